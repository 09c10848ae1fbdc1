"""A run folder: locked by one, bound to one model and pool, complete only with its manifest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradsift.base.errors import CorruptError, LockedError, MismatchError, StorageError
from gradsift.store.run import Run
from reporters import Listening


def test_a_folder_appears_when_it_is_written_to(tmp_path: Path) -> None:
    """Naming a run makes nothing; publishing does."""
    run = Run(tmp_path / "a" / "b")
    assert not run.folder.exists()
    assert run.artifacts("gradients") == []
    assert run.publish_text("note.txt", "hé").read_text() == "hé"


def test_the_lock_excludes_others_and_is_given_back(tmp_path: Path) -> None:
    """A second holder is refused at once; after the first has ended, even by an error, the folder is free."""
    first, second = Run(tmp_path / "run"), Run(tmp_path / "run")
    with first.lock(), pytest.raises(LockedError, match="another process works on"), second.lock():
        pass
    with pytest.raises(ZeroDivisionError), first.lock():
        raise ZeroDivisionError
    with second.lock():
        pass


@pytest.mark.parametrize("error", [PermissionError(13, "x"), FileExistsError(17, "x"), NotADirectoryError(20, "x")])
def test_errors_of_the_work_are_not_taken_for_errors_of_the_lock(error: OSError, tmp_path: Path) -> None:
    """A file that cannot be read while the folder is held is that file's error, not the folder's."""
    with pytest.raises(type(error)), Run(tmp_path / "run").lock():
        raise error


def test_places_where_no_folder_can_be(tmp_path: Path) -> None:
    """A file, a path below a file, and a folder without permission are refused with what to do."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="is a file: --out needs a folder"):
        Run(file)
    with pytest.raises(StorageError, match="a part of its path is a file"), Run(file / "run").lock():
        pass
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match=r"no permission\. Choose another --out"), Run(tmp_path / "run").lock():
            pass
        tmp_path.chmod(0o700)


def test_a_run_belongs_to_one_identity(tmp_path: Path) -> None:
    """The first binding stays; an equal one is fine in any order of keys, another is refused and named."""
    run = Run(tmp_path)
    with pytest.raises(StorageError, match="is not a run folder"):
        run.identity()
    run.bind({"model": {"weights": "1", "size": 2}, "pool": "p"})
    run.bind({"pool": "p", "model": {"size": 2, "weights": "1"}})
    with pytest.raises(
        MismatchError,
        match=r'model\.weights is "1", wanted "9"; its pool is another one\. Give the same, or another --out',
    ):
        run.bind({"model": {"weights": "9", "size": 2}, "pool": "q"})
    assert run.identity() == {"model": {"weights": "1", "size": 2}, "pool": "p"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', "\x00"])
def test_a_damaged_run_json_is_said(content: str, tmp_path: Path) -> None:
    """Whatever stands in run.json instead of an identity, it is an error that names the file."""
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CorruptError, match=r"run\.json is damaged: delete it, this one file, and"):
        Run(tmp_path).bind({"model": 1})


def test_artifacts_are_complete_with_their_manifest(tmp_path: Path) -> None:
    """Equal configurations share a prefix, others do not; only what has a manifest is listed."""
    run = Run(tmp_path)
    prefix = run.prefix("data", {"a": 1, "b": [2]})
    assert prefix == run.prefix("data", {"b": [2], "a": 1})
    assert len({prefix, run.prefix("scores", {"a": 1, "b": [2]}), run.prefix("data", {"a": 2, "b": [2]})}) == 3
    run.storage.publish(f"{prefix}part", b"x")
    assert run.manifest(prefix) is None
    assert run.artifacts("data") == []
    run.complete(prefix, "data", {"a": 1}, rows=3)
    found = run.manifest(prefix)
    assert found is not None
    assert (found["rows"], found["config"]) == (3, {"a": 1})
    assert run.artifacts("data") == [prefix]


@pytest.mark.parametrize("content", ["", '{"kind": ', '{"kind": "x", "_digest": "0"}'])
def test_a_damaged_manifest_is_none(content: str, tmp_path: Path) -> None:
    """What a half-written or altered manifest describes counts as unfinished, and is completed again."""
    run = Run(tmp_path)
    prefix = run.prefix("scores", {"a": 1})
    run.storage.publish(f"{prefix}manifest.json", content.encode())
    assert run.manifest(prefix) is None
    run.complete(prefix, "scores", {"a": 1})
    assert run.manifest(prefix) is not None


def test_altered_files_of_an_artifact_are_found_and_said(tmp_path: Path) -> None:
    """A file that is missing, shorter or other than its manifest says makes the artifact unfinished, and goes."""
    run, said = Run(tmp_path), Listening()
    run.storage.publish("data/1/part", b"whole")
    run.complete("data/1/", "data", {}, files=["part"])
    assert run.intact("data/1/", said) == run.manifest("data/1/")
    assert said.warned == []
    for change in (b"whol", b"whore", None):
        if change is None:
            run.path("data/1/part").unlink(missing_ok=True)
        else:
            run.path("data/1/part").write_bytes(change)
        assert run.intact("data/1/", said) is None
        assert not run.storage.exists("data/1/part")  # who makes it again sees that it is not there
    assert len(said.warned) == 3
    assert said.warned[0] == f"{tmp_path}/data/1/part is missing, truncated or altered: making it again"
    run.path("data/1/manifest.json").write_text("{")
    assert run.intact("data/1/", said) is None
    assert "manifest.json is truncated or altered" in said.warned[-1]
    assert run.intact("data/2/", said) is None
    assert len(said.warned) == 4
