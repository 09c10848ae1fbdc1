"""What a command lists is its own, and what an earlier one left goes once it no longer holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradsift.jobs.results import FILES
from tiny_world import COMMON, Cli, World, target_rows

CHOICE = {"selected.jsonl", "scores.parquet", "skipped.jsonl", "report.html"}
EXPLANATION = {
    "explanations.jsonl", "explanations.parquet", "relevance.json", "explanation.html", "skipped.jsonl", "report.html",
}  # fmt: skip


def there(out: Path) -> set[str]:
    return {name for name in FILES if (out / name).is_file()}


def read(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


@pytest.fixture(scope="module")
def reward(tiny: World) -> tuple[str, ...]:
    """Options of a ranking by rewards."""
    file = tiny.folder / "letters.py"
    file.write_text("def letters(completions, **columns):\n    return [float(len(set(c))) for c in completions]\n")
    return "--reward", f"{file}:letters", "--samples", "4", "--max-new-tokens", "6"


def test_a_later_choice_replaces_what_was_said_of_the_earlier(
    tiny: World, reward: tuple[str, ...], tmp_path: Path
) -> None:
    """diagnostics.json names its method, is written anew for the next one, and goes where there is nothing to say."""
    own = (*tiny.with_adapters(), "--budget", 4, "--json")
    nice = tiny("select", tmp_path, *own, "--estimator", "nice", *reward).succeeded().json
    assert set(nice["files"]) == CHOICE | {"diagnostics.json"} == there(tmp_path)
    said = read(tmp_path, "diagnostics.json")
    assert (said["command"], said["method"]) == ("select", "NICE (M=4)")
    assert [one["over"] for one in said["reliability"]] == ["samples", "targets"]
    assert said["checkpoints"]
    bm25 = tiny("select", tmp_path, *own, "--estimator", "bm25").succeeded().json
    said = read(tmp_path, "diagnostics.json")
    assert said["method"] == "BM25"
    assert [one["over"] for one in said["reliability"]] == ["targets"]
    assert "checkpoints" not in said
    assert list(said["kept"]["targets"]) == bm25["selections"][0]["ids"]
    chance = tiny("select", tmp_path, *own, "--estimator", "random").succeeded().json
    assert set(chance["files"]) == CHOICE == there(tmp_path)


def test_other_scores_leave_a_choice_as_it_is(tiny: World, tmp_path: Path) -> None:
    """`score` lists no selected.jsonl, says nothing of its rows, and leaves it there, whatever the method."""
    own = (*tiny.with_adapters(), "--budget", 4, "--json")
    chosen = tiny("select", tmp_path, *own).succeeded().json
    kept = (tmp_path / "selected.jsonl").read_bytes()
    again = tiny("score", tmp_path, *own[:-3], "--json").succeeded().json
    assert again["command"] == read(tmp_path, "summary.json")["command"] == "score"
    assert set(again["files"]) == {"scores.parquet", "diagnostics.json", "skipped.jsonl"}
    assert (tmp_path / "selected.jsonl").read_bytes() == kept
    assert "kept" not in again
    assert len(chosen["selections"][0]["kept"]["targets"]) == 4
    tiny("score", tmp_path, *own[:-3], "--estimator", "bm25").succeeded()
    assert read(tmp_path, "diagnostics.json")["method"] == "BM25"
    assert (tmp_path / "selected.jsonl").read_bytes() == kept


def test_an_explanation_and_a_choice_list_their_own(tiny: World, tmp_path: Path) -> None:
    """Files of the other stay, and the report shows both with both commands; neither lists the other's."""
    own = (*tiny.with_adapters(), "--json")
    prompt = ("--prompt", "what says the cow", "-k", 2, "--max-new-tokens", 8)
    tiny("select", tmp_path, *own, "--budget", 4).succeeded()
    explained = tiny("explain", tmp_path, *own, *prompt).succeeded().json
    assert set(explained["files"]) == EXPLANATION
    printed = Cli(*[part for part in tiny.arguments("explain", tmp_path, *own, *prompt) if part != "--json"])
    listed = {
        line.split()[0] for line in printed.succeeded().out.splitlines() if line.startswith("  ") and line.strip()
    }
    assert listed & set(FILES) == EXPLANATION
    assert there(tmp_path) == CHOICE | EXPLANATION | {"diagnostics.json"}
    assert "select and explain" in (tmp_path / "report.html").read_text()
    chosen = tiny("select", tmp_path, *own, "--budget", 4).succeeded().json
    assert set(chosen["files"]) == CHOICE | {"diagnostics.json"}


def test_responses_and_rewards_go_together(tiny: World, reward: tuple[str, ...], tmp_path: Path) -> None:
    """rewards.json says whose it is, and goes with responses that have none; a ranking does not list either."""
    own = (*tiny.with_adapters(), "--json")
    earned = tiny("reward", tmp_path, *own, *reward).succeeded().json
    assert {"responses.jsonl", "rewards.json"} <= set(earned["files"])
    said = read(tmp_path, "rewards.json")
    assert said["command"] == "reward"
    assert said["target"].startswith("target.jsonl")
    ranked = tiny("select", tmp_path, *own, "--estimator", "nice", *reward, "--budget", 4).succeeded().json
    assert not {"responses.jsonl", "rewards.json"} & set(ranked["files"])
    sampled = tiny("sample", tmp_path, *own, *reward[2:]).succeeded().json
    assert "rewards.json" not in sampled["files"]
    assert not (tmp_path / "rewards.json").exists()


def test_trainings_and_evaluations_name_themselves(tiny: World, tmp_path: Path) -> None:
    """training.json says on what, evaluation.json of which models; each says by which command."""
    (tmp_path / "ids").write_text("p00\np01\np02\np03\n")
    settings = ("--epochs", 1, "--rank", 2, "--learning-rate", "1e-3", "--preset", "small", "--ids", tmp_path / "ids")
    model = ("--model", tiny.model, "--out", tmp_path / "run", *COMMON)
    Cli("train", "--pool", tiny.pool, *model, *settings).succeeded()
    said = read(tmp_path / "run", "training.json")
    assert (said["command"], said["chosen"]) == ("train", str(tmp_path / "ids"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in target_rows()))
    Cli("evaluate", *model, "--data", data).succeeded()
    said = read(tmp_path / "run", "evaluation.json")
    assert said["command"] == "evaluate"
    assert [one["name"] for one in said["evaluations"]] == ["base model"]
