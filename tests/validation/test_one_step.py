"""One AdamW step: what it adds, what it does to an output, and that nothing of it stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from tiny_models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_qwen2, with_lora
from torch import Tensor, nn

from gradsift.base.errors import ConfigError, DataError, MismatchError, ModelError, NonFiniteError, ShapeError
from gradsift.base.types import TokenizedExample
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.model.loss import token_mean
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns
from gradsift.store.storage import LocalStorage
from gradsift.validation.one_step import (
    OneStep,
    StepModel,
    StoredSteps,
    effect_of,
    jensen_shannon,
    labels_of,
    log_likelihood,
)

# A large rate makes a step visible in a tiny model; the step itself is the same function of lr.
STEP = OneStep(lr=1e-3)
LOGITS = st.floats(-50, 50)


def examples(lengths: list[int], *, seed: int = 0, weighted: bool = False) -> list[TokenizedExample]:
    generator = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        answer = np.arange(length) >= length - max(1, length // 3)
        ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        weights = (answer * generator.choice([0.25, 1.0, 3.0], length)).astype(np.float32) if weighted else None
        found.append(TokenizedExample(f"e{number}", ids, answer, weights))
    return found


def build(name: str, dtype: torch.dtype) -> tuple[Any, str]:
    """A model and the pattern of what moves in it."""
    match name:
        case "lora":
            return with_lora(tiny_llama()).to(dtype), "lora"
        case "plain":
            return tiny_qwen2().to(dtype), "q_proj|mlp"
        case "gpt2":
            return tiny_gpt2().to(dtype), "c_attn|c_proj"
    raise AssertionError(name)


EVERY_MODEL = pytest.mark.parametrize("name", ["lora", "plain", "gpt2"])


def step_model(network: Any, pattern: str, options: OneStep = STEP, **more: Any) -> StepModel:
    return StepModel(network, find_modules(network, pattern).captured, options, **more)


def stored(
    model: StepModel, rows: list[TokenizedExample], folder: Path, dtype: str = "float64", **changed: Any
) -> GradientStore:
    """A store of the examples' unprojected gradients."""
    projection = Projection(kind="none")
    segments = plan_segments({c.name: c.shape for c in model.modules}, projection)
    projector = Projector(segments, projection, dtype=torch.float64)
    sequences = [token_mean(row, number) for number, row in enumerate(rows)]
    result = gradient_rows(
        model.network,
        model.modules,
        projector,
        sequences,
        RowSettings(token_budget=40, views=("plain",)),
        row_count=len(rows),
    )
    config = {
        "projection": projection.model_dump(mode="json"),
        "view": "plain",
        "loss": "token_mean",
        "dtype": dtype,
        "segments": [segment.entry for segment in segments],
        **changed,
    }
    writer = GradientStoreWriter(LocalStorage(folder), "", config)
    columns = ShardColumns(
        ids=[row.id for row in rows],
        loss=result.loss.tolist(),
        supervised_tokens=[int(row.supervised.sum()) for row in rows],
        norm=result.norms["plain"].tolist(),
        projected_norm=result.norms["plain"].tolist(),
        excluded={},
    )
    writer.write_shard(0, result.rows["plain"], columns)
    writer.finish(1)
    return GradientStore.open(folder)


