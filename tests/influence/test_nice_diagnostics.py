"""Diagnostics of policy gradients: known agreement in, known figures out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gradsift.base.errors import ConfigError
from gradsift.context import Pool
from gradsift.generation.sampling import Sampling
from gradsift.gradients.policy import PolicyGradient, PolicySource
from gradsift.influence.bm25 import BM25
from gradsift.influence.diagnostics import _Resampling, cosines, diagnose
from gradsift.influence.estimator import rate_weights
from gradsift.influence.less import less_scores
from gradsift.influence.nice import NICE, NICEIF, PolicyTargets
from gradsift.influence.nice_ekfac import NICEEKFAC
from gradsift.influence.prompts import PromptTarget, open_prompts
from gradsift.influence.random import Random
from gradsift.influence.reliability import Looked, Reliability
from gradsift.influence.scores import score, strata_of, target_parts
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from gradsift.selection.trust import choice_among, looked_at, sample_reliability, target_reliability
from tiny_world import World, target_rows

SIX = Sampling(samples=6, max_new_tokens=6)


def long_ones(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def few_ones(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) in (8, 11)) for text in completions]


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("diagnostics") / "run")


@pytest.fixture(scope="module")
def target(pool: Pool) -> PromptTarget:
    return open_prompts(target_rows(), pool, long_ones, subtask="task")


def policy_rows(
    pool: Pool, target: PromptTarget, method: NICE, taken: dict[str, list[int]] | None = None
) -> list[torch.Tensor]:
    """At each checkpoint, the policy gradients of all samples, or of some as often as they are named [prompt dim]."""
    targets, found = PolicyTargets(pool, target, method), []
    for checkpoint in pool.checkpoints():
        responses, rewards, _ = targets.rollouts(checkpoint)
        own = {id_: there if taken is None else [there[n] for n in taken[id_]] for id_, there in responses.items()}
        source = PolicySource.of(own, rewards, method.policy, template=pool.chat.fingerprint, labels=targets.labels)
        store = pool.collect(source, checkpoint, ["plain"], what="target")["plain"]
        found.append(store.rows_by_id(target.data.ids).double())
    return found


def scores_of(pool: Pool, targets: list[torch.Tensor], *, normalise: bool) -> np.ndarray:
    checkpoints = pool.checkpoints()
    rows = [pool.stores(c, ["adam"])["adam"].rows_by_id(pool.data.ids).double() for c in checkpoints]
    rates = [c.learning_rate or 0.0 for c in checkpoints]
    scores = less_scores(rows, targets, rates, normalise=normalise).numpy()
    return np.stack([scores[:, [0, 2]].mean(axis=1), scores[:, [1, 3]].mean(axis=1)], axis=1)


POLICIES = (
    PolicyGradient(), PolicyGradient(baseline="mean"), PolicyGradient(baseline="leave_one_out"),
    PolicyGradient(variant="rejection"), PolicyGradient(variant="ppo"), PolicyGradient(importance_weights=True),
    PolicyGradient(variant="rejection", fallback="label"),
)  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [pytest.param(one, marks=[pytest.mark.slow] * (number in (0, 2))) for number, one in enumerate(POLICIES)],
    ids=str,
)
def test_resamples_are_rankings_of_their_own(
    pool: Pool, target: PromptTarget, policy: PolicyGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What resampling adds to a score is that of the ranking by just those samples, whose baseline and spread are their
    own, less that by all; times √(M/(M − 1)). Labels stand for resamples in which nothing has any weight."""
    method = NICE(sampling=SIX, policy=policy, normalise=False)
    if policy.fallback == "label":
        target = open_prompts(target_rows(), pool, few_ones, subtask="task")
    generator = np.random.default_rng(1)
    counts = {id_: torch.from_numpy(generator.multinomial(6, [1 / 6] * 6, size=3)) for id_ in target.data.ids}
    monkeypatch.setattr("gradsift.influence.diagnostics.DRAWS", 3)
    monkeypatch.setattr(_Resampling, "_counts", lambda self, id_, n: counts[id_])
    strata = strata_of(4, target.subtasks, "max_of_means")
    work = _Resampling(PolicyTargets(pool, target, method), strata, Looked.at(pool.data.ids))
    checkpoints = pool.checkpoints()
    for checkpoint, weight in zip(checkpoints, rate_weights(checkpoints), strict=True):
        work.at(checkpoint, weight)
    whole = scores_of(pool, policy_rows(pool, target, method), normalise=False)
    scale = float(np.abs(whole).max())
    assert np.allclose(work.scores[..., 0], whole, atol=1e-4 * scale)
    for draw in range(3):
        taken = {id_: torch.arange(6).repeat_interleave(own[draw]).tolist() for id_, own in counts.items()}
        resampled = scores_of(pool, policy_rows(pool, target, method, taken), normalise=False)
        wanted = np.sqrt(6 / 5) * (resampled - whole)
        assert np.allclose(work.scores[..., 1 + draw], wanted, atol=2e-4 * max(scale, float(np.abs(wanted).max())))
    assert work.units == 24
    if policy.fallback == "none":
        assert work.freedom().tolist() == [10, 10]
        return
    earned = work.whole.rollouts(checkpoints[0])[1]
    signal = {id_: torch.tensor([earned[id_, n] or 0.0 for n in range(6)]).double() for id_ in counts}
    fallen = [bool((counts[id_].double() @ own == 0).any()) for id_, own in signal.items() if bool(own.any())]
    assert len(fallen) == 3  # one prompt has no signal at all
    assert any(fallen)
    assert sorted(work.freedom().tolist()) == [5, 10]


