"""Validate explanations by training on them: does a step on the selection support the output it explains?

Compact, section 3.3. For an output ŷ of prompt x, a selection S and random sets R of the same size::

    ξ⁺    = log p(ŷ|x; θ+S) − mean_R log p(ŷ|x; θ+R)        prediction support, nats; above 0 = S supports the output
    ξ^JSD = JSD(p, p+S) / mean_R JSD(p, p+R)                prediction shift; above 1 = S moves the output more

Of an output that is explained in contrast to another answer, log p is the difference of both, and JSD the mean over the
tokens of both. The random sets are drawn from the whole pool, as in the paper: the selection is not taken out of it,
which lets all cells of one output and size share their five random steps. Every effect of a step is kept in the run
folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, Literal

import numpy as np

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.errors import ConfigError, CorruptError, DataError
from gradsift.base.lazy import Tensor
from gradsift.base.types import Skipped, TokenizedExample
from gradsift.context import Pool
from gradsift.data.pairs import Pairs
from gradsift.explanation.explain import Explanations
from gradsift.explanation.outputs import OutputSource, contrasted
from gradsift.explanation.verdict import Trained
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection
from gradsift.model.models import QUANTISED, DtypeName, host, model_identity
from gradsift.report.text import signed
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.top_k import Naive
from gradsift.store.gradient_store import GradientStore, StoreManifest
from gradsift.store.manifest import Record, fingerprint, read_json
from gradsift.store.run import revised
from gradsift.validation.one_step import (
    Effect,
    OneStep,
    StepModel,
    StoredSteps,
    difference,
    effect_of,
    seed_of,
)
from gradsift.validation.statistics import (
    Agreement,
    Correlation,
    Proportion,
    Reranking,
    agreement,
    change_of_correlation,
    share_over,
)
from gradsift.warmup.checkpoint import Checkpoint

Route = Literal["auto", "stored", "trained"]
Answers = (
    TokenizedExample | tuple[TokenizedExample, ...]
)  # an output, or with the answer in contrast to which it stands
_PRECISION = ("float64", "float32", "float16", "bfloat16")  # stored rows, best first


@dataclass(frozen=True, slots=True)
class CellKey:
    """How a selection was made."""

    estimator: str
    strategy: str
    k: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One selection for one output.

    output: the output's id
    selected: pool ids
    relevance: ξ, the selection relevance as a linear ratio (1 = 0 dB)
    """

    output: str
    key: CellKey
    selected: tuple[str, ...]
    relevance: float

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.output}, {self.key.estimator}, {self.key.strategy}, k={self.key.k}"


@dataclass(frozen=True, slots=True)
class Validated:
    """What training on one selection does to its output, against random sets.

    support: ξ⁺, the mean of `supports`, nats
    supports: against each random set
    shift: ξ^JSD; None where no random set moves the output at all
    jsd: JSD(p, p+S), nats per token
    random_jsd: the same of each random set
    gain: log p(ŷ|x; θ+S) − log p(ŷ|x; θ), nats
    """

    cell: Cell
    support: float
    supports: tuple[float, ...]
    shift: float | None
    jsd: float
    random_jsd: tuple[float, ...]
    gain: float


@dataclass(frozen=True)
class Sanity:
    """Is the step large enough to be seen? Training on the output itself against training on a random example.

    support: pairs (output, random example) in which the output itself raises its likelihood more
    shift: pairs in which it moves the distribution more
    """

    outputs: int
    support: Proportion
    shift: Proportion
    failed: tuple[Skipped, ...]


