"""EK-FAC with a reward's policy gradient as target: a dense inverse in float64, the sign, what is planned and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsift as gs
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.types import Sequence
from gradsift.context import Pool
from gradsift.gradients.capture import find_modules
from gradsift.gradients.kronecker import Eigenbasis, Pass, corrected_eigenvalues, eigenvectors, kronecker_factors
from gradsift.influence.nice import PolicyTargets
from gradsift.influence.nice_ekfac import NICEEKFAC
from gradsift.influence.prompts import PromptTarget
from gradsift.model.models import host
from gradsift.rewards.form import Length
from gradsift.warmup.checkpoint import Checkpoint
from tiny_world import World, pool_rows, target_rows

Opened = tuple[Pool, PromptTarget]
FEW = gs.Sampling(samples=4, max_new_tokens=6)
METHOD = NICEEKFAC(sampling=FEW)


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture(scope="module")
def opened(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A pool in float64 whose rows are not projected, with two checkpoints, and rewarded prompts."""
    pool = tiny.open_pool(tmp_path_factory.mktemp("nice-ekfac") / "run", pool_rows(8), dtype="float64")
    return pool, gs.open_prompts(target_rows(3), pool, vowels)


def drawn(opened: Opened, checkpoint: Checkpoint) -> tuple[list[Sequence], Tensor]:
    """The responses of all prompts as sequences that weigh 1 on each of their tokens, and what they earned."""
    responses, rewards, _ = PolicyTargets(*opened, METHOD).rollouts(checkpoint)
    every = [response for own in responses.values() for response in own]
    sequences = [
        Sequence(
            number,
            np.concatenate([one.prompt_ids, one.token_ids]).astype(np.int32),
            np.repeat([0, 1], [len(one.prompt_ids), len(one.token_ids)]).astype(np.float32),
        )
        for number, one in enumerate(every)
    ]
    return sequences, torch.tensor([rewards[one.key] for one in every], dtype=torch.float64).view(3, -1)


def log_probability(network: Any, sequence: Sequence) -> Tensor:
    """Σ_t log f(ŷ^t | before) over a response's tokens."""
    ids = torch.tensor(sequence.token_ids.astype(np.int64))
    log_p = torch.log_softmax(network(input_ids=ids[None], use_cache=False).logits[0, :-1], dim=-1)
    return (log_p.gather(1, ids[1:, None])[:, 0] * torch.tensor(sequence.weights[1:])).sum()


