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

with atheris.instrument_imports(include=["gradsift"]):
    from gradsift.data.load import load_examples
    from gradsift.errors import GradsiftError
    from gradsift.recipe import load_recipes
    from gradsift.run import Run
    from gradsift.store.gradient_store import _map_safetensors


def pool(suffix: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        load_examples(str(path.rename(path.with_suffix(suffix))))

    return read


def manifest(path: Path) -> None:
    folder = path.parent / "data" / "1"
    folder.mkdir(parents=True)
    path.rename(folder / "manifest.json")
    Run(path.parent).manifest("data/1/")


def store(path: Path) -> None:
    _map_safetensors(path)


TARGETS: dict[str, Callable[[Path], object]] = {
    "jsonl": pool(".jsonl"),
    "json": pool(".json"),
    "csv": pool(".csv"),
    "parquet": pool(".parquet"),
    "recipe": load_recipes,
    "manifest": manifest,
    "store": store,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"name what to fuzz first: {', '.join(TARGETS)}")
    read = TARGETS[sys.argv[1]]

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
