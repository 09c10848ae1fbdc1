"""Prompts that come one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gradsift.cli import app
from gradsift.model import models
from tiny_world import World


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
