from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from pydantic import ValidationError
from safetensors.numpy import save
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, get_scheduler

from gradsift.base import interruption
from gradsift.base.errors import ConfigError, CorruptError, DataError, ModelError
from gradsift.base.types import Sequence
from gradsift.data.dataset import Dataset
from gradsift.model import models
from gradsift.model.batching import form_batches
from gradsift.model.models import host, parameter_name
from gradsift.store.run import Run
from gradsift.warmup import trainer as trainer_module
from gradsift.warmup.checkpoint import Checkpoint, load_moments, open_checkpoint, trained_parameters
from gradsift.warmup.train import PRESETS, TRAINING_PRESETS, Training, Warmup, effective_batch_size, train, warm_up
from reporters import Listening

VOCABULARY = 128
SMALL = Training(epochs=2, rank=4, alpha=8, dropout=0.0, learning_rate=1e-2, batch_size=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_host() -> Any:
    models._HOSTS.clear()
    yield
    models._HOSTS.clear()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def make_data(run: Run, count: int, seed: int = 0, *, weighted: bool = False) -> Dataset:
    """A data set of random token ids with 4 to 40 tokens, the last 1 to 12 of them supervised, by weights if asked."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 41, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.zeros(offsets[-1], dtype=np.bool_)
    for stop, length in zip(offsets[1:], lengths, strict=True):
        supervised[stop - rng.integers(1, min(12, length - 1) + 1) : stop] = True
    ids = [f"row-{number:03}" for number in range(count)]
    config = {"template": "none", "count": count, "seed": seed, "weighted": weighted}
    prefix = run.prefix("data", config)
    tokens = {
        "token_ids": rng.integers(0, VOCABULARY, offsets[-1]).astype(np.int32),
        "supervised": supervised,
        "offsets": offsets,
    }
    if weighted:
        tokens["weights"] = (supervised * rng.choice([0.25, 1.0, 3.0], offsets[-1])).astype(np.float32)
    run.storage.publish(f"{prefix}tokens.safetensors", save(tokens))
    run.storage.publish(f"{prefix}rows.jsonl", b"\n".join(b"{}" for _ in ids))
    run.storage.publish(f"{prefix}index.json", json.dumps({"ids": ids, "hashes": ids}).encode())
    run.complete(prefix, "data", config, description="random tokens", skipped=[], announcement=None)
    return Dataset(run, prefix)


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    folder = Path(checkpoint.adapter)
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "adam.safetensors")


def assert_same(first: list[Checkpoint], second: list[Checkpoint]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.learning_rate == other.learning_rate
        a, b = tensors_of(one), tensors_of(other)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert Path(one.adapter, "checkpoint.json").read_text() == Path(other.adapter, "checkpoint.json").read_text()


def in_order(data: Dataset, count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_training_equals_hand_written_adamw(
    run: Run, llama: str, monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    """Weights, moments, rate and loss equal AdamW written out, on the mean of example means over a whole batch, in
    float64; with micro-batches of several sizes, a last batch of two instead of four, clipping and weight decay. Where
    labels have weights the mean of an example is their weighted sum over their number."""
    monkeypatch.setattr(trainer_module, "_CPU_TOKENS", 64)
    data = make_data(run, 30, weighted=weighted)
    settings = Training(
        epochs=1, rank=4, alpha=8, dropout=0.0, learning_rate=1e-2, weight_decay=0.1, batch_size=64, max_grad_norm=0.5
    )
    (checkpoint,) = train(run, data, data.ids, settings, model=llama, dtype="float64", seed=3)
    steps, batch_size = 8, 4
    assert effective_batch_size(30, 64) == batch_size

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64)
    with trainer_module.adapter_on(model, settings, 3) as network:
        named = {parameter_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        m = {name: torch.zeros_like(p) for name, p in named.items()}
        v = {name: torch.zeros_like(p) for name, p in named.items()}
        order = in_order(data, 30, 3, 0)
        rates, losses, clipped = [], [], 0
        for step in range(steps):
            batch = [data[position] for position in order[step * batch_size : (step + 1) * batch_size]]
            assert len(batch) == (4 if step < 7 else 2)
            total = torch.zeros((), dtype=torch.float64)
            for example in batch:
                ids = torch.from_numpy(example.token_ids.astype(np.int64))
                logits = network(input_ids=ids[None]).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
                if example.weights is not None:
                    nll = nll * torch.from_numpy(example.weights[1:])
                mean = nll[torch.from_numpy(example.supervised[1:])].mean()
                losses.append(float(mean.detach()))
                total = total + mean / len(batch)
            gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
            norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
            clipped += bool(norm > 0.5)
            rate = 1e-2 * (step if step < 1 else (steps - step) / (steps - 1))
            rates.append(rate)
            for name, p in named.items():
                g = gradients[name] * min(1.0, 0.5 / (float(norm) + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                step_size = m[name] / (1 - 0.9 ** (step + 1))
                denominator = (v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                with torch.no_grad():
                    p.mul_(1 - rate * 0.1).sub_(rate * step_size / denominator)
        assert clipped > 0
        found = tensors_of(checkpoint)
        for name, p in named.items():
            for ours, reference in (
                (found[name], p.detach()),
                (found[f"{name}.exp_avg"], m[name]),
                (found[f"{name}.exp_avg_sq"], v[name]),
            ):  # Llama's norms compute in float32 whatever the model's dtype
                assert float((ours - reference).norm()) < 2e-6 * float(reference.norm())
    assert int(found["step"]) == steps
    assert checkpoint.learning_rate == pytest.approx(np.mean(rates))
    info = json.loads(Path(checkpoint.adapter, "checkpoint.json").read_text())
    assert {key: value for key, value in info.items() if key not in ("files", "_digest")} == {
        "epoch": 1,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "learning_rate": checkpoint.learning_rate,
        "steps": 8,
        "loss": pytest.approx(np.mean(losses), rel=1e-6),
    }


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_is_the_mean_of_the_rates_used(run: Run, llama: str, schedule: str) -> None:
    """η̄ of each epoch is the mean of transformers' own schedule over that epoch's steps, resumed or not."""
    data = make_data(run, 16)
    settings = SMALL.model_copy(update={"schedule": schedule, "warmup_ratio": 0.2, "epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        train(run, data, data.ids, settings, model=llama, reporter=Listening(stop_after=20))
    checkpoints = train(run, data, data.ids, settings, model=llama)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=24)
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = np.mean(np.reshape(rates, (3, 8)), axis=1)
    np.testing.assert_allclose([c.learning_rate for c in checkpoints], expected, rtol=1e-12)


def test_files_are_what_peft_writes_and_moments_belong_to_them(run: Run, llama: str, tmp_path: Path) -> None:
    """PEFT loads the adapter, saving it again gives the same weights and configuration, and the moments are there for
    exactly the parameters that were trained."""
    data = make_data(run, 16)
    checkpoint = train(run, data, data.ids, SMALL, model=llama)[-1]
    network = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), checkpoint.adapter)
    network.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    ours, theirs = (Path(folder) for folder in (checkpoint.adapter, tmp_path / "again"))
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}
    first, second = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    assert first["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert first | {"target_modules": 0} == second | {"target_modules": 0}
    moments = load_moments(open_checkpoint(str(ours)), trained_parameters(network))
    assert moments.exp_avg.keys() == moments.exp_avg_sq.keys() == a.keys()
    assert moments.step == 16
    assert moments.options == (0.9, 0.999, 1e-8)
    assert sorted(path.name for path in ours.parent.iterdir()) == ["epoch-1", "epoch-2", "manifest.json"]
    assert len(list(ours.iterdir())) == 4


LONGER = SMALL.model_copy(update={"epochs": 3, "dropout": 0.2})


@pytest.fixture(scope="module")
def undisturbed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """30 rows, 3 epochs of 8 steps, dropout, in one go."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = make_data(run, 30)
    checkpoints = train(run, data, data.ids, LONGER, model=llama)
    torch.set_num_threads(threads)
    return checkpoints


@pytest.mark.parametrize("rows", [13, 30, 45, 75])
def test_an_interrupted_training_ends_where_an_undisturbed_one_does(
    run: Run, llama: str, undisturbed: list[Checkpoint], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Interrupted within the first epoch, after it, within the second or the third, it goes on from the last saved
    step and gives the same weights, moments, rates and losses to the bit, with dropout."""
    data = make_data(run, 30)
    monkeypatch.setattr(trainer_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer_module, "_SAVE_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(run, data, data.ids, LONGER, model=llama, reporter=Listening(stop_after=rows))
    torch.manual_seed(99)
    second = Listening()
    resumed = train(run, data, data.ids, LONGER, model=llama, reporter=second)
    assert_same(undisturbed, resumed)
    assert (
        second.said[0]
        == "warm-up: going on after "
        + {
            13: "step 3 of 8 in epoch 1",
            30: "epoch 1",
            45: "step 3 of 8 in epoch 2",
            75: "step 3 of 8 in epoch 3",
        }[rows]
    )
    assert 90 - rows <= second.done == second.totals[0] <= 90 - rows + 4
    assert not list(Path(resumed[0].adapter).parent.glob("partial*"))


def test_without_a_saved_step_it_goes_on_after_the_last_finished_epoch(
    run: Run, llama: str, undisturbed: list[Checkpoint]
) -> None:
    """A training stopped by an error within epoch 2, before its state was saved, repeats that epoch only."""
    data = make_data(run, 30)
    with pytest.raises(RuntimeError):
        train(run, data, data.ids, LONGER, model=llama, reporter=Listening(stop_after=45, error=RuntimeError))
    second = Listening()
    assert_same(undisturbed, train(run, data, data.ids, LONGER, model=llama, reporter=second))
    assert second.done == 60


ALTERED = {
    "cut in half": lambda data: data[: len(data) // 2],
    "one bit flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
}


@pytest.mark.parametrize("name", ["adam.safetensors", "adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ALTERED)
def test_an_altered_epoch_is_trained_again(
    run: Run, llama: str, undisturbed: list[Checkpoint], name: str, damage: str
) -> None:
    """A file of a finished epoch that is cut off or differs in one bit is found, said, and made again; what it was
    is not believed."""
    data = make_data(run, 30)
    shutil.copytree(Path(undisturbed[0].adapter).parents[1], run.path("checkpoints"))
    (file,) = run.path("checkpoints").glob(f"*/epoch-2/{name}")
    file.write_bytes(ALTERED[damage](file.read_bytes()))
    second = Listening()
    assert_same(undisturbed, train(run, data, data.ids, LONGER, model=llama, reporter=second))
    assert second.done == 60
    assert [text for text in second.warned if "epoch 2 is missing, truncated or altered" in text]


def test_an_epoch_whose_files_are_of_another_step_is_refused(run: Run, llama: str) -> None:
    """Moments of another number of steps are an error that names the folder, not silent nonsense."""
    data = make_data(run, 16)
    with pytest.raises(RuntimeError):
        train(run, data, data.ids, SMALL, model=llama, reporter=Listening(stop_after=24, error=RuntimeError))
    (info,) = run.path("checkpoints").glob("*/epoch-1/checkpoint.json")
    info.write_text(json.dumps({"learning_rate": 0.1}))  # as versions without checksums wrote it
    (file,) = run.path("checkpoints").glob("*/epoch-1/adam.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptError, match=r"cannot be read .* delete that folder"):
        train(run, data, data.ids, SMALL, model=llama)


@pytest.mark.parametrize("damage", ALTERED)
def test_an_altered_state_within_an_epoch_costs_that_epoch_alone(
    run: Run, llama: str, undisturbed: list[Checkpoint], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What was saved within an epoch and is cut off or altered is said and not used: the epoch begins anew."""
    data = make_data(run, 30)
    monkeypatch.setattr(trainer_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer_module, "_SAVE_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(run, data, data.ids, LONGER, model=llama, reporter=Listening(stop_after=45))
    (file,) = run.path("checkpoints").glob("*/partial.safetensors")
    file.write_bytes(ALTERED[damage](file.read_bytes()))
    second = Listening()
    assert_same(undisturbed, train(run, data, data.ids, LONGER, model=llama, reporter=second))
    assert second.done == 60
    assert [text for text in second.warned if "the epoch that it is of begins anew" in text]


def describe(base: Any) -> dict[str, Any]:
    modules = list(base.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, id(module), module.training) for name, module in modules],
        "hooks": [len(getattr(module, kind)) for _, module in modules for kind in hooks],
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in base.named_parameters()],
        "attributes": sorted(vars(base)),
        "config": base.config.to_dict(),
        "forward": base.forward.__func__,
    }


