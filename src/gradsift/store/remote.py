"""Storage at a URL that fsspec understands (`s3://bucket/run`), with copies here of what was read or written.

An object store gives whole objects or none, which is all that `Storage` asks. Memory maps and other libraries need
files: `local(key)` fetches an object once and again only after it has changed. The copies lie in the user's cache
folder, one folder a URL, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradsift.base import hub
from gradsift.base.errors import ConfigError, CorruptError, LockedError, StorageError
from gradsift.base.secrets import Secret
from gradsift.store.manifest import Record, read_json
from gradsift.store.storage import LocalStorage, cache_folder
from gradsift.store.writers import born, machine, remove_left_behind

_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "adlfs", "azure")
_OBJECT_STORES = frozenset({"s3", "gs", "abfs", "oci", "oss"})
_CONDITIONAL = frozenset({"s3", "s3a"})
_ONE_REQUEST = 50 << 20  # bytes that are written in one request, which alone may have conditions
_TRIES = 3  # at an object that a worker of the same holder writes at the same time
_LEASE_SECONDS = 90.0  # a run whose holder has not renewed its claim for so long is free


def is_url(place: str | Path) -> bool:
    """Whether a run's place is a URL rather than a path.

    >>> is_url("s3://bucket/run"), is_url("runs/math"), is_url(Path("runs"))
    (True, False, False)
    """
    return isinstance(place, str) and "://" in place


def at_hand(place: str) -> str:
    """A file or folder that is named by a URL, as a copy on this machine; anything else as it is.

    What is no file here is a hub's, of which a name that is mistyped without a network is to fail at once.

    >>> at_hand("runs/math/adapter")
    'runs/math/adapter'
    """
    if not is_url(place):
        if not Path(place).expanduser().exists():
            hub.look()
        return place
    parent, _, name = place.rstrip("/").rpartition("/")
    storage = storage_at(parent)
    if storage.exists(name):
        return str(storage.local(name))
    if not storage.list(f"{name}/"):
        raise StorageError(f"{place} is not there")
    return str(storage.folder(name))


def storage_at(url: str) -> RemoteStorage:
    """This process's storage at a URL: whoever holds it holds it for all that the process writes there."""
    return _shared(url.rstrip("/"), str(cache_folder()))


@lru_cache(maxsize=64)
def _shared(url: str, _copies: str) -> RemoteStorage:
    return RemoteStorage(url)


