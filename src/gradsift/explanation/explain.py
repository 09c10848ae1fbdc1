"""Explain an output: the few training examples whose gradients account for the gradient of what the model said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.errors import ConfigError, CorruptError, DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import descending_ranks
from gradsift.base.strings import Strings
from gradsift.base.types import Skipped, TokenizedExample
from gradsift.context import Pool, Target
from gradsift.data.pairs import Pairs
from gradsift.explanation import lines
from gradsift.explanation.coefficients import CoefficientModel
from gradsift.explanation.exact import ExactRows, RowsLackingError, exact_rows, missed
from gradsift.explanation.matches import token_matches
from gradsift.explanation.outputs import Output, OutputSource, Question, answers, contrasted, question_of
from gradsift.explanation.relevance import (
    Aggregation,
    Relevance,
    relevance_of_choices,
    relevance_of_draws,
    selection_relevance,
)
from gradsift.explanation.result import ChosenExample, Draw, Explanation, StrategyResult
from gradsift.explanation.verdict import WORTH, Missed, Reference, Trained
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, influence_of, rate_weights, target_view
from gradsift.influence.less import LESS
from gradsift.model.models import model_identity
from gradsift.report.blocks import Block, Shown
from gradsift.selection.aide import Aide
from gradsift.selection.candidates import CANDIDATES, ORDERS, Candidates
from gradsift.selection.divine import Divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.pursuit import Reconstruction, RelevancePursuit, sought
from gradsift.selection.random import RandomChoice
from gradsift.selection.selector import Choices, Selector, choose_all
from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, MostInfluential
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint, read_json
from gradsift.store.run import revisions

Ranking = tuple[Sequence[str], NDArray[np.float32]]
"""Pool ids, and their influence on outputs `[pool output]` or on one `[pool]`; higher = training on it helps."""

DEFAULT_ESTIMATOR: Estimator = LESS(optimizer="sgd", checkpoints="last")
"""The cosine of plain gradients at the last checkpoint (Compact, App. A)."""

DEFAULT_STRATEGIES: tuple[Selector, ...] = (RelevancePursuit(), MostHelpful())
"""What relevance itself would choose of what supports an output, and the naive ranking to compare it with."""

OPPOSING = 25
"""How many of the lowest scores compete for what is against an output, at most as many as the candidates."""

_AGAINST: dict[str, Selector] = {
    "most harmful": MostHelpful(),
    "pursuit of the opposite": RelevancePursuit(),
}  # of opposed candidates

RANDOM = RandomChoice()
"""What every choice is compared with, unless the strategies hold a random one of their own."""

MATCHES = 10  # outputs of which tokens are matched, unless told otherwise

ALL_STRATEGIES: tuple[Selector, ...] = (
    MostHelpful(),
    MostHarmful(),
    MostInfluential(),
    LeastInfluential(),
    *(FacilityLocation(order=order, trade_off=λ) for order in ORDERS for λ in (0.25, 0.5, 0.75, 1.0)),
    *(Divine(order=order) for order in ORDERS),
    Aide(),
    RandomChoice(),
    RelevancePursuit(),
)
"""The strategies of Compact's Table 1, and relevance pursuit."""


_BEST = RelevancePursuit()  # what the best choice is sought by


@dataclass(frozen=True)
class _Random:
    """The random choices of one output: ids in the order they were drawn, and their relevance, by budget and draw.

    squared_norm: of the output's gradient, which relevance is about
    """

    ids: dict[int, list[list[str]]]
    relevances: dict[int, list[Relevance]]
    squared_norm: float

    def among(self, candidates: Candidates) -> tuple[Choices, dict[int, list[Relevance]]]:
        """The same as positions of an estimator's pool."""
        known = Strings.of(candidates.ids)
        return {k: [known.positions(own).tolist() for own in draws] for k, draws in self.ids.items()}, self.relevances