def state(network: nn.Module) -> dict[str, Any]:
    """Everything about a model that a step could leave changed, weights as bytes."""
    return {
        "bytes": {name: tensor.numpy(force=True).tobytes() for name, tensor in network.state_dict().items()},
        "places": [parameter.data_ptr() for parameter in network.parameters()],
        "required": [parameter.requires_grad for parameter in network.parameters()],
        "gradients": [parameter.grad is None for parameter in network.parameters()],
        "training": [module.training for module in network.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
    }


# Jensen-Shannon divergence


@given(
    st.lists(st.lists(LOGITS, min_size=4, max_size=4), min_size=2, max_size=6).filter(lambda rows: len(rows) % 2 == 0)
)
def test_divergence_is_scipys(rows: list[list[float]]) -> None:
    """scipy's distance is its root; it is symmetric to the last bit and at most ln 2."""
    p, q = torch.tensor(rows, dtype=torch.float64).chunk(2)
    found = jensen_shannon(p, q)
    with np.errstate(invalid="ignore"):  # scipy takes the root of a rounding error below zero
        wanted = np.nan_to_num(jensenshannon(p.softmax(1).numpy(), q.softmax(1).numpy(), axis=1)) ** 2
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12, rtol=1e-9)
    assert torch.equal(found, jensen_shannon(q, p))
    assert (found <= math.log(2)).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 2.0, 40.0])
def test_divergence_keeps_its_digits_however_close_the_two_are(size: float) -> None:
    """Against 60 digits: 1e-6 relative even where the logits differ in their tenth decimal place."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 30, generator=generator, dtype=torch.float64) * 3
    q = p + size * torch.randn(1, 30, generator=generator, dtype=torch.float64)
    with localcontext(prec=60):
        raw = [[Decimal(x).exp() for x in row.tolist()] for row in (p[0], q[0])]
        a, b = ([x / sum(row) for x in row] for row in raw)
        pairs = [(x, y, (x + y) / 2) for x, y in zip(a, b, strict=True)]
        wanted = sum(x * (x / m).ln() + y * (y / m).ln() for x, y, m in pairs) / 2
    assert float(jensen_shannon(p, q)) == pytest.approx(float(wanted), rel=1e-6, abs=0)


def test_divergence_at_its_ends() -> None:
    """Equal rows give exactly 0, disjoint ones ln 2, and a shift of all logits changes nothing."""
    p = torch.randn(100, 7, generator=torch.Generator().manual_seed(1))
    assert jensen_shannon(p, p.clone()).tolist() == [0.0] * 100
    assert jensen_shannon(p, p + 3).max() < 1e-12
    for top in (1e3, 1e38):
        apart = jensen_shannon(torch.tensor([[top, 0.0]]), torch.tensor([[0.0, top]]))
        assert apart.item() == pytest.approx(math.log(2), abs=1e-15)
    assert jensen_shannon(p.half(), p.bfloat16()).dtype == torch.float64


def test_divergence_refuses_what_it_cannot_compare() -> None:
    """Other shapes, other axes, and logits that are not finite."""
    p = torch.zeros(2, 3)
    for other in (torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(ShapeError):
            jensen_shannon(p, other)
    with pytest.raises(NonFiniteError, match="logits_q: NaN or infinity"):
        jensen_shannon(p, p.log())


def test_likelihood_is_the_sum_over_tokens() -> None:
    """Σ log softmax at the labels, as a loop over tokens in fp64 gives it."""
    logits = torch.randn(150, 9, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(150) % 9
    wanted = sum(math.log(row.double().softmax(0)[label]) for row, label in zip(logits, labels, strict=True))
    assert log_likelihood(logits, labels) == pytest.approx(wanted, rel=1e-12)


# The step


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_step_of_a_gradient_is_a_fresh_adamws(decay: float) -> None:
    """Nearly lr times the gradient's sign, whatever its length, and its sign lowers the loss; no more moves."""
    model = step_model(*build("plain", torch.float64), STEP.model_copy(update={"weight_decay": decay}))
    before = [weight.detach().clone() for weight in model.weights]
    size = sum(weight.numel() for weight in before)
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(size, generator=generator, dtype=torch.float64) * torch.logspace(-12, 4, size)
    gradient[0] = 0
    with model.moved_by(gradient):
        parts = gradient.split([weight.numel() for weight in before])
        for captured, weight, old, part in zip(model.modules, model.weights, before, parts, strict=True):
            own = captured.unfolded(part.view(captured.shape))
            wanted = old - STEP.lr * (own / (own.abs() + STEP.eps) + decay * old)
            torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-7 * STEP.lr)


