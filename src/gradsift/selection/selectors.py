"""The selectors that there are: gradsift's own, in the order in which they are listed, and those of other packages."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from gradsift.base.plugins import methods_of, one_of
from gradsift.selection.aide import Aide
from gradsift.selection.diverse import Diverse
from gradsift.selection.divine import Divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.gumbel import GumbelTopK
from gradsift.selection.joint_greedy import JointGreedy
from gradsift.selection.metagradient import MetagradientDescent
from gradsift.selection.pursuit import RelevancePursuit
from gradsift.selection.random import RandomChoice
from gradsift.selection.selector import Selector
from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, MostInfluential, TopK
from gradsift.selection.transport import TSDS

OWN: tuple[type[Selector], ...] = (
    TopK, MostHelpful, MostHarmful, MostInfluential, LeastInfluential, FacilityLocation, Divine, Aide, RelevancePursuit,
    TSDS, JointGreedy, MetagradientDescent, Diverse, GumbelTopK, RandomChoice,
)  # fmt: skip
GROUP = "gradsift.selectors"
"""The entry point group by which other packages add theirs."""


@cache
def selectors() -> dict[str, type[Selector]]:
    """Every selector by its kind; see `methods_of`."""
    return methods_of(Selector, OWN, GROUP)  # type: ignore[type-abstract]


if TYPE_CHECKING:
    AnySelector = Selector
else:
    AnySelector: Any = one_of(selectors().values())
    """Any of them, as a field of a recipe."""
