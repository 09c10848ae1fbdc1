"""SHA-256 of whole files, each read once: what a file system says of a file decides whether it is the same one.

Digests of large files are kept in `digests.json` in the cache folder, under device, inode, size and both times: a moved
file is found again, a copy is read once more, and one that was written to since is another file. The record is believed
only if it is this user's own, writable by nobody else, and whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from gradsift.base.errors import StorageError
from gradsift.store.manifest import publish_json, read_if_whole
from gradsift.store.storage import LocalStorage, cache_folder

_NAME = "digests.json"
_WORTH = 1 << 20  # bytes: smaller files are read again as fast as they are looked up
_SETTLED = 2.0  # seconds: a file written to since then may be written to again within one tick of its clock
_MOST, _MOST_BYTES = 4096, 1 << 20  # entries of the record; a larger one is none of ours
_KEY, _DIGEST = re.compile(r"[0-9a-f:-]{1,160}"), re.compile(r"[0-9a-f]{64}")

_known: dict[str, str] = {}  # of this process


def file_digest(path: Path, before: bytes = b"") -> str:
    """SHA-256 of `before` and all bytes of a file, 64 hex digits."""
    found = path.stat()
    if found.st_size < _WORTH:
        return _digest(path, before)
    key = f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    if before:
        key += f":{hashlib.sha256(before).hexdigest()}"
    digest = _known.get(key) or _recorded().get(key)
    if digest is None:
        settled = time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED
        digest = _digest(path, before)
        if not settled or _times(path.stat()) != _times(found):
            return digest
        _record(key, digest)
    _known[key] = digest
    return digest


def _digest(path: Path, before: bytes) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(before)).hexdigest()


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _recorded() -> dict[str, str]:
    """The record, or nothing where it is not there, not whole, or may be somebody else's."""
    path = cache_folder() / _NAME
    try:
        found = path.lstat()
    except OSError:
        return {}
    own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    if not own or found.st_size > _MOST_BYTES:
        return {}
    with suppress(StorageError):
        digests = (read_if_whole(LocalStorage(path.parent), _NAME, sealed=True) or {}).get("digests")
        if isinstance(digests, dict) and all(
            _KEY.fullmatch(str(key)) and isinstance(digest, str) and _DIGEST.fullmatch(digest)
            for key, digest in digests.items()
        ):
            return digests
    return {}


def _record(key: str, digest: str) -> None:
    """Add a digest to the record, whose oldest entries go; a cache folder that cannot be written is done without."""
    entries = [*_recorded().items(), (key, digest)][-_MOST:]
    with suppress(StorageError):
        publish_json(LocalStorage(cache_folder()), _NAME, {"digests": dict(entries)}, sealed=True)