@EVERY_MODEL
@pytest.mark.parametrize("budget", [1, 10_000], ids=["accumulated", "at-once"])
def test_real_step_is_a_training_loops(name: str, budget: int) -> None:
    """The usual loop on a copy gives the same weights: pad, token-mean cross entropy with -100, backward, AdamW."""
    network, pattern = build(name, torch.float64)
    model = step_model(network, pattern, token_budget=budget)
    batch = examples([9, 4, 14])
    other, _ = build(name, torch.float64)
    weights = [captured.weight for captured in find_modules(other, pattern).captured]
    other.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.zeros(3, 14, dtype=torch.int64)
    labels = torch.full((3, 14), -100)
    for row, example in enumerate(batch):
        tokens = torch.from_numpy(example.token_ids.astype(np.int64))
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(example.supervised), tokens, -100)
    mask = torch.arange(14)[None] < torch.tensor([[9], [4], [14]])
    optimizer = torch.optim.AdamW(weights, lr=STEP.lr, weight_decay=0)
    other(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    optimizer.step()
    with model.trained_on(batch):
        for captured, wanted in zip(model.modules, weights, strict=True):
            torch.testing.assert_close(captured.weight.detach(), wanted.detach(), rtol=0, atol=1e-7)


def test_weights_of_labels_scale_their_part_of_the_step() -> None:
    """The step is AdamW's on Σ w_t·NLL_t over the number of labels of the batch."""
    batch = examples([9, 4, 14], weighted=True)
    model, other = (step_model(*build("plain", torch.float64)) for _ in range(2))
    for weight in other.weights:
        weight.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for example in batch:
        assert example.weights is not None
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        logits = other.network(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.weights[1:])).sum()
    (total / sum(int(example.supervised.sum()) for example in batch)).backward()
    torch.optim.AdamW(other.weights, lr=STEP.lr, weight_decay=0).step()
    with model.trained_on(batch):
        for ours, wanted in zip(model.weights, other.weights, strict=True):
            torch.testing.assert_close(ours.detach(), wanted.detach(), rtol=0, atol=1e-7)


@EVERY_MODEL
@pytest.mark.parametrize(("dtype", "weighted"), [(torch.float64, False), (torch.float64, True), (torch.float32, False)])
def test_stored_rows_give_the_real_step(name: str, dtype: torch.dtype, weighted: bool, tmp_path: Path) -> None:
    """Both routes end at the same weights and effects, also where labels have weights; a selection's order does not
    matter."""
    network, pattern = build(name, dtype)
    model = step_model(network, pattern)
    rows = examples([9, 4, 17, 9, 2, 12], weighted=weighted)
    output = examples([11], seed=9)[0]
    before = model.logits(output)
    by_id = {row.id: row for row in rows}
    formed = StoredSteps(model, stored(model, rows, tmp_path))
    exact = dtype == torch.float64
    for chosen in (["e2"], ["e0", "e1", "e5"], [row.id for row in rows]):
        taken = [by_id[id_] for id_ in chosen]
        with model.trained_on(taken):
            wanted = [weight.detach().clone() for weight in model.weights]
        with formed.on(chosen[::-1]):
            for weight, other in zip(model.weights, wanted, strict=True):
                # Tokens' weights are fp32, and a step magnifies the rounding of a gradient that nearly vanishes.
                apart = (weight.detach() - other).abs() / STEP.lr
                assert float(apart.max()) < 1e-2 if exact else float((apart > 1e-2).double().mean()) < 2e-2
        first = effect_of(model.trained_on(taken), model, [output], [before])
        second = effect_of(formed.on(chosen[::-1]), model, [output], [before])
        assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-7 if exact else 2e-5)
        assert second.jsd == pytest.approx(first.jsd, rel=1e-5 if exact else 1e-2)