@pytest.mark.parametrize(
    "method", [NICE(sampling=SIX), NICEIF(sampling=SIX), NICEEKFAC(sampling=SIX)], ids=["NICE", "NICE_IF", "NICE_EKFAC"]
)
def test_the_ranking_is_that_of_the_scores(pool: Pool, target: PromptTarget, method: Any) -> None:
    """All samples weighed once give the scores that `score` gives, for each method."""
    scores = score(pool, target, method)
    whole = PolicyTargets(pool, target, method)
    checkpoints = pool.checkpoints()[-1:] if isinstance(method, NICEIF) else pool.checkpoints()
    weights = [1.0] if isinstance(method, NICEIF) else rate_weights(checkpoints)
    assert scores.strata is not None
    work = _Resampling(whole, scores.strata, Looked.at(scores.ids))
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        work.at(checkpoint, weight)
    found = work.scores[..., 0].amax(dim=1).numpy()
    assert np.allclose(found, scores.aggregate, atol=1e-3 * float(np.abs(scores.aggregate).max()))
    assert scores.per_target is not None
    parts = target_parts(scores, scores.ids)
    assert np.allclose((parts @ scores.strata.outputs.numpy().T).max(axis=1), scores.aggregate, atol=1e-6)


def test_halves_are_independent_estimates(pool: Pool) -> None:
    """Of two samples there is one way to halve them: their cosine, each with a weight of its own."""
    target = open_prompts(target_rows(), pool, lambda completions, **_: [1.0 + len(text) for text in completions])
    method = NICE(sampling=Sampling(samples=2, max_new_tokens=6))
    found = diagnose(pool, target, method)
    first, second = (policy_rows(pool, target, method, {id_: [n] for id_ in target.data.ids}) for n in (0, 1))
    assert found.prompt_ids == target.data.ids
    for entry, a, b in zip(found.checkpoints, first, second, strict=True):
        assert np.allclose(entry.half_cosine, torch.cosine_similarity(a, b, dim=1), atol=1e-5)
        assert entry.median_half_cosine == pytest.approx(float(np.median(entry.half_cosine)))


def test_choices_say_how_often_they_would_come_again(pool: Pool, target: PromptTarget) -> None:
    """Of each row of a choice by scores alone; what is new is said of both reliabilities."""
    scores = score(pool, target, NICE(sampling=SIX))
    chosen = select(scores, TopK(), budget=5)
    found, over_targets = sample_reliability(scores, chosen), target_reliability(scores, chosen)
    assert found is not None
    assert over_targets is not None
    assert [len(one.kept or ()) for one in (found.reliability, over_targets)] == [5, 5]
    assert (found.reliability.over, found.reliability.units) == ("samples", 24)
    assert (over_targets.over, over_targets.units) == ("targets", 4)
    assert found.reliability == diagnose(pool, target, NICE(sampling=SIX), choice=choice_among(chosen, looked_at(
        scores, chosen)), looked=looked_at(scores, chosen)).reliability  # fmt: skip
    by_coverage = select(scores, FacilityLocation(), budget=5)
    assert choice_among(by_coverage, looked_at(scores, by_coverage)) is None
    assert sample_reliability(score(pool, target, BM25())) is None
    assert target_reliability(score(pool, None, Random())) is None


