from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import CorruptError, StorageError
from gradsift.store.manifest import DIGEST, canonical, differences, fingerprint, publish_json, read_json
from gradsift.store.storage import LocalStorage, checksum, checksum_file


def test_objects_are_published_read_listed_and_deleted(tmp_path: Path) -> None:
    """An object appears whole under its key, is listed sorted by prefix, replaced, and gone after deletion."""
    storage = LocalStorage(tmp_path / "deep" / "er")
    assert storage.list("") == []
    for key in ("b/2", "a/1", "b/10", "b2"):
        storage.publish(key, key.encode())
    assert storage.list("") == ["a/1", "b/10", "b/2", "b2"]
    assert storage.list("b/") == ["b/10", "b/2"]
    assert storage.list("b") == ["b/10", "b/2", "b2"]
    assert storage.list("b/1") == ["b/10"]
    assert (storage.exists("a/1"), storage.exists("a"), storage.exists("a/1/x")) == (True, False, False)
    storage.publish("a/1", b"replaced")
    assert storage.read("a/1") == storage.local("a/1").read_bytes() == b"replaced"
    assert storage.size("a/1") == 8
    storage.delete("a/1")
    storage.delete("a/1")
    assert not storage.exists("a/1")


def test_a_reader_keeps_the_object_it_opened(tmp_path: Path) -> None:
    """Publishing replaces the object, it never writes into it: a reader in the middle of the old one finishes it."""
    storage = LocalStorage(tmp_path)
    storage.publish("key", b"old object")
    with storage.local("key").open("rb", buffering=0) as reader:
        assert reader.read(3) == b"old"
        storage.publish("key", b"another, longer object")
        assert reader.read() == b" object"
    assert storage.read("key") == b"another, longer object"


def test_temporary_files_are_not_listed(tmp_path: Path) -> None:
    """What a killed writer left is not an object."""
    storage = LocalStorage(tmp_path)
    storage.publish("x/1", b"")
    (tmp_path / "x" / ".tmp-123-2").write_bytes(b"part")
    assert storage.list("x/") == ["x/1"]


def test_a_file_in_place_of_a_folder_is_said(tmp_path: Path) -> None:
    """Writing below a file says that a part of the path is a file, at any depth."""
    (tmp_path / "file").write_text("")
    for key in ("file/x", "file/deeper/x"):
        with pytest.raises(StorageError, match=r"cannot write .*file.*a part of the path is a file"):
            LocalStorage(tmp_path).publish(key, b"data")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        LocalStorage(tmp_path).read("file/x")
    with pytest.raises(StorageError, match="cannot delete"):
        LocalStorage(tmp_path).delete("file/x")


def test_a_folder_in_place_of_a_file_is_said(tmp_path: Path) -> None:
    """Writing or reading a key that is a folder says so and leaves no temporary file."""
    (tmp_path / "key").mkdir()
    with pytest.raises(StorageError, match="it is a folder"):
        LocalStorage(tmp_path).publish("key", b"data")
    with pytest.raises(StorageError, match="it is a folder"):
        LocalStorage(tmp_path).read("key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_absent_object_is_said(tmp_path: Path) -> None:
    """Reading what is not there is a StorageError with its path."""
    with pytest.raises(StorageError, match=r"cannot read .*nothing: it is not there"):
        LocalStorage(tmp_path).read("nothing")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: free space .* goes on where it stopped"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_says_why_and_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    """When the system refuses the write, the old object stays whole, no temporary file remains, the reason is said."""
    storage = LocalStorage(tmp_path)
    storage.publish("key", b"old")

    def refuse(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=message):
        storage.publish("key", b"new")
    assert storage.read("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_full_and_a_read_only_disk_are_survived(tmp_path: Path) -> None:
    """On a real file system without room, or read-only: the message, the old object, no leftovers."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges that are missing here")
    try:
        storage = LocalStorage(tmp_path)
        storage.publish("key", b"old")
        with pytest.raises(StorageError, match="the disk is full"):
            storage.publish("key", bytes(1 << 20))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(StorageError, match="read-only"):
            storage.publish("key", b"new")
        assert storage.read("key") == b"old"
        assert storage.list("") == ["key"]
        assert [path.name for path in tmp_path.iterdir()] == ["key"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_checksums_of_files_and_bytes_agree(tmp_path: Path) -> None:
    """A file read in blocks has its bytes' checksum; one flipped bit changes it."""
    data = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(data)
    assert checksum_file(tmp_path / "file", block=100) == checksum(data)
    assert checksum(data) != checksum(bytes([data[0] ^ 1]) + data[1:])


def test_fingerprints_name_values_not_their_order() -> None:
    """Equal values have one fingerprint whatever the order of keys; NaN, which equals nothing, is refused."""
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": [1.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


@pytest.mark.parametrize(
    ("found", "wanted", "phrases"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c is 2, wanted 3"]),
        ({"a": 1}, {"b": "x"}, ["a is 1, wanted null", 'b is null, wanted "x"']),
        ({"a": {"b": 1}}, {"a": None}, ['a is {"b":1}, wanted null']),
    ],
)
def test_differences_are_named_by_path(found: dict[str, Any], wanted: dict[str, Any], phrases: list[str]) -> None:
    """One phrase per differing key, nested keys by their path."""
    assert differences(found, wanted) == phrases


def test_long_differences_are_shortened_but_told_apart() -> None:
    """Long values end in their fingerprints, so that two that begin alike do not read the same."""
    (phrase,) = differences({"a": ["x"] * 50}, {"a": [*["x"] * 50, "y"]})
    found, wanted = phrase.split(", wanted ")
    assert found.removeprefix("a is ") != wanted
    assert len(phrase) < 250


def test_json_objects_round_trip(tmp_path: Path) -> None:
    """Published JSON reads back, letters of every script included."""
    storage = LocalStorage(tmp_path)
    publish_json(storage, "x.json", {"ä": [1, "雪"], "n": None})
    assert read_json(storage, "x.json") == {"ä": [1, "雪"], "n": None}
    storage.publish("x.json", b'"text"')
    with pytest.raises(CorruptError, match="not a JSON object"):
        read_json(storage, "x.json")


@settings(max_examples=50, deadline=None)
@given(
    value=st.dictionaries(
        st.text().filter(lambda key: key != DIGEST),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    ),
    place=st.integers(min_value=0),
    bit=st.integers(min_value=0, max_value=7),
)
def test_a_sealed_object_is_what_was_written_or_damaged(value: dict[str, Any], place: int, bit: int) -> None:
    """Whatever single bit of a sealed file flips, reading it gives the written value or CorruptError, never another."""
    with TemporaryDirectory() as folder:
        storage = LocalStorage(folder)
        publish_json(storage, "x.json", value, sealed=True)
        assert read_json(storage, "x.json") == value
        data = bytearray(storage.read("x.json"))
        data[place % len(data)] ^= 1 << bit
        storage.local("x.json").write_bytes(data)
        try:
            found = read_json(storage, "x.json")
        except CorruptError:
            return
        assert found == value or DIGEST not in data.decode()  # its name altered: as if it had no seal