@pytest.mark.parametrize("how", ["finished", "interrupted", "wrong modules", "failed"])
def test_the_base_model_is_left_as_it_was(run: Run, llama: str, how: str) -> None:
    """Modules, weights, flags, hooks and configuration of the shared base are the same after training, after Ctrl-C
    and after an error; so are Python's, NumPy's and torch's random numbers."""
    data = make_data(run, 16)
    base = host(llama).base()
    before, weights = describe(base), {name: p.clone() for name, p in base.state_dict().items()}
    python, numpy, state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    if how == "finished":
        train(run, data, data.ids, SMALL, model=llama)
    elif how == "wrong modules":
        with pytest.raises(ModelError, match=r"no linear module named c_attn: choose --lora-modules .*q_proj"):
            train(run, data, data.ids, SMALL.model_copy(update={"target_modules": ("q_proj", "c_attn")}), model=llama)
    else:
        error = KeyboardInterrupt if how == "interrupted" else RuntimeError
        with pytest.raises(error):
            train(run, data, data.ids, SMALL, model=llama, reporter=Listening(stop_after=20, error=error))
    assert host(llama).base() is base
    assert describe(base) == before
    assert all(torch.equal(weights[name], p) for name, p in base.state_dict().items())
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), state)


def test_training_prints_nothing(run: Run, llama: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but the reporter writes: no bars, logs or notes of the Trainer, and no warnings of any kind."""
    data = make_data(run, 16)
    host(llama).base()
    capfd.readouterr()
    level = transformers.logging.get_verbosity()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(run, data, data.ids, SMALL, model=llama)
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in caught] == []
    assert transformers.logging.get_verbosity() == level


def test_a_finished_training_is_returned_without_loading_a_model(run: Run, llama: str) -> None:
    """A second call opens what is there and loads nothing; a lost epoch is trained again."""
    data = make_data(run, 16)
    first = train(run, data, data.ids, SMALL, model=llama)
    kept = [tensors_of(checkpoint) for checkpoint in first]
    models._HOSTS.clear()
    assert train(run, data, data.ids, SMALL, model=llama) == first
    assert not models._HOSTS
    run.storage.delete(f"{Path(first[1].adapter).relative_to(run.folder)}/adam.safetensors")
    assert train(run, data, data.ids, SMALL, model=llama) == first
    for before, checkpoint in zip(kept, first, strict=True):
        after = tensors_of(checkpoint)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_seed_decides_and_the_order_of_ids_does_not(run: Run, llama: str, tmp_path: Path) -> None:
    """The same ids in another order are the same training; another seed, or an id named twice, is another one."""
    data = make_data(run, 16)
    first = train(run, data, data.ids, SMALL, model=llama)
    assert train(run, data, data.ids[::-1], SMALL, model=llama) == first
    other = Run(tmp_path / "other")
    again = train(other, make_data(other, 16), data.ids[::-1], SMALL, model=llama)
    assert_same(first, again)
    for ids, seed in ((data.ids, 1), ([*data.ids, data.ids[0]], 0)):
        different = train(run, data, ids, SMALL, model=llama, seed=seed)
        assert different[0].adapter != first[0].adapter
        a, b = tensors_of(first[-1]), tensors_of(different[-1])
        assert not any(torch.equal(a[name], b[name]) for name in a if name.endswith(".weight"))


def test_an_epoch_at_rate_0_is_refused(run: Run, llama: str) -> None:
    """One example makes one step per epoch, the first at rate 0: no checkpoint, and the message says what to do."""
    data = make_data(run, 16)
    with pytest.raises(ModelError, match=r"epoch 1 taught the adapter nothing.*rate of 0.*with warmup_ratio 0"):
        train(run, data, data.ids[:1], SMALL, model=llama)
    assert not list(run.folder.glob("checkpoints/*/epoch-1"))
    settings = SMALL.model_copy(update={"warmup_ratio": 0.0})
    assert all(c.learning_rate > 0 for c in train(run, data, data.ids[:1], settings, model=llama))


def test_a_non_finite_loss_stops_training(run: Run, llama: str) -> None:
    """A rate that blows the weights up ends in an error that names step, example and remedy; nothing is published."""
    data = make_data(run, 16)
    settings = SMALL.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(
        ModelError, match=r"training loss is (nan|inf) at step \d+ of 16 .*row-0\d\d.*Lower the learning"
    ):
        train(run, data, data.ids, settings, model=llama)
    assert not list(run.folder.glob("checkpoints/*/epoch-1"))


def test_weights_blown_up_by_the_last_step_are_not_published(run: Run, llama: str) -> None:
    """An epoch whose last step made a weight infinite is an error too, though every loss of it was finite."""
    data = make_data(run, 16)
    settings = SMALL.model_copy(update={"learning_rate": 1e30, "weight_decay": 1e10, "epochs": 1})
    with pytest.raises(ModelError, match=r"after step 2 of 2 the weights of .*lora_A.* are not finite"):
        train(run, data, data.ids[:2], settings, model=llama)
    assert not list(run.folder.glob("checkpoints/*/epoch-1"))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 63, 64, 100, 1000, 1024, 5000])
def test_small_pools_get_smaller_batches(count: int) -> None:
    """The batch is the largest up to the wanted one that leaves at least 8 steps per epoch, or one example."""
    size = effective_batch_size(count, 128)
    assert -(-count // size) >= min(8, count)
    assert size == 128 or -(-count // (size + 1)) < 8


def test_warm_up_takes_a_uniform_share_by_seed(run: Run, llama: str) -> None:
    """5% of 200 rows are 10; of 40 rows 2 would be too few for 8 steps, so 8 are taken; the seed chooses which."""
    settings = Warmup(**{**SMALL.model_dump(), "epochs": 1, "batch_size": 128})
    drawn = []
    for rows, seed, expected in ((200, 0, 10), (40, 0, 8), (200, 1, 10)):
        data, reporter = make_data(run, rows), Listening()
        (checkpoint,) = warm_up(run, data, settings, model=llama, seed=seed, reporter=reporter)
        content = run.manifest(f"{Path(checkpoint.adapter).parent.relative_to(run.folder)}/")
        assert content is not None
        assert content["examples"] == reporter.done == expected
        assert reporter.said[0] == (
            f"warm-up: batch size 1 instead of 128, so that {expected} examples make {expected} optimizer steps "
            "per epoch"
        )
        drawn.append(content["config"]["ids"])
    assert len(set(drawn)) == 3


def test_a_training_that_teaches_nothing_says_so(run: Run, llama: str) -> None:
    """Eight steps at LESS's rate of 2e-5 get a warning that names the preset for few examples; eight at 1e-3 none."""
    for rate, warned in ((2e-5, True), (1e-3, False)):
        settings = Training(**{**SMALL.model_dump(include=set(Training.model_fields)), "epochs": 1,
                               "learning_rate": rate})  # fmt: skip
        reporter = Listening()
        data = make_data(run, 8)
        train(run, data, data.ids, settings, model=llama, reporter=reporter)
        assert any("--preset small" in said for said in reporter.warned) == warned


def test_a_second_warm_up_says_by_what_it_is_another(run: Run, llama: str) -> None:
    """An option of the first command that is left out in the second costs a training: it is named. Seeds are meant."""
    data, said = make_data(run, 10), []
    small = {**SMALL.model_dump(), "epochs": 1}
    for changed, seed in (({}, 0), ({"rank": 3}, 0), ({}, 1)):
        reporter = Listening()
        warm_up(run, data, Warmup(**small | changed), model=llama, seed=seed, reporter=reporter)
        said.append([line for line in reporter.said if "the run folder has" in line])
    own = f"training.rank is {SMALL.rank}, wanted 3"
    assert said == [[], [f"warm-up: another one than the run folder has, whose {own}"], []]


def test_presets_are_the_papers() -> None:
    """The presets hold the numbers that LESS and Compact Example-Based Explanations print."""
    less, compact = PRESETS["less"], PRESETS["compact"]
    assert less == Warmup()
    assert (less.fraction, less.epochs, less.learning_rate, less.warmup_ratio, less.batch_size) == (
        0.05,
        4,
        2e-5,
        0.03,
        128,
    )
    assert (less.rank, less.alpha, less.dropout, less.weight_decay, less.schedule) == (128, 512, 0.1, 0.0, "linear")
    assert (compact.fraction, compact.epochs, compact.learning_rate, compact.batch_size) == (1.0, 1, 1e-4, 32)
    assert (compact.rank, compact.alpha, compact.target_modules) == (16, 32, ("q_proj", "v_proj"))


def test_presets_come_by_name_with_fields_changed() -> None:
    """`preset` gives a warm-up or a training as `--preset` does, changes what is named, and lists what there is."""
    for name, settings in PRESETS.items():
        assert Warmup.preset(name) == settings
    for name, training in TRAINING_PRESETS.items():
        assert Training.preset(name) == training
    assert Warmup.preset("compact", rank=4) == PRESETS["compact"].model_copy(update={"rank": 4})
    assert type(Training.preset("compact")) is Training
    with pytest.raises(ConfigError, match="preset 'big' is unknown: there are less, nice, compact, small"):
        Warmup.preset("big")
    with pytest.raises(ValidationError, match="rank"):
        Training.preset("less", rank=0)


def test_models_without_q_proj_get_pefts_default(run: Run, tmp_path: Path) -> None:
    """GPT-2 has one fused Conv1D: LoRA goes there, without a warning, and the example of the loss still falls."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    data = make_data(run, 16)
    settings = SMALL.model_copy(update={"epochs": 4})
    checkpoints = train(run, data, data.ids, settings, model=str(tmp_path / "gpt2"))
    config_file = json.loads(Path(checkpoints[0].adapter, "adapter_config.json").read_text())
    assert config_file["target_modules"] == ["c_attn"]
    assert config_file["fan_in_fan_out"] is True
    losses = [json.loads(Path(c.adapter, "checkpoint.json").read_text())["loss"] for c in checkpoints]
    assert losses[-1] < losses[0]


def test_the_adapter_is_float32_on_a_bfloat16_base(run: Run, llama: str) -> None:
    """Weights and moments are float32, so that small updates are not rounded away."""
    data = make_data(run, 16)
    checkpoint = train(run, data, data.ids, SMALL, model=llama, dtype="bfloat16")[-1]
    assert {t.dtype for name, t in tensors_of(checkpoint).items() if name != "step"} == {torch.float32}


def test_wrong_arguments_are_refused_at_once(run: Run, llama: str) -> None:
    """No ids, ids of another data set and a negative seed are refused before a model is loaded."""
    data = make_data(run, 16)
    with pytest.raises(DataError, match="no examples to train on"):
        train(run, data, [], SMALL, model=llama)
    with pytest.raises(DataError, match=r"1 of 2 ids .*'elsewhere'"):
        train(run, data, [data.ids[0], "elsewhere"], SMALL, model=llama)
    with pytest.raises(ConfigError, match="seed is -1"):
        warm_up(run, data, model=llama, seed=-1)
    assert not models._HOSTS


def test_micro_batches_keep_the_token_budget() -> None:
    """Every sequence is in one micro-batch; count × longest stays within the budget unless one alone exceeds it."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(2, 60, 50).tolist(), 200]
    sequences = [Sequence(row, np.zeros(n, np.int32), np.zeros(n, np.float32)) for row, n in enumerate(lengths)]
    parts = [batch.sequences for batch in form_batches(sequences, 128, whole=True)]
    assert sorted(sequence.row for part in parts for sequence in part) == list(range(51))
    assert all(len(part) * max(len(s.token_ids) for s in part) <= 128 or len(part) == 1 for part in parts)
    assert len(parts) < 30


@pytest.mark.parametrize("rows", [2, 13, 45])
def test_ctrl_c_loses_no_step(run: Run, llama: str, undisturbed: list[Checkpoint], rows: int) -> None:
    """Interrupted in the middle of a step, without any state that was saved before, it goes on after the last whole
    one, says so, and ends at the same weights, moments, rates and losses to the bit."""
    data = make_data(run, 30)
    first = Listening(stop_after=rows)
    with interruption.watching(), pytest.raises(KeyboardInterrupt):
        train(run, data, data.ids, LONGER, model=llama, reporter=first)
    assert re.match(r"interrupted: \d+ of 24 steps of the warm-up kept; ", interruption.last_words())
    second = Listening()
    assert_same(undisturbed, train(run, data, data.ids, LONGER, model=llama, reporter=second))
    assert first.done + second.done < 90 + 8  # the examples of one step


def test_no_signal_tears_an_optimizer_step_apart(
    run: Run, llama: str, undisturbed: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while AdamW writes weights is heeded after the step, whose state is saved."""
    data = make_data(run, 30)
    step = torch.optim.AdamW.step
    steps = 0

    def interrupted(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch, interruption.watching():
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run, data, data.ids, LONGER, model=llama)
        assert steps == 3
        assert interruption.last_words().startswith("interrupted: 3 of 24 steps of the warm-up kept; ")
    assert_same(undisturbed, train(run, data, data.ids, LONGER, model=llama))
