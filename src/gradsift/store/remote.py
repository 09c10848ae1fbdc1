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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradsift.errors import ConfigError, LockedError, StorageError
from gradsift.secrets import Secret
from gradsift.store.storage import LocalStorage, cache_folder

_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "adlfs", "azure")
_OBJECT_STORES = frozenset({"s3", "gs", "abfs", "oci", "oss"})
_LEASE_SECONDS = 90.0  # a run whose holder has not renewed its claim for so long is free


def is_url(place: str | Path) -> bool:
    """Whether a run's place is a URL rather than a path.

    >>> is_url("s3://bucket/run"), is_url("runs/math"), is_url(Path("runs"))
    (True, False, False)
    """
    return isinstance(place, str) and "://" in place


def at_hand(place: str) -> str:
    """A file or folder that is named by a URL, as a copy on this machine; anything else as it is.

    Raises:
        StorageError: it is not there, or cannot be reached.

    >>> at_hand("runs/math/adapter")
    'runs/math/adapter'
    """
    if not is_url(place):
        return place
    parent, _, name = place.rstrip("/").rpartition("/")
    storage = _storage_at(parent)
    if storage.exists(name):
        return str(storage.local(name))
    if not storage.list(f"{name}/"):
        raise StorageError(f"{place} is not there")
    return str(storage.folder(name))


@lru_cache(maxsize=64)
def _storage_at(url: str) -> RemoteStorage:
    return RemoteStorage(url)


class RemoteStorage:
    """Storage under a URL.

    Args:
        url: of the run, such as `s3://bucket/runs/math`. Credentials come from where the protocol's library looks.
        copies: folder for copies; by default in the user's cache folder.

    Raises:
        ConfigError: the protocol is unknown or its library is not installed.
        StorageError: the place cannot be reached.
    """

    def __init__(self, url: str, copies: str | Path | None = None) -> None:
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
        folder = Path(copies) if copies is not None else _copies_of(self.url)
        self._copies = LocalStorage(folder / "objects")
        self._versions = LocalStorage(folder / "versions")

    def __repr__(self) -> str:
        return f"RemoteStorage({self.url!r})"

    @property
    def copies(self) -> Path:
        """The folder of the copies."""
        return self._copies.root

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects for itself and keeps copies of its own machine."""
        return RemoteStorage, (self.url,)

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
            content: bytes = self._fs.cat_file(self._at(key))
            return content

    def publish(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object."""
        with self._told("write", key):
            self._make_folder(key)
            self._fs.pipe_file(self._at(key), bytes(data))

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

        Raises:
            LockedError: another process works here.
        """
        lease = _Lease(self)
        lease.take()
        try:
            yield
        finally:
            lease.give_back()

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; whether it was written."""
        with self._told("write", key):
            self._make_folder(key)
            try:
                self._fs.pipe_file(self._at(key), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                    return False
                raise
        return True

    def _make_folder(self, key: str) -> None:
        """Where there are folders: an object store would look for the bucket with each write, or make one."""
        if _OBJECT_STORES.isdisjoint([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol):
            self._fs.makedirs(self._at(key).rpartition("/")[0], exist_ok=True)

    def _upload(self, key: str) -> None:
        with self._told("write", key):
            self._make_folder(key)
            self._fs.put_file(str(self._copies.local(key)), self._at(key))
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


class _Lease:
    """A claim on a run that ends by itself when it is not renewed."""

    def __init__(self, storage: RemoteStorage) -> None:
        self._storage = storage
        self._owner = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Claim the run, or wait out a claim that is no longer renewed."""
        if not self._storage.create("lock", self._claim()):
            self._refuse_living()
            self._storage.publish("lock", self._claim())
            time.sleep(_LEASE_SECONDS / 90)  # others may have waited as well: the last to write has it
        if self._held_by() != self._owner:
            raise self._locked(self._held_by())
        self._thread.start()

    def give_back(self) -> None:
        """End the claim, if it is still ours."""
        self._stop.set()
        self._thread.join()
        if self._held_by() == self._owner:
            self._storage.delete("lock")

    def _refuse_living(self) -> None:
        """Whether a claim lives shows in its being renewed, whatever the clocks of two machines say."""
        before = self._read()
        deadline = time.monotonic() + _LEASE_SECONDS
        if 0 <= time.time() - before.get("renewed", 0.0) < _LEASE_SECONDS / 3:
            raise self._locked(before.get("owner", "unknown"))
        while time.monotonic() < deadline:
            time.sleep(_LEASE_SECONDS / 9)
            now = self._read()
            if not now or now != before:
                if now:
                    raise self._locked(now.get("owner", "unknown"))
                return

    def _renew(self) -> None:
        while not self._stop.wait(_LEASE_SECONDS / 6):
            try:
                if self._held_by() == self._owner:
                    self._storage.publish("lock", self._claim())
            except StorageError:
                continue  # the next renewal may get through; the work itself fails where the store is gone

    def _claim(self) -> bytes:
        return json.dumps({"owner": self._owner, "renewed": time.time()}).encode()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._storage.read("lock"))
        except (StorageError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _held_by(self) -> str:
        return str(self._read().get("owner", ""))

    def _locked(self, owner: str) -> LockedError:
        return LockedError(
            f"another process works on {self._storage.url} ({owner}): wait for it, or use another --out. A claim that "
            f"is not renewed for {_LEASE_SECONDS:.0f} seconds is taken over"
        )


def _secret() -> Secret:
    """What the libraries send to a bucket's server, which may say it in an error."""
    return Secret(*(os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")))


def _copies_of(url: str) -> Path:
    return cache_folder() / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