def test_half_precision_rows_give_nearly_the_real_step(tmp_path: Path) -> None:
    """fp16 rows, the default of a store, keep the effects to a hundredth."""
    network, pattern = build("lora", torch.float32)
    model = step_model(network, pattern)
    rows = examples([9, 4, 17])
    output = examples([11], seed=9)[0]
    before = model.logits(output)
    real = effect_of(model.trained_on(rows), model, [output], [before])
    formed = effect_of(
        StoredSteps(model, stored(model, rows, tmp_path, "float16")).on(["e0", "e1", "e2"]), model, [output], [before]
    )
    start = log_likelihood(before, labels_of(output))
    assert formed.log_likelihood - start == pytest.approx(real.log_likelihood - start, rel=1e-2)
    assert formed.jsd == pytest.approx(real.jsd, rel=1e-2)


@EVERY_MODEL
@pytest.mark.parametrize("dropout", [False, True])
def test_model_comes_back_bit_for_bit(name: str, dropout: bool, tmp_path: Path) -> None:
    """Weights by their bytes and addresses, flags, gradients, modes and hooks, after either route."""
    network, pattern = build(name, torch.float32)
    rows = examples([9, 4])
    store = stored(step_model(network, pattern), rows, tmp_path)
    network.train()
    network.requires_grad_(True)
    model = step_model(network, pattern, STEP.model_copy(update={"dropout": dropout}))
    output = examples([8], seed=4)[0]
    before, logits = state(network), model.logits(output)
    contexts: list[Callable[[], Any]] = [lambda: model.trained_on(rows)]
    if not dropout:
        contexts.append(lambda: StoredSteps(model, store).on(["e0", "e1"]))
    for context in contexts:
        with context():
            assert not network.training
            assert state(network)["bytes"] != before["bytes"]
        assert state(network) == before
    network.eval()
    quiet = model.logits(output)
    with model.trained_on(rows):
        assert not torch.equal(model.logits(output), quiet)
    assert torch.equal(model.logits(output), quiet)
    assert logits.shape == quiet.shape