def test_the_loss_cosine_is_that_of_the_labels(pool: Pool, target: PromptTarget) -> None:
    """Cosine with the token-mean loss gradient of each prompt's own answer; NaN where a prompt has none."""
    found = diagnose(pool, target, NICEIF(sampling=SIX))
    (entry,) = found.checkpoints
    checkpoint = pool.checkpoints()[-1]
    policy = PolicyTargets(pool, target, NICEIF(sampling=SIX)).at(checkpoint)
    assert target.labels is not None
    a, b = (
        pool.collect(source, checkpoint, ["plain"], what="target")["plain"].rows_by_id(target.data.ids)
        for source in (policy, target.labels)
    )
    assert entry.loss_cosine is not None
    assert np.allclose(entry.loss_cosine, torch.cosine_similarity(a, b, dim=1), atol=1e-5)
    assert entry.median_loss_cosine == pytest.approx(float(np.median(entry.loss_cosine)))
    bare = [{key: value for key, value in row.items() if key != "completion"} for row in target_rows()]
    mixed = open_prompts([*target_rows()[:2], *bare[2:]], pool, long_ones)
    partly = diagnose(pool, mixed, NICEIF(sampling=SIX)).checkpoints[0]
    assert partly.loss_cosine is not None
    assert np.isnan(partly.loss_cosine).tolist() == [False, False, True, True]
    none = diagnose(pool, open_prompts(bare, pool, long_ones), NICEIF(sampling=SIX)).checkpoints[0]
    assert none.loss_cosine is None
    assert none.median_loss_cosine is None


def test_noise_is_told_and_signal_is_not(pool: Pool) -> None:
    """Rewards drawn by lot give halves that agree on nothing, and no percentage or a warning; one and the same answer
    gives 1."""
    generator = np.random.default_rng(0)

    def lot(completions: list[str], **columns: Any) -> list[float]:
        return generator.normal(size=len(completions)).tolist()

    noise = diagnose(pool, open_prompts(target_rows(), pool, lot), NICE(sampling=SIX))
    assert noise.reliability.low < 0.3
    assert not noise.reliability.told or noise.reliability.weak
    assert any("too weak to rank by" in text for text in noise.warnings) == noise.reliability.weak
    warm = Sampling(samples=6, max_new_tokens=6, top_k=1)  # the same answer each time
    sure = diagnose(pool, open_prompts(target_rows(), pool, long_ones), NICE(sampling=warm))
    assert (sure.reliability.low, sure.reliability.high) == (1.0, 1.0)
    assert all(np.nanmin(entry.half_cosine) == pytest.approx(1, abs=1e-5) for entry in sure.checkpoints)
    assert not any("too weak" in text for text in sure.warnings)
    weak = Reliability("samples", 6, 0.0, 0.2, 0.45)
    assert weak.weak
    assert not weak.told


def test_a_prompt_whose_halves_have_no_signal_has_no_cosine(pool: Pool) -> None:
    """Where one sample of six earns something, one half never does: NaN. What can have no weight takes no pass."""
    counts: dict[str, int] = {}

    def first(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        numbers = []
        for prompt in prompts:
            numbers.append(counts.get(prompt, 0))
            counts[prompt] = numbers[-1] + 1
        return [float(number % 6 == 0) for number in numbers]

    found = diagnose(pool, open_prompts(target_rows(), pool, first), NICE(sampling=SIX, checkpoints="last"))
    assert np.isnan(found.checkpoints[0].half_cosine).all()
    assert math.isnan(found.checkpoints[0].median_half_cosine)
    assert not found.reliability.told
    configs = [pool.run.manifest(prefix) for prefix in pool.run.artifacts("gradients")]
    assert any(config is not None and config["shards"][0]["rows"] == 4 for config in configs)
    with pytest.raises(ConfigError, match="halves of one sample cannot be compared"):
        diagnose(pool, open_prompts(target_rows(), pool, first), NICE(sampling=Sampling(samples=1)))


def test_cosines_row_by_row() -> None:
    """Any length of row, far below what fp32 can square; NaN for a zero row."""
    first, second = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    wanted = torch.cosine_similarity(first, second, dim=1)
    assert torch.allclose(cosines(first, second), wanted)
    assert torch.allclose(cosines(first * 1e-200, second * 1e150), wanted)
    first[2] = 0
    assert torch.isnan(cosines(first, second)).tolist() == [False, False, True, False, False]