@dataclass(frozen=True)
class Validation:
    """All cells, those that could not be validated, and how relevance agrees with what training does.

    agreement: over all different selections, those that hold the same examples for the same output counting once; None
        where none could be validated
    by_estimator: the same for each estimator's cells
    route: how the steps were taken, `stored` or `trained`
    reranking: whether facility location changes how relevance goes with support, by estimator and λ
    sanity: whether the step is large enough to be seen; None where that was not asked for
    """

    cells: tuple[Validated, ...]
    failed: tuple[Skipped, ...]
    agreement: Agreement | None
    by_estimator: dict[str, Agreement]
    route: str
    settings: OneStep
    reranking: tuple[Reranking, ...] = ()
    sanity: Sanity | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"settings": self.settings.model_dump(mode="json")}

    def effects(self) -> dict[tuple[str, str, str, int], Trained]:
        """What each cell's verdict says of it, by output, estimator, strategy and k."""
        return {
            (one.cell.output, *astuple(one.cell.key)): Trained(one.support, one.supports, one.shift)
            for one in self.cells
        }

    def facts(self) -> dict[str, str]:
        """How relevance agrees with what training does, in words, for a page or a terminal."""
        found = self.agreement
        if found is None:
            return {}
        same = len(self.cells) - found.cells
        counts = ((found.cells, "different selection"), (found.outputs, "output"))
        cells = " for ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts)
        cells += f", steps {self.route}"
        cells += f"; {same:,} more that are the same" * (same > 0) + f"; {len(self.failed)} failed" * bool(self.failed)
        both = {
            "ρ(relevance, support)": (found.support, found.support_above),
            "ρ(relevance, shift)": (found.shift, found.shift_above),
        }
        facts = {
            "trained on": cells,
            **{name: _both(*pair) for name, pair in both.items() if pair[0].rho is not None},
            "support > 0": f"{share_text(found.supported)} of all, {share_text(found.precision)} of those above 0 dB",
            "0 dB rule is right": share_text(found.accuracy),
        }
        if (sanity := self.sanity) is not None:
            facts["the output itself beats a random row"] = (
                f"in support {share_text(sanity.support)}, in shift {share_text(sanity.shift)} of "
                f"{sanity.support.count:,} pairs"
            )
        return facts

    def lines(self) -> list[str]:
        """`facts` as lines."""
        return [f"{name}: {value}" for name, value in self.facts().items()]


def validate(
    pool: Pool,
    outputs: Iterable[Answers],
    cells: Iterable[Cell],
    *,
    settings: OneStep | None = None,
    route: Route = "auto",
    checkpoint: Checkpoint | None = None,
) -> Validation:
    """Support and shift of selections, and how well their relevance predicted both.

    The step moves the modules that the pool's gradients are of: the adapter's, or those that a pattern names. What was
    done before is found in the run folder; a cell that fails is listed and stops nothing.

    Args:
        pool: from `open_pool`.
        outputs: the outputs that the cells name, tokens with their supervised part; (output, other answer) in contrast.
        cells: selections.
        settings: the step.
        route: `stored` forms the steps from unprojected gradients (collected now if the run lacks them), `trained`
            takes them for real; `auto` is `stored` where the run holds such gradients or the pool is set to collect
            them, else `trained`.
        checkpoint: where the step starts; by default the pool's last, `Checkpoint(None)` is the base model.

    Raises:
        ConfigError: dropout with `stored`, or fewer pool examples than are asked for.
        DataError: two different outputs of one id, or no cell can be validated.
    """
    settings = settings or OneStep()
    by_id = _by_id(outputs)
    wanted = list(cells)
    bench = _Bench(pool, settings, route, checkpoint or pool.checkpoints()[-1])
    results: dict[int, Validated] = {}
    failed: list[Skipped] = []
    outputs_first = {cell.output: number for number, cell in reversed(list(enumerate(wanted)))}
    order = sorted(range(len(wanted)), key=lambda number: (outputs_first[wanted[number].output], number))
    with pool.reporter.stage("training on selections", len(wanted), "cells") as advance:
        for number in order:
            cell = wanted[number]
            found = attempted("validate", partial(bench.validated, cell, by_id))
            if isinstance(found, Stopped):
                failed.append(Skipped(cell.output, "not_validated", f"{cell.label}: {found.error}"))
            else:
                results[number] = found
            bench.save()
            advance(1)
    if not results:
        raise DataError(f"no cell can be validated; first: {failed[0].detail if failed else 'none was given'}")
    done = tuple(results[number] for number in sorted(results))
    estimators = dict.fromkeys(entry.cell.key.estimator for entry in done)
    by_estimator = {
        name: _agreement([entry for entry in done if entry.cell.key.estimator == name]) for name in estimators
    }
    validation = Validation(done, tuple(failed), _agreement(done), by_estimator, bench.route, settings)
    pool.run.publish_json("validation.json", validation.as_dict())
    return validation


