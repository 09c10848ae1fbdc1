"""One walk over what a recipe's run will do, in the order in which it does it; what the run folder has is told as done.

The methods are asked what they read and need, as the run asks them; nothing is computed and nothing is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np

from gradsift.base.errors import ConfigError
from gradsift.base.progress import Reporter, silent
from gradsift.base.types import Message
from gradsift.compare.chosen import MOST_POINTS
from gradsift.compare.grid import CellOf, Grid, Key, open_grid
from gradsift.context import Pool, Target
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.evaluation.arms import Contender, beside_base, opponent_of
from gradsift.evaluation.evaluate import evaluation_config
from gradsift.evaluation.metric import ASKED, Judging, Needs
from gradsift.evaluation.setup import Trained, subject_of
from gradsift.explanation.exact import MOST_AT_ONCE, is_known
from gradsift.explanation.explain import (
    OPPOSING,
    RANDOM,
    Explanations,
    check_methods,
    explained_views,
    kept_explanations,
    shown_budget,
)
from gradsift.explanation.matches import missing_matches
from gradsift.explanation.outputs import OutputSource, answers, missing_answers
from gradsift.explanation.tokens import MOST_PAIRS
from gradsift.generation.endpoint import Endpoint, usage_of
from gradsift.generation.local import SHARE
from gradsift.generation.samples import missing_samples
from gradsift.gradients.collect import SequenceSource, kept_as
from gradsift.gradients.policy import MOST_ROWS
from gradsift.gradients.rows import View
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.diagnostics import sample_rows, sample_source
from gradsift.influence.estimator import (
    Estimator,
    Passes,
    conversations,
    parts_of,
    read_together,
    target_view,
    views_read,
)
from gradsift.influence.nice import PolicyEstimator, PolicyTargets, sampler_of, takes_reward
from gradsift.influence.prompts import PromptTarget, missing_rewards
from gradsift.influence.ratings import Rater, missing_ratings
from gradsift.influence.rds import missing_embeddings
from gradsift.jobs.bench import open_bench
from gradsift.jobs.rollouts import check_rollouts
from gradsift.jobs.select_explain import (
    chooses,
    explain_questions,
    methods_of,
    open_recipe,
    open_recipe_target,
    views_beside,
)
from gradsift.model import embeddings
from gradsift.plan.work import Asked, Drawing, Work
from gradsift.recipe import Explain, Recipe, Validate
from gradsift.rewards.judge import Judge
from gradsift.rewards.reward import single_rewards
from gradsift.rewards.samples import prompt_of
from gradsift.rewards.value import RewardValue
from gradsift.selection.candidates import ORDERS
from gradsift.selection.select import budget_count, kept_count
from gradsift.selection.selector import Selector, reader_beside
from gradsift.store.run import Run
from gradsift.validation.bench import Bench, Judgement, self_pools
from gradsift.validation.validate import is_validated
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint
from gradsift.warmup.train import Training, kept_training, warm_up_ids

COMMANDS = ("run", "sample", "reward")

_FILE_BYTES = 4_000  # of a prompt's responses and rewards, besides their tokens
_TOKEN_BYTES = 14  # token id, two log-probabilities and the text of a token, compressed
_CHOICE_SECONDS = 0.003  # one strategy at one budget for one output, relevance included (benchmarks/speed.py explain)
_CHOICE_BYTES = 1_500  # what is kept of it


@dataclass(frozen=True)
class _Rows:
    """Rows of which gradients are taken.

    source: their sequences, where they are there already
    name:   tells them from other rows of the walk
    """

    stage: str
    name: str
    count: int
    tokens: float
    source: SequenceSource | None = None


@dataclass
class Walk:
    """What is walked over, and what was met so far.

    pool, target: opened in a folder that is thrown away
    kept:         the pool in the recipe's own run folder, where there is one
    checkpoints:  how many the pool's gradients are taken at
    """

    recipe: Recipe
    pool: Pool
    target: Target | None
    kept: Pool | None
    works: list[Work] = field(default_factory=list)
    checkpoints: int = 0
    _there: dict[tuple[str, int, View], bool] = field(default_factory=dict)  # stores, and whether with their sums
    _done: set[str] = field(default_factory=set)  # what the rest of the walk finds
    _adapters: list[Checkpoint | None] | None = None  # of the warm-up under way; None for those not trained yet

    def run(self) -> Walk:
        """What `gradsift run` would do; where it would have nothing to do, one `gradsift collect` of the estimator."""
        recipe = self.recipe
        if chooses(recipe):
            self._choose_and_report()
        elif recipe.explain is None and recipe.estimator.view is not None:
            self._gradients(recipe.estimator, targets=False)
        if recipe.explain is not None:
            self._explain(recipe.explain)
        return self

    def roll_out(self, *, rewarded: bool) -> Walk:
        """What `gradsift sample` or `gradsift reward` would do."""
        method, target = self.recipe.estimator, self.target
        assert takes_reward(method), method
        assert isinstance(target, PromptTarget), target
        self._rollouts(method, target, rewarded=rewarded)
        return self

    def judge(self, settings: Bench) -> Walk:
        """What `gradsift bench` would do: every method's scores, and the trainings that they are held against."""
        assert self.target is not None
        judge = Judgement(self.kept or self.pool, self.target, settings)
        judge.check()
        done = self.kept is not None and self.kept.run.storage.exists(judge.done_key)
        self.target = judge.target
        self._judged(settings.judged)
        self._retrain(judge, done=done)
        if "self" in settings.asked:
            (whole, *halves), _ = self_pools(self.pool, self.target, settings)
            methods = [method for method in settings.judged if not method.trains]
            own = self.pool
            for pool in (whole, *halves):
                self.pool, self._there = pool, {}
                self.kept = self.kept and replace(pool, run=self.kept.run, reporter=self.kept.reporter)
                self._judged([method for method in methods if pool is whole or method.view is not None])
            self.pool = own
        return self

    def _judged(self, methods: Sequence[Estimator]) -> None:
        reading = [part for method in methods for part in parts_of(method) if part.view is not None]
        self._rows_together(reading, sums=any(method.full_sum for method in reading))
        for method in methods:
            self._score(method)

    def _retrain(self, judge: Judgement, *, done: bool) -> None:
        """The trainings that scores are held against, and the losses after them."""
        target, settings, pool = judge.target, judge.settings, self.pool
        epochs, mean = self.recipe.warmup.epochs, float(pool.data.lengths.mean())
        trainings = settings.trainings(int(judge.available.sum()), target.subtasks)
        if "train" in trainings:
            base = subject_of(pool, None).base
            read = judge.held_out.bind(base).needs(base).read
            for times, size in trainings.pop("train"):
                rows = times * size * epochs
                left = {"adapters": times * epochs}
                self.add(Work("fine-tunings", rows, backward=rows * mean, stored=left, tasks=times, done=done))
                self.add(Work("evaluation", times * len(read), forward=float(times * sum(read)), done=done))
        if trainings:
            times = sum(times for own in trainings.values() for times, _ in own) - judge.known()
            asked = 0 if target.labels is None else int(target.labels.lengths.sum())
            rows = times * int(judge.available.sum()) * epochs
            self.add(Work("retrainings", rows, rows * mean, float(times * asked), tasks=times, done=done or not times))

    def compare(self, grid: Grid) -> Walk:
        """What `gradsift compare` would do: choices at each warm-up, then every cell."""
        for seed, seeds in grid.warmups:
            self.pool = replace(self.pool, seed=seed)
            self.kept = self.kept and replace(self.kept, seed=seed)
            self._there, self._adapters = {}, None
            self._choices(grid, grid.choosing(seeds))
        _Cells(self, grid).walk()
        if grid.job.embedding is not None and embeddings.at_hand(grid.job.embedding):
            self.add(Work("maps of texts", texts=min(MOST_POINTS, len(self.pool.data)), seconds=None))
        return self

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choose_and_report(self) -> None:
        recipe, methods = self.recipe, methods_of(self.recipe)
        self._last_rows_together(methods, views_beside(recipe))
        for method in methods:
            self._score(method)
        available = len(self.pool.data) - (len(self.target.overlap) if self.target is not None else 0)
        size = budget_count(recipe.budget, available) if recipe.drop is None else kept_count(recipe.drop, available)
        self._select(recipe.selection, recipe.estimator, [size])
        if takes_reward(recipe.estimator) and recipe.estimator.view and isinstance(self.target, PromptTarget):
            self._diagnose(recipe.estimator, self.target)

    def _choices(self, grid: Grid, choosing: Sequence[Contender]) -> None:
        methods = [one.estimator for one in choosing if one.estimator is not None]
        sums = any(method.full_sum for method in methods)
        if sums:
            full = self.pool.gradients.model_copy(update={"full_sum": True})
            self.pool = replace(self.pool, gradients=full)
        self._rows_together(methods, sums=sums)
        for one in choosing:
            assert one.estimator is not None
            self._score(one.estimator)
            if one.selection is not None:
                self._select(one.selection, one.estimator, grid.budgets if one.sized else [grid.size(one)])
        if sums:
            self.pool = replace(self.pool, gradients=self.recipe.gradients)

    def _rows_together(self, methods: Sequence[Estimator], *, sums: bool) -> None:
        """The pool's rows that methods read, in one pass at each checkpoint."""
        last = len(self._checkpoints()) - 1 if any(method.view for method in methods) else -1
        for number in range(last + 1):
            self._pool_rows(number, views_read(methods, last=number == last), sums)

    def _last_rows_together(self, methods: Sequence[Estimator], views: Sequence[View]) -> None:
        """As `collect_together`."""
        reading, read, sums = read_together(methods)
        if reading:
            self._checkpoints()
            for method in reading:
                if takes_reward(method) and isinstance(self.target, PromptTarget):
                    self._rollouts(method, self.target)
            last, sums = len(self._checkpoints()) - 1, sums or self.pool.gradients.full_sum
            if not all(self._holds(self.pool.data, self._checkpoints()[last], view, sums) for view in read):
                self._pool_rows(last, [*read, *views], sums)

    def _score(self, method: Estimator) -> None:
        method.preflight(self.pool, self.target)
        for one in method.before:
            self._score(one)
        for rater in method.raters:
            self._rate(rater)
        if method.text_model is not None and self.target is not None:
            for name, data in (("pool", self.pool.data), ("target", self.target.data)):
                self._embedded(name, [conversation_text(own) for own in conversations(data)], method.text_model)
        self._other_passes(method, self.target)
        if takes_reward(method) and isinstance(self.target, PromptTarget):
            ends = method.ends(self.kept or self.pool, self.target)
            for number in range(len(ends)):
                self._responses(method, self.target, number, ends=ends)
        if method.view is not None:
            self._gradients(method, targets=method.needs_target)

    def _other_passes(self, method: Estimator, target: Target | PromptTarget | None) -> None:
        for one in method.passes(self.kept or self.pool, target, self._checkpoints):
            self._passed(one, method)

    def _passed(self, one: Passes, *by: Any) -> None:
        """Rows that methods take through the model, counted once."""
        if self.is_new("passes", *(repr(part) for part in by), one, self.pool.seed):
            backward, forward = (0.0, one.tokens) if one.forward else (one.tokens, 0.0)
            done = one.done and self.kept is not None
            self.add(Work(
                one.stage, one.rows, backward, forward, stored=one.stored, at_most=one.at_most, held=one.held, done=done
            ))  # fmt: skip

    def _gradients(self, method: Estimator, *, targets: bool) -> None:
        """The pool's rows that a method reads, and its targets'."""
        assert method.view is not None, method
        every = range(len(self._checkpoints()))
        for number in every[-1:] if method.last_checkpoint else every:
            self._pool_rows(number, [method.view], method.full_sum)
            if targets and self.target is not None:
                self._target_rows(method, self.target, number)

    def _target_rows(self, method: Estimator, target: Target, number: int, view: View | None = None) -> None:
        """Those of a method; `view` is of the pool's rows that they go with, where it is not the method's own."""
        view = view or method.view
        assert view is not None, method
        if takes_reward(method) and isinstance(target, PromptTarget):
            self._policy_rows(method, target, number)
            return
        source: Any = method.targets(self.pool, target)
        rows = _Rows("target gradients", "target", len(source.ids), float(sum(source.token_counts())), source)
        # JI2S takes the pool's sums and the targets' rows alone.
        self._collect(rows, number, [target_view(view)], self.pool.gradients.full_sum and not method.full_sum)
        if method.full_sum and self.is_new("curvature", rows.name, method.model_dump_json(), number):
            if overlap := len(target.overlap):
                tokens = overlap * float(self.pool.data.lengths.mean())
                self._collect(_Rows("pool gradients", "overlap", overlap, tokens), number, [view], sums=True)
            # H is applied to the pool's sum by another pass over the targets.
            known = self._holds(rows.source, self._checkpoints()[number], target_view(view), sums=False)
            made = known and bool(self.kept and self.kept.run.artifacts("curvature"))
            self.add(Work("curvature", rows.count, backward=rows.tokens, tasks=1, done=made))

    def _select(self, selector: Selector, estimator: Estimator, budgets: Sequence[int]) -> None:
        """What a selector reads beside scores, and takes of the model."""
        for budget in budgets if self.target is not None else ():
            assert self.target is not None
            selector.preflight(self.pool, self.target, estimator)
            for one in selector.passes(self.kept or self.pool, self.target, estimator, budget):
                self._passed(one, selector, estimator, budget)
        reading = reader_beside(estimator)
        if selector.takes == "checkpoints":
            self._gradients(reading, targets=True)
        elif selector.takes in ("rows", "target"):
            last = len(self._checkpoints()) - 1
            self._pool_rows(last, [selector.view_with(estimator)], sums=False)
            if selector.takes == "target" and self.target is not None:
                self._target_rows(reading, self.target, last, selector.view_with(estimator))
        if selector.text_model is not None:
            texts = [conversation_text(own) for own in conversations(self.pool.data)]
            self._embedded("pool", texts, selector.text_model)

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> list[Checkpoint | None]:
        """Those that gradients are taken at: given, trained before, or trained by the run, which is told."""
        if self._adapters is None:
            recipe, seed = self.recipe, self.pool.seed
            if self.pool.adapters:
                self._adapters = [open_checkpoint(adapter) for adapter in self.pool.adapters]
                return self._adapters
            rows = self.pool.training
            ids = warm_up_ids(rows, recipe.warmup, seed)
            found, epochs = self.trained(rows, ids, recipe.warmup, seed), recipe.warmup.epochs
            tokens, done = float(rows.lengths[rows.positions(ids)].sum()), found is not None
            self.add(
                Work("warm-up", epochs * len(ids), backward=epochs * tokens, stored={"adapters": epochs}, done=done)
            )
            self._answers(rows, len(ids), tokens, done)
            self._adapters = [None] * epochs if found is None else [*found]
        return self._adapters

    def trained(self, rows: Dataset, ids: Sequence[str], settings: Training, seed: int) -> list[Checkpoint] | None:
        """The checkpoints of a training that the run folder has."""
        if self.kept is None:
            return None
        how: dict[str, Any] = {"model": self.recipe.model, "dtype": self.pool.dtype, "seed": seed}
        return kept_training(self.kept.run, rows, ids, settings, **how)

    def _answers(self, source: Any, count: int, tokens: float, done: bool) -> None:
        """What DPO asks of the base model, or of a checkpoint: the probabilities of both answers of each pair."""
        if isinstance(source, Pairs) and source.by_dpo:
            self.add(Work("answers' probabilities", count, forward=tokens, done=done))

    def _pool_rows(self, number: int, views: Sequence[View], sums: bool) -> None:
        data = self.pool.data
        rows = _Rows("pool gradients", "pool", len(data), float(data.lengths.sum()), data)
        self._collect(rows, number, views, sums or self.pool.gradients.full_sum)
        self.checkpoints = len({place for name, place, _ in self._there if name == "pool"})

    def _collect(self, rows: _Rows, number: int, views: Iterable[View], sums: bool) -> None:
        """As `gradsift.gradients.collect.collect`: one pass for the views that are not there yet."""
        wanted = dict.fromkeys(kept_as(view, self.pool.gradients.projection) for view in views)
        known = {view: self._there.get((rows.name, number, view)) for view in wanted}
        missing = [view for view, held in known.items() if held is None or (sums and not held)]
        if not missing:
            return
        checkpoint = self._checkpoints()[number]
        self._there |= {(rows.name, number, view): sums for view in missing}
        made = [view for view in missing if not self._holds(rows.source, checkpoint, view, sums)]
        width = self.pool.gradients.projection.dim / self.recipe.gradients.projection.dim
        if not any(name == rows.name and place != number for name, place, _ in self._there):
            self._answers(rows.source, rows.count, rows.tokens, not made)
        self._answers(rows.source, rows.count, rows.tokens, not made)
        self.add(
            Work(
                rows.stage, rows.count, backward=rows.tokens, stored={"rows": rows.count * len(made) * width},
                tasks=(rows.count, rows.tokens / max(1, rows.count)), done=not made,
            )
        )  # fmt: skip

    def _holds(self, source: SequenceSource | None, checkpoint: Checkpoint | None, view: View, sums: bool) -> bool:
        """Whether the run folder has a store."""
        if self.kept is None or source is None or checkpoint is None:
            return False
        gradients = self.pool.gradients.model_copy(update={"full_sum": sums})
        return replace(self.kept, gradients=gradients).kept(source, checkpoint, view) is not None

    # --- rewards ------------------------------------------------------------------------------------------------------

    def _policy_rows(self, method: PolicyEstimator, target: PromptTarget, number: int) -> None:
        """Responses, rewards, and a row for each prompt."""
        known = self._responses(method, target, number)
        source = None if known is None else known.at(self._known(number))
        rows = self._rows_of(method, target, source, "policy")
        self._collect(rows, number, [target_view(method.view or "plain")], sums=False)

    def _rows_of(
        self, method: PolicyEstimator, target: PromptTarget, source: SequenceSource | None, name: str
    ) -> _Rows:
        called = "policy gradients", f"{name} {method.model_dump_json()}"
        if source is not None:
            return _Rows(*called, len(source.ids), float(sum(source.token_counts())), source)
        count = len(target.data) * (min(MOST_ROWS, method.drawing.samples) if name == "samples" else 1)
        return _Rows(*called, count, method.tokens_of(target))

    def _rollouts(self, method: PolicyEstimator, target: PromptTarget, *, rewarded: bool = True) -> None:
        """The responses wherever they are drawn."""
        alone = [None] if method.assistant is not None else self._checkpoints()
        for number in range(len(alone))[-1:] if method.last_checkpoint else range(len(alone)):
            self._responses(method, target, number, rewarded=rewarded)

    def _responses(
        self, method: PolicyEstimator, target: PromptTarget, number: int, *, rewarded: bool = True,
        ends: Sequence[Checkpoint | None] = (),
    ) -> PolicyTargets | None:  # fmt: skip
        """The responses at one of the `ends` of a method's own, or at a checkpoint, and what they earn."""
        writer = method.assistant
        checkpoint = None if writer is not None else (ends or self._checkpoints())[number]
        sampling, place = method.drawing, "" if writer is not None else f"{'end ' * bool(ends)}{number}"
        responses, limit = len(target.data) * sampling.samples, sampling.max_new_tokens
        drawn = unpaid = responses
        complete = None
        if self.kept is not None and (checkpoint is not None or writer is not None):
            sampler = sampler_of(self.kept, target, method, checkpoint or Checkpoint(None))
            samples, requests = missing_samples(self.kept.run, target.data.prompts, sampler)
            drawn = sum(len(request.numbers) for request in requests)
            unpaid = drawn + missing_rewards(target, samples) if rewarded else 0
            if not unpaid and self.kept.run.manifest(samples.prefix) is not None:
                complete = PolicyTargets(self.kept, replace(target), method)
        new = "responses", place, str(writer), str(method.server), sampling.model_dump_json()
        if self.is_new(*new, self.pool.seed if writer is None else None):
            prompts = [ids.tolist() for ids in target.data.prompt_ids]
            self.add(self._drawing(method, prompts, drawn, limit))
            if rewarded:
                self.earn("rewards", target, unpaid, limit)
        return complete

    def _drawing(self, method: PolicyEstimator, prompts: list[list[int]], drawn: int, limit: int) -> Work:
        sampling, assistant = method.drawing, method.assistant
        endpoint = method.server if assistant is None else assistant.model
        stored = {"bytes": len(prompts) * _FILE_BYTES + drawn * limit * _TOKEN_BYTES}
        if not isinstance(endpoint, Endpoint):
            drawing = Drawing(prompts, drawn, sampling, endpoint)
            return Work("responses", drawing=drawing, stored=stored, tasks=math.ceil(drawn / SHARE), done=not drawn)
        around = "" if assistant is None else assistant.prompt_prefix + assistant.prompt_suffix
        more = len(self.pool.tokenizer(around, add_special_tokens=False)["input_ids"]) if around else 0
        each = math.ceil(sampling.samples / endpoint.samples_per_request)
        calls = math.ceil(drawn / sampling.samples * each)
        read = calls * (float(np.mean([len(prompt) for prompt in prompts])) + more)
        asked = Asked("responses", endpoint.model, usage_of(endpoint, round(read), drawn * limit, requests=calls))
        return Work("responses", asked=(asked,), seconds=None, stored=stored, done=not drawn)

    def earn(self, stage: str, target: PromptTarget, responses: int, limit: int, *, role: str = "judge") -> None:
        """What the rewards of so many responses take beside arithmetic."""
        singles = single_rewards(target.reward)
        programs = responses * sum(single.programs for single in singles)
        texts = responses * sum(single.texts for single in singles)
        asked = []
        for single in singles:
            if single.questions and isinstance(target.judge, Endpoint):
                question, judge = partial(_judge_some, single, target), cast(Judge, single)
                judging = Judging(judge, target.judge, responses * single.questions, question)
                asked += self.judged(judging, limit, role)
        if programs or texts or asked:
            work = Work(stage, asked=tuple(asked), programs=programs, texts=texts, seconds=None, done=not responses)
            self.add(work)

    def judged(self, judging: Judging, limit: int, role: str) -> list[Asked]:
        """What a judge's answers cost: some questions are counted as they are asked, of empty responses."""
        if not isinstance(judging.ask, Endpoint):
            return []
        counting = _Counting(self.pool)
        judging.question(judging.judge.bind(counting))
        question = counting.mean + limit
        written = judging.calls * judging.judge.max_tokens
        usage = usage_of(judging.ask, round(judging.calls * question), written, requests=judging.calls)
        return [Asked(role, judging.ask.model, usage)]

    def _diagnose(self, method: PolicyEstimator, target: PromptTarget) -> None:
        """A row for each sample, and the labels' beside them."""
        view = target_view(method.view or "plain")
        every = range(len(self._checkpoints()))
        for number in every[-1:] if method.last_checkpoint else every:
            known, source = self._responses(method, target, number), None
            if known is not None:
                _, source = sample_source(known, sample_rows(known, self._known(number)))
            rows = self._rows_of(method, target, source, "samples")
            if rows.count:
                self._collect(rows, number, [view], sums=False)
                pool, at = self.kept or self.pool, self._checkpoints()[number]
                for one in method.sample_passes(pool, source, at, rows.count, rows.tokens):
                    self._passed(one, method, number)
            if target.labels is not None:
                own = target.labels
                labels = _Rows("target gradients", "labels", len(own), float(own.lengths.sum()), own)
                self._collect(labels, number, [view], sums=False)

    def _known(self, number: int) -> Checkpoint:
        """A checkpoint that is there; an assistant's responses need none."""
        return self._checkpoints()[number] or Checkpoint(None)

    # --- ratings and embeddings ---------------------------------------------------------------------------------------

    def _rate(self, rater: Rater) -> None:
        if not self.is_new("ratings", rater.model_dump_json()):
            return
        data = self.pool.data
        waiting = data.ids if self.kept is None else missing_ratings(self.kept, rater)
        work = Work("ratings")
        if rater.asks is not None:
            asked = [question for id_ in waiting if (question := rater.question(data.messages(id_))) is not None]
            counting = _Counting(self.pool)
            for question in asked[:: max(1, len(asked) // ASKED)]:
                counting.complete(question)
            endpoint, most = rater.asks
            usage = usage_of(endpoint, round(len(asked) * counting.mean), len(asked) * most, requests=len(asked))
            work = replace(work, asked=(Asked("ratings", endpoint.model, usage),), seconds=None)
        elif rater.passes and waiting:
            tokens = rater.passes * float(data.lengths[data.positions(waiting)].sum())
            work = replace(work, rows=rater.passes * len(waiting), forward=tokens)
        self.add(replace(work, done=not waiting))

    def _embedded(self, name: str, texts: list[str], model: str) -> None:
        if not self.is_new("embeddings", name, model, self.pool.data.fingerprint):
            return
        count = len(texts)
        if self.kept is not None and embeddings.at_hand(model):
            count = missing_embeddings(self.kept.run, texts, model)
        stored = {"bytes": 4 * count * embeddings.width(model)}
        self.add(Work("embeddings", texts=count, seconds=None if count else 0.0, stored=stored, done=not count))

    # --- explaining ---------------------------------------------------------------------------------------------------

    def _explain(self, job: Explain) -> None:
        """Answers, their gradients, choosing, and training on what was chosen."""
        pool = self.pool
        check_methods(pool, job.estimators, job.strategies)
        questions, _ = explain_questions(self.recipe, pool)
        last = len(self._checkpoints()) - 1
        place, checkpoint = self.kept or pool, self._checkpoints()[last]
        known = checkpoint if self.kept is not None else None
        silent_ones = missing_answers(place, questions, known, max_new_tokens=job.max_new_tokens)
        before = float(sum(map(len, silent_ones)))
        written = len(silent_ones) * job.max_new_tokens
        if any(question.output is None for question in questions):
            self.add(Work("answers", len(silent_ones), answers=(written, before), done=not silent_ones))
        source = known_ones = None
        if self.kept is not None and checkpoint is not None and not silent_ones:
            quiet = replace(self.kept, reporter=silent())
            answered = answers(quiet, questions, max_new_tokens=job.max_new_tokens)[0]
            source = OutputSource.of(quiet, answered)
            known_ones = kept_explanations(
                quiet, answered, k=job.budgets, estimators=job.estimators, strategies=job.strategies,
                coefficients=job.coefficients, candidates=job.candidates, aggregation=job.aggregation, exact=job.exact,
            )  # fmt: skip
            known_ones = known_ones if known_ones is not None and len(known_ones.entries) == len(answered) else None
        prompts = [len(pool.chat.prompt_ids(question.messages, question.options)) for question in questions]
        tokens = float(sum(prompts) + len(questions) * job.max_new_tokens)
        if source is not None:
            tokens = float(sum(source.token_counts()))
        outputs = _Rows("gradients of answers", "outputs", len(questions), tokens, source)
        views = explained_views(job.estimators)
        self._pool_rows(last, sorted(views), sums=False)
        self._collect(outputs, last, {target_view(view) for view in views}, self.pool.gradients.full_sum)
        asked = Target(source or _Expected([question.id for question in questions]), None, ())  # type: ignore[arg-type]
        for method in (part for one in job.estimators for part in (*one.before, one)):
            self._other_passes(method, asked)
            if method.text_model is not None:
                self._embedded("pool", [conversation_text(own) for own in conversations(pool.data)], method.text_model)
                self._embedded("outputs", [""] * len(questions), method.text_model)
            if method.view is not None:
                for number in [last] if method.last_checkpoint else range(last + 1):
                    self._pool_rows(number, [method.view], sums=False)
                    self._collect(outputs, number, [target_view(method.view)], self.pool.gradients.full_sum)
        if job.exact:
            self._candidates(job, len(questions), tokens, source, checkpoint, known_ones)
        if job.all_checkpoints:
            chosen = len(job.strategies) * len(job.estimators) * max(job.budgets)
            rows = (last + 1) * len(questions) * min(len(pool.data), chosen)
            read = rows * float(pool.data.lengths.mean()) + (last + 1) * tokens
            done = known_ones is not None and all(
                is_known(known_ones.pool, at, *known_ones.chosen(entry))
                for at in known_ones.pool.checkpoints()
                for entry in known_ones.entries
            )
            self.add(Work("chosen rows' gradients", rows, backward=read, done=done))
        choices = len(questions) * len(job.strategies) * len(job.estimators) * len(job.budgets)
        seconds, stored = choices * _CHOICE_SECONDS, {"bytes": choices * _CHOICE_BYTES}
        self.add(Work("choosing", seconds=seconds, stored=stored, done=known_ones is not None))
        if job.validation is not None:
            self._train_on_choices(job, job.validation, len(questions), tokens, known_ones)
        shown = job.paged(len(questions))
        self._match_tokens(job, shown, tokens / max(1, len(questions)), last, known_ones)
        if job.embedding is not None and shown and embeddings.at_hand(job.embedding):
            self.add(Work("maps of texts", texts=shown * min(job.candidates, len(pool.data)), seconds=None))

    def _candidates(
        self, job: Explain, outputs: int, tokens: float, source: OutputSource | None, checkpoint: Checkpoint | None,
        known: Explanations | None,
    ) -> None:  # fmt: skip
        """Whole gradients of the candidates, of random rows and of the outputs; at most so many rows."""
        pool = self.pool
        orders = {one.ranking for one in job.strategies} - {None} | {"most_helpful"}
        lists = (len(ORDERS) if "any" in orders else len(orders)) * len(job.estimators)
        draws = max([RANDOM.draws, *(getattr(one, "draws", 1) for one in job.strategies)])
        lowest = len(job.estimators) * max(min(OPPOSING, job.candidates), *job.budgets)
        each = min(len(pool.data), lists * max(job.candidates, *job.budgets) + lowest + draws * max(job.budgets))
        at_once = min(outputs, max(1, MOST_AT_ONCE // each)) if each < len(pool.data) else outputs
        rows = -(-outputs // at_once) * min(len(pool.data), at_once * each)
        adam = any(one.view == "adam" for one in job.estimators)
        done = known is not None
        if self.kept is not None and source is not None and checkpoint is not None and not done:
            done = all(is_known(self.kept, checkpoint, source.alone(id_), adam=adam) for id_ in source.ids)
        read = rows * float(pool.data.lengths.mean()) + tokens
        stored = {"bytes": outputs * 8.0 * (each + 1) ** 2 * (3 if adam else 1)}
        self.add(Work("candidates' gradients", rows + outputs, backward=read, stored=stored, done=done))

    def _match_tokens(self, job: Explain, outputs: int, tokens: float, last: int, known: Explanations | None) -> None:
        """The examples that are shown first, and their outputs, once more through the model."""
        lengths = self.pool.data.lengths
        ranker, k = job.estimators[0], shown_budget(job.budgets)
        times = last + 1 if ranker.splits and not ranker.last_checkpoint else 1
        rows, length = outputs * k * times, float(lengths.mean()) if outputs else 0.0
        kept = 8 * outputs * k * (length + tokens + min(MOST_PAIRS, length * tokens))
        read = rows * length + outputs * times * tokens
        done = known is not None and not missing_matches(
            known.pool, known.source, *known.matched(known.entries[:outputs])
        )
        self.add(Work("tokens of examples", rows, backward=read, stored={"bytes": kept}, done=done))

    def _train_on_choices(
        self, job: Explain, how: Validate, outputs: int, tokens: float, known: Explanations | None
    ) -> None:
        """Effects of steps on chosen and random sets: each a pass over its output, and where it is trained, over it."""
        pool, projection, random = self.pool, self.recipe.gradients.projection, how.step.random_sets
        sets = len(job.budgets) * (len(job.strategies) * len(job.estimators) + random)
        stored = how.route == "stored" or projection.kind == "none"
        trained = 0.0 if stored else outputs * sets * max(job.budgets) * float(pool.data.lengths.mean())
        if how.sanity:  # on the output itself, for real, and on single rows
            sets, trained = sets + 1 + random, trained + tokens
            trained += 0.0 if stored else outputs * random * float(pool.data.lengths.mean())
        own = float(pool.data.lengths.sum()) if stored and projection.kind != "none" else 0.0
        self.add(Work(
            "training on choices", outputs * sets, forward=sets * tokens, backward=trained + own,
            stored={"unprojected": len(pool.data)} if own else {},
            done=known is not None and is_validated(known, how.step, how.route, sanity=how.sanity),
        ))  # fmt: skip

    # --- what was met -------------------------------------------------------------------------------------------------

    def add(self, work: Work) -> None:
        """To what was met."""
        self.works.append(work)

    def is_new(self, *parts: object) -> bool:
        """Whether something is met for the first time: the run finds it the next time."""
        name = "\0".join(map(str, parts))
        if name in self._done:
            return False
        self._done.add(name)
        return True


@dataclass(frozen=True)
class _Expected:
    """Answers that are not there yet, as the targets of an estimator."""

    ids: list[str]
    fingerprint: str = "expected"


class _Cells:
    """The cells of a comparison: each one's fine-tuning, its metrics and its curve."""

    def __init__(self, walk: Walk, grid: Grid) -> None:
        self._walk, self._grid, self._base = walk, grid, subject_of(walk.pool, None).base
        self._asked: dict[int, tuple[Any, Needs | None]] = {}  # by metric: bound to its data, and what it needs
        self._chosen = _last_choices(walk, grid)

    def walk(self) -> None:
        """Cell by cell; equal work is counted each time, as nobody knows which choices agree."""
        grid, job, cells = self._grid, self._grid.job, list(self._grid.cells())
        trained = sum(not cell.contender.base for cell in cells)
        for cell in cells:
            epochs = () if cell.contender.base else range(1, grid.training_of(cell.contender).epochs + 1)
            model = self._train(cell, trained) if epochs else None
            for _ in epochs if job.best_by is not None else ():
                self._measure("evaluation", job.best_by, len(cells), known=False)
            known = not epochs or (model is not None and job.best_by is None)
            for metric in job.metrics:
                other = grid.opponent(metric, cell)
                if other is None or (other.contender.name, other.budget) != (cell.contender.name, cell.budget):
                    self._measure("evaluation", metric, len(cells), model, known=known)
            for watched in grid.curve if epochs else ():
                if self._walk.is_new("curve", watched.label):
                    self._measure("curves", watched, known=True)
                for epoch in epochs:
                    state = None if model is None else replace(model, kept=epoch)
                    self._measure("curves", watched, 1, state, known=state is not None)

    def _train(self, cell: CellOf, trainings: int) -> Trained | None:
        """The fine-tuning of a cell, and its model where the run folder has it."""
        walk, grid, (contender, budget, seed) = self._walk, self._grid, cell
        pool, training, data = walk.pool, grid.training_of(contender), grid.datasets.get(contender.name, walk.pool.data)
        tokens, found, whole = budget * float(pool.data.lengths.mean()), None, grid.job.full_training
        ids = self._chosen.get(cell.key)
        if not contender.chooses:
            ids = list(data.ids if contender.data is not None else grid.available)
        if ids is not None:
            tokens = float(data.lengths[data.positions(ids)].sum())
            found = None if whole else walk.trained(data, ids, training, seed)
        left = {"models": 1.0} if whole else {"adapters": training.rank / walk.recipe.warmup.rank}
        walk.add(
            Work(
                f"fine-tuning, {trainings} times", training.epochs * budget, backward=training.epochs * tokens,
                stored={kind: training.epochs * count for kind, count in left.items()},
                tasks=trainings, done=found is not None,
            )
        )  # fmt: skip
        return None if found is None else Trained(pool.model, tuple(found), len(found), seed, budget)

    def _measure(self, stage: str, metric: Any, tasks: int = 1, model: Trained | None = None, *, known: bool) -> None:
        """One metric of one model, None being the base; only what is `known` can have been measured before."""
        walk, (bound, needs) = self._walk, self._needs(metric)
        done = False
        if walk.kept is not None and known:
            config, run = evaluation_config(subject_of(walk.pool, model), metric, bound), walk.kept.run
            done = config is not None and run.manifest(run.prefix("evaluations", config)) is not None
        if needs is None or done:
            walk.add(Work(stage, seconds=None, done=done))
            return
        if len(needs.read):
            walk.add(Work(stage, len(needs.read), forward=float(sum(needs.read)), tasks=tasks))
        limit = 0
        if needs.sampling is not None:
            limit, count = needs.sampling.max_new_tokens, len(needs.prompts) * needs.sampling.samples
            drawing = Drawing(needs.prompts, count, needs.sampling)
            walk.add(Work(stage, drawing=drawing, tasks=tasks))
            if needs.both and walk.is_new("other side", metric.label):
                walk.add(Work(stage, drawing=drawing))
            if needs.target is not None:
                walk.earn(stage, needs.target, count, limit, role=f"judge of {metric.label}")
        if needs.judging is not None:
            asked = walk.judged(needs.judging, limit, f"judge of {metric.label}")
            walk.add(Work(stage, asked=tuple(asked), seconds=None))

    def _needs(self, metric: Any) -> tuple[Any, Needs | None]:
        if id(metric) not in self._asked:
            arm = opponent_of(metric) is not None  # whose responses are those of its own cell
            bound = beside_base(metric).bind(self._base)
            asked: Callable[[Any], Needs] | None = getattr(bound, "needs", None)
            needs = None if asked is None else asked(self._base)
            self._asked[id(metric)] = bound, replace(needs, both=False) if arm and needs is not None else needs
        return self._asked[id(metric)]


def _last_choices(walk: Walk, grid: Grid) -> dict[Key, list[str]]:
    """What the run folder's last comparison chose: of arms that are as they were, if all that they rest on is there."""
    if walk.kept is None or not walk.kept.run.storage.exists("comparison.json"):
        return {}
    if not all(work.done for work in walk.works):
        return {}
    try:
        last = json.loads(walk.kept.run.storage.read("comparison.json"))
        methods = {arm["name"]: (arm["estimator"], arm["selection"]) for arm in last["arms"]}
        chosen = {Key(cell["arm"], cell["budget"], cell["seed"]): cell["ids"] for cell in last["cells"]}
    except (ValueError, KeyError, TypeError):  # damaged: the next comparison writes it anew
        return {}
    now = {
        one.name: tuple(part and part.model_dump(mode="json") for part in (one.estimator, one.selection))
        for one in grid.contenders
    }
    known = set(walk.pool.training.ids)
    return {key: ids for key, ids in chosen.items() if now.get(key.arm) == methods.get(key.arm) and known >= set(ids)}


def walked(recipe: Recipe, scratch: str, reporter: Reporter, command: str = "run") -> tuple[Walk, Grid | None]:
    """The walk over a recipe, whose pool and target are opened in `scratch`, and the comparison that it asks for."""
    inside = recipe.model_copy(update={"out": scratch})
    if command not in COMMANDS:
        raise ConfigError(f"--for {command!r} is unknown: there are {', '.join(COMMANDS)}")
    if command != "run":
        check_rollouts(recipe)
        pool = open_recipe(inside, reporter, announce=False)
        rewarded = command == "reward"
        prompts = open_recipe_target(inside.model_copy(update={"keep_overlap": True}), pool, rewarded=rewarded)
        return Walk(recipe, pool, prompts, _kept_pool(recipe, pool)).roll_out(rewarded=rewarded), None
    if recipe.bench is not None:
        pool, known, settings = open_bench(inside, reporter, announce=False)
        return Walk(recipe, pool, known, _kept_pool(recipe, pool)).judge(settings), None
    if recipe.compare is not None:
        grid = open_grid(inside, recipe.compare, reporter)
        return Walk(recipe, grid.pool, grid.target, _kept_pool(recipe, grid.pool)).compare(grid), grid
    pool = open_recipe(inside, reporter, announce=False)
    wanted = takes_reward(recipe.estimator) or (recipe.target is not None and chooses(recipe))
    target = open_recipe_target(inside, pool) if wanted else None
    return Walk(recipe, pool, target, _kept_pool(recipe, pool)).run(), None


def _kept_pool(recipe: Recipe, pool: Pool) -> Pool | None:
    """The pool in the recipe's own run folder, which belongs to no other one; None where there is none yet."""
    run = Run(recipe.out)
    if not run.storage.exists("run.json"):
        return None
    wanted = pool.run.identity()
    run.refuse_other(wanted, pool.run.data_of(wanted["pool"]))
    return replace(pool, run=run, reporter=silent())


def _judge_some(judge: RewardValue, target: PromptTarget, bound: Any) -> None:
    """Put questions about some prompts with empty responses to a judge."""
    examples = target.data.examples[:: max(1, len(target.data) // ASKED)]
    rows = [example.row for example in examples]
    read = {name: [row[name] for row in rows] for name in judge.columns if all(name in row for row in rows)}
    bound(prompts=[prompt_of(example) for example in examples], completions=[""] * len(examples), **read)


class _Counting:
    """A judge that counts the tokens of what it is asked, and says nothing."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.lengths: list[int] = []

    @property
    def mean(self) -> float:
        """Tokens of a question."""
        return float(np.mean(self.lengths)) if self.lengths else 0.0

    def complete(self, messages: Sequence[Message], **_: object) -> str:
        texts = [message["content"] for message in messages]
        ids = self.pool.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.lengths.append(sum(map(len, ids)))
        return ""
