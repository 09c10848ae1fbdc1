"""The demo's examples as files to try commands on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from gradsift.base.errors import ConfigError
from gradsift.store.storage import LocalStorage

# Name in a user's folder: (name in the package, what it is good for)
_FILES = {
    "pool.jsonl": ("pool.jsonl", "to choose from"),
    "target.jsonl": ("target_validation.jsonl", "of what the model should get better at"),
    "test.jsonl": ("target_heldout.jsonl", "of the same kind, to measure with"),
}


def write_files(folder: str | Path) -> list[tuple[Path, int, str]]:
    """Write pool, target and test .jsonl into `folder`, over no other file: path, rows and a few words of each."""
    folder = Path(folder)
    data = resources.files("gradsift.demo") / "data"
    contents = {name: (data / source).read_bytes() for name, (source, _) in _FILES.items()}
    for name, content in contents.items():
        path = folder / name
        if path.exists() and path.read_bytes() != content:
            raise ConfigError(
                f"{path} is there already and is another file: name an empty folder, or move it out of the way"
            )
    for name, content in contents.items():
        LocalStorage(folder).publish(name, content)
    return [(folder / name, content.count(b"\n"), _FILES[name][1]) for name, content in contents.items()]