def validate_explanations(
    pool: Pool,
    explanations: Explanations,
    *,
    settings: OneStep | None = None,
    route: Route = "auto",
    sanity: bool = False,
) -> Validation:
    """`validate` every selection of some explanations of this pool; of a random strategy the first draw.

    `sanity` adds `sanity_check` of the outputs.

    Raises:
        As `validate`.

    Example::

        found = validate_explanations(pool, explain(pool, "What is 17 + 25?", k=5))
        found.cells[0].support      # above 0: training on the selection makes the answer more likely
    """
    cells = cells_of(explanations)
    outputs = answers_of(explanations)
    found = validate(pool, outputs, cells, settings=settings, route=route)
    checked = sanity_check(pool, outputs, settings=settings, route=route) if sanity else None
    found = replace(found, reranking=tuple(_reranking(found.cells, explanations)), sanity=checked)
    pool.run.publish_json("validation.json", found.as_dict())
    return found


def is_validated(explanations: Explanations, settings: OneStep, route: Route, *, sanity: bool) -> bool:
    """Whether the run folder has every step that `validate_explanations` would take."""
    pool, cells = explanations.pool, cells_of(explanations)
    bench = _Bench(pool, settings, "trained" if route == "trained" else "auto", pool.checkpoints()[-1])
    if route == "stored" and bench.route == "trained":
        return False
    for output in answers_of(explanations):
        bench.turn_to(output)
        own = [cell for cell in cells if cell.output == output[0].id]
        budgets = {cell.key.k for cell in own} | ({1} if sanity else set())
        random = (ids for k in budgets for ids in bench.random_sets(k))
        if not bench.has([*random, *(cell.selected for cell in own)], itself=sanity):
            return False
    return True


def _reranking(cells: Sequence[Validated], explanations: Explanations) -> Iterator[Reranking]:
    """Whether facility location changes ρ(ξ, ξ⁺) of the naive choices from the same rankings."""
    located = [own for own in explanations.strategies if isinstance(own, FacilityLocation)]
    for estimator, trade_off in product(explanations.estimators, sorted({own.trade_off for own in located})):
        again = {own.strategy: own.ranking for own in located if own.trade_off == trade_off}
        naive = {
            own.strategy for own in explanations.strategies if isinstance(own, Naive) and own.ranking in again.values()
        }
        compared = [
            one
            for part in (naive, again)
            for one in distinct(
                one for one in cells if one.cell.key.estimator == estimator.label and one.cell.key.strategy in part
            )
        ]
        if not naive or not compared:
            continue
        before, after, change, outputs = change_of_correlation(
            [one.cell.relevance for one in compared],
            [one.support for one in compared],
            [one.cell.output for one in compared],
            [one.cell.key.strategy in again for one in compared],
        )
        if before is not None and after is not None and math.isfinite(change.low):  # there are several outputs
            yield Reranking(estimator.label, trade_off, before, after, change, outputs)


def distinct(cells: Iterable[Validated]) -> list[Validated]:
    """Cells that hold other examples, or are for other outputs, than those before them: copies say nothing new."""
    first: dict[tuple[str, frozenset[str]], Validated] = {}
    for one in cells:
        first.setdefault((one.cell.output, frozenset(one.cell.selected)), one)
    return list(first.values())


def cells_of(explanations: Explanations) -> list[Cell]:
    """One cell for each output, estimator, strategy and budget."""
    return [
        Cell(
            entry.id,
            CellKey(found.estimator, found.strategy, found.k),
            tuple(example.id for example in found.examples),
            found.draws[0].ratio,
        )
        for entry in explanations.entries
        for found in entry.results
        if found.examples
    ]


def answers_of(explanations: Explanations) -> list[tuple[TokenizedExample, ...]]:
    """The explained outputs, each with the other answer in contrast to which it is explained, if there is one."""
    source = explanations.source
    places = {entry.id: number for number, entry in enumerate(source.entries)}
    return [tuple(source.both(places[entry.id])) for entry in explanations.entries]


