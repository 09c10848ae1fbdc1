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
from gradsift.base.errors import ConfigError
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


def flat_gradient(value: torch.Tensor, weights: list[torch.Tensor], **options: Any) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, weights, **options)])


def weights_of(network: Any, segments: Any) -> list[torch.Tensor]:
    """The trained weight of each segment of a store."""
    named = {
        n.replace(".default.", ".").removeprefix("base_model.model."): p for n, p in with_gradients(network).items()
    }
    return [next(p for n, p in named.items() if n in one["name"] or one["name"] in n) for one in segments]


def test_gradients_and_losses_are_those_of_the_definition(pool: Pool) -> None:
    """Rows at each checkpoint are autograd's gradients of the DPO loss in float64; a store's losses are that loss."""
    assert isinstance(pool.data, Pairs)
    for checkpoint in pool.checkpoints():
        store = pool.stores(checkpoint, ["plain"])["plain"]
        network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
        weights, losses = weights_of(network, store.config["segments"]), plain_losses(network, pool.data)
        for row, loss in enumerate(losses):
            wanted = flat_gradient(loss, weights)
            found = store.rows(row, row + 1)[0].double()
            assert float((found - wanted).norm() / wanted.norm()) < 1e-6
        np.testing.assert_allclose(store.losses.numpy(), [loss.item() for loss in losses], rtol=1e-6)


def odds(loss: torch.Tensor) -> torch.Tensor:
    """σ(m)/σ(−m) of a loss −log σ(m)."""
    return ((-loss).exp() / -torch.expm1(-loss)).detach()


