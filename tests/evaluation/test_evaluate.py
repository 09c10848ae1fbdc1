"""The verbs `train_on` and `evaluate`, and the metrics that need no judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsift as gs
from gradsift.base.errors import ConfigError, DataError, MismatchError
from gradsift.evaluation.evaluate import evaluate, measure
from gradsift.evaluation.fine_tune import check_seeds, train_on
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mean_reward import MeanReward
from gradsift.evaluation.setup import Trained, open_model
from gradsift.generation.sampling import Sampling
from gradsift.model import models
from gradsift.rewards.estimators import pass_at_k
from gradsift.rewards.form import Length
from gradsift.warmup.merge import merge
from gradsift.warmup.train import Training
from tiny_world import World, save_model

SETTINGS = Training(epochs=3, rank=4, alpha=8, learning_rate=3e-2, batch_size=4, dropout=0.0)
SAMPLED = Sampling(samples=12, temperature=1.0, max_new_tokens=6)
SHORT = MeanReward(data="replaced", reward=Length(unit="characters", maximum=14), sampling=SAMPLED)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> gs.Pool:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return gs.open_pool(tiny.pool, model=tiny.model, out=str(out), max_length=64, device="cpu")


@pytest.fixture(scope="module")
def trained(pool: gs.Pool, tiny: World) -> Trained:
    """Keeps the best of three epochs at a rate that overshoots."""
    return train_on(pool, pool.data.ids[:12], SETTINGS, seed=1, keep="best", best_by=HeldOutLoss(tiny.target))


def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    models._HOSTS.clear()
    monkeypatch.setattr(models, "load_model", refuse)


def test_loss_is_that_of_transformers_and_perplexity_its_exponential(
    pool: gs.Pool, tiny: World, trained: Trained
) -> None:
    """Each example's value is the loss transformers gives for its labels; the token loss weighs examples by their
    labels; perplexity is exp of it; all come with the standard errors of a mean and of a ratio."""
    found = measure(pool, trained, HeldOutLoss(tiny.target))
    data = HeldOutLoss(tiny.target).bind(open_model(tiny.model, out=pool.run, max_length=64, device="cpu")).data
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.model), trained.path).eval()
    losses, labels = [], []
    for position in range(len(data)):
        example = data[position]
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        wanted = torch.where(torch.from_numpy(example.supervised)[None], ids, -100)
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=wanted).loss))
        labels.append(int((wanted != -100).sum()))
        assert found["loss"].per_item[example.id] == pytest.approx(losses[-1], rel=1e-5)
    assert found["loss"].value == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["loss"].standard_error == pytest.approx(np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-4)
    summed, labels = np.multiply(losses, labels), np.array(labels)
    assert found["token_loss"].value == pytest.approx(summed.sum() / labels.sum(), rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(found["token_loss"].value))
    residual = summed - found["token_loss"].value * labels
    assert found["token_loss"].standard_error == pytest.approx(
        residual.std(ddof=1) / math.sqrt(len(labels)) / labels.mean(), rel=1e-4
    )
    assert not found["loss"].higher_is_better


def test_the_loss_of_weighted_turns(pool: gs.Pool, tiny: World, trained: Trained) -> None:
    """A row's value is Σ w·NLL over the number of its labels: that of a row of weight 3 is three times as large."""
    rows = [
        {"id": name, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red", **flags}]}
        for name, flags in (("plain", {}), ("thrice", {"weight": 3}), ("quarter", {"weight": 0.25}))
    ]
    found = measure(pool, trained, HeldOutLoss(rows))["loss"].per_item
    assert found["thrice"] == pytest.approx(3 * found["plain"], rel=1e-6)
    assert found["quarter"] == pytest.approx(found["plain"] / 4, rel=1e-6)


def test_the_best_epoch_on_the_validation_data_is_kept(pool: gs.Pool, tiny: World, trained: Trained) -> None:
    """`keep="best"` names the epoch with the lowest validation loss, and with a reward the one with the highest, the
    first of equal ones; every epoch stays; `last` keeps the last."""
    each = [
        measure(pool, gs.Checkpoint(epoch.adapter), HeldOutLoss(tiny.target))["loss"].value
        for epoch in trained.checkpoints
    ]
    assert list(trained.validation) == each
    assert trained.kept == 1 + int(np.argmin(each))
    assert trained.path == trained.checkpoints[trained.kept - 1].adapter
    last = train_on(pool, pool.data.ids[:12], SETTINGS, seed=1)
    assert (last.kept, last.checkpoints) == (3, trained.checkpoints)
    reward = MeanReward(data=tiny.target, reward=Length(unit="tokens", maximum=6), sampling=SAMPLED)
    by_reward = train_on(pool, pool.data.ids[:12], SETTINGS, seed=1, keep="best", best_by=reward)
    assert by_reward.validation == (1.0, 1.0, 1.0)
    assert by_reward.kept == 1
    assert json.loads(json.dumps(by_reward.as_dict()))["kept_epoch"] == 1


def test_mean_reward_and_pass_at_k_over_prompts(pool: gs.Pool, tiny: World, trained: Trained) -> None:
    """The reward is the mean over prompts of a prompt's mean, pass@k the estimator of rewards on its counts; 100 of 12
    samples is not reported, and rewards that are not 0 or 1 have no pass@k."""
    metric = SHORT.model_copy(update={"data": tiny.target})
    found = measure(pool, trained, metric)
    (prefix,) = {p for p in pool.run.artifacts("samples") if any("reward-" in k for k in pool.run.storage.list(p))} - {
        p
        for p in pool.run.artifacts("samples")
        if pool.run.manifest(p)["config"]["adapter"] != trained.checkpoint.identity()
    }
    counts: dict[str, int] = {}
    from gradsift.generation.samples import _read

    for key in pool.run.storage.list(prefix):
        if key.endswith(".parquet") and "reward-" not in key:
            for response in _read(pool.run, key)[0]:
                counts[response.prompt_id] = counts.get(response.prompt_id, 0) + (len(response.text) <= 14)
    assert 0 < sum(counts.values()) < 48
    assert found["reward"].per_item == {id_: pytest.approx(count / 12) for id_, count in counts.items()}
    assert [figure.name for figure in found.figures] == ["reward", "pass@1", "pass@10"]
    for k in (1, 10):
        expected = [pass_at_k(12, count, k) for count in counts.values()]
        assert found[f"pass@{k}"].value == pytest.approx(np.mean(expected))
        assert found[f"pass@{k}"].standard_error == pytest.approx(np.std(expected, ddof=1) / 2)
    signed = MeanReward(data=tiny.target, reward=lambda completions, **_: [-1.0] * len(completions), sampling=SAMPLED)
    assert [figure.name for figure in measure(pool, trained, signed).figures] == ["reward"]


def test_nothing_is_measured_twice(
    pool: gs.Pool, tiny: World, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second evaluation, of the training, of its folder, without the pool, loads no model and gives the same."""
    metrics = [HeldOutLoss(tiny.target), SHORT.model_copy(update={"data": tiny.target})]
    first = evaluate(pool, trained, metrics)
    without_model(monkeypatch)
    assert evaluate(pool, trained, metrics) == first
    place = open_model(tiny.model, out=pool.run, max_length=64, device="cpu")
    assert evaluate(place, trained.path, metrics).results == first.results
    assert train_on(pool, pool.data.ids[:12], SETTINGS, seed=1).path == trained.checkpoints[-1].adapter
    assert json.loads(json.dumps(first.as_dict()))["results"][0]["figures"][0]["per_item"].keys() == {
        f"t{number}" for number in range(4)
    }


def test_a_metric_that_fails_is_reported_and_the_others_go_on(
    pool: gs.Pool, tiny: World, trained: Trained, tmp_path: Path
) -> None:
    """A reward that raises on everything, data without labels, a file that is not there: each has its message, and
    the metrics after them their figures. A reward that raises on one response leaves that one out and says so."""

    def never(completions: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no idea")

    def picky(completions: list[str], prompts: list[Any], **_: Any) -> list[float]:
        if any("owl" in str(prompt) for prompt in prompts):
            raise RuntimeError("no owls")
        return [1.0] * len(completions)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "what colour is the cat"}\n')
    metrics = [
        MeanReward(data=tiny.target, reward=never),
        HeldOutLoss(str(prompts)),
        HeldOutLoss(str(tmp_path / "absent.jsonl")),
        MeanReward(data=tiny.target, reward=picky),
        HeldOutLoss(tiny.target),
    ]
    found = evaluate(pool, trained, metrics)
    errors = [result.error for result in found.results]
    assert "no idea" in errors[0]
    assert "A loss needs examples with answers" in errors[1]
    assert "absent.jsonl" in errors[2]
    assert errors[3:] == [None, None]
    assert found.results[3]["reward"].n == 3
    assert any("1 of 4 prompts have no response with a reward" in note for note in found.results[3].notes)
    assert found["loss"].n == 4
    with pytest.raises(DataError, match=r"training is done and kept.*epoch 1 failed.*needs examples with answers"):
        train_on(pool, pool.data.ids[:12], SETTINGS, seed=1, keep="best", best_by=HeldOutLoss(str(prompts)))


def test_an_adapter_of_another_base_is_refused_before_any_metric(tiny: World, trained: Trained, tmp_path: Path) -> None:
    """The message names the adapter and the first tensor that does not fit; it is no metric's failure."""
    other = save_model(tmp_path / "other", hidden=48)
    place = open_model(other, out=str(tmp_path / "run"), max_length=64, device="cpu")
    with pytest.raises(MismatchError, match=r"epoch-\d was trained for another model: .* has shape"):
        evaluate(place, trained.path, [HeldOutLoss(tiny.target)])
    with pytest.raises(MismatchError, match="belongs to another model"):
        open_model(other, out=Path(trained.path).parents[2], max_length=64)


def test_wrong_requests_are_refused_before_training(pool: gs.Pool, tiny: World) -> None:
    """Seeds named twice, `best` without a metric, a metric without `best`, no metric at all."""
    with pytest.raises(ConfigError, match="seed 1 is named 2 times"):
        check_seeds([0, 1, 1])
    with pytest.raises(ConfigError, match="must be a whole number from 0"):
        check_seeds([0, -1])
    with pytest.raises(ConfigError, match="give one, or keep the last"):
        train_on(pool, None, SETTINGS, keep="best")
    with pytest.raises(ConfigError, match="leave it out, or keep the best"):
        train_on(pool, None, SETTINGS, best_by=HeldOutLoss(tiny.target))
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate(pool, None, [])


def test_a_fully_trained_model_is_evaluated_as_itself(pool: gs.Pool, tiny: World) -> None:
    """`full` gives a folder with no adapter, whose loss is that of the model in it."""
    settings = SETTINGS.model_copy(update={"epochs": 1, "learning_rate": 1e-2})
    whole = train_on(pool, pool.data.ids[:12], settings, full=True)
    assert whole.full
    found = measure(pool, whole, HeldOutLoss(tiny.target))["loss"].value
    alone = open_model(whole.path, out=str(Path(whole.path).parent / "alone"), max_length=64, device="cpu")
    assert measure(alone, None, HeldOutLoss(tiny.target))["loss"].value == found
    assert found != measure(pool, None, HeldOutLoss(tiny.target))["loss"].value


def test_merged_weights_answer_as_base_and_adapter_do(tiny: World, trained: Trained, tmp_path: Path) -> None:
    """transformers alone loads the merged folder; its logits are those of the base with the adapter, and not those of
    the base; merging again writes nothing, and a folder with something else in it is refused."""
    folder = merge(tiny.model, trained.path, tmp_path / "merged", dtype="float32", device="cpu")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.inference_mode():
        plain = base(ids).logits
        wanted = PeftModel.from_pretrained(base, trained.path).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert merge(tiny.model, trained.path, folder, dtype="float32", device="cpu") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no earlier merge"):
        merge(tiny.model, trained.path, tmp_path / "mine")