def sanity_check(
    pool: Pool,
    outputs: Iterable[Answers],
    *,
    settings: OneStep | None = None,
    route: Route = "auto",
) -> Sanity:
    """How often training on the output itself does more to it than training on a random example (Compact, section 4.3).

    The paper finds 98.49 % in support and 96.28 % in shift; much less says that the step is lost in rounding. Each
    output is compared with `settings.random_sets` examples of the pool, one at a time.
    """
    settings = settings or OneStep()
    bench = _Bench(pool, settings, route, pool.checkpoints()[-1])
    pairs: list[tuple[str, Effect, Effect]] = []
    failed: list[Skipped] = []
    entries = list(_by_id(outputs).values())
    with pool.reporter.stage("training on outputs themselves", len(entries), "outputs") as advance:
        for output in entries:
            found = attempted("validate", partial(bench.beside_itself, output))
            if isinstance(found, Stopped):
                failed.append(Skipped(output[0].id, "not_validated", found.error))
            else:
                pairs += found
            bench.save()
            advance(1)
    if not pairs:
        raise DataError(f"no output can be checked; first: {failed[0].detail if failed else 'none was given'}")
    of = [output for output, *_ in pairs]
    return Sanity(
        outputs=len(entries) - len(failed),
        support=share_over([own.log_likelihood > other.log_likelihood for _, own, other in pairs], of),
        shift=share_over([own.jsd > other.jsd for _, own, other in pairs], of),
        failed=tuple(failed),
    )


def random_sets(ids: Sequence[str], k: int, *, output: str, count: int = 5, seed: int = 0) -> list[tuple[str, ...]]:
    """`count` sets of k different ids, drawn uniformly by (seed, output, k), whatever the order of the ids."""
    if not 1 <= k <= len(ids):
        raise ConfigError(f"k is {k}: choose between 1 and the {len(ids)} examples of the pool")
    ordered = sorted(ids)
    sets = []
    for number in range(count):
        generator = np.random.default_rng(seed_of(f"{seed}|{output}|{k}|{number}"))
        sets.append(tuple(ordered[position] for position in sorted(generator.choice(len(ordered), k, replace=False))))
    return sets


def measured(cell: Cell, before: float, effect: Effect, controls: Sequence[Effect]) -> Validated:
    """ξ⁺ and ξ^JSD of a cell from the effects of its own step and of its random sets'; `before` is log p(ŷ|x; θ)."""
    supports = tuple(effect.log_likelihood - control.log_likelihood for control in controls)
    mean_jsd = sum(control.jsd for control in controls) / len(controls)
    return Validated(
        cell=cell,
        support=sum(supports) / len(supports),
        supports=supports,
        shift=effect.jsd / mean_jsd if mean_jsd > 0 else None,
        jsd=effect.jsd,
        random_jsd=tuple(control.jsd for control in controls),
        gain=effect.log_likelihood - before,
    )


class _Kept(Record):
    log_likelihood: float | None
    effects: dict[str, tuple[float, float]]


