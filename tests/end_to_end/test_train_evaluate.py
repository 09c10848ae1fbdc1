"""`gradsift train` and `gradsift evaluate` as a user types them, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from loopback import completion, serving
from tiny_world import COMMON, Cli, World, save_model, without, write_rows

TRAINING = ("--epochs", "2", "--rank", "4", "--alpha", "8", "--learning-rate", "1e-2", "--batch-size", "4",
            "--dropout", "0")  # fmt: skip


def train(tiny: World, out: Path, *more: object) -> Cli:
    return Cli(
        "train", "--model", tiny.model, "--pool", tiny.pool, "--out", out, *without(TRAINING, more), *COMMON, *more
    )


def evaluate(tiny: World, out: Path, *more: object) -> Cli:
    return Cli("evaluate", "--model", tiny.model, "--out", out, *COMMON, *more)


@pytest.fixture(scope="module")
def chosen(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows as `gradsift select` leaves them."""
    rows = [
        json.loads(line) | {"gradsift_id": f"p{n:02}"}
        for n, line in enumerate(Path(tiny.pool).read_text().splitlines()[:9])
    ]
    return write_rows(tmp_path_factory.mktemp("chosen") / "selected.jsonl", rows)


@pytest.fixture(scope="module")
def trained(tiny: World, chosen: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run folder with two seeds, the best epoch of each, the adapters merged."""
    out = tmp_path_factory.mktemp("trained") / "run"
    options = ("--selected", chosen, "--seed", "0,3", "--keep", "best", "--validation", tiny.target, "--json")
    found = train(tiny, out, *options, "--merge", out.parent / "merged").succeeded().json
    return out, found


def test_train_leaves_an_adapter_for_each_seed(
    tiny: World, chosen: str, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The JSON names each seed's kept adapter, its validation losses and its merged folder; typed again it trains
    nothing; ids in a file train on the same; training.json holds the same list."""
    out, found = trained
    assert [entry["seed"] for entry in found] == [0, 3]
    assert [entry["examples"] for entry in found] == [9, 9]
    for entry in found:
        assert entry["path"] == entry["epochs"][entry["kept_epoch"] - 1]
        assert entry["validation"][entry["kept_epoch"] - 1] == min(entry["validation"])
        assert AutoModelForCausalLM.from_pretrained(entry["merged"]).num_parameters() > 0
        assert Path(entry["merged"]).name == f"seed-{entry['seed']}"
    assert json.loads((out / "training.json").read_text())["trained"] == found
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"p{n:02}\n" for n in range(9)))
    before = sorted(out.rglob("*.safetensors"))
    again = train(tiny, out, "--ids", ids, "--seed", "3").succeeded()
    assert again.out == f"{found[1]['epochs'][1]}\n"
    assert sorted(out.rglob("*.safetensors")) == before


