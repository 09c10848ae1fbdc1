"""Prompts that come one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gradsift.cli import app
from gradsift.model import models
from tiny_world import World, write_rows


def test_prompts_are_explained_as_they_come(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--prompt -` explains each line of standard input with one loaded model, as `--no-exact` explains it alone; one
    that cannot be explained is told, and the next one is explained."""
    loaded: list[str] = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, **more: loaded.append(name) or load(name, **more))
    command = tiny.arguments("explain", tmp_path / "run", "--json", "--quiet", "--max-new-tokens", "4")

    def called(*more: str, lines: str = "") -> list[dict]:
        models.release_models()
        loaded.clear()
        result = CliRunner().invoke(app, [*command, *more], input=lines)
        assert result.exit_code == bool(lines), result.output
        return list(map(json.loads, result.stdout.splitlines())) if lines else [json.loads(result.stdout)]

    alone = called("--prompt", "what colour is the cat", "--no-exact")[0]["explanations"][0]
    first, second, third = called("--prompt", "-", lines=f"what colour is the cat\n\n{'x' * 4000}\nwhat says the dog\n")
    assert len(loaded) == 1
    assert first["results"] == alone["results"]
    assert "shorten it" in second["error"]
    assert third["output"] != first["output"]


_DESCENT = ("--selection", "metagradient", "--set", "selection.held_out=0.01")
_DIVERSE = ("--selection", "diverse", "--set", "selection.by=no/such")
_ARMS = "compare.arms=[{estimator: {kind: bm25}, selection: {kind: metagradient, held_out: 0.01}}]"
_COMPARE = ("--set", _ARMS, "--set", "compare.metrics=[{kind: loss, data: %s}]")


@pytest.mark.parametrize(
    ("command", "given", "lacks"),
    [
        ("select", _DESCENT, "give more targets"),
        ("select", _DIVERSE, "no/such"),
        ("select", ("--estimator", "bm25", "--selection", "tsds", "--reward", "length:1-9"), "LESS (SGD) needs labels"),
        ("plan", _DESCENT, "give more targets"),
        ("plan", _COMPARE, "give more targets"),
        ("explain", (*_DIVERSE, "--prompt", "what"), "no/such"),
        ("explain", ("--prompt", "what", "--set", "explain.estimators=[{kind: rds, model: no/such}]"), "no/such"),
        ("plan", ("--set", "explain={prompt: what, estimators: [{kind: rds, model: no/such}]}"), "no/such"),
    ],
)
def test_what_a_method_lacks_is_said_first(
    tiny: World, tmp_path: Path, command: str, given: tuple[str, ...], lacks: str
) -> None:
    """What a selector, a strategy or an estimator lacks is refused before anything is trained or collected."""
    more: dict[str, object] = {}
    if "tsds" in given:
        more["target"] = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "what colour"}, {"prompt": "what says"}])
    given = tuple(one.replace("%s", tiny.target) for one in given)
    done = tiny(command, tmp_path / "run", *given, **more)
    assert done.code
    assert lacks in done.err
    assert not {"checkpoints", "gradients", "embeddings"} & {one.name for one in tmp_path.glob("run/*")}