class _Bench:
    """Effects of steps on one output after the other: found in the run folder, or measured and kept there."""

    def __init__(self, pool: Pool, settings: OneStep, route: Route, checkpoint: Checkpoint) -> None:
        if settings.dropout and route == "stored":
            raise ConfigError("stored gradients are without dropout: use the trained route, or set dropout to false")
        self.pool, self.settings, self.checkpoint = pool, settings, checkpoint
        self.store = None if settings.dropout else _stored_rows(pool, self.checkpoint, route)
        self.route = "trained" if self.store is None else "stored"
        self.dtype: DtypeName = pool.dtype
        if settings.float32 and pool.dtype in QUANTISED:
            raise ConfigError(
                f"one step is validated in float32, and the base is {pool.dtype}: another function. Collect with dtype "
                "bfloat16 or float32, or set float32 to false and see only steps that its rounding does not hide"
            )
        if settings.float32 and pool.dtype not in ("float32", "float64"):
            self.dtype = "float32"
        excluded = {} if self.store is None else self.store.excluded
        self.ids = sorted(id_ for id_ in pool.data.ids if id_ not in excluded)
        config = {
            "model": model_identity(pool.model),
            "model_dtype": self.dtype,
            "adapter": self.checkpoint.identity(),
            "modules": pool.gradients.modules,
            "pool": pool.data.fingerprint,
            "gradients": None if self.store is None else self.store.fingerprint,
            "step": settings.model_dump(mode="json", exclude={"random_sets"}),
        }
        config = revised("validation", config)
        self.prefix = pool.run.prefix("validation", config)
        self._config = config
        self._answers: tuple[TokenizedExample, ...] = ()

    @cached_property
    def model(self) -> StepModel:
        """Loaded when the first effect is not in the run folder."""
        network = host(self.pool.model, self.dtype, self.pool.device).with_adapter(self.checkpoint.adapter)
        modules = find_modules(network, self.pool.gradients.modules)
        for name in modules.unreachable:
            self.pool.reporter.warn(f"no step is taken on {name}")
        return StepModel(network, modules.captured, self.settings, token_budget=self.pool.gradients.token_budget)

    @cached_property
    def steps(self) -> Callable[[Sequence[str]], AbstractContextManager[None]]:
        """The model after the step on a selection: formed from stored gradients, or taken for real."""
        data = self.pool.data
        if self.store is not None:
            return StoredSteps(self.model, self.store, data.loss).on
        own = replace(self.pool, dtype=self.dtype).referred(data)
        if isinstance(own, Pairs):
            return lambda ids: self.model.trained_on(own.subset(own.positions(ids)))
        return lambda ids: self.model.trained_on([own.by_id(id_) for id_ in ids])

    def turn_to(self, output: Answers) -> None:
        answers = together(output)
        if [*map(id, answers)] == [*map(id, self._answers)]:
            return
        self._answers, self._changed = answers, False
        self._before: list[Tensor] = []
        beside = contrasted([answers[1] if len(answers) > 1 else None])
        name = OutputSource(answers[:1], self.pool.chat.fingerprint, **beside).fingerprint
        self._file = f"{self.prefix}{name}.json"
        self._effects: dict[str, Effect] = {}
        self._likelihood: float | None = None
        if self.pool.run.storage.exists(self._file):
            try:
                content = read_json(self.pool.run.storage, self._file, _Kept)
            except CorruptError as error:
                self.pool.reporter.warn(f"{error}; its steps are taken again")
                return
            self._likelihood = content["log_likelihood"]
            self._effects = {name: Effect(*values) for name, values in content["effects"].items()}

    def save(self) -> None:
        if not self._answers or not self._changed:
            return
        if not self.pool.run.storage.exists(f"{self.prefix}config.json"):
            self.pool.run.publish_json(f"{self.prefix}config.json", self._config)
        content = {
            "output": self._answers[0].id,
            "log_likelihood": self._likelihood,
            "effects": {name: [effect.log_likelihood, effect.jsd] for name, effect in self._effects.items()},
        }
        self.pool.run.publish_json(self._file, content, sealed=True)
        self._changed = False

    def validated(self, cell: Cell, outputs: Mapping[str, tuple[TokenizedExample, ...]]) -> Validated:
        if cell.output not in outputs:
            raise DataError(f"there is no output {cell.output!r}")
        self.turn_to(outputs[cell.output])
        if len(set(cell.selected)) != cell.key.k or len(cell.selected) != cell.key.k:
            raise DataError(f"the selection holds {len(set(cell.selected))} different ids, but k is {cell.key.k}")
        if not cell.relevance > 0:
            raise DataError(f"the relevance is {cell.relevance}: give the linear ratio, above 0")
        self.pool.data.positions(cell.selected)  # refuses ids of another pool
        controls = [self.effect(ids) for ids in self.random_sets(cell.key.k)]
        effect = self.effect(cell.selected)
        assert self._likelihood is not None
        return measured(cell, self._likelihood, effect, controls)

    def has(self, sets: Iterable[Sequence[str]], *, itself: bool) -> bool:
        """Whether the run folder has the effects on the current output of steps on these examples, and on itself."""
        return {fingerprint(sorted(ids)) for ids in sets} | ({"itself"} if itself else set()) <= set(self._effects)

    def random_sets(self, k: int) -> list[tuple[str, ...]]:
        """The control of every selection of k for the current output."""
        options = self.settings
        return random_sets(self.ids, k, output=self._answers[0].id, count=options.random_sets, seed=options.seed)

    def effect(self, ids: Sequence[str]) -> Effect:
        ordered = sorted(ids)
        return self._effect(fingerprint(ordered), lambda: self.steps(ordered))

    def beside_itself(self, output: tuple[TokenizedExample, ...]) -> list[tuple[str, Effect, Effect]]:
        """The output's id, with the effects of a step on itself (away from the other answer, where there is one), which
        is taken for real, and of one on each of some random examples.
        """
        self.turn_to(output)
        itself = self._effect("itself", lambda: self.model.trained_on(self._answers[:1], self._answers[1:]))
        return [(output[0].id, itself, self.effect(ids)) for ids in self.random_sets(1)]

    def _effect(self, name: str, step: Callable[[], AbstractContextManager[None]]) -> Effect:
        if name not in self._effects:
            if not self._before:
                self._before = [self.model.logits(one) for one in self._answers]
                self._likelihood = difference(self._before, self._answers)
            self._effects[name] = effect_of(step(), self.model, self._answers, self._before)
            self._changed = True
        return self._effects[name]


