"""Pools of preference pairs: DPO's loss in gradients, training, evaluation and MAGIC, and pairs to drop or to flip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers.models.llama import modeling_llama

import gradsift as gs
from gradsift.context import Pool
from gradsift.data.pairs import Pairs
from gradsift.model.models import host
from gradsift.warmup.train import Warmup
from tiny_world import ANIMALS, COLOURS, World

BETA = 0.3
TRAINED = Warmup(fraction=1.0, epochs=2, rank=2, alpha=8, learning_rate=1e-2, batch_size=3, dropout=0.0)


def preferred(count: int = 9, start: int = 0) -> list[dict[str, Any]]:
    """Right colours beside wrong ones."""
    rows = []
    for number in range(start, start + count):
        animal, right, wrong = ANIMALS[number % 8], COLOURS[number % 8], COLOURS[(3 * number + 1) % 8]
        asked = f"what colour is the {animal} of {number}"
        rows.append({"id": f"d{number}", "prompt": asked, "chosen": f"it is {right}", "rejected": f"{wrong}, it says"})
    return rows


def some_turned(*turned: str) -> list[dict[str, Any]]:
    """The same, of which some have their answers exchanged."""
    rows = preferred()
    for row in rows:
        if row["id"] in turned:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
    return rows


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    """Llama's norm, which computes in float32 whatever its input, in float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
        yield


def opened(tiny: World, out: Path, rows: list[dict[str, Any]], **options: Any) -> Pool:
    unprojected = gs.Gradients(projection=gs.Projection(kind="none"), dtype="float32")
    given = {"objective": "dpo", "beta": BETA, "dtype": "float64", "max_length": 64, "device": "cpu"}
    given |= {"warmup": TRAINED, "gradients": unprojected}
    return gs.open_pool(rows, model=tiny.model, out=str(out), **(given | options))


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return opened(tiny, tmp_path_factory.mktemp("preferences") / "run", some_turned("d2", "d5"))


def log_p(network: Any, example: Any) -> torch.Tensor:
    """Σ log p of the labels, by the model's own forward and nothing else."""
    ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
    found = torch.log_softmax(network(input_ids=ids).logits[0, :-1].double(), -1)
    chosen = found.gather(1, ids[0, 1:, None])[:, 0]
    return (chosen * torch.from_numpy(example.supervised[1:])).sum()


def plain_losses(network: Any, pairs: Pairs) -> list[torch.Tensor]:
    """The definition: −log σ(β[(log π(c) − log π₀(c)) − (log π(r) − log π₀(r))])."""
    losses = []
    for place in range(len(pairs)):
        both = pairs[place], pairs.rejected[place]
        with torch.no_grad(), network.disable_adapter():
            chosen, rejected = (log_p(network, one) for one in both)
        margin = (log_p(network, both[0]) - chosen) - (log_p(network, both[1]) - rejected)
        losses.append(-logsigmoid(BETA * margin))
    return losses


def with_gradients(network: Any) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in network.named_parameters() if "lora_" in n}
    for parameter in named.values():
        parameter.requires_grad_(True)
    return named


def test_gradients_and_losses_are_those_of_the_definition(pool: Pool) -> None:
    """Rows at each checkpoint are autograd's gradients of the DPO loss in float64; a store's losses are that loss."""
    assert isinstance(pool.data, Pairs)
    for checkpoint in pool.checkpoints():
        store = pool.stores(checkpoint, ["plain"])["plain"]
        network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
        named = with_gradients(network)
        order = [segment["name"] for segment in store.config["segments"]]
        losses = plain_losses(network, pool.data)
        places = {name.replace(".default.", ".").removeprefix("base_model.model."): name for name in named}
        keys = [next(own for short, own in places.items() if short in name or name in short) for name in order]
        for row, loss in enumerate(losses):
            wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [named[key] for key in keys])])
            found = store.rows(row, row + 1)[0].double()
            assert float((found - wanted).norm() / wanted.norm()) < 1e-6
        np.testing.assert_allclose(store.losses.numpy(), [loss.item() for loss in losses], rtol=1e-6)


def test_held_out_pairs_are_measured_beside_the_base_model(pool: Pool) -> None:
    """Loss, accuracy and margin are the definition's; the base model prefers nothing, at a loss of log 2."""
    held_out = preferred(4, start=9)
    last = pool.checkpoints()[-1]
    metric = gs.Preferences(data=held_out, beta=BETA)
    found = gs.evaluate(pool, last, [metric]).results[0]
    assert found.error is None, found.error
    base = gs.evaluate(pool, None, [metric]).results[0]
    assert base["loss"].value == pytest.approx(np.log(2), rel=1e-6)
    assert base["accuracy"].value == 0
    network = host(pool.model, pool.dtype, pool.device).with_adapter(last.adapter)
    with torch.no_grad():
        losses = torch.stack(plain_losses(network, gs.open_target(held_out, pool).data))
    assert found["loss"].value == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found["accuracy"].value == pytest.approx((losses < np.log(2)).double().mean().item())
    assert found["margin"].value == pytest.approx(-torch.expm1(losses).log().mean().item(), rel=1e-5)


