"""`gradsift demo --data` gives the demo's examples out as files, and harms no file of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradsift.data.load import load_examples
from gradsift.demo.model import NAME
from tiny_world import Cli


def test_the_demos_examples_come_as_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pool, target and test are written and can be loaded; no model is fetched; the text names them and the model."""
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    found = Cli("demo", "--data", tmp_path / "new", "--json").succeeded().json
    assert found == {
        "files": {str(tmp_path / "new" / name): rows for name, rows in SIZES.items()},
        "model": None,
    }
    for path, rows in found["files"].items():
        assert len(load_examples(path).examples) == rows
    assert not (tmp_path / "cache").exists()
    again = Cli("demo", "--data", tmp_path / "new").succeeded().out
    assert all(f"{path}: {rows} examples" in again for path, rows in found["files"].items())
    assert "`gradsift demo` fetches it" in again


def test_a_file_of_the_users_is_not_overwritten(tmp_path: Path) -> None:
    """Another target.jsonl in the folder is refused by name before anything is written."""
    (tmp_path / "target.jsonl").write_text("mine\n")
    refused = Cli("demo", "--data", tmp_path)
    assert refused.code == 2
    assert f"{tmp_path / 'target.jsonl'} is there already" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["target.jsonl"]
    assert (tmp_path / "target.jsonl").read_text() == "mine\n"


@pytest.mark.model
def test_the_folder_of_the_demos_model_is_told(
    demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the demo's model is in the cache, its folder is named, to be given as --model."""
    if demo_model_path.name != NAME:
        pytest.skip("GRADSIFT_TEST_MODEL names a model outside the cache")
    monkeypatch.setenv("GRADSIFT_CACHE", str(demo_model_path.parent))
    assert f"is in {demo_model_path}" in Cli("demo", "--data", tmp_path).succeeded().out


SIZES = {"pool.jsonl": 240, "target.jsonl": 12, "test.jsonl": 24}