def test_evaluate_prints_a_table_and_leaves_every_value(
    tiny: World, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Base and adapters stand side by side with value, standard error and n; evaluation.json has each item; a metric
    whose judge is not there and an adapter of another base are messages and exit code 1, and lose nothing."""
    out, found = trained
    adapters = [part for entry in found for part in ("--adapter", entry["path"])]
    options = ("--data", tiny.target, "--metric", "loss", "--reward", "length:1-6", "--max-new-tokens", 6)
    shown = evaluate(tiny, out, *options, "--base", *adapters).succeeded()
    assert "held-out loss on target.jsonl" in shown.out
    assert "length on target.jsonl" in shown.out
    for word in ("loss", "perplexity", "reward", "pass@1", "base model", Path(found[0]["path"]).name, "s.e."):
        assert word in shown.out
    content = json.loads((out / "evaluation.json").read_text())
    assert [len(entry["results"]) for entry in content["evaluations"]] == [2, 2, 2]
    losses = [entry["results"][0]["figures"][0] for entry in content["evaluations"]]
    assert losses[1]["per_item"].keys() == {"t0", "t1", "t2", "t3"}
    assert losses[1]["value"] == pytest.approx(min(found[0]["validation"]))
    assert f"{losses[2]['value']:.4f}" in shown.out

    other = Cli("train", "--model", save_model(tmp_path / "m", hidden=48), "--pool", tiny.pool, "--out", tmp_path / "o",
                *without(TRAINING, ("--epochs",)), "--epochs", 1, *COMMON).succeeded().out.strip()  # fmt: skip
    failed = evaluate(tiny, out, "--data", tiny.target, "--reward", "judge:grade", "--metric", "loss", *adapters[:2],
                      "--adapter", other, "--json")  # fmt: skip
    assert failed.code == 1
    assert "asks a language model" in failed.err
    assert "was trained for another model" in failed.err
    assert failed.json["evaluations"][0]["results"][0] == content["evaluations"][1]["results"][0]
    assert len(failed.json["failures"]) == 2


def test_judged_metrics_from_the_command_line(
    tiny: World, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """--against and --questions ask the judge at --judge-url, and their tables have wins and grades."""
    out, found = trained
    questions = write_rows(tmp_path / "q.jsonl", [{"turns": ["what colour is the cat", "why"], "category": "colours"}])

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return completion("Grade: 7" if "Grade:" in body["messages"][-1]["content"] else "Better: tie")

    with serving(reply) as server:
        shown = evaluate(
            tiny, out, "--adapter", found[0]["path"], "--data", tiny.target, "--against", "answer", "--questions",
            questions, "--judge-model", "judge", "--judge-url", server.url, "--max-new-tokens", 4,
        ).succeeded()  # fmt: skip
    for word in (
        "wins against answer on target.jsonl",
        "win_rate",
        "0.5000",
        "grade_turn_2",
        "grade_colours",
        "7.0000",
    ):
        assert word in shown.out


def test_full_training_from_the_command_line(tiny: World, chosen: str, tmp_path: Path) -> None:
    """--full leaves a transformers folder for the epoch, which `evaluate --model` takes."""
    out = tmp_path / "run"
    folder = train(tiny, out, "--selected", chosen, "--full", "--epochs", 1).succeeded().out.strip()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype.is_floating_point
    shown = Cli("evaluate", "--model", folder, "--out", tmp_path / "e", "--data", tiny.target, *COMMON).succeeded()
    assert "perplexity" in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "0,1,0"), "seed 0 is named 2 times"),
        (("--seed", "zero"), "--seed 'zero': wanted whole numbers"),
        (("--preset", "mine"), "--preset 'mine' is unknown: there are less, compact, nice, ji2s"),
        (("--keep", "best"), "--keep best and --validation FILE go together"),
        (("--rank", "0"), "--rank is 0"),
        (("--full", "--merge", "m"), "--merge is for adapters"),
        (("--ids", "absent.txt"), "cannot read absent.txt"),
        (("--selected", "a", "--ids", "b"), "give one of them"),
    ],
)
def test_wrong_training_options_are_refused_at_once(
    tiny: World, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """One message, exit code 2 (1 where a file is not there), and no run folder."""
    wrong = train(tiny, tmp_path / "run", *options)
    assert wrong.code == (1 if "absent.txt" in options else 2)
    assert message in wrong.err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--metric", "loss"), "the metric loss needs --data"),
        (("--metric", "blue"), "--metric 'blue' is unknown: there are loss, preferences, reward, tasks"),
        (("--reward", "length:1-2"), "the metric reward needs --data"),
        (("--judge-url", "http://x/v1", "--questions", "q.jsonl"), "name its model with --judge-model"),
        (("--data", "x", "--reward", "length:1-2", "--samples", "0"), "--sampling: samples"),
    ],
)
def test_wrong_evaluation_options_are_refused_at_once(
    tiny: World, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """One message that names the option, and exit code 2."""
    wrong = evaluate(tiny, tmp_path / "run", *options)
    assert wrong.code == 2
    assert message in wrong.err


def test_ids_that_the_pool_does_not_have_are_named(tiny: World, tmp_path: Path) -> None:
    """The message has the first such id; nothing is trained."""
    ids = tmp_path / "ids.txt"
    ids.write_text("p01\nnobody\n")
    wrong = train(tiny, tmp_path / "run", "--ids", ids)
    assert wrong.code == 1
    assert "'nobody'" in wrong.err
