"""What an artifact is: its configuration, its inputs, its files. Two artifacts compare by name, not by chance."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradsift.base.errors import CorruptError, GradsiftError
from gradsift.store.storage import Storage

DIGEST = "_digest"  # the key of a sealed object's own fingerprint
_PACKAGES = ("gradsift", "torch", "transformers", "peft", "datasets", "numpy")


class Record(BaseModel):
    """What a JSON file of ours has to hold to be gone on from: fields and their types; others may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Manifest(Record):
    """What `manifest` makes."""

    kind: str
    fingerprint: str
    config: dict[str, Any]
    files: dict[str, str] = {}


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON-able value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}


@cache  # of a process; a version is read from a file of its package
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase per key in which two configurations differ: `projection.seed is 0, wanted 1`."""
    phrases = []
    for key in sorted({*found, *wanted}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            phrases += differences(a, b, f"{prefix}{key}.")
        elif canonical(a) != canonical(b):
            phrases.append(f"{prefix}{key} is {_short(a)}, wanted {_short(b)}")
    return phrases


def read_json(storage: Storage, key: str, shape: type[Record] = Record, *, sealed: bool = False) -> dict[str, Any]:
    """A JSON object of a shape, without its seal where it has one; anything else under that key is `CorruptError`."""
    content, name = storage.read(key), storage.name(key)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, error) from error
    if not isinstance(value, dict):
        raise _damaged(name, "not a JSON object")
    digest = value.pop(DIGEST, None)
    try:
        altered = (sealed or digest is not None) and digest != _digest(value)
    except ValueError:  # a number that an altered digit made infinite
        altered = True
    if altered:
        raise _damaged(name, "its content does not match its digest")
    try:
        shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise _damaged(name, f"{place}: {first['msg']}") from error
    return value


def _damaged(name: str, why: object) -> CorruptError:
    return CorruptError(f"{name} is damaged ({why}): delete its folder and run the same command again")


def read_if_whole(
    storage: Storage, key: str, shape: type[Record] = Record, *, sealed: bool = False
) -> dict[str, Any] | None:
    """As `read_json`; None where there is nothing under that key, or it is damaged."""
    try:
        return read_json(storage, key, shape, sealed=sealed) if storage.exists(key) else None
    except CorruptError:
        return None


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever a file's content makes a library or Python raise while it is read, as `CorruptError` of that file."""
    try:
        yield
    except (GradsiftError, OSError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error


def publish_json(storage: Storage, key: str, value: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Publish a JSON object, readable by people.

    A sealed one holds its own fingerprint, by which `read_json` finds a single altered digit.
    """
    if sealed:
        assert DIGEST not in value, key
        value = {**value, DIGEST: _digest(value)}
    storage.publish(key, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def manifest(kind: str, config: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """A manifest: written last, so that its presence says the artifact is complete."""
    return {
        "kind": kind,
        "fingerprint": fingerprint(config),
        "config": dict(config),
        **content,
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _digest(value: Mapping[str, Any]) -> str:
    """Of the value as JSON reads it back: keys are text there."""
    return fingerprint(json.loads(json.dumps(value)))


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 80 else f"{text[:60]}… (fingerprint {fingerprint(value)})"