def ascents(opened: Opened, checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Of each prompt (1/M) Σ_m r_m ∇log f by autograd through the whole network, module by module `[out in]`."""
    pool, _ = opened
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    modules = find_modules(network).captured
    weights = [one.weight for one in modules]
    sequences, rewards = drawn(opened, checkpoint)
    found = []
    for weight in weights:
        weight.requires_grad_(True)
    for number, own in enumerate(rewards):
        mine = sequences[number * len(own) : (number + 1) * len(own)]
        value = torch.stack([r * log_probability(network, one) for r, one in zip(own, mine, strict=True)]).mean()
        parts = torch.autograd.grad(value, weights)
        found.append({one.name: part for one, part in zip(modules, parts, strict=True)})
    for weight in weights:
        weight.requires_grad_(False)
    return found


def test_is_a_dense_solve_with_the_policy_gradient(opened: Opened) -> None:
    """Σ_e w_e λ_e ⟨g, (H_e + λ_e)⁻¹ (−(1/M) Σ r ∇log f)⟩, −g being a row's ascent: H_e a dense matrix of each module,
    policy gradients by autograd over single responses; to the precision of stored float32.
    """
    pool, target = opened
    wanted = torch.zeros(8, 3, dtype=torch.float64)
    rates = [one.learning_rate or 0.0 for one in pool.checkpoints()]
    sample, settings = pool.data.sequences(0, 8), Pass(1000, list(pool.data.ids))
    for checkpoint, rate in zip(pool.checkpoints(), rates, strict=True):
        store = pool.stores(checkpoint, ["plain"])["plain"]
        rows, up = store.rows(0, 8).double(), ascents(opened, checkpoint)
        network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
        modules = find_modules(network).captured
        bases = {
            name: Eigenbasis(*(eigenvectors(one.double()) for one in own))
            for name, own in kronecker_factors(network, modules, sample, settings).items()
        }
        values = corrected_eigenvalues(network, modules, sample, bases, settings)
        damping = 0.1 * max(float(own.max()) for own in values.values()) / 8
        start = 0
        for one in modules:
            kron = torch.kron(bases[one.name].out_vectors, bases[one.name].in_vectors)
            H = kron @ torch.diag(values[one.name].flatten() / 8) @ kron.T
            V = torch.stack([-own[one.name].flatten() for own in up], dim=1)
            solved = torch.linalg.solve(H + damping * torch.eye(len(H), dtype=torch.float64), V)
            wanted += rate / sum(rates) * damping * rows[:, start : start + len(H)] @ solved
            start += len(H)
        assert start == rows.shape[1]
    scores = gs.score(pool, target, METHOD)
    assert scores.per_target is not None
    np.testing.assert_allclose(scores.per_target, wanted.numpy(), rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert len(scores.rewards) == 2
    assert scores.rewards[0].prompts == 3


def test_a_step_on_a_row_earns_what_its_score_says(opened: Opened) -> None:
    """The sign, by finite differences: with a λ above all curvature a score is how fast (1/M) Σ r log f, responses
    held, rises along a plain step on the row: higher = training on it earns more.
    """
    pool, target = opened
    method = NICEEKFAC(sampling=FEW, damping=1e9, checkpoints="last")
    per_target = gs.score(pool, target, method).per_target
    assert per_target is not None
    checkpoint = pool.checkpoints()[-1]
    rows = pool.stores(checkpoint, ["plain"])["plain"].rows(0, 8).double()
    sequences, rewards = drawn(opened, checkpoint)
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    modules = find_modules(network).captured
    sizes = [one.out_features * one.in_features for one in modules]

    def move(row: Tensor, by: float) -> None:
        with torch.no_grad():
            for one, part in zip(modules, row.split(sizes), strict=True):
                one.weight.add_(by * part.view(one.shape))

    for number in (0, 1, 5):
        earned = []
        for side in (1, -1):
            move(rows[number], -side * 1e-4)
            with torch.no_grad():
                logs = torch.stack([log_probability(network, one) for one in sequences])
            move(rows[number], side * 1e-4)
            earned.append((rewards * logs.view_as(rewards)).mean(dim=1))
        rise = ((earned[0] - earned[1]) / 2e-4).numpy()
        np.testing.assert_allclose(per_target[number], rise, rtol=1e-3, atol=1e-4 * np.abs(rise).max())


def test_is_planned_as_it_runs(tiny: World, tmp_path: Path) -> None:
    """Before responses are there they count as long as they may be; a second scoring has nothing left to do."""
    pool = tiny.open_pool(tmp_path / "run", pool_rows(8), dtype="float64")
    target = gs.open_prompts(target_rows(3), pool, Length(minimum=1))
    before = METHOD.passes(pool, target, pool.checkpoints)
    assert not any(one.done for one in before)
    prompts = float(target.data.lengths.sum())
    assert before[1].tokens == pytest.approx(4 * (prompts + 3 * 6) + float(pool.data.lengths.sum()))
    gs.score(pool, target, METHOD)
    after = METHOD.passes(pool, gs.open_prompts(target_rows(3), pool, Length(minimum=1)), pool.checkpoints)
    assert all(one.done for one in after)
    assert [one.stage for one in after] == [one.stage for one in before]
    assert after[1].tokens <= before[1].tokens


def test_what_does_not_go_together_is_refused(opened: Opened) -> None:
    """EK-FAC's and the policy gradient's own refusals both hold; labels are no reward; silence is told."""
    with pytest.raises(ConfigError, match="leave labels at model"):
        NICEEKFAC(labels="data", conjugate_gradient=1)
    with pytest.raises(ConfigError, match="a baseline compares the samples"):
        NICEEKFAC(sampling=gs.Sampling(samples=1), policy=gs.PolicyGradient(baseline="leave_one_out"))
    pool, _ = opened
    with pytest.raises(ConfigError, match="ranks by a reward"):
        gs.score(pool, gs.open_target(target_rows(3), pool), METHOD)
    silent = gs.open_prompts(target_rows(3), pool, lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(DataError, match="no prompt has a signal"):
        gs.score(pool, silent, METHOD)
    assert METHOD.label == "NICE-EK-FAC (M=4)"
    assert NICEEKFAC(checkpoints="last").label == "NICE-EK-FAC (last checkpoint)"
