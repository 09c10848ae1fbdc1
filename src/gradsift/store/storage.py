"""The one interface through which gradsift touches stored files, and folders that have it: list, read, publish.

It is a tree of immutable objects named by keys such as `gradients/3f2a/shard-00000.safetensors`, and asks no more than
an object store can give: whole objects appear at once or not at all, nothing is renamed or appended, and a memory map
is made of `local(key)`, which `RemoteStorage` fetches first.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gradsift.base.errors import LockedError, StorageError
from gradsift.base.inputs import open_input
from gradsift.store.writers import is_temporary, remove_left_behind, temporary_name

if TYPE_CHECKING:
    from gradsift.store.remote import RemoteStorage

Storage: TypeAlias = "LocalStorage | RemoteStorage"
_GROUP_ROWS = 1 << 17  # of a parquet file that are written together


class LocalStorage:
    """Storage in a folder: an object is written under a temporary name, flushed to disk, then renamed."""

    claim: str | None = None  # the lock of a folder is not handed on

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    def list(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, sorted; temporary files of killed writers are not listed."""
        folder = self.root / prefix if prefix.endswith("/") or not prefix else (self.root / prefix).parent
        if not folder.is_dir():
            return []
        keys = (path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())
        return sorted(key for key in keys if key.startswith(prefix) and not is_temporary(key))

    def exists(self, key: str) -> bool:
        """Whether a published object has this key."""
        return (self.root / key).is_file()

    def size(self, key: str) -> int:
        """Bytes of an object."""
        return (self.root / key).stat().st_size

    def read(self, key: str) -> bytes:
        """The whole object."""
        try:
            with open_input(self.root / key) as file:
                return file.read()
        except OSError as error:
            raise _storage_error(self.root / key, "read", error) from error

    def publish(self, key: str, data: bytes | memoryview) -> None:
        """Write, flush, rename: a reader sees the old object or the new one, never a part."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.write(data)

        self.publish_with(key, write)

    def publish_with(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` make the file under the temporary path that it is given: for what should not lie in memory."""
        path = self.root / key
        temporary = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _flush(temporary)
            temporary.replace(path)
        except BaseException as error:  # an interruption leaves no more behind than a full disk
            with suppress(OSError):  # a read-only system refuses this, too
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError | SafetensorError):
                raise _storage_error(path, "write", _as_os_error(error)) from error
            raise

    def publish_folder(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder that appears under its key when all is there, replacing what was there."""
        path = self.root / key
        temporary = temporary_name(path)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise _storage_error(path, "write", _as_os_error(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""
        try:
            (self.root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _storage_error(self.root / key, "delete", error) from error

    def local(self, key: str) -> Path:
        """The object's own path, to be memory-mapped or given to another library, read only."""
        return self.root / key

    folder = local  # with all objects under the key

    def name(self, key: str) -> str:
        """Its path."""
        return str(self.root / key)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder by a file `lock`, of which the operating system lets go with the process.

        What writers that are dead left half written is removed.
        """
        lock = FileLock(self.root / "lock", timeout=0)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise LockedError(f"another process works on {self.root}: wait for it, or use another --out") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"cannot make the folder {self.root}: a part of its path is a file") from error
        except OSError as error:
            reason = "no permission" if isinstance(error, PermissionError) else error.strerror or str(error)
            raise StorageError(f"cannot write to {self.root}: {reason}. Choose another --out") from error
        try:
            remove_left_behind(self.root)
            yield
        finally:
            lock.release()


def publish_parquet(storage: Storage, key: str, tables: Iterable[Any]) -> None:
    """Publish pyarrow tables, one below the other, as a parquet file; no more than some of them are held at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(path: Path) -> None:
        rest = iter(tables)
        waiting = [next(rest)]
        with pq.ParquetWriter(path, waiting[0].schema, compression="zstd") as file:
            for table in chain(rest, [None]):
                if table is None or sum(part.num_rows for part in waiting) >= _GROUP_ROWS:
                    file.write_table(pa.concat_tables(waiting).unify_dictionaries())
                    waiting = []
                waiting.append(table)

    storage.publish_with(key, write)


def cache_folder() -> Path:
    """Where gradsift keeps what it fetches once: `$GRADSIFT_CACHE`, else `$XDG_CACHE_HOME/gradsift` or `~/.cache/…`."""
    explicit = os.environ.get("GRADSIFT_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsift"


def checksum(data: bytes | memoryview) -> str:
    """XXH3-128 of the bytes, hex: finds accidents (truncation, flipped bits) at memory speed."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_file(path: Path, *, block: int = 1 << 20) -> str:
    """`checksum` of a file, in blocks."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(block):
            state.update(chunk)
    return state.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _as_os_error(error: Exception) -> OSError:
    """The library's words for a disk that is full are in its message only."""
    full = "No space left" in str(error)
    return error if isinstance(error, OSError) else OSError(errno.ENOSPC if full else errno.EIO, str(error))


def _storage_error(path: Path, verb: str, error: OSError) -> StorageError:
    remedies = {
        errno.ENOSPC: "the disk is full: free space or choose another --out, then run the same command again, "
        "which goes on where it stopped",
        errno.EDQUOT: "the disk quota is used up: free space or choose another --out, then run the same command again",
        errno.EACCES: "no permission: choose a folder you may write to",
        errno.EPERM: "no permission: choose a folder you may write to",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOENT: "it is not there",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.EISDIR: "it is a folder, not a file",
    }
    remedy = remedies.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot {verb} {path}: {remedy}")
