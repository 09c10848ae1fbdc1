"""What a user can get wrong in a comparison, in `train` and in `evaluate`: one message, exit code 1, nothing lost.

A message is given as the part that tells the case apart; it stands in one line that begins with `error: `.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tiny_world import COMMON, Cli, World, pool_rows, save_model, target_rows, write_rows

WARMUP = {"fraction": 0.5, "epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 4, "dropout": 0}
TRAINING = {"epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0}
JUDGE = {"model": "judge", "base_url": "http://127.0.0.1:9/v1", "max_retries": 0}
RANDOM = {"estimator": {"kind": "random"}}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with something wrong in them."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "test.jsonl", target_rows(8)[4:])
    write_rows(folder / "prompts.jsonl", [{"prompt": "what colour is it"}])
    write_rows(folder / "texts.jsonl", [{"text": "what colour is it"}])
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.parquet").write_text("PAR")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50)[:40])
    (folder / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    (folder / "ratings.py").write_text("def rated(rows):\n    return [1.0] * len(rows)\n")
    return folder


def compare(tiny: World, here: Path, out: Path, change: dict[str, Any], **more: Any) -> Cli:
    """`gradsift compare` on a random arm, with something changed."""
    job = {"test": "{here}/test.jsonl", "training": TRAINING, "seeds": [0], "budgets": [6], "arms": [RANDOM]}
    content = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(out), "max_length": 64,
        "device": "cpu", "warmup": WARMUP, "gradients": {"projection": {"dim": 256}}, "judge": JUDGE,
        "compare": job | change,
    }  # fmt: skip
    text = yaml.safe_dump(content | more, sort_keys=False, allow_unicode=True).replace("{here}", str(here))
    path = out.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    return Cli("compare", path, "--quiet")


def metric(kind: str, **fields: Any) -> dict[str, Any]:
    return {"metrics": [{"kind": kind, **fields}]}


CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("test data is no parquet", {"test": "{here}/bad.parquet"}, {}, "is not a parquet file that can be read"),
    ("test data breaks off", {"test": "{here}/cut.jsonl.gz"}, {}, "cannot be read: Compressed file ended"),
    ("test data is not UTF-8", {"test": "{here}/latin.jsonl"}, {}, "latin.jsonl:1: not UTF-8"),
    ("test data is empty", {"test": "{here}/empty.jsonl"}, {}, "is empty: no rows found"),
    ("test data has no answers", {"test": "{here}/prompts.jsonl"}, {}, ". A loss needs examples with answers"),
    ("metric of no kind", metric("bleu"), {}, "'bleu' is unknown: there are loss, preferences, reward, lm_eval, "),
    ("metric by its name", {"metrics": ["loss"]}, {}, "compare.metrics.0 is 'loss': wanted settings of its own"),
    ("file of an arm", {"arms": [{"data": "{here}/none.jsonl"}]}, {}, "none.jsonl does not exist (readable files in"),
    ("estimator of an arm", {"arms": [{"estimator": {"kind": "lesss"}}]}, {}, "'lesss' is unknown: there are less,"),
    ("NICE without a reward", {"arms": [{"estimator": {"kind": "nice"}}]}, {},
     "NICE ranks by a reward, and none is named: give --reward"),
    ("reward of a column that is not there", {}, {"reward": {"kind": "numeric", "answer": "result"},
     "compare": {"arms": [{"estimator": {"kind": "nice"}}], "test": "{here}/test.jsonl"}},
     "the reward numeric reads the column 'result', which the targets do not have (they have completion, id,"),
    ("metric of such a reward", metric("reward", reward={"kind": "numeric", "answer": "result"}), {},
     "reads the column 'result', which the targets do not have"),
    ("reward of no file", metric("reward", reward="{here}/none.py:f"), {}, "there is no file {here}/none.py"),
    ("reward of nothing", metric("reward"), {}, "'compare.metrics.0.reward' is missing"),
    ("comparison without a judge", metric("pairwise"), {"judge": None}, "a comparison needs a judge: `judge:` in a"),
    ("comparison with no arm", metric("pairwise", against="arm:LESS"), {},
     "against is 'arm:LESS', and there is no such arm: 'random'"),
    ("comparison with no budget", metric("pairwise", against="arm:random", budget=7), {},
     "the budget of 'arm:random' is 7, which is none of its own: there are 6"),
    ("budget of no arm", metric("pairwise", budget=6), {}, "budget is of an arm, and against is 'base'"),
    ("comparison with whole models", metric("pairwise", against="arm:random") | {"full_training": True}, {},
     "whose whole model would have to be loaded beside this one"),
    ("comparison with no adapter", metric("pairwise", against="{here}/none"), {}, "none"),
    ("questions that are none", metric("grading", questions="{here}/texts.jsonl"), {},
     "texts.jsonl has no question: wanted rows with `turns` (a list of texts) or `prompt`"),
    ("questions that are not there", metric("grading", questions="{here}/q.jsonl"), {}, "q.jsonl does not exist"),
    ("reference that is no arm", {"reference": "LESS"}, {},
     "compare.reference is 'LESS', and there is no such arm: 'random'"),
    ("best by no answers", {"keep": "best", "best_by": {"kind": "loss", "data": "{here}/prompts.jsonl"}}, {},
     "A loss needs examples with answers"),
    ("best by an arm", {"keep": "best", "best_by": {"kind": "pairwise", "data": "{here}/test.jsonl",
     "against": "arm:random"}}, {}, "compare.best_by: epochs cannot be chosen by another arm's model"),
    ("selection of another estimator", {"arms": [{"estimator": {"kind": "less"},
     "selection": {"kind": "joint_greedy"}}]}, {}, "selection joint_greedy picks by the terms of JI2S"),
    ("training of an arm", {"arms": [{"full": True, "training": "ji2"}]}, {},
     "compare.arms.0.training: training preset 'ji2' is unknown: there are less"),
    ("training of the base", {"arms": [{"base": True, "training": "less"}]}, {}, "training does not go with it"),
    ("field of the training", {"training": {"epoch": 1}}, {}, "'compare.training.epoch'; did you mean 'epochs'?"),
    ("budget in words", {"budgets": ["many"]}, {}, "compare.budgets.0 is 'many': wanted a number of examples"),
    ("seeds that are no list", {"seeds": "0"}, {}, "compare.seeds is '0': wanted a list"),
    ("no target", {"arms": [{"estimator": {"kind": "less"}}]}, {"target": None}, "no target: give --target"),
    ("rater of no judge", {"arms": [{"estimator": {"kind": "alpagasus"}}]}, {"judge": None},
     "AlpaGasus asks a judge, and none is named"),
    ("rater of no function", {"arms": [{"estimator": {"kind": "alpagasus", "rater": {"kind": "function",
     "name": "{here}/ratings.py:words"}}}]}, {}, "ratings.py"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "more", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_mistake_is_told_before_any_work(
    change: dict[str, Any], more: dict[str, Any], message: str, tiny: World, here: Path, tmp_path: Path
) -> None:
    """One line with what was found and what to do, exit code 1, and no training."""
    found = compare(tiny, here, tmp_path / "run", change, **more)
    assert message.replace("{here}", str(here)) in found.err
    assert found.code in (1, 2)  # of a model or a file that is not there, and of what was typed wrong
    assert found.err.splitlines()[-1].startswith("error: ")
    assert ".. " not in found.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_little_memory_for_full_training(
    tiny: World, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell says what training all parameters takes and what is free; the base model's figures are there."""

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    found = compare(tiny, here, tmp_path / "run", {"arms": [RANDOM, {"base": True}], "full_training": True})
    assert found.code == 1
    assert "1 failed and the rest is done, first random, 6 examples, seed 0, train" in found.err
    assert "GiB are free on cpu: train an adapter" in found.err
    assert (tmp_path / "run" / "comparison.json").is_file()


