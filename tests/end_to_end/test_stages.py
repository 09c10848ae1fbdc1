"""`gradsift sample` and `gradsift reward`: what they print and leave, and that later commands find it all again."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from gradsift.base.errors import ConfigError
from gradsift.jobs.rollouts import pass_rates, run_sample
from gradsift.model import models
from gradsift.recipe import validated
from loopback import Answer, completion, serving
from tiny_world import Cli, World, save_model, target_rows, write_rows

FEW = ("--samples", "4", "--max-new-tokens", "6")
REWARD = """
from pathlib import Path

def vowels(completions, task, **columns):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write("x" * len(completions))
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""


def prompts(folder: Path, **columns: Any) -> str:
    rows = [{key: value for key, value in row.items() if key != "completion"} | columns for row in target_rows()]
    return write_rows(folder / "prompts.jsonl", rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_then_reward_then_select_do_nothing_twice(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reward` and `select` find the responses of `sample`, and `select` the rewards of `reward`."""
    (tmp_path / "rewards.py").write_text(REWARD)
    target, out = prompts(tmp_path), tmp_path / "run"
    sampled = tiny("sample", out, "--json", *FEW, *tiny.with_adapters(), target=target).succeeded().json
    files = {path: path.read_bytes() for path in out.glob("samples/*/*/*.parquet")}
    assert [entry["checkpoint"] for entry in sampled["checkpoints"]] == ["epoch-1", "epoch-2"]
    assert all(entry["responses"]["responses"] == 16 and entry["rewards"] is None for entry in sampled["checkpoints"])
    assert not (out / "rewards.json").exists()
    bare = rows_of(out / "responses.jsonl")
    assert len(bare) == 32
    assert {row["reward"] for row in bare} == {None}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    function = ("--reward", str(tmp_path / "rewards.py:vowels"))
    with monkeypatch.context() as patch:
        models._HOSTS.clear()
        patch.setattr(models, "load_model", refuse)
        given = (*FEW, *function, *tiny.with_adapters())
        rewarded = tiny("reward", out, "--json", *given, target=target).succeeded().json
    assert len((tmp_path / "calls").read_text()) == 32
    rows = rows_of(out / "responses.jsonl")
    assert [row | {"reward": None} for row in rows] == bare
    for entry in rewarded["checkpoints"]:
        own = [row["reward"] for row in rows if row["checkpoint"] == entry["checkpoint"]]
        assert entry["rewards"]["mean"] == pytest.approx(sum(own) / len(own))
        assert entry["rewards"]["no_signal"] == [
            id_ for id_, values in by_prompt(rows, entry["checkpoint"]).items() if not any(values)
        ]
    assert json.loads((out / "rewards.json").read_text())["checkpoints"] == rewarded["checkpoints"]

    shown = tiny("select", out, "--budget", 3, "--estimator", "nice", "--json", *given, target=target).succeeded().json
    assert len(shown["selections"][0]["ids"]) == 3
    assert len((tmp_path / "calls").read_text()) == 32
    assert {path: path.read_bytes() for path in out.glob("samples/*/*/0*.parquet")} == {
        path: content for path, content in files.items() if "reward-" not in path.name
    }
    reported = [entry["rewards"] for entry in shown["diagnostics"]["checkpoints"]]
    assert reported == [entry["rewards"] for entry in rewarded["checkpoints"]]


def by_prompt(rows: list[dict[str, Any]], checkpoint: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["checkpoint"] == checkpoint:
            found[row["prompt_id"]].append(row["reward"])
    return found


def test_the_best_and_the_worst_response_are_shown(tiny: World, tmp_path: Path) -> None:
    """Tables, then for --show prompts the responses of highest and lowest reward; without rewards the first."""
    target, out = prompts(tmp_path), tmp_path / "run"
    common = (*FEW, "--checkpoints", "last", *tiny.with_adapters())
    shown = tiny("sample", out, "--show", 1, *common, target=target).succeeded().out
    assert "distinct per prompt" in shown
    assert "epoch-2" in shown
    assert "epoch-1" not in shown
    assert "t0: what colour is the cat of 0\n  " in shown
    assert "\nt1: " not in shown
    (tmp_path / "by_number.py").write_text(
        "def rank(completion_ids, **columns):\n    return [ids[0] * 1.0 for ids in completion_ids]\n"
    )
    given = ("--reward", str(tmp_path / "by_number.py"), "--show", 1, *common)
    shown = tiny("reward", out, *given, target=target).succeeded().out
    assert "without signal" in shown
    assert "pass@" not in shown
    own = sorted((r for r in rows_of(out / "responses.jsonl") if r["prompt_id"] == "t0"), key=lambda r: r["reward"])
    assert shown.index(f"\n  earns {own[-1]['reward']:g}") < shown.index(f"\n  earns {own[0]['reward']:g}")
    assert "rewards.json" in shown


def test_what_a_terminal_obeys_is_not_shown(tiny: World, tmp_path: Path) -> None:
    """Escape sequences that an assistant writes are replaced, and stay what they are in the file."""
    with serving(Answer(completion("\x1b[31mred\x07", "x"))) as server:
        options = ("--assistant", "g", "--assistant-url", server.url, "--samples", 1, "--show", 9)
        shown = tiny("sample", tmp_path / "run", *options, target=prompts(tmp_path)).succeeded().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\ufffd[31mred" in shown
    assert rows_of(tmp_path / "run" / "responses.jsonl")[0]["text"] == "\x1b[31mred\x07"


def test_an_assistant_on_a_server_needs_no_warm_up(tiny: World, tmp_path: Path) -> None:
    """One set of responses for all checkpoints, asked with prefix and suffix, without training; tokens are counted."""
    out = tmp_path / "run"
    options = ("--assistant-prefix", "Briefly: ", "--assistant-suffix", " Thanks.", "--samples", 2, "--json")
    with serving(lambda body: completion("it is red" if "cat" in body["messages"][0]["content"] else "")) as server:
        options += ("--assistant", "g", "--assistant-url", server.url)
        found = tiny("sample", out, *options, target=prompts(tmp_path)).succeeded().json
        asked = server.requests
    assert len(asked) == 8
    assert asked[0]["messages"][-1]["content"].startswith("Briefly: what colour")
    assert asked[0]["messages"][-1]["content"].endswith(" Thanks.")
    assert [entry["checkpoint"] for entry in found["checkpoints"]] == ["assistant g"]
    assert found["checkpoints"][0]["usage"]["completion_tokens"] == 7 * 8
    assert not (out / "checkpoints").exists()


def test_passed_unit_tests_are_counted_and_the_isolation_is_told(tiny: World, tmp_path: Path) -> None:
    """Rewards of 0 and 1 give pass@1; the user is told once what shuts programs off."""
    target = prompts(tmp_path, test="assert answer() == 1", entry_point="")
    good, bad = "```python\ndef answer():\n    return 1\n```", "```python\ndef answer():\n    return 2\n```"
    given = ("--reward", "unit_tests", "--allow-code-execution", "--samples", 1)
    with serving(lambda body: completion(good if "cat" in body["messages"][0]["content"] else bad)) as server:
        options = (*given, "--assistant", "g", "--assistant-url", server.url)
        arguments = tiny.arguments("reward", tmp_path / "run", *options, target=target)
        shown = Cli(*[argument for argument in arguments if argument != "--quiet"]).succeeded()
    assert re.search(r"pass@1 +0\.250", shown.out)
    assert shown.err.count("unit tests run what the model wrote; in force: ") == 1


def test_pass_at_k_goes_as_far_as_the_samples() -> None:
    """k is 1, 10 and 100 up to the fewest responses of a prompt; rewards other than 0 and 1 have none."""
    rewards = {("a", n): float(n == 0) for n in range(12)} | {("b", n): 0.0 for n in range(10)}
    assert pass_rates(rewards) == pytest.approx({1: 1 / 24, 10: 10 / 24})
    assert pass_rates(rewards | {("a", 3): 0.5}) == {}


def test_responses_without_a_reward_say_why(tiny: World, tmp_path: Path) -> None:
    """A response that the reward cannot judge has none, and its reason beside it."""
    (tmp_path / "picky.py").write_text(
        "def picky(completions, log_problem, **columns):\n"
        "    log_problem(0, 'too odd')\n    return [1.0] * len(completions)\n"
    )
    given = (*FEW, "--reward", str(tmp_path / "picky.py"), "--checkpoints", "last", *tiny.with_adapters(), "--json")
    found = tiny("reward", tmp_path / "run", *given, target=prompts(tmp_path)).succeeded().json
    failed = [row for row in rows_of(tmp_path / "run" / "responses.jsonl") if row["reward"] is None]
    assert [(row["prompt_id"], row["number"], row["problem"]) for row in failed] == [("t0", 0, "picky: too odd")]
    assert found["checkpoints"][0]["without_reward"] == 1


def test_more_samples_are_added_to_those_there(tiny: World, tmp_path: Path) -> None:
    """From 4 to 6 samples the first 4 stay, and the terminal says how many there were."""
    target, out = prompts(tmp_path), tmp_path / "run"
    common = ("--max-new-tokens", "6", "--checkpoints", "last", *tiny.with_adapters())
    tiny("sample", out, "--samples", 4, *common, target=target).succeeded()
    before = rows_of(out / "responses.jsonl")
    arguments = tiny.arguments("sample", out, "--samples", 6, *common, target=target)
    said = Cli(*[argument for argument in arguments if argument != "--quiet"]).succeeded().err
    assert "16 of 24 responses are there already" in said
    after = rows_of(out / "responses.jsonl")
    assert [row for row in after if row["number"] < 4] == before
    assert len(after) == 24


def test_an_estimator_without_responses_is_refused(tiny: World, tmp_path: Path) -> None:
    """Python's `run_sample` of a recipe for LESS says what samples."""
    recipe = validated({"model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="the estimator less samples no responses: name nice or nice_if"):
        run_sample(recipe)


def test_a_local_assistant_writes_for_the_model(tiny: World, tmp_path: Path) -> None:
    """`--assistant` with a folder samples from that model; the responses are counted in the model's own tokens."""
    other = save_model(tmp_path / "g", seed=5)
    options = (*FEW, "--assistant", other, "--json")
    found = tiny("sample", tmp_path / "run", *options, target=prompts(tmp_path)).succeeded().json
    assert [entry["checkpoint"] for entry in found["checkpoints"]] == ["assistant g"]
    assert found["checkpoints"][0]["responses"]["responses"] == 16
