"""The estimators that there are: gradsift's own, in the order in which they are listed, and those of other packages."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from gradsift.base.plugins import methods_of, one_of
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf, ProjectedInverse
from gradsift.influence.deita import DEITA
from gradsift.influence.dsir import DSIR
from gradsift.influence.ekfac import EKFAC
from gradsift.influence.estimator import Estimator
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS
from gradsift.influence.magic import MAGIC
from gradsift.influence.nice import NICE, NICEIF
from gradsift.influence.nice_ekfac import NICEEKFAC
from gradsift.influence.nice_magic import NICEMAGIC
from gradsift.influence.random import Random
from gradsift.influence.rds import RDS
from gradsift.influence.rerank import Rerank
from gradsift.influence.states import RDSPlus, RepSim
from gradsift.influence.trak import TRAK

OWN: tuple[type[Estimator], ...] = (
    LESS, DataInf, ProjectedInverse, TRAK, EKFAC, JI2S, MAGIC, NICE, NICEIF, NICEEKFAC, NICEMAGIC, Rerank, BM25, RDS,
    RDSPlus, RepSim, DSIR, AlpaGasus, DEITA, Random,
)  # fmt: skip
GROUP = "gradsift.estimators"
"""The entry point group by which other packages add theirs."""


@cache
def estimators() -> dict[str, type[Estimator]]:
    """Every estimator by its kind; see `methods_of`."""
    return methods_of(Estimator, OWN, GROUP)  # type: ignore[type-abstract]


if TYPE_CHECKING:
    AnyEstimator = Estimator
    AnyRanker = Estimator
else:
    _pairs = tuple(one for one in estimators().values() if one.pairs and one.takes != "reward")
    AnyEstimator: Any = one_of(estimators().values())
    """Any of them, as a field of a recipe."""
    AnyRanker: Any = one_of(_pairs)
    """Those that explanations can be made by: each target has a score of its own, and no reward is needed."""
    _first = (m for m in estimators().values() if m.needs_target and m.takes != "reward" and m is not Rerank)
    _then = (one for one in _pairs if one.view is not None)
    Rerank.model_rebuild(_types_namespace={"AnyFirst": one_of(_first), "AnyThen": one_of(_then)})