@pytest.fixture(scope="module")
def foreign(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of a wider model."""
    folder = tmp_path_factory.mktemp("foreign")
    model = save_model(folder / "model", hidden=48)
    options = ("--epochs", 1, "--rank", 4, "--batch-size", 8, "--dropout", 0)
    found = Cli("train", "--model", model, "--pool", tiny.pool, "--out", folder / "run", *options, *COMMON)
    return found.succeeded().out.strip()


def test_an_adapter_of_another_base(tiny: World, here: Path, foreign: str, tmp_path: Path) -> None:
    """Chosen by, compared with and evaluated: the message names the adapter; what does not need it is done."""
    less = {"estimator": {"kind": "less", "optimizer": "sgd"}}
    chosen = compare(tiny, here, tmp_path / "run", {"arms": [less, RANDOM]}, adapter=[foreign])
    assert chosen.code == 1
    assert "was trained for another model" in chosen.err
    assert "random" in (tmp_path / "run" / "comparison.json").read_text()
    evaluated = Cli("evaluate", "--model", tiny.model, "--out", tmp_path / "e", "--adapter", foreign, "--base",
                    "--data", tiny.target, "--json", *COMMON)  # fmt: skip
    assert evaluated.code == 1
    assert "was trained for another model" in evaluated.err
    assert [one["name"] for one in evaluated.json["evaluations"]] == ["base model"]
    folder = Path(foreign).parents[2]
    trained = Cli("train", "--model", tiny.model, "--pool", tiny.pool, "--out", folder, *COMMON)
    assert trained.code == 1
    assert "belongs to" in trained.err


EVALUATED = [
    ("folder without an adapter", ("--adapter", "{here}", "--data", "{target}"), "{here}"),
    ("adapter that is not there", ("--adapter", "{here}/none", "--data", "{target}"), "{here}/none"),
    ("reward of no column", ("--data", "{target}", "--reward", "numeric:result"), "reads the column 'result'"),
    ("data that is not there", ("--data", "{here}/none.jsonl"), "none.jsonl does not exist"),
    ("questions that are none", ("--questions", "{here}/texts.jsonl", "--judge-model", "m", "--judge-url",
     "http://127.0.0.1:9/v1"), "has no question"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in EVALUATED], ids=[case[0] for case in EVALUATED])
def test_a_mistake_in_evaluate(options: tuple[str, ...], message: str, tiny: World, here: Path, tmp_path: Path) -> None:
    """The message names what could not be used, and the exit code is 1."""
    given = [option.format(here=here, target=tiny.target) for option in options]
    found = Cli("evaluate", "--model", tiny.model, "--out", tmp_path / "run", *given, *COMMON)
    assert (found.code, message.format(here=here) in found.err) == (1, True), found.err
    assert ".. " not in found.err


TRAINED = [
    ('{"gradsift_id": "p00"}\n{broken\n', "selected.jsonl", "selected.jsonl:2 cannot be read: not valid JSON"),
    ('{"text": "p00"}\n', "selected.jsonl", "selected.jsonl:1 has neither gradsift_id nor id"),
    ("", "ids.txt", "ids.txt names no example: wanted an id a line"),
    ('["p00", "nobody"]', "ids.json", "'nobody'"),
]


@pytest.mark.parametrize(("text", "name", "message"), TRAINED)
def test_ids_that_cannot_be_used(text: str, name: str, message: str, tiny: World, tmp_path: Path) -> None:
    """The message has file and line, or the id; nothing is trained."""
    (tmp_path / name).write_text(text)
    found = Cli("train", "--model", tiny.model, "--pool", tiny.pool, "--out", tmp_path / "run", "--ids",
                tmp_path / name, *COMMON)  # fmt: skip
    assert (found.code, message in found.err) == (1, True), found.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ids_as_rows_lists_and_lines(tiny: World, tmp_path: Path) -> None:
    """Rows of any readable file, a JSON list and lines of text name the same examples, and train once."""
    names = ["p00", "p03", "p05"]
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in names))
    (tmp_path / "ids.json").write_text(str(names).replace("'", '"'))
    (tmp_path / "ids.csv").write_text("id,text\n" + "".join(f"{name},x\n" for name in names))
    write_rows(tmp_path / "ids.jsonl", [{"gradsift_id": name, **pool_rows(1)[0]} for name in names])
    options = ("--epochs", 1, "--rank", 4, "--batch-size", 1, "--dropout", 0)
    found = {
        Cli("train", "--model", tiny.model, "--pool", tiny.pool, "--out", tmp_path / "run", "--ids",
            tmp_path / f"ids.{kind}", *options, *COMMON).succeeded().out
        for kind in ("txt", "json", "csv", "jsonl")
    }  # fmt: skip
    assert len(found) == 1
