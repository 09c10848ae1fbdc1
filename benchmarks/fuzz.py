"""Coverage-guided fuzzing of what reads files, with atheris (`pip install atheris`; no dependency of gradsift).

    python benchmarks/fuzz.py jsonl -max_total_time=300
    python benchmarks/fuzz.py recipe runs/corpus -max_total_time=300 -rss_limit_mb=2048

The first argument is one of jsonl, json, csv, parquet, recipe, manifest and store; the others are libFuzzer's. An input
may be refused with one of gradsift's errors; any other exception, 20 seconds without an end, and 2 GB of memory are
findings, written to a file crash-… that the same command takes as an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

from gradsift.base.errors import GradsiftError

INSTRUMENTED = ["gradsift.data", "gradsift.recipe", "gradsift.store"]


def pool(suffix: str) -> Callable[[Path], object]:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from gradsift.data.load import load_examples

    return lambda path: load_examples(str(path.rename(path.with_suffix(suffix))))


def recipe(_: str) -> Callable[[Path], object]:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from gradsift.recipe import load_recipes

    return load_recipes


def manifest(_: str) -> Callable[[Path], object]:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from gradsift.store.manifest import read_json
        from gradsift.store.storage import LocalStorage

    return lambda path: read_json(LocalStorage(path.parent), path.name)


def store(_: str) -> Callable[[Path], object]:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from gradsift.store.gradient_store import _map_safetensors

    return _map_safetensors


TARGETS: dict[str, Callable[[str], Callable[[Path], object]]] = {
    "jsonl": pool,
    "json": pool,
    "csv": pool,
    "parquet": pool,
    "recipe": recipe,
    "manifest": manifest,
    "store": store,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"name what to fuzz first: {', '.join(TARGETS)}")
    read = TARGETS[sys.argv[1]](f".{sys.argv[1]}")

    def one(data: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "input"
            path.write_bytes(data)
            with suppress(GradsiftError):
                read(path)

    atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=2048", *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