def _stored_rows(pool: Pool, checkpoint: Checkpoint, route: Route) -> GradientStore | None:
    """The pool's unprojected plain gradients at a checkpoint: asked for, or there already in the best precision."""
    if route == "trained":
        return None
    if pool.gradients.projection.kind == "none":
        return pool.stores(checkpoint, ["plain"])["plain"]
    settings = pool.gradients.model_copy(update={"projection": Projection(kind="none")})
    wanted = replace(pool, gradients=settings).at(checkpoint).config(pool.data, "plain")
    same = ("view", "model", "model_dtype", "adapter", "data", "template", "loss", "modules", "autocast", "revision")
    found: list[tuple[int, str]] = []
    for prefix in pool.run.artifacts("gradients"):
        content = pool.run.manifest(prefix, StoreManifest)
        config = {} if content is None else content["config"]
        projection = config.get("projection")
        unprojected = isinstance(projection, dict) and projection.get("kind") == "none"
        if unprojected and all(config.get(key) == wanted.get(key) for key in same):
            found.append((_PRECISION.index(config["dtype"]), prefix))
    if found:
        return GradientStore(pool.run.storage, min(found)[1])
    if route == "auto":
        return None
    return replace(pool, gradients=settings).stores(checkpoint, ["plain"])["plain"]


def _agreement(cells: Sequence[Validated]) -> Agreement:
    cells = distinct(cells)
    columns = zip(*((one.cell.relevance, one.support, one.shift, one.cell.output) for one in cells), strict=True)
    return agreement(*columns)


def together(output: Answers) -> tuple[TokenizedExample, ...]:
    """An output, and the other answer where there is one."""
    return output if isinstance(output, tuple) else (output,)


def _by_id(outputs: Iterable[Answers]) -> dict[str, tuple[TokenizedExample, ...]]:
    by_id: dict[str, tuple[TokenizedExample, ...]] = {}
    for output in map(together, outputs):
        known = by_id.setdefault(output[0].id, output)
        same = len(known) == len(output) and all(
            np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.supervised, other.supervised)
            for one, other in zip(known, output, strict=True)
        )
        if not same:
            raise DataError(f"two different outputs have the id {output[0].id!r}: give each its own")
    return by_id


def rho_text(found: Correlation) -> str:
    """A correlation with its interval.

    >>> rho_text(Correlation(0.5, 9, 0.25, 0.75))
    '+0.50 (+0.25 to +0.75)'
    """
    if found.rho is None:
        return "none"
    ends = "" if found.low is None or found.high is None else f" ({signed(found.low)} to {signed(found.high)})"
    return f"{signed(found.rho)}{ends}"


def share_text(found: Proportion) -> str:
    """A share with its interval over outputs."""
    if found.share is None or found.low is None or found.high is None:
        return "none"
    return f"{found.share:.0%} ({found.low:.0%} to {found.high:.0%})"


def _both(overall: Correlation, above: Correlation) -> str:
    return f"{rho_text(overall)} over all, {rho_text(above)} above 0 dB ({above.count})"
