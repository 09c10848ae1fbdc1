"""What the peer scripts share: an environment of its own per peer, one timed command, the result file.

Only the standard library is imported here, so that a measuring run starts nothing heavy beside the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "peers"


@dataclass(frozen=True)
class Environment:
    """A peer's virtual environment under `.cache/peers/`.

    requirements are given to pip in one call, so that the resolver keeps the torch pin: installed one after the
    other, a dependency may pull a newer torch, and with it the CUDA libraries.
    """

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    def program(self, name: str) -> Path:
        return self.folder / "bin" / name

    def make(self) -> None:
        """Create the environment anew, install the requirements and remove what breaks the peer."""
        venv.create(self.folder, clear=True, with_pip=True)
        pip = [str(self.program("python")), "-m", "pip"]
        subprocess.run([*pip, "install", *self.requirements], check=True)
        if self.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *self.unwanted], check=True)

    def require(self) -> None:
        """Exit with the remedy when the environment is not there."""
        if not self.program("python").exists():
            sys.exit(f"no environment at {self.folder}: run `python {sys.argv[0]} --setup` once")

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        """Installed versions, as the peer's own interpreter sees them."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        answer = subprocess.run(
            [str(self.program("python")), "-c", code, *packages], check=True, capture_output=True, text=True
        )
        return dict(json.loads(answer.stdout))


@dataclass(frozen=True)
class Timed:
    """One command from process start to exit.

    seconds:            wall clock of the whole process
    cpu_seconds:        user and system time of the process and its children
    peak_bytes:         largest resident set among the processes this script has started
    collection_seconds: from the peer's first progress line to its last as this script saw them arrive, None where it
                        prints none
    collection_printed: the peer's own last progress line
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    collection_seconds: float | None
    collection_printed: str | None


def run_timed(
    command: Sequence[str], environment: Mapping[str, str], log: Path, progress: re.Pattern[str] | None = None
) -> Timed:
    """Run a command, keep its output in `log`, and time it and the part that its progress bar covers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = last = None
    line = ""
    printed: str | None = None
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            now = time.perf_counter()
            sink.write(chunk)
            # A bar rewrites its line with a carriage return: both ends of line count.
            *finished, line = re.split(r"[\r\n]", line + chunk.decode(errors="replace"))
            for text in [*finished, line]:
                if progress is not None and progress.search(text) and text != printed:
                    first = now if first is None else first
                    last, printed = now, text
        code = process.wait()
        seconds = time.perf_counter() - start
    if code != 0:
        sys.exit(f"{Path(command[0]).name} exited with {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Timed(
        seconds=round(seconds, 3),
        cpu_seconds=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3),
        peak_bytes=after.ru_maxrss * 1024,
        collection_seconds=round(last - first, 3) if first is not None and last is not None else None,
        collection_printed=printed.strip() if printed else None,
    )


def process_environment(threads: int, scratch: Path) -> dict[str, str]:
    """The caller's environment with fixed thread counts, no hub, and caches of its own.

    The `datasets` cache lies in the scratch folder: a second run would otherwise find the first one's tokenised rows.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
        "PYTHONSAFEPATH": "1",
    }


def adapter_on(model: Path, adapter: Path, scratch: Path) -> Path:
    """A copy of a peft adapter whose configuration names `model` as its base: peers read the base from there."""
    copy = scratch / "adapter"
    copy.mkdir()
    for file in adapter.iterdir():
        if file.name.startswith("adapter_model."):
            shutil.copy2(file, copy / file.name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model.resolve())
    (copy / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return copy


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a jsonl file with `id` and `messages`."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return rows if limit is None else rows[:limit]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def bytes_under(folder: Path) -> int:
    """Apparent size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def machine() -> dict[str, Any]:
    """What a reader needs to judge a timing; the load says whether the machine was shared."""
    return {
        "platform": platform.platform(),
        "processor": next(
            (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all peer scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peer's virtual environment and stop")
    parser.add_argument("--model", type=Path, help="folder of the base model and its tokenizer")
    parser.add_argument("--adapter", type=Path, help="folder of the peft LoRA adapter")
    parser.add_argument("--rows", type=Path, help="jsonl with `id` and `messages`")
    parser.add_argument("--out", type=Path, help="where the result goes (json)")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--token-budget", type=int, default=2048, help="padded tokens in a batch (bergson's default)")
    parser.add_argument("--verify", action="store_true", help="compare with autograd in place of measuring")
    parser.add_argument("--verify-rows", type=int, default=8, help="how many of the first rows --verify looks at")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parsed options; all but --setup need model, adapter, rows and out."""
    options = parser.parse_args()
    missing = [name for name in ("model", "adapter", "rows", "out") if getattr(options, name) is None]
    if missing and not options.setup:
        parser.error("missing " + ", ".join(f"--{name}" for name in missing))
    return options
