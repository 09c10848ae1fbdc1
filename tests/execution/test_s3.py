"""Runs in a bucket, on a local S3 server: the results of a folder, one process at a time, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gradsift.base.errors import ConfigError, LockedError, StorageError
from gradsift.model import models
from gradsift.store import remote, writers
from gradsift.store.remote import RemoteStorage
from gradsift.store.run import Run
from processes import python, said, wait_until
from tiny_world import World

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a server of this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'gradsift[s3]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3,server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("copies")))
        RemoteStorage("s3://tests")._fs.mkdir("tests")
        yield "s3://tests"
    server.stop()


def test_without_s3fs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL whose protocol's library is missing names the extra; one of no protocol at all is refused."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3://bucket/run: .*pip install 'gradsift\[s3\]'"):
        Run("s3://bucket/run")
    with pytest.raises(ConfigError, match="no URL that can be written to"):
        Run("nowhere://bucket/run")


def test_objects_in_a_bucket_are_as_files_in_a_folder(bucket: str, tmp_path: Path) -> None:
    """Published whole, listed sorted by prefix, replaced, deleted; a copy is fetched again only after a change; what is
    not there says so with its URL."""
    storage = RemoteStorage(f"{bucket}/objects")
    assert storage.list("") == []
    for key in ("b/2", "a/1", "b/10", "b2"):
        storage.publish(key, key.encode())
    assert storage.list("") == ["a/1", "b/10", "b/2", "b2"]
    assert (storage.list("b/"), storage.list("b/1")) == (["b/10", "b/2"], ["b/10"])
    copy = storage.local("a/1")
    assert copy.read_bytes() == b"a/1"
    before = copy.stat().st_mtime_ns
    assert storage.local("a/1").stat().st_mtime_ns == before
    storage.publish("a/1", b"replaced")
    assert storage.local("a/1").read_bytes() == storage.read("a/1") == b"replaced"
    storage.publish_folder("c", lambda folder: (folder / "x").write_bytes(b"x") and None)
    assert (storage.folder("c") / "x").read_bytes() == b"x"
    storage.delete("a/1")
    assert not storage.exists("a/1")
    with pytest.raises(StorageError, match=r"cannot read s3://tests/objects/a/1: it is not there"):
        storage.read("a/1")
    assert not storage.replace("b2", b"another", None)
    assert storage.read("b2") == b"b2"


def test_a_place_that_cannot_be_written_says_what_to_do(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that is not there is not made but asked for, missing credentials are named; folders are made."""
    with pytest.raises(StorageError, match=r"s3://none/run/lock: there is no such bucket .*make it first"):
        Run("s3://none/run").storage.replace("lock", b"", None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    anonymous = RemoteStorage(f"{bucket}/run")
    anonymous._fs = type(anonymous._fs)(skip_instance_cache=True)
    with pytest.raises(StorageError, match=r"no permission .*credentials.*: check the credentials"):
        anonymous.replace("lock", b"", None)
    with Run(f"file://{tmp_path}/run").lock():
        assert (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
def test_a_choice_in_a_bucket_is_that_of_a_folder(
    tiny: World, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, gradients, scores and choice are those of a local run; on another machine, without copies, the same
    command finds all of it and loads no model."""
    place = f"{bucket}/runs/math"
    given = ("--budget", "4", "--json")
    here = tiny("select", tmp_path / "run", *given).succeeded().json
    there = tiny("select", place, *given).succeeded().json
    assert there["out"] == place
    assert there["files"]["selected.jsonl"] == f"{place}/selected.jsonl"
    storage = RemoteStorage(place)
    for name in ("selected.jsonl", "scores.parquet"):
        assert storage.read(name) == (tmp_path / "run" / name).read_bytes(), name
    assert here["selections"] == there["selections"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path / "another machine"))
        models._HOSTS.clear()
        patch.setattr(models, "load_model", refuse)
        assert tiny("select", place, *given).succeeded().json["selections"] == there["selections"]


def test_one_process_at_a_time_works_in_a_bucket(tiny: World, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the claim is renewed, a second command is refused; afterwards, and when a dead holder's claim has run out,
    the run is free."""
    place = f"{bucket}/runs/locked"
    with Run(place).lock():
        refused = tiny("collect", place)
        assert refused.code == 1
        assert f"another process works on {place}" in refused.err
    monkeypatch.setattr(remote, "_LEASE_SECONDS", 0.9)
    with Run(place).lock():
        pass
    dead: dict[str, Any] = {"owner": "gone", "renewed": time.time() - 5}
    RemoteStorage(place).publish("lock", json.dumps(dead).encode())
    with Run(place).lock(), pytest.raises(LockedError, match="another process works on"), Run(place).lock():
        pass
    assert not RemoteStorage(place).exists("lock")


def stand_still(storage: RemoteStorage) -> None:
    """No renewal any more, and a while goes by, as where the whole process is stopped."""
    assert storage._lease is not None
    storage._lease._stop.set()
    storage._lease._thread.join()
    time.sleep(0.5)


def test_who_was_stopped_beyond_the_lease_writes_no_more(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes over; the first, when it goes on, is refused at its next write, and is so at its end, too; its
    workers with it. The second writes on, and replaces what it finds."""
    monkeypatch.setattr(remote, "_LEASE_SECONDS", 0.9)
    first, second = RemoteStorage(f"{bucket}/runs/stopped"), RemoteStorage(f"{bucket}/runs/stopped")

    def refused() -> Any:
        return pytest.raises(LockedError, match=r"another has taken the run over \(.*process")

    def work() -> None:
        with first.lock():
            first.publish("a", b"first")
            make, arguments = first.__reduce__()
            worker: RemoteStorage = make(*arguments)
            worker.publish("b", b"of its worker")
            worker.publish("b", b"and again")
            stand_still(first)
            with second.lock():
                second.publish("a", b"second")
                for storage in (first, worker):
                    with refused():
                        storage.publish("a", b"too late")
                    with refused():
                        storage.publish_with("c", lambda path: path.write_bytes(b"too late") and None)
                    with refused():
                        storage.delete("b")
                assert second.read("a") == b"second"
            assert not second.exists("c")
            assert not second.exists("lock")

    with refused():
        work()
    first.publish("a", b"without a lock")  # as Python functions write
    assert second.read("a") == b"without a lock"


@pytest.mark.parametrize("before", [None, b"old"])
def test_stopped_between_looking_and_writing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    """Where the store knows conditions, a write that began before the takeover does not replace what came after it."""
    monkeypatch.setattr(remote, "_LEASE_SECONDS", 0.9)
    place = f"{bucket}/runs/between-{before}"
    first, second = RemoteStorage(place), RemoteStorage(place)
    if before is not None:
        second.publish("a", before)
    write = first._if_unchanged

    def too_late(put: Any, version: str | None) -> bool:
        monkeypatch.setattr(first, "_if_unchanged", write)
        stand_still(first)
        with second.lock():
            second.publish("a", b"second")
        return write(put, version)

    def work() -> None:
        with first.lock():
            monkeypatch.setattr(first, "_if_unchanged", too_late)
            first.publish("a", b"first")

    with pytest.raises(LockedError, match="taken the run over"):
        work()
    assert second.read("a") == b"second"


def test_a_dead_process_of_this_machine_holds_nothing(bucket: str) -> None:
    """Its claim, renewed a moment ago, is taken over at once; a living one's, and another machine's, are not."""
    storage = RemoteStorage(f"{bucket}/runs/dead")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    claim: dict[str, Any] = {
        "owner": "x",
        "token": "t",
        "machine": writers.machine(),
        "process": child.pid,
        "born": 1.0,
    }
    fresh = {"renewed": time.time()}
    for changes in ({"process": os.getpid(), "born": writers.born(os.getpid())}, {"machine": "another"}):
        storage.publish("lock", json.dumps(claim | fresh | changes).encode())
        with pytest.raises(LockedError, match="another process works on"), storage.lock():
            pass
    for changes in ({}, {"process": os.getpid()}):  # the number of a dead one may be a living one's
        storage.publish("lock", json.dumps(claim | fresh | changes).encode())
        began = time.monotonic()
        with storage.lock():
            assert time.monotonic() - began < 5


def test_a_lock_that_is_none_is_waited_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies under the name of the lock, it is a claim that is not renewed, or a message."""
    monkeypatch.setattr(remote, "_LEASE_SECONDS", 0.3)
    storage = RemoteStorage(f"{bucket}/runs/odd")
    for content in (b"", b"[]", b"{}", b'{"owner": 5}', b'{"owner": "x", "renewed": "now"}', b"\xff"):
        storage.publish("lock", content)
        with storage.lock():
            storage.publish("a", content)


def test_secrets_of_a_bucket_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL with a password is refused without showing it."""
    for url in ("s3://key:hunter2secret@bucket/run", "s3://bucket/run?token=hunter2secret"):
        with pytest.raises(ConfigError, match="user, a password or a query") as refused:
            Run(url)
        assert "hunter2" not in str(refused.value)


SHORT_LEASE = (
    "import sys, gradsift.store.remote as r; r._LEASE_SECONDS = 3.0; from gradsift.cli import app; app(sys.argv[1:])"
)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_two_writers_and_one_result(
    tiny: World, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A command that was stopped beyond its lease ends with 1 once another has taken over; one that was killed is gone
    on from at once. The results are those of a folder, to the byte."""
    place, errors = f"{bucket}/runs/{ends}", tmp_path / "errors"
    options = ("--adapter", tiny.adapters[-1], "--shard-rows", 1, "--token-budget", "64")
    tiny("collect", tmp_path / "run", *options).succeeded()
    storage = RemoteStorage(place)
    first = python("-c", SHORT_LEASE, *tiny.arguments("collect", place, *options), errors=errors)
    wait_until(lambda: len(storage.list("gradients/")) > 6, first, errors)
    first.send_signal(signal.SIGSTOP if ends == "stopped" else signal.SIGKILL)
    if ends == "killed":
        first.wait()
    else:
        time.sleep(1.2)  # what was renewed a moment ago belongs to a living process
    monkeypatch.setattr(remote, "_LEASE_SECONDS", 3.0)
    tiny("collect", place, *options).succeeded()
    if ends == "stopped":
        written = {key: storage._version(key) for key in storage.list("")}
        first.send_signal(signal.SIGCONT)
        first.wait(60)
        assert {key: storage._version(key) for key in storage.list("")} == written
        assert first.returncode == 1, errors.read_text()
        assert "another has taken the run over" in errors.read_text()
    shards = [key for key in storage.list("gradients/") if "shard-" in key]
    assert len(shards) == 48
    for key in shards:
        assert storage.read(key) == (tmp_path / "run" / key).read_bytes(), key
    assert not storage.exists("lock")


@pytest.mark.slow
def test_workers_write_into_a_bucket(tiny: World, bucket: str, tmp_path: Path) -> None:
    """Two workers put the shards into the bucket, with the bytes that this process leaves in a folder."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gradsift[ray]'")
    place, errors = f"{bucket}/runs/ray", tmp_path / "errors"
    options = ("--adapter", tiny.adapters[-1], "--shard-rows", 5, "--token-budget", "64")
    tiny("collect", tmp_path / "run", *options).succeeded()
    driver = python(
        "-m", "gradsift", *tiny.arguments("collect", place, *options, "--engine", "ray", "--workers", 2), errors=errors
    )
    said(driver, errors)
    storage = RemoteStorage(place)
    shards = [key for key in storage.list("gradients/") if "shard-" in key]
    assert len(shards) >= 5
    for key in shards:
        assert storage.read(key) == (tmp_path / "run" / key).read_bytes(), key