def test_model_comes_back_after_an_exception(tmp_path: Path) -> None:
    """From the body, from the backward pass, and from a gradient that is not finite."""
    network, pattern = build("lora", torch.float32)
    model = step_model(network, pattern, OneStep(lr=1e-3, dropout=True))
    plain = step_model(network, pattern)
    rows = examples([9, 4])
    before = state(network)

    def refuse(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        raise RuntimeError("no memory")

    def body_fails(context: Any) -> None:
        with context:
            raise KeyboardInterrupt

    for context in (model.trained_on(rows), plain.moved_by(torch.ones(sum(w.numel() for w in plain.weights)))):
        with pytest.raises(KeyboardInterrupt):
            body_fails(context)
        assert state(network) == before
    handle = network.get_output_embeddings().register_forward_pre_hook(refuse)
    hooked = state(network)
    with pytest.raises(RuntimeError, match="no memory"), model.trained_on(rows):
        raise AssertionError("the step cannot be taken")
    assert state(network) == hooked
    handle.remove()
    nan = torch.ones(sum(w.numel() for w in plain.weights))
    nan[-1] = float("nan")
    with pytest.raises(NonFiniteError), plain.moved_by(nan):
        raise AssertionError("the step cannot be taken")
    with pytest.raises(ShapeError), plain.moved_by(torch.ones(3)):
        raise AssertionError("the step cannot be taken")
    assert state(network) == before


def test_dropout_is_off_unless_asked_for() -> None:
    """Without it two equal steps are equal and as in eval mode; with it the seed decides, and nothing else draws."""
    network, pattern = build("lora", torch.float64)
    rows = examples([9, 4])

    def after(options: OneStep) -> list[Tensor]:
        with step_model(network, pattern, options).trained_on(rows):
            return [captured.weight.detach().clone() for captured in find_modules(network, pattern).captured]

    def equal(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(map(torch.equal, first, second))

    assert equal(after(STEP), after(STEP))
    on = STEP.model_copy(update={"dropout": True})
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    first = after(on)
    assert torch.equal(torch.rand(3), undisturbed)
    assert equal(first, after(on))
    assert not equal(first, after(STEP))
    assert not equal(first, after(on.model_copy(update={"seed": 1})))


def test_training_on_an_output_supports_it() -> None:
    """The sign: a small step on the output itself raises its likelihood, and a longer step raises it more."""
    network, pattern = build("lora", torch.float64)
    output = examples([12], seed=5)[0]
    gains = []
    for rate in (1e-5, 1e-4, 1e-3):
        model = step_model(network, pattern, OneStep(lr=rate))
        before = model.logits(output)
        effect = effect_of(model.trained_on([output]), model, [output], [before])
        gains.append(effect.log_likelihood - log_likelihood(before, labels_of(output)))
        assert effect.jsd > 0
    assert gains == sorted(gains)
    assert gains[0] > 0


def test_logits_are_those_before_the_labels() -> None:
    """`logits[t]` predicts `token[t+1]`: the rows of a whole pass that precede supervised tokens."""
    network, pattern = build("lora", torch.float64)
    output = examples([10], seed=6)[0]
    with torch.inference_mode():
        whole = network(input_ids=torch.from_numpy(output.token_ids.astype(np.int64))[None]).logits[0]
    wanted = whole[np.flatnonzero(output.supervised) - 1]
    torch.testing.assert_close(step_model(network, pattern).logits(output), wanted)


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(4)))
def test_batch_order_changes_nothing(order: list[int]) -> None:
    """The token mean over a batch does not know its order."""
    network, pattern = build("lora", torch.float64)
    model, rows, output = step_model(network, pattern), examples([9, 4, 17, 2]), examples([11], seed=9)[0]
    before = model.logits(output)
    first = effect_of(model.trained_on(rows), model, [output], [before])
    second = effect_of(model.trained_on([rows[n] for n in order]), model, [output], [before])
    assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-7)


def test_what_cannot_be_stepped_is_refused(tmp_path: Path) -> None:
    """Weights that would round the step away; stores of projected rows, other modules, or dropout; empty batches."""
    network, pattern = build("lora", torch.bfloat16)
    with pytest.raises(ModelError, match=r"is torch\.bfloat16, in which a step of 0\.001 is rounded away"):
        step_model(network, pattern)
    network, pattern = build("plain", torch.float32)
    model, rows = step_model(network, pattern), examples([9, 4])
    store = stored(model, rows, tmp_path / "a")
    with pytest.raises(ConfigError, match="without dropout"):
        StoredSteps(step_model(network, pattern, OneStep(dropout=True)), store)
    with pytest.raises(MismatchError, match="holds gradients of 8 modules, the model has 6"):
        StoredSteps(step_model(network, "mlp"), store)
    projected = stored(model, rows, tmp_path / "b", projection={"kind": "sparse"})
    with pytest.raises(MismatchError, match="projection sparse, view plain"):
        StoredSteps(model, projected)
    with pytest.raises(MismatchError, match="first 'e7'"):
        StoredSteps(model, store).on(["e0", "e7"])
    mute = TokenizedExample("mute", rows[0].token_ids, np.zeros(9, dtype=np.bool_))
    with pytest.raises(DataError, match="no supervised token"), model.trained_on([mute]):
        raise AssertionError("nothing to train on")
    with pytest.raises(DataError, match="no supervised token"):
        StoredSteps(model, store).mean_gradient([])
    with pytest.raises(DataError, match="output 'mute' has no token to predict"):
        model.logits(mute)
    with pytest.raises(ShapeError, match="the axis 'dim'"), model.moved_by(torch.ones(3)):
        raise AssertionError("another space")