@pytest.mark.parametrize("kind", ["hvp", "ggn", "fisher"])
def test_curvature_is_that_of_the_definition(pool: Pool, kind: Any) -> None:
    """JI2S's product is autograd's with the mean DPO loss: its Hessian, β²σ(m)σ(−m)∇x∇xᵀ, or the gradients' moments."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gradsift.influence.ji2s import _project_product

    target, checkpoint = gs.open_target(preferred(3, start=12), pool), pool.checkpoints()[-1]
    queries = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    segments = queries.config["segments"]
    weights = weights_of(network, segments)
    s = torch.randn(queries.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH):
        losses = plain_losses(network, target.data)
        rows = [flat_gradient(loss, weights, create_graph=True) for loss in losses]
        if kind == "hvp":
            wanted = flat_gradient(sum(row @ s for row in rows), weights, retain_graph=True)
        else:  # of a loss −log σ(m) the gradient is −σ(−m)∇m
            scales = [1.0 if kind == "fisher" else odds(loss) for loss in losses]
            wanted = sum(scale * (row @ s) * row for scale, row in zip(scales, rows, strict=True)).detach()
    parts = s.split([one["stop"] - one["start"] for one in segments])
    total = {one["name"]: part.view(*one["shape"]) for one, part in zip(segments, parts, strict=True)}
    found = _project_product(pool, total, queries, target.data, kind, checkpoint).double() * 3
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("labels", ["model", "data"])
def test_ekfac_is_of_the_pairs_own_moments(pool: Pool, labels: Any) -> None:
    """Λ are the mean squares, in the factors' basis, of autograd's gradients of pairs, or of √σ(m)σ(−m)∇m."""
    from gradsift.gradients.capture import find_modules
    from gradsift.gradients.kronecker import DampedInverse, Eigenbasis, Pass, corrected_eigenvalues

    method = gs.EKFAC(labels=labels, checkpoints="last")
    target, checkpoint = gs.open_target(preferred(2, start=12), pool), pool.checkpoints()[-1]
    scores = gs.score(pool, target, method)
    factors = method._factors(pool, checkpoint)
    (basis,), (eigenvalues,) = (list(factors._files(pool.run, what)) for what in ("basis", "eigenvalues"))
    bases = {name: Eigenbasis(basis[f"out/{name}"].double(), basis[f"in/{name}"].double()) for name in eigenvalues}
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    data = pool.weighed(factors.sample, checkpoint)
    own = data.information(0, len(data)) if labels == "model" else data.sequences(0, len(data))
    for budget in (1, 1000):  # apart and together
        sums = corrected_eigenvalues(network, find_modules(network).captured, own, bases, Pass(budget))
        for name, found in eigenvalues.items():
            torch.testing.assert_close(sums[name] / len(data), found.double(), rtol=1e-4, atol=1e-9)
    losses = plain_losses(network, data)
    weights = weights_of(network, [{"name": name} for name in eigenvalues])
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    scales = [1.0 if labels == "data" else odds(loss).sqrt() for loss in losses]
    for place, (name, found) in enumerate(eigenvalues.items()):
        moved = torch.stack([scale * bases[name].into(row[place]) for row, scale in zip(rows, scales, strict=True)])
        torch.testing.assert_close(found.double(), moved.square().mean(0), rtol=1e-4, atol=1e-9)
    largest = 0.1 * max(float(one.max()) for one in eigenvalues.values())
    wanted = torch.zeros(len(data), 2, dtype=torch.float64)
    stores = [pool.collect(one, checkpoint, ["plain"], what="rows")["plain"] for one in (pool.data, target.data)]
    G, V = (store.rows(0, len(store)).double() for store in stores)
    for one in stores[0].config["segments"]:
        part, name = slice(one["start"], one["stop"]), one["name"]
        inverse = DampedInverse(bases[name], eigenvalues[name].double(), largest)
        wanted += largest * G[:, part] @ inverse(V[:, part].reshape(2, *one["shape"])).flatten(1).T
    np.testing.assert_allclose(scores.per_target, wanted.numpy(), rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "method",
    [gs.JI2S(), gs.JI2S(hessian="hvp"), gs.JI2S(hessian="ggn"), gs.EKFAC(conjugate_gradient=2, rows=5)],
    ids=lambda method: method.label,
)
def test_curvature_scores_pairs(pool: Pool, method: Any) -> None:
    """Of pairs by DPO, as pool and as target, every pair has a score."""
    scores = gs.score(pool, gs.open_target(preferred(2, start=12), pool), method)
    assert sorted(scores.ids) == sorted(pool.data.ids)
    assert np.isfinite(scores.aggregate).all()


def test_curvature_by_difference(tiny: World, tmp_path: Path) -> None:
    """The difference is no probability: EK-FAC takes the second moments of pairs, and draws no labels."""
    plain = opened(tiny, tmp_path / "run", preferred(4), objective="difference", dtype="float32")
    target = gs.open_target(preferred(2, start=12), plain)
    with pytest.raises(ConfigError, match=r"no probability .* set labels to data"):
        gs.score(plain, target, gs.EKFAC())
    assert np.isfinite(gs.score(plain, target, gs.EKFAC(labels="data")).aggregate).all()


@pytest.mark.parametrize("of_pairs", [True, False], ids=["pairs", "single answers"])
def test_trak_by_difference(of_pairs: bool, tiny: World, tmp_path: Path) -> None:
    """The margin is log(p/(1−p)) of p = π(c)/(π(c) + π(r)), in the kernel and in 1 − p, by autograd; of a target of one
    answer that of its mean probability.
    """
    plain = opened(tiny, tmp_path / "run", preferred(5), objective="difference")
    asked = preferred(2, start=12)
    columns = None if of_pairs else {"prompt": "prompt", "completion": "chosen"}
    target = gs.open_target(asked, plain, columns=columns)
    scores = gs.score(plain, target, gs.TRAK(damping=0.5, kernel="whole", checkpoints="last"))
    checkpoint = plain.checkpoints()[-1]
    segments = plain.stores(checkpoint, ["plain"])["plain"].config["segments"]
    network = host(plain.model, plain.dtype, plain.device).with_adapter(checkpoint.adapter)
    weights = weights_of(network, segments)

    def probabilities(data: Any) -> list[torch.Tensor]:
        if isinstance(data, Pairs):
            both = [
                torch.stack([log_p(network, one[place]) for one in (data, data.rejected)]) for place in range(len(data))
            ]
            return [one.softmax(0)[0] for one in both]
        return [(log_p(network, data[place]) / data.supervised_tokens[place]).exp() for place in range(len(data))]

    rows, targets = (
        torch.stack([flat_gradient(torch.logit(p), weights) for p in probabilities(data)])
        for data in (plain.data, target.data)
    )
    doubt = 1 - torch.stack(probabilities(plain.data)).detach()
    kernel = rows.T @ rows / len(rows) + 0.5 * torch.eye(rows.shape[1], dtype=torch.float64)
    wanted = doubt[:, None] * (rows @ torch.linalg.solve(kernel, targets.T))
    np.testing.assert_allclose(scores.per_target, wanted.numpy(), rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("route", ["trained", "stored"])
def test_support_by_pairs_is_a_step_on_their_loss(pool: Pool, route: Any) -> None:
    """An output's log-likelihood after AdamW's step on the mean of the pairs' losses, taken for real or formed."""
    from gradsift.validation.validate import Cell, CellKey

    output = gs.open_target([{"prompt": "what colour is the cow", "completion": "it is red"}], pool).data[0]
    step, checkpoint = gs.OneStep(lr=1e-3, random_sets=2), pool.checkpoints()[-1]
    cell = Cell(output.id, CellKey("any", "any", 2), tuple(pool.data.ids[:2]), 1.0)
    found = gs.validate(pool, [output], [cell], settings=step, route=route).cells[0]
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    named = with_gradients(network)
    kept = {name: parameter.detach().clone() for name, parameter in named.items()}
    before = log_p(network, output).item()
    optimizer = torch.optim.AdamW(named.values(), **step.adamw)
    torch.stack(plain_losses(network, pool.data.subset([0, 1]))).mean().backward()
    optimizer.step()
    after = log_p(network, output).item()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(kept[name])
            parameter.grad = None
    assert abs(after - before) > 1e-6
    assert found.gain == pytest.approx(after - before, rel=1e-3)


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