class RemoteStorage:
    """Storage under a URL, such as `s3://bucket/runs/math`; credentials come from where the protocol's library looks.

    Copies lie in a folder, by default in the user's cache folder; `claim` is by what another process holds the run, for
    whom this one writes.

    Raises:
        ConfigError: the protocol is unknown or its library is not installed.
        StorageError: the place cannot be reached.
    """

    def __init__(self, url: str, copies: str | Path | None = None, claim: str | None = None) -> None:
        from fsspec.core import url_to_fs

        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            # Not shown: what stands there is a secret, and a run's place is written to files.
            raise ConfigError("the URL of a run holds a user, a password or a query: give them in the environment")
        self.url = url.rstrip("/")
        try:
            # Listings change under us: workers write while the driver looks.
            self._fs, self._root = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(f"{url}: {error}. For s3:// that is pip install 'gradsift[s3]'") from error
        except ValueError as error:
            raise ConfigError(f"{url} is no URL that can be written to: {error}") from error
        self._protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._lease: _Lease | None = None
        self._token, self._conditional = claim, True
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        folder = cache_folder() / "runs" / digest if copies is None else Path(copies)
        self._copies = LocalStorage(folder / "objects")
        self._versions = LocalStorage(folder / "versions")

    def __repr__(self) -> str:
        return f"RemoteStorage({self.url!r})"

    @property
    def copies(self) -> Path:
        """The folder of the copies."""
        return self._copies.root

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects for itself and keeps copies of its own machine; it writes while we hold the run."""
        return RemoteStorage, (self.url, None, self.claim)

    def list(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, sorted."""
        folder = prefix if prefix.endswith("/") or not prefix else prefix.rpartition("/")[0]
        with self._told("list", prefix):
            try:
                found = self._fs.find(self._at(folder).rstrip("/"))
            except FileNotFoundError:
                return []
        keys = (str(path)[len(self._root) :].lstrip("/") for path in found)
        return sorted(key for key in keys if key.startswith(prefix))

    def exists(self, key: str) -> bool:
        """Whether an object has this key."""
        with self._told("look for", key):
            return bool(self._fs.isfile(self._at(key)))

    def size(self, key: str) -> int:
        """Bytes of an object."""
        with self._told("read", key):
            return int(self._fs.size(self._at(key)))

    def read(self, key: str) -> bytes:
        """The whole object."""
        with self._told("read", key):
            return self._fs.cat_file(self._at(key))

    def publish(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object."""
        with self._told("write", key):
            self._put(key, lambda **how: self._fs.pipe_file(self._at(key), bytes(data), **how), len(data))

    def publish_with(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` make a file, then publish it."""
        self._copies.publish_with(key, write)
        self._upload(key)

    def publish_folder(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then publish its files in the order of their names.

        A store has no folders that appear at once: whoever reads them waits for a manifest that comes after.
        """
        self._copies.publish_folder(key, write)
        wanted = {f"{key}/{path.relative_to(self._copies.root / key).as_posix()}"
                  for path in (self._copies.root / key).rglob("*") if path.is_file()}  # fmt: skip
        for old in self.list(f"{key}/"):
            if old not in wanted:
                self.delete(old)
        for one in sorted(wanted):
            self._upload(one)

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""
        if key != "lock":
            self._check_held()
        with self._told("delete", key), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(key))
        self._copies.delete(key)
        self._versions.delete(key)

    def local(self, key: str) -> Path:
        """A copy of the object as it is now; where it would lie if there is none."""
        if self.exists(key):
            self._fetch(key)
        return self._copies.local(key)

    def folder(self, key: str) -> Path:
        """A folder with copies of all objects under the key, as they are now."""
        for one in self.list(f"{key.rstrip('/')}/"):
            self._fetch(one)
        return self._copies.local(key)

    def name(self, key: str) -> str:
        """What messages call an object."""
        return f"{self.url}/{key}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run by an object `lock` that is renewed while we work; one that is not renewed counts no more.

        While it is held, nothing is written, here or by workers that were sent this storage, unless it is still ours.
        """
        lease = _Lease(self)
        lease.take()
        self._lease = lease
        try:
            for copies in (self._copies, self._versions):
                remove_left_behind(copies.root)
            yield
        except BaseException:
            with suppress(LockedError):
                lease.give_back()
            raise
        else:
            lease.give_back()
        finally:
            self._lease = None

    @property
    def claim(self) -> str | None:
        """By what the run is held, for workers that write for the holder."""
        return self._token if self._lease is None else self._lease.token

    @property
    def conditional(self) -> bool:
        """Whether the store can be told to write only what nobody has written in between."""
        return self._conditional and not _CONDITIONAL.isdisjoint(self._protocols)

    def claim_there(self) -> tuple[dict[str, Any] | None, str | None]:
        """Who holds the run and the version of that object; None where nobody does, or it cannot be read."""
        try:
            with self._told("read", "lock"):
                version = self._etag("lock")
                if version is None:
                    return None, None
                return _Claim.model_validate(read_json(self, "lock", _Claim)).model_dump(), version
        except CorruptError:
            return _Claim(owner="unknown").model_dump(), version
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None, None
            raise

    def replace(self, key: str, data: bytes, version: str | None) -> bool:
        """Write an object if it is still of this version, or (None) not there; whether it was written.

        Stores that cannot tell write it.
        """
        with self._told("write", key):
            self._make_folder(key)
            if version is not None and self._etag(key) != version:
                return False
            return self._if_unchanged(lambda **how: self._fs.pipe_file(self._at(key), data, **how), version)

    def _if_unchanged(self, put: Callable[..., Any], version: str | None) -> bool:
        """Have `put` write an object on the condition that it is of a version, or (None) not there."""
        how = {"mode": "create"} if version is None else {"IfMatch": version} if self.conditional else {}
        try:
            put(**how)
        except FileExistsError:
            return False
        except OSError as error:
            said = str(error)
            if any(word in said for word in ("PreconditionFailed", "pre-conditions", "ConditionalRequestConflict")):
                return False
            if how and version is not None and "NotImplemented" in said:
                self._conditional = False
                put()
                return True
            raise
        return True

    def _etag(self, key: str) -> str | None:
        try:
            return self._version(key) if not self.conditional else str(self._fs.info(self._at(key))["ETag"])
        except FileNotFoundError:
            return None

    def _check_held(self) -> None:
        """Before anything is written for whoever holds the run: refuse to where another has taken it over."""
        if self._lease is not None:
            self._lease.check()
        elif self._token is not None:
            now, _ = self.claim_there()
            if now is None or now["token"] != self._token:
                raise _taken_over(self.url, "it is gone" if now is None else now["owner"])

    def _put(self, key: str, put: Callable[..., Any], size: int) -> None:
        """Write an object; for whoever holds the run, only if nobody else has written it since a moment ago."""
        self._make_folder(key)
        if self.claim is None:
            put()
            return
        for _ in range(_TRIES):
            version = self._etag(key)
            self._check_held()
            if not self.conditional or (version is not None and size > _ONE_REQUEST):
                put()
                return
            if self._if_unchanged(put, version):
                return
        raise StorageError(f"cannot write {self.name(key)}: others write it all the time")

    def _make_folder(self, key: str) -> None:
        """Where there are folders: an object store would look for the bucket with each write, or make one."""
        if _OBJECT_STORES.isdisjoint(self._protocols):
            self._fs.makedirs(self._at(key).rpartition("/")[0], exist_ok=True)

    def _upload(self, key: str) -> None:
        path = self._copies.local(key)
        with self._told("write", key):
            self._put(key, lambda **how: self._fs.put_file(str(path), self._at(key), **how), path.stat().st_size)
            version = self._version(key)
        self._versions.publish(key, version.encode())

    def _fetch(self, key: str) -> None:
        with self._told("read", key):
            version = self._version(key)
            known = self._copies.exists(key) and self._versions.exists(key)
            if known and self._versions.read(key).decode() == version:
                return
            self._copies.publish_with(key, lambda path: self._fs.get_file(self._at(key), str(path)))
        self._versions.publish(key, version.encode())

    def _version(self, key: str) -> str:
        info = self._fs.info(self._at(key))
        known = {name: str(info[name]) for name in ("ETag", "etag", "size", "mtime", "LastModified") if name in info}
        return json.dumps(known, sort_keys=True)

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    @contextmanager
    def _told(self, verb: str, key: str) -> Iterator[None]:
        """Errors of the protocol's library as ours."""
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if verb in ("list", "delete"):
                raise
            missing = "there is no such bucket or folder: make it first" if verb == "write" else "it is not there"
            raise StorageError(f"cannot {verb} {self.name(key)}: {missing}") from error
        except Exception as error:
            name, said = type(error).__name__, _secret().masked(str(error))
            if isinstance(error, PermissionError) or name == "NoCredentialsError":
                raise StorageError(
                    f"cannot {verb} {self.name(key)}: no permission ({said}): check the credentials and the bucket's "
                    "policy"
                ) from error
            if not isinstance(error, OSError) and not type(error).__module__.startswith(_LIBRARIES):
                raise
            raise StorageError(
                f"cannot {verb} {self.name(key)}: {name}: {said}. What is complete stays: run the same command again "
                "when the place can be reached"
            ) from error


class _Claim(Record):
    """Who holds a run, as its object `lock` says."""

    owner: str
    token: str = ""  # of the holder; workers that it has started hold the run by the same
    machine: str = ""  # where it runs; by this, its number and when it began, a dead one is told on its machine
    process: int = 0
    born: float = 0.0
    renewed: float = 0.0  # when it last said so, by its clock


class _Lease:
    """A claim on a run that ends by itself when it is not renewed.

    Whoever was stopped for longer than that finds another holder, or none, and writes no more.
    """

    def __init__(self, storage: RemoteStorage) -> None:
        self._storage = storage
        self.token = uuid.uuid4().hex
        process = os.getpid()
        self._owner = f"{socket.gethostname()}, process {process}, {self.token[:8]}"
        self._who = {"token": self.token, "machine": machine(), "process": process, "born": born(process) or 0.0}
        self._renewed = 0.0  # by a clock that goes on while the process, or the machine, is stopped
        self._version: str | None = None  # of the object, as we wrote it last
        self._taken_by: str | None = None
        self._renewing, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def take(self) -> None:
        began = _now()
        if not self._storage.replace("lock", self._claim(), None):
            seen, version = self._storage.claim_there()
            if seen is not None and not _is_dead(seen):
                seen, version = self._outlive(seen, version)
            began = _now()
            taken = self._storage.replace("lock", self._claim(), None if seen is None else version)
            if taken and not self._storage.conditional:
                time.sleep(_LEASE_SECONDS / 90)  # others may have waited as well: the last to write has it
        if not self._is_ours():
            raise self._locked(self._taken_by or "unknown")
        self._renewed = began
        self._thread.start()

    def give_back(self) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StorageError):
            if self._is_ours():
                self._storage.delete("lock")
                return
        if self._taken_by is not None:
            raise _taken_over(self._storage.url, self._taken_by)

    def check(self) -> None:
        """Refuse to write where somebody else may hold the run by now."""
        # For so long after the last renewal nobody has taken the run over, whatever happened since.
        if self._taken_by is None and _now() - self._renewed > _LEASE_SECONDS * 2 / 3:
            self._renew()
        if self._taken_by is not None:
            raise _taken_over(self._storage.url, self._taken_by)

    def _outlive(self, seen: dict[str, Any], version: str | None) -> tuple[dict[str, Any] | None, str | None]:
        """Whether a claim lives shows in its being renewed, whatever the clocks of two machines say."""
        if 0 <= time.time() - seen["renewed"] < _LEASE_SECONDS / 3:
            raise self._locked(seen["owner"])
        deadline = _now() + _LEASE_SECONDS
        while _now() < deadline:
            time.sleep(_LEASE_SECONDS / 9)
            now, version = self._storage.claim_there()
            if now is None:
                return None, None
            if now != seen:
                raise self._locked(now["owner"])
        return seen, version

    def _keep_renewing(self) -> None:
        while self._taken_by is None and not self._stop.wait(_LEASE_SECONDS / 6):
            with suppress(StorageError):  # the next one may get through; the work fails where the store is gone
                self._renew()

    def _renew(self) -> None:
        with self._renewing:
            began = _now()
            for _ in range(2):  # it may be ours all the same: a reply that was lost
                replaced = self._storage.replace("lock", self._claim(), self._version)
                if not self._is_ours():
                    return
                if replaced:
                    self._renewed = began
                    return

    def _is_ours(self) -> bool:
        """Whether the claim that is there is this one, and of which version; else it is known who has taken over."""
        now, self._version = self._storage.claim_there()
        if now is not None and now["token"] == self.token:
            return True
        self._taken_by = self._taken_by or ("it is gone" if now is None else now["owner"])
        return False

    def _claim(self) -> bytes:
        return json.dumps({"owner": self._owner, **self._who, "renewed": time.time()}).encode()

    def _locked(self, owner: str) -> LockedError:
        return LockedError(
            f"another process works on {self._storage.url} ({owner}): wait for it, or use another --out. A claim that "
            f"is not renewed for {_LEASE_SECONDS:.0f} seconds is taken over"
        )


def _taken_over(url: str, owner: str) -> LockedError:
    return LockedError(
        f"this process was stopped for longer than its claim on {url} lives, and another has taken the run over "
        f"({owner}): nothing more is written. What was done before is kept; the other goes on from there"
    )


def _is_dead(claim: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is there no more."""
    if claim["machine"] != machine() or not claim["process"]:
        return False
    began = born(claim["process"])
    return began is None or abs(began - claim["born"]) > 1.0


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps where there is such a one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _secret() -> Secret:
    """What the libraries send to a bucket's server, which may say it in an error."""
    return Secret(*(os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")))