def test_training_takes_the_steps_of_the_loss(pool: Pool) -> None:
    """A training without dropout ends where AdamW on the definition's losses ends."""
    from gradsift.warmup.train import effective_batch_size, epoch_order
    from gradsift.warmup.trainer import adapter_on, learning_rates

    ids = sorted(pool.training.ids)
    size, steps = effective_batch_size(len(ids), TRAINED.batch_size), 0
    total = TRAINED.epochs * -(-len(ids) // size)
    rates = learning_rates(TRAINED, total)
    with adapter_on(host(pool.model, pool.dtype, pool.device).base(), TRAINED, pool.seed) as network:
        named = with_gradients(network)
        optimizer = torch.optim.AdamW(named.values(), weight_decay=0, betas=TRAINED.betas, eps=TRAINED.eps)
        for epoch in range(TRAINED.epochs):
            order = epoch_order(len(ids), pool.seed, epoch)
            for start in range(0, len(ids), size):
                own = [ids[place] for place in order[start : start + size]]
                part = pool.training.subset(pool.training.positions(own))
                optimizer.zero_grad()
                torch.stack(plain_losses(network, part)).mean().backward()
                torch.nn.utils.clip_grad_norm_(named.values(), TRAINED.max_grad_norm)
                optimizer.param_groups[0]["lr"] = rates[steps]
                optimizer.step()
                steps += 1
        wanted = {name.replace(".default.", "."): p.detach().clone() for name, p in named.items()}
    from safetensors.torch import load_file

    found = load_file(Path(pool.checkpoints()[-1].adapter) / "adapter_model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-7)


def test_magic_goes_back_through_a_training_by_dpo(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """Scores are minus the derivatives of held-out DPO losses by a pair's weight, by retraining; riders go along."""
    small = opened(tiny, tmp_path / "run", preferred(11), warmup=TRAINED.model_copy(update={"epochs": 1}))
    target = gs.open_target(preferred(2, start=12), small)
    method = gs.MAGIC(fraction=0.7, per="target")
    scores = gs.score(small, target, method)
    replay, ids = method._replay(small, set(), small.seed)
    held_out = small.referred(target.data)
    sequences, dpo = held_out.sequences_at(range(2)), held_out.dpo(range(2))
    riders = replay.record.riders[0]
    assert len(riders)
    with replay.network() as network:
        for id_ in (ids[0], ids[-1]):
            ends = []
            for side in (1, -1):
                weights = torch.ones(len(small.training), dtype=torch.float64)
                weights[small.training.position(id_)] += side * 1e-4
                ends.append(network.losses(replay.end_with(network, weights), sequences, 2, dpo))
            wanted = -(ends[0] - ends[1]) / 2e-4
            np.testing.assert_allclose(scores.per_target[scores.ids.index(id_)], wanted.numpy(), rtol=1e-4, atol=1e-8)
        data, theta = replay.data, replay.end(network)
        along = torch.randn(1, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = network.ride(theta, data.sequences_at(riders), len(riders), along, data.dpo(riders))
        for number, place in enumerate(riders):
            gradient, _ = network.gradient(theta, data.sequences_at([place]), torch.ones(1), data.dpo([place]))
            assert float(found[0, number]) == pytest.approx(float(gradient @ along[0]), rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        gs.LESS(optimizer="sgd"),
        gs.LESS(optimizer="adam"),
        gs.LESS(optimizer="sgd", normalise=False),
        gs.LESS(optimizer="sgd", normalise=False, checkpoints="last"),
        gs.DataInf(),
    ],
    ids=lambda method: method.label,
)
def test_what_a_pair_would_do_turned_round_is_foretold(pool: Pool, tiny: World, tmp_path: Path, method: Any) -> None:
    """A pair's score turned round is its score in a pool that has it so, whatever the method; the median decides."""
    from gradsift.influence.suggestions import suggestions

    adapters = [str(one.adapter) for one in pool.checkpoints()]
    target = gs.open_target(preferred(2, start=12), pool)
    scores = gs.score(pool, target, method)
    found = suggestions(scores)
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert {one.score for one in found} >= {float(s) for s in scores.aggregate if s < 0}
    assert 0 < len(found) < len(pool.data)
    median = np.median(scores.aggregate[scores.aggregate > 0])
    if isinstance(method, gs.DataInf):  # whose curvature is that of the pool as it is
        law = [-one.score * np.exp(one.margin) for one in found]
        np.testing.assert_allclose([one.turned for one in found], law, rtol=1e-6)
        return
    exchanged = {"d2", "d5"} ^ {one.id for one in found}
    turned = opened(tiny, tmp_path / "turned", some_turned(*exchanged), adapters=adapters)
    brute = gs.score(turned, gs.open_target(preferred(2, start=12), turned), method)
    for one in found:
        assert one.turned == pytest.approx(brute.aggregate[brute.ids.index(one.id)], rel=1e-3, abs=1e-6)
        assert one.suggestion == ("flip" if one.turned > median else "drop")
