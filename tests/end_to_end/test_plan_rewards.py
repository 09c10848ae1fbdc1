"""`gradsift plan` of a target with a reward: what is sampled, judged and run is counted before anything heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsift.model.models import load_tokenizer
from tiny_world import Cli, World, save_model, target_rows, write_rows

NICE = ("--estimator", "nice", "--samples", "5", "--max-new-tokens", "7")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def prompts(folder: Path, **columns: Any) -> str:
    rows = [{key: value for key, value in row.items() if key != "completion"} | columns for row in target_rows()]
    return write_rows(folder / "prompts.jsonl", rows)


def lengths(tiny: World) -> list[int]:
    """Tokens of each prompt, from the template itself."""
    tokenizer = load_tokenizer(tiny.model)
    return [len(tokenizer(CHAT.format(row["prompt"]), add_special_tokens=False)["input_ids"]) for row in target_rows()]


def test_responses_and_policy_gradients_are_counted(tiny: World, tmp_path: Path) -> None:
    """Prompts × samples × checkpoints × limit; gradients of prompt and response, twice; no labels are counted.

    A prompt's rows are one for all of its samples and one for each.
    """
    given = (*NICE, "--reward", "length:1-5", "--json")
    found = tiny("plan", tmp_path / "run", *given, target=prompts(tmp_path)).succeeded().json
    stages = found["stages"]
    assert stages["responses"]["tokens"] == 4 * 5 * 2 * 7
    assert stages["responses"]["seconds"] > 0
    assert stages["policy gradients"]["tokens"] == pytest.approx(2 * 2 * 5 * sum(n + 7 for n in lengths(tiny)))
    assert stages["policy gradients"]["disk_bytes"] == (1 + 5) * 4 * 2 * 256 * 2
    assert "target gradients" not in stages
    assert stages["pool gradients"]["tokens"] == 2 * found["pool"]["tokens"]
    assert "rewards" not in stages
    assert found["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert found["sampling"][0]["tokens_per_second"] > 0
    assert found["endpoints"] == []
    last = tiny("plan", tmp_path / "run", *given, "--checkpoints", "last", target=prompts(tmp_path)).succeeded().json
    assert last["stages"]["responses"]["tokens"] == 4 * 5 * 7
    assert not (tmp_path / "run").exists()


def test_an_assistant_writes_once(tiny: World, tmp_path: Path) -> None:
    """A local assistant's responses are counted once, measured on itself; their gradients at every checkpoint."""
    given = (*NICE, "--reward", "length:1-5", "--assistant", save_model(tmp_path / "g", seed=5), "--json")
    found = tiny("plan", tmp_path / "run", *given, target=prompts(tmp_path)).succeeded().json
    assert found["stages"]["responses"]["tokens"] == 4 * 5 * 7
    assert found["stages"]["responses"]["seconds"] > 0
    assert found["stages"]["policy gradients"]["tokens"] == pytest.approx(2 * 2 * 5 * sum(n + 7 for n in lengths(tiny)))


def test_a_recipe_with_endpoints_and_prices(tiny: World, tmp_path: Path) -> None:
    """Calls, tokens and cost of an assistant and of a judge; time that nobody can know is told as such."""
    target = write_rows(tmp_path / "t.jsonl", [{**row, "reference": "red"} for row in target_rows()])
    recipe = {
        "model": tiny.model, "pool": tiny.pool, "target": target, "out": str(tmp_path / "run"), "max_length": 64,
        "device": "cpu", "adapter": tiny.adapters, "gradients": {"projection": {"kind": "sparse", "dim": 256}},
        "reward": {"kind": "judge", "mode": "pairwise", "max_tokens": 50},
        "judge": {"model": "j", "base_url": "http://localhost:1/v1", "prompt_price": 2, "completion_price": 8},
        "estimator": {"kind": "nice_if", "assistant": {
            "model": {"model": "g", "base_url": "http://localhost:1/v1", "samples_per_request": 2, "prompt_price": 1,
                      "completion_price": 3},
            "sampling": {"preset": "assisted", "samples": 3, "max_new_tokens": 10}, "prompt_suffix": " please"}},
    }  # fmt: skip
    path = tmp_path / "nice.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = Cli("plan", path, "--json", "--quiet").succeeded().json
    writer, judge = found["endpoints"]
    suffix = len(load_tokenizer(tiny.model)(" please", add_special_tokens=False)["input_ids"])
    assert (writer["role"], writer["model"], writer["requests"]) == ("responses", "g", 4 * 2)
    assert writer["prompt_tokens"] == 2 * sum(n + suffix for n in lengths(tiny))
    assert writer["completion_tokens"] == 4 * 3 * 10
    assert writer["cost"] == pytest.approx((writer["prompt_tokens"] + 3 * 120) / 1e6)
    assert (judge["role"], judge["requests"], judge["completion_tokens"]) == ("judge", 4 * 3 * 2, 4 * 3 * 2 * 50)
    assert judge["prompt_tokens"] > judge["requests"] * 100  # the instructions alone are longer
    assert found["stages"]["responses"]["seconds"] is None
    assert found["stages"]["rewards"]["seconds"] is None
    assert found["stages"]["target gradients"]["tokens"] > 0  # the labels, for the diagnostics
    shown = " ".join(Cli("plan", path, "--quiet").succeeded().out.split())
    assert "responses, asked of g: 8 calls" in shown
    assert "judge, asked of j: 24 calls" in shown
    assert "time: without what ? stands for" in shown


def test_programs_of_unit_tests_are_counted(tiny: World, tmp_path: Path) -> None:
    """Each response is a program to run."""
    target = prompts(tmp_path, test="assert answer() == 1", entry_point="")
    given = (*NICE, "--reward", "unit_tests", "--allow-code-execution")
    assert "40 programs are run" in tiny("plan", tmp_path / "run", *given, target=target).succeeded().out


def test_without_a_reward_it_is_refused(tiny: World, tmp_path: Path) -> None:
    """A plan of what `select` would refuse is refused with the same words."""
    refused = tiny("plan", tmp_path / "run", *NICE, target=prompts(tmp_path))
    assert refused.code == 2
    assert "ranks by a reward, and none is named: give --reward" in refused.err
