"""The estimators that there are: gradsift's own, in the order in which they are listed, and those of other packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf, ProjectedInverse
from gradsift.influence.deita import DEITA
from gradsift.influence.dsir import DSIR
from gradsift.influence.estimator import Estimator
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS
from gradsift.influence.nice import NICE, NICEIF
from gradsift.influence.random import Random
from gradsift.influence.rds import RDS
from gradsift.influence.trak import TRAK

OWN: tuple[type[Estimator], ...] = (
    LESS, DataInf, ProjectedInverse, TRAK, JI2S, NICE, NICEIF, BM25, RDS, DSIR, AlpaGasus, DEITA, Random,
)  # fmt: skip
GROUP = "gradsift.estimators"
"""The entry point group by which other packages add theirs."""


@cache
def estimators() -> dict[str, type[Estimator]]:
    """Every estimator by its kind.

    Raises:
        ConfigError: one of another package cannot be loaded, is no `Estimator`, or has a kind that is taken.
    """
    found = {kind_of(one): one for one in OWN}
    for entry in entry_points(group=GROUP):
        of = f"the estimator {entry.name!r} of {entry.dist.name if entry.dist else entry.value}"
        try:
            one = entry.load()
            kind = kind_of(one)
        except Exception as error:
            raise ConfigError(f"{of} cannot be used ({type(error).__name__}: {error}): mend or uninstall it") from error
        if kind in found:
            raise ConfigError(f"{of} has the kind {kind!r}, which {found[kind].__module__} has: rename or uninstall it")
        found[kind] = one
    return found


def kind_of(one: type[Estimator]) -> str:
    """The value of an estimator's field `kind`.

    Raises:
        TypeError: it is no subclass of `Estimator`.
        ValueError: it has no field `kind` with one value.
    """
    if not (isinstance(one, type) and issubclass(one, Estimator)):
        raise TypeError(f"{one!r} is no subclass of gradsift.Estimator")
    kind = one.model_fields["kind"].default
    if not isinstance(kind, str):
        raise ValueError(f'{one.__name__} has no kind: give it a field like kind: Literal["mine"] = "mine"')
    return kind


if TYPE_CHECKING:
    AnyEstimator = Estimator
    AnyRanker = Estimator
else:
    _pairs = tuple(one for one in estimators().values() if one.pairs and one.takes != "reward")
    AnyEstimator: Any = Annotated[Union[tuple(estimators().values())], Field(discriminator="kind")]  # noqa: UP007
    """Any of them, as a field of a recipe."""
    AnyRanker: Any = Annotated[Union[_pairs], Field(discriminator="kind")]  # noqa: UP007
    """Those that explanations can be made by: each target has a score of its own, and no reward is needed."""