@dataclass(frozen=True, kw_only=True)
class Explanations(Shown):
    """Explanations of a list of prompts, and the prompts that could not be explained, by plain rows (`store`,
    `gradients`) at the last checkpoint, for the numbers of examples `budgets`.
    """

    pool: Pool = field(repr=False, compare=False)
    source: OutputSource = field(repr=False, compare=False)
    store: GradientStore = field(repr=False, compare=False)
    gradients: GradientStore = field(repr=False, compare=False)
    estimators: tuple[Estimator, ...] = field(repr=False)
    strategies: tuple[Selector, ...] = field(repr=False)
    budgets: tuple[int, ...]
    coefficients: CoefficientModel
    candidates: int
    aggregation: Aggregation
    exact: bool
    entries: tuple[Explanation, ...] = ()
    failed: tuple[Skipped, ...] = ()
    _exact: dict[str, ExactRows] = field(default_factory=dict, repr=False, compare=False)
    _rankings: dict[str, Ranking] = field(default_factory=dict, repr=False, compare=False)

    def scores_of(self, output_id: str, estimator: Estimator) -> Ranking:
        """Pool ids and their influence on one output `[pool]`."""
        ids, matrix = self._ranking(estimator)
        return ids, matrix[:, self.source.ids.index(output_id)]

    def gradient_of(self, output_id: str) -> Tensor:
        """The output's projected plain gradient `[dim]`."""
        position = self.gradients.positions([output_id])[0]
        return self.gradients.rows(position, position + 1)[0]

    def rows_of(self, output_id: str, ids: Sequence[str]) -> Tensor:
        """Gradients of pool rows `[row dim]`, in coordinates that keep their products and those with the output's."""
        if not self.exact:
            return self.store.rows_by_id(ids)
        if output_id not in self._exact or not set(ids) <= set(self._exact[output_id].ids):
            self._measure({output_id: self._compared(output_id, ids)})
        return self._exact[output_id].rows(list(ids))

    def candidates_of(self, output_id: str, estimator: Estimator, chosen: Iterable[str] = ()) -> Candidates:
        """What strategies choose from for one output: the scored examples that have a gradient.

        With whole gradients, those of the candidates and of what else is compared (`_compared`), whose rows are given
        by coordinates with the same inner products, and whose scores are exact where the estimator can tell. `chosen`
        are further ids that will be read.
        """
        if not self.exact:
            return self._stored(output_id, estimator)
        if output_id not in self._exact:
            self._measure({output_id: self._compared(output_id, chosen)})
        rows, (ids, values) = self._exact[output_id], self.scores_of(output_id, estimator)
        known = Strings.of(ids)
        places = known.positions(rows.ids)
        scores = np.where(self.store.holds(ids), values, np.float32(-np.inf))
        exact = estimator.exactly(rows, self._checkpoints)
        if exact is not None:
            scores[places[places >= 0]] = exact[places >= 0]
        found = Candidates(
            torch.from_numpy(scores), lambda wanted: rows.rows([ids[place] for place in wanted]), rows.target,
            count=self.candidates, ids=ids, test_id=output_id, pool=self.pool, among=places[places >= 0],
        )  # fmt: skip
        found.sought = np.intersect1d(known.positions(self._sought.get(output_id, [])), places[places >= 0])
        return found

    def _stored(self, output_id: str, estimator: Estimator) -> Candidates:
        """The same by stored gradients; what was sought are those that the first of the ranking do not hold."""
        ids, scores = self.scores_of(output_id, estimator)
        more: dict[str, Any] = {"count": self.candidates, "test_id": output_id, "pool": self.pool}
        found = Candidates.stored(self.store, ids, scores, self.gradient_of(output_id), **more)
        spare = self.candidates - self.budgets[-1]
        # Half of them, but the ranking has twice as many as it gives, whose order whole gradients may change.
        room = min(self.candidates // 2, spare, max(self.candidates // 4, spare - self.budgets[-1]))
        places = Strings.of(ids).positions(self._sought.get(output_id, []))
        first = found.first("most_helpful", self.candidates - room)
        found.sought = places[np.isin(places, found.available) & ~np.isin(places, first)][:room]
        return found

    @cached_property
    def _sought(self) -> dict[str, list[str]]:
        """Of each output what pursuit in the whole pool would choose, and what comes next; none where all compete."""
        if self.candidates >= len(self.store):
            return {}
        targets = {id_: self.gradient_of(id_) for id_ in self.source.ids if id_ in self.gradients}
        targets = {id_: gradient for id_, gradient in targets.items() if gradient.any()}
        how: dict[str, Any] = {"budgets": self.budgets, "count": self.candidates}
        found = sought(self.store, [*targets.values()], **how, engine=self.pool.engine, device=self.pool.device)
        return {id_: [self.store.ids[at] for at in own] for id_, own in zip(targets, found, strict=True)}

    @cached_property
    def _checkpoints(self) -> int:
        return len(self.pool.checkpoints())

    @property
    def _opposing(self) -> int:
        return min(OPPOSING, self.candidates)

    def _compared(self, output_id: str, more: Iterable[str] = ()) -> list[str]:
        """Ids of all rows whose gradients are compared with an output's: of each ranking the first, and random ones."""
        wanted = dict.fromkeys(more)
        stored = {estimator.label: self._stored(output_id, estimator) for estimator in self.estimators}
        for candidates in stored.values():
            candidates.least = self.budgets[-1]
            wanted |= dict.fromkeys(
                candidates.ids[place]
                for place in candidates.competing("most_harmful", self.budgets[-1], self._opposing)
            )
            wanted |= dict.fromkeys(candidates.ids[place] for place in candidates.sought.tolist())
            for strategy in (_BEST, *self.strategies):
                if strategy.ranking is not None:
                    alone = strategy.last or strategy.takes == "scores"  # leaves room for what was sought
                    own = self.candidates - len(candidates.sought) if alone else getattr(strategy, "candidates", None)
                    first = candidates.competing(strategy.ranking, self.budgets[-1], own)
                    wanted |= dict.fromkeys(candidates.ids[place] for place in first)
        _, drawn = self._drawn(stored)
        wanted |= dict.fromkeys(id_ for draws in drawn.values() for own in draws for id_ in own)
        return sorted(wanted, key=self.pool.data.position)

    def _measure(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Take the gradients of outputs and of the rows that they are compared with."""
        adam = any(estimator.view == "adam" for estimator in self.estimators)
        asked = [(self.source.alone(output_id), ids) for output_id, ids in wanted.items()]
        found = exact_rows(self.pool, self.pool.checkpoints()[-1], asked, adam=adam)
        self._exact.update(zip(wanted, found, strict=True))

    def explain_all(self, answered: Sequence[Output], failed: list[Skipped]) -> list[Explanation]:
        """Explanations in the order of the outputs: kept ones, and new ones, which are kept; `failed` is added to."""
        keys = {output.id: self._key(output) for output in answered}
        done: dict[str, Explanation | None] = {output.id: self._kept(keys[output.id]) for output in answered}
        usable = []
        for output in answered:
            if output.id not in self.gradients:
                reason = self.gradients.excluded.get(output.id, "no gradient")
                failed.append(Skipped(output.id, "gradient", reason))
            elif not self.gradient_of(output.id).any():
                failed.append(Skipped(output.id, "zero_gradient", "the output's gradient is zero: nothing to explain"))
            else:
                usable.append(output)
        missing = [output for output in usable if done[output.id] is None]
        if missing:
            for estimator in self.estimators:
                self._ranking(estimator)
            if self.exact:
                self._measure({output.id: self._compared(output.id) for output in missing})
            with self.pool.reporter.stage("choosing examples", len(missing), "outputs") as advance:
                for output in missing:
                    entry = attempted("explain", partial(self._explain, output))
                    if isinstance(entry, Stopped):
                        failed.append(Skipped(output.id, "not_explained", entry.error))
                    else:
                        self.pool.run.publish_json(keys[output.id], entry.as_dict(), sealed=True)
                        done[output.id] = entry
                    advance(1)
        return [found for output in usable if (found := done[output.id]) is not None]

    def matched(self, entries: Sequence[Explanation]) -> tuple[Estimator, dict[str, list[str]]]:
        """The estimator whose scores are split into tokens, and of which examples, by output."""
        ranker, k = self.estimators[0], shown_budget(self.budgets)
        shown = {one.id: [found.id for found in one.best_first(k, ranker.label)[0].examples] for one in entries}
        return ranker if ranker.splits else DEFAULT_ESTIMATOR, shown

    def chosen(self, entry: Explanation) -> tuple[OutputSource, list[str]]:
        """An output, and the ids of all that was chosen for it."""
        ids = {example.id for found in entry.results for example in found.examples}
        return self.source.alone(entry.id), sorted(ids, key=self.pool.data.position)

    def throughout(self, entries: Sequence[Explanation]) -> list[Explanation]:
        """The explanations with the relevance of what they chose at all checkpoints together.

        `ξ = Σ_e w_e ‖g_e‖² / Σ_e w_e ‖g_e − A_e t‖²`, w_e the rates' shares (`rate_weights`) and one t for all of them:
        that of every checkpoint's gradients times √w_e, one after the other. Of random draws, the first.
        """
        wanted = [self.chosen(entry) for entry in entries]
        checkpoints = self.pool.checkpoints()
        sums: list[Any] = [0.0] * len(entries)
        for checkpoint, weight in zip(checkpoints, rate_weights(checkpoints), strict=True):
            for number, own in enumerate(exact_rows(self.pool, checkpoint, wanted, adam=False)):
                sums[number] = sums[number] + weight * own.products["plain", "plain"]
        measured = []
        for entry, (_, ids), products in zip(entries, wanted, sums, strict=True):
            rows = ExactRows(tuple(ids), {("plain", "plain"): products})
            results = []
            for found in entry.results:
                if not found.examples:
                    results.append(replace(found, throughout=found.draws[0]))
                    continue
                chosen_rows = rows.rows([example.id for example in found.examples])
                relevance = selection_relevance(rows.target, chosen_rows, coefficients=self.coefficients)
                results.append(replace(found, throughout=draw_of(relevance)))
            norm = float(products[-1, -1])
            measured.append(replace(entry, results=tuple(results), squared_norm_throughout=norm))
        return measured

    def _explain(self, output: Output) -> Explanation:
        while True:
            try:
                return self._explained(output)
            except RowsLackingError as error:  # a strategy that chooses beyond the first of a ranking
                self._measure({output.id: self._compared(output.id, {*self._exact[output.id].ids, *error.ids})})

    def _explained(self, output: Output) -> Explanation:
        position = self.gradients.positions([output.id])[0]
        competing = {estimator.label: self.candidates_of(output.id, estimator) for estimator in self.estimators}
        random = self._random(competing)
        results = tuple(
            found for label, candidates in competing.items() for found in self._results(label, candidates, random)
        )
        return Explanation(
            id=output.id,
            messages=output.question.messages,
            output=output.text,
            generated=output.generated,
            finished=output.finished,
            tokens=int(output.entry.supervised.sum()),
            loss=float(self.gradients.losses[position]) * self.source.scale(self.source.ids.index(output.id)),
            gradient_norm=float(self.gradients.norms[position]),
            squared_norm=random.squared_norm,
            coefficients=self.coefficients,
            aggregation=self.aggregation,
            results=results,
            references=self._references(competing, random, results),
            instead=output.question.instead,
            against=tuple(
                found
                for estimator in self.estimators
                if estimator.signed
                for found in self._against(estimator.label, competing[estimator.label])
            ),
            exact=self.exact,
            missed=tuple(self._missed(output.id, results)) if self.exact else (),
        )

    def _missed(self, output_id: str, results: Sequence[StrategyResult]) -> Iterator[Missed]:
        """What the projected rankings, and the search of the store, may have kept from the candidates."""
        for estimator in self.estimators:
            yield from self._unranked(output_id, estimator)
        pursuits = {one.strategy for one in self.strategies if one.last and one.supports}
        if own := [found for found in results if found.strategy in pursuits and found.examples]:
            yield from self._unsought(output_id, own)

    def _unranked(self, output_id: str, estimator: Estimator) -> Iterator[Missed]:
        """What a projected ranking may have kept from the most helpful."""
        exact = estimator.exactly(self._exact[output_id], self._checkpoints)
        if exact is None:
            return
        ids, values = self.scores_of(output_id, estimator)
        places = Strings.of(ids).positions(self._exact[output_id].ids)
        scores = np.where(self.store.holds(ids), values, -np.inf).astype(np.float64)
        there = places >= 0
        others = np.delete(scores, places[there])
        for k in self.budgets:
            yield Missed(estimator.label, k, missed(scores[places[there]], exact[there], others, k))

    def _unsought(self, output_id: str, results: Sequence[StrategyResult]) -> Iterator[Missed]:
        """What the projected search may have kept from pursuit: rows that in a chosen one's place rebuild `WORTH` more.

        Of those that came next in the search, as all others leave more error. Any row may stand for one of weight 0, so
        that without a least gain every row near a tie would count for a half. How far projection errs is told by the
        nearest third of the rows taken again: those that rebuild nothing err more. They differ too little for a slope.
        """
        rows = self._exact[output_id]
        others = [id_ for id_ in self._sought.get(output_id, ()) if id_ not in rows.places]
        stored = torch.cat([self.store.rows_by_id([*rows.ids, *others]), self.gradient_of(output_id)[None]]).double()
        projected, exact = map(Reconstruction.within, (stored @ stored.T, rows.products["plain", "plain"]))
        own = exact.supporting()
        projected, exact = projected.only([*own, *range(len(rows.ids), len(stored) - 1)]), exact.only(own)
        places = {rows.ids[at]: number for number, at in enumerate(own)}
        for found in results:
            picks = [places[example.id] for example in found.examples]
            known, foretold = exact.replacing(picks), projected.replacing(picks)
            nearest = np.argsort(foretold[: len(known)], kind="stable")[: max(len(known) // 3, 2 * found.k)]
            near = np.union1d(nearest, picks)
            count = missed(-foretold[near], -known[near], -foretold[len(known) :] - WORTH, len(picks), slope=1.0)
            yield Missed(found.estimator, found.k, count, found.strategy)

    def _drawn(self, competing: Mapping[str, Candidates]) -> tuple[Candidates, dict[int, list[list[str]]]]:
        """The random choices of one output, the same whichever estimator ranks: of what each of them can choose."""
        strategy = next((own for own in self.strategies if own.by_chance), RANDOM)
        first, *others = competing.values()
        for other in others:
            first = first.also_of(other)
        (choices,) = choose_all([strategy], first, self.budgets)
        return first, {k: [[first.ids[place] for place in made] for made in draws] for k, draws in choices.items()}

    def _random(self, competing: Mapping[str, Candidates]) -> _Random:
        """Random choices with their relevance."""
        first, ids = self._drawn(competing)
        (by_budget,) = self._relevances(first, [_Random(ids, {}, 0.0).among(first)[0]])
        return _Random(ids, by_budget, by_budget[self.budgets[0]][0].squared_norm)

    def _relevances(self, competing: Candidates, choices: Sequence[Choices]) -> list[dict[int, list[Relevance]]]:
        """Of each choice, by budget and draw."""
        found = relevance_of_choices(competing, choices, models=(self.coefficients,))
        return [{k: by_model[self.coefficients] for k, by_model in own.items()} for own in found]

    def _references(
        self, competing: Mapping[str, Candidates], random: _Random, results: Sequence[StrategyResult]
    ) -> tuple[Reference, ...]:
        """Random draws, and the best that was found: by any strategy, by a draw, or by pursuit of the most helpful."""
        best = {k: max(relevance.ratio for relevance in found) for k, found in random.relevances.items()}
        for found in results:
            best[found.k] = max(best[found.k], *(draw.ratio for draw in found.draws))
        for candidates in competing.values() if _BEST not in self.strategies else ():
            (relevances,) = self._relevances(candidates, choose_all([_BEST], candidates, self.budgets))
            for k, (relevance,) in relevances.items():
                best[k] = max(best[k], relevance.ratio)
        return tuple(
            Reference(
                k,
                tuple(relevance.ratio for relevance in random.relevances[k]),
                relevance_of_draws(random.relevances[k], how=self.aggregation).ratio,
                best[k],
            )
            for k in self.budgets
        )

    def _results(self, estimator: str, competing: Candidates, random: _Random) -> Iterator[StrategyResult]:
        ranks = descending_ranks(competing.scores.numpy())
        ranking = [strategy for strategy in self.strategies if not strategy.by_chance]
        choices = choose_all(ranking, competing, self.budgets) if ranking else []
        relevances = self._relevances(competing, choices) if ranking else []
        made = dict(zip((one.strategy for one in ranking), zip(choices, relevances, strict=True), strict=True))
        for strategy in self.strategies:
            own, by_budget = made.get(strategy.strategy) or random.among(competing)
            for k, selections in own.items():
                yield self._result(estimator, strategy.strategy, k, selections[0], by_budget[k], competing, ranks)

    def _against(self, estimator: str, competing: Candidates) -> Iterator[StrategyResult]:
        """What is against the output: the same, for −g and scores of the other sign, of the lowest below 0."""
        ranks = descending_ranks(competing.scores.numpy())
        opposite = competing.opposed(max(self._opposing, self.budgets[-1]))
        choices = choose_all([*_AGAINST.values()], opposite, self.budgets)
        for name, own, by_budget in zip(_AGAINST, choices, self._relevances(opposite, choices), strict=True):
            for k, (picks,) in own.items():
                yield self._result(estimator, name, k, picks, by_budget[k], competing, ranks)

    def _result(
        self,
        estimator: str,
        strategy: str,
        k: int,
        picks: Sequence[int],
        found: Sequence[Relevance],
        competing: Candidates,
        ranks: NDArray[np.int64],
    ) -> StrategyResult:
        """A choice of one or several draws, of which the first is `picks`."""
        one = relevance_of_draws(found, how=self.aggregation)
        examples = tuple(
            ChosenExample(competing.ids[place], float(competing.scores[place]), int(ranks[place]), weight)
            for place, weight in zip(picks, found[0].coefficients.tolist(), strict=True)
        )
        draws, flags = tuple(draw_of(relevance) for relevance in found), (one.near_zero, one.capped)
        assert competing.target_gradient is not None
        toward = competing.rows(picks) @ competing.target_gradient.double() if picks else torch.zeros(0)
        supports = bool((toward > 0).all())
        return StrategyResult(estimator, strategy, k, one.db, one.ratio, *flags, examples, draws, supports=supports)

    def _ranking(self, estimator: Estimator) -> Ranking:
        """Pool ids and their influence on all outputs `[pool output]`."""
        if estimator.label not in self._rankings:
            of_outputs = Target(self.source, None, ())  # type: ignore[arg-type]  # which is read as a data set is
            found = influence_of(estimator, self.pool, of_outputs)
            for warning in found.warnings:
                self.pool.reporter.warn(warning)
            assert found.matrix is not None, estimator
            self._rankings[estimator.label] = Strings.of(found.ids), found.matrix
        return self._rankings[estimator.label]

    def _key(self, output: Output) -> str:
        """Where the explanation is kept: under everything that it depends on and says."""
        tokens = OutputSource((output.entry,), "", **contrasted([output.other])).fingerprint
        said = [list(output.question.messages), output.text, output.generated, output.finished]
        return f"{self._prefix}{fingerprint([tokens, said])}.json"

    @cached_property
    def _prefix(self) -> str:
        config = {
            "pool": self.store.fingerprint,
            "estimators": [
                {**estimator.model_dump(mode="json"), "inputs": estimator.inputs(self.pool)}
                for estimator in self.estimators
            ],
            "strategies": [strategy.identity(explaining=True) for strategy in self.strategies],
            "budgets": list(self.budgets),
            "coefficients": self.coefficients,
            "candidates": self.candidates,
            "aggregation": self.aggregation,
            "exact": self.exact,
            "warmup": [checkpoint.identity() for checkpoint in self.pool.checkpoints()],
            **revisions("scores", "products"),
        }
        return self.pool.run.prefix("explanations", config)

    def _kept(self, key: str) -> Explanation | None:
        storage = self.pool.run.storage
        if not storage.exists(key):
            return None
        try:
            return lines.read_explanation.validate_json(json.dumps(read_json(storage, key)))
        except (CorruptError, ValidationError):
            self.pool.reporter.warn(f"{self.pool.run.name(key)} is damaged: explaining this output again")
            return None

    def blocks(self) -> tuple[Block, ...]:
        """What a notebook shows of them."""
        from gradsift.explanation.shown import explanations_blocks  # which knows what explanations are

        return explanations_blocks(self)

    @property
    def path(self) -> str:
        """Where they are, line by line."""
        return self.pool.run.name(lines.FILE)

    @property
    def unshown(self) -> list[Skipped]:
        """What the prompts and given answers have and the model was not shown."""
        return [part for entry in self.source.entries for part in entry.unshown]

    @property
    def outputs(self) -> list[TokenizedExample]:
        """The explained outputs' tokens, in the order of `entries`."""
        by_id = {entry.id: entry for entry in self.source.entries}
        return [by_id[entry.id] for entry in self.entries]

    def trained(self, effects: Mapping[tuple[str, str, str, int], Trained]) -> Explanations:
        """The same, written again, with what training on choices did, by output, estimator, strategy and k."""
        entries = [
            replace(
                entry,
                results=tuple(
                    replace(found, trained=effects.get((entry.id, found.estimator, found.strategy, found.k)))
                    for found in entry.results
                ),
            )
            for entry in self.entries
        ]
        found = replace(self, entries=tuple(entries))
        found.publish()
        return found

    def publish(self) -> None:
        """Add them to explanations.jsonl and .parquet."""
        checkpoints = [checkpoint.identity() for checkpoint in self.pool.checkpoints()]
        of = [self.pool.data.fingerprint, model_identity(self.pool.model), checkpoints]
        lines.publish(self.pool.run, self.entries, lines.Made(fingerprint(of), self._prefix.split("/")[-2]))

    def table(self) -> pa.Table:
        """Long form: output, estimator, strategy, k, relevance (dB, ratio, share), its verdict, chosen ids."""
        return lines.table(self.entries)


def explain(
    pool: Pool,
    questions: str | Sequence[Question] | Question,
    *,
    k: int | Sequence[int] = 5,
    estimator: Estimator | Sequence[Estimator] | None = None,
    strategies: Sequence[Selector] = DEFAULT_STRATEGIES,
    coefficients: CoefficientModel = "MSEProjUSimp",
    candidates: int = CANDIDATES,
    max_new_tokens: int = 128,
    aggregation: Aggregation = "ratio_of_means",
    matches: int = MATCHES,
    exact: bool = True,
    all_checkpoints: bool = False,
) -> Explanations:
    """For each prompt, k training examples that account for the model's output, by each strategy.

    The model's own greedy output is explained unless the question gives one. Its gradient and the pool's are plain and
    un-normalised, at the last checkpoint; they are collected if the run does not hold them. Finished explanations are
    kept in the run folder; a prompt that cannot be explained is listed and stops nothing.

    Args:
        pool: from `open_pool`.
        questions: a prompt, or questions.
        k: examples per explanation, or several such numbers.
        estimator: ranks the pool, one or several; by default the cosine of plain gradients at the last checkpoint
            (Compact, App. A).
        strategies: how k of the highest-ranked are chosen; `ALL_STRATEGIES` for all of the paper's.
        coefficients: the model of the reconstruction's weights (Compact, App. D).
        candidates: m, how many of the ranking strategies choose from. Naive rankings and pursuit have half of them,
            and pursuit as many rows as are sought for it in the whole pool (`pursuit.sought`).
        max_new_tokens: limit of the generated output.
        aggregation: how the relevances of a random strategy's draws become one, and in `relevance_table` those of
            outputs (`gradsift.explanation.relevance.aggregate_relevance`).
        matches: outputs, from the first on, of which the examples that are shown first are split into tokens: which
            of them carry the score, and which of the output's they bear on; takes each of these once more through the
            model.
        exact: take the candidates through the model once more and compare whole gradients; False compares stored rows,
            whose projection makes choices and relevance uncertain.
        all_checkpoints: also measure the relevance of what is chosen at all checkpoints together (`throughout`): the
            chosen examples go through the model at each of them.

    Raises:
        ConfigError: k below 1 or above the pool, or above the candidates; a strategy that cannot choose for one output.
        DataError: no question can be explained.
    """
    if isinstance(questions, str):
        questions = [question_of(questions)]
    elif isinstance(questions, Question):
        questions = [questions]
    budgets = tuple(sorted({k} if isinstance(k, int) else set(k)))
    check_budgets(budgets, len(pool.data), candidates)
    given = estimator or DEFAULT_ESTIMATOR
    estimators: tuple[Estimator, ...] = tuple(given) if isinstance(given, Sequence) else (given,)
    if matches and isinstance(pool.data, Pairs):
        pool.reporter.say("the pool's rows are pairs of answers, whose scores are not split into tokens")
        matches = 0
    if not strategies:
        raise ConfigError("there are no strategies: give at least one, such as most_helpful")
    _check_once("strategy", [strategy.strategy for strategy in strategies])
    _check_once("estimator", [ranker.label for ranker in estimators])
    check_methods(pool, estimators, strategies)
    if any(question.instead is not None for question in questions):
        for ranker in estimators:
            refuse_contrast(ranker)
    checkpoint = pool.checkpoints()[-1]
    asked, again = _once_each(questions, lambda question: question.id, "a prompt of this id comes before it")
    answered, failed = answers(pool, asked, max_new_tokens=max_new_tokens)
    answered, copies = _once_each(answered, _tokens_of, "its prompt and answer are those of {}, which stands for both")
    failed += [*again, *copies]
    if not answered:
        raise DataError(f"no prompt can be explained; first: {failed[0].detail if failed else 'none was given'}")
    source = OutputSource.of(pool, answered)
    views = sorted(explained_views(estimators))
    store = pool.stores(checkpoint, views)["plain"]
    if budgets[-1] > len(store):
        raise ConfigError(
            f"k is {budgets[-1]}, but only {len(store)} examples of the pool have a finite gradient: lower k"
        )
    of_outputs = sorted({target_view(view) for view in views})
    gradients = pool.collect(source, checkpoint, of_outputs, what="output")["plain"]
    work = Explanations(
        pool=pool, source=source, store=store, gradients=gradients, estimators=estimators, strategies=tuple(strategies),
        budgets=budgets, coefficients=coefficients, candidates=candidates, aggregation=aggregation,
        exact=exact,
    )  # fmt: skip
    explained = work.explain_all(answered, failed)
    if not explained:
        raise DataError(f"no prompt can be explained; first: {failed[0].detail}")
    if all_checkpoints:
        explained = work.throughout(explained)
    tokens = token_matches(pool, source, *work.matched(explained[:matches]))
    explained = [replace(entry, matches=tokens.get(entry.id, ())) for entry in explained]
    found = replace(work, entries=tuple(explained), failed=tuple(failed))
    found.publish()
    return found


def kept_explanations(
    pool: Pool, answered: Sequence[Output], *, k: Sequence[int], estimators: Sequence[Estimator], **asked: Any
) -> Explanations | None:
    """Those that `explain` finds in the run folder, None without the rows that they are of; nothing is computed."""
    source, last = OutputSource.of(pool, answered), pool.at(pool.checkpoints()[-1])
    store, gradients = (last.held(pool.run, own, "plain") for own in (pool.data, source))
    if store is None or gradients is None:
        return None
    how: dict[str, Any] = {"estimators": tuple(estimators), "budgets": tuple(k), **asked}
    work = Explanations(pool=pool, source=source, store=store, gradients=gradients, **how)
    entries = tuple(found for output in answered if (found := work._kept(work._key(output))) is not None)
    return replace(work, entries=entries)


def check_methods(pool: Pool, estimators: Iterable[Estimator], strategies: Iterable[Selector]) -> None:
    """Refuse estimators and strategies that cannot explain one output, or lack what they take here.

    Raises:
        ConfigError: so it is.
    """
    for ranker, strategy in product(estimators, strategies):
        if not ranker.pairs or ranker.takes == "reward":
            raise ConfigError(
                f"{ranker.label} has no score for each output: explain with LESS, DataInf, ProjectedInverse, TRAK, "
                "BM25 or RDS"
            )
        strategy.check(ranker, explaining=True)
        ranker.preflight(pool, None)
        strategy.preflight(pool, None, ranker)


def refuse_contrast(ranker: Estimator) -> None:
    """Refuse an estimator without gradients, to which a contrast of two answers is that of one."""
    if ranker.view is None:
        raise ConfigError(
            f"{ranker.label} takes no gradient, and a contrast of two answers is one of gradients: explain it with "
            "LESS, DataInf, ProjectedInverse or TRAK"
        )


def shown_budget(budgets: Sequence[int]) -> int:
    """The budget that is shown first: 5 where it was asked for, else the smallest."""
    return 5 if 5 in budgets else budgets[0]


def explained_views(estimators: Sequence[Estimator]) -> set[View]:
    """The views that explanations read at the last checkpoint: plain gradients, and what the estimators rank by."""
    return {"plain", *(view for ranker in estimators if (view := ranker.view) is not None)}


def check_budgets(budgets: Sequence[int], available: int, candidates: int = CANDIDATES) -> None:
    """Refuse numbers of examples that a pool and its candidates cannot give."""
    if not budgets:
        raise ConfigError("there is no k: give the number of examples per explanation, such as 5")
    for k in (budgets[0], budgets[-1]):
        if not 1 <= k <= available:
            raise ConfigError(f"k is {k}: choose between 1 and the {available} examples of the pool")
    if budgets[-1] > candidates:
        raise ConfigError(
            f"k is {budgets[-1]}, but only the {candidates} highest-ranked examples compete: "
            "lower k or raise --candidates"
        )


def _check_once(what: str, labels: Sequence[str]) -> None:
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ConfigError(f"the {what} {min(twice)!r} is given twice: give each once")


def _once_each(given: Sequence[Any], key: Callable[[Any], str], detail: str) -> tuple[list[Any], list[Skipped]]:
    """The first of each key, and those whose key was there before; `detail` may name that one."""
    first: dict[str, Any] = {}
    for one in given:
        first.setdefault(key(one), one)
    before = [(one, there) for one in given if (there := first[key(one)]) is not one]
    return list(first.values()), [Skipped(one.id, "duplicate", detail.format(there.id)) for one, there in before]


def _tokens_of(output: Output) -> str:
    """What an output is, whatever its id: copies would count as several in every interval."""
    pair = [None if one is None else replace(one, id="") for one in (output.entry, output.other)]
    assert pair[0] is not None
    return OutputSource((pair[0],), "", **contrasted([pair[1]])).fingerprint


def draw_of(relevance: Relevance) -> Draw:
    """What is kept of the relevance of one selection."""
    t = relevance.coefficients.double()
    return Draw(
        ratio=relevance.ratio,
        squared_error=relevance.squared_error,
        near_zero=relevance.near_zero,
        l1=float(t.abs().sum()),
        l2=float(torch.linalg.vector_norm(t)),
        nonzero=float((t != 0).sum()) / max(1, len(t)),
        negative=float((t < 0).sum()) / max(1, len(t)),
    )
