"""The source of a user's module: its own file and those of the user's modules that it imports; none of them is run.

A module is the user's own where it lies in the project of the first (the nearest folder above with pyproject.toml,
setup.py, setup.cfg or .git, else the folder itself) and is not installed, or in the same package. What is imported by a
name that only running the code would tell is not found.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_MARKS = ("pyproject.toml", "setup.py", "setup.cfg", ".git")
_INSTALLED = ("site-packages", "dist-packages")
FILES = "gradsift_files"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of source.

    module: the name that it is imported by
    digest: 16 hex digits of its bytes
    files:  data files that it names in a literal `gradsift_files`
    """

    module: str
    path: Path
    digest: str
    files: tuple[str, ...] = ()


_Times = tuple[tuple[int, int], ...]
_found: dict[tuple[str, str], tuple[_Times, list[Source]]] = {}


def sources_of(path: Path, module: str) -> list[Source]:
    """The source of a module, by its name in its packages: itself first, in the order in which imports name it."""
    path = path.resolve()
    key = (str(path), module)
    times, known = _found.get(key, ((), []))
    if not known or _times(known) != times:
        known = list(_walk(path, module))
        _found[key] = _times(known), known
    return known


def _times(sources: Sequence[Source]) -> _Times:
    found = []
    for source in sources:
        try:
            status = source.path.stat()
        except OSError:
            return ()
        found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


def _walk(path: Path, module: str) -> Iterator[Source]:
    top = path
    for _ in module.split(".")[1:]:  # of a package, the folder that holds its outermost part
        top = top.parent
    if path.name == "__init__.py":
        top = top.parent
    package = top if top.is_dir() and top != path else None
    folder = top.parent
    projects = (place for place in (folder, *folder.parents) if any((place / mark).exists() for mark in _MARKS))
    roots = [next(projects, folder)] + ([] if package is None else [package])
    places = list(dict.fromkeys([str(folder), str(path.parent), str(Path.cwd()), *sys.path]))
    waiting, seen = [(path, module)], {path}
    while waiting:
        file, name = waiting.pop(0)
        content = file.read_bytes()
        tree = _parsed(content) if file.suffix == ".py" else None
        yield Source(name, file, hashlib.sha256(content).hexdigest()[:16], _literal_files(tree))
        for wanted in _imports(tree, name, is_package=file.name == "__init__.py"):
            for found, known_as in _located(wanted, places):
                if found not in seen and _is_own(found, roots, package):
                    seen.add(found)
                    waiting.append((found, known_as))


def _parsed(content: bytes) -> ast.AST | None:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # importing it will say what is wrong
        return None


def _imports(tree: ast.AST | None, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                yield name


def _located(name: str, places: Sequence[str]) -> list[tuple[Path, str]]:
    """Files that importing a dotted name runs, packages first; as many of its parts as are modules."""
    parts = name.split(".")
    for place in places:
        folder, found = Path(place or "."), list[tuple[Path, str]]()
        for number, part in enumerate(parts):
            inside = folder / part
            known_as = ".".join(parts[: number + 1])
            files = [inside / "__init__.py", inside.with_name(f"{part}.py")]
            files += [inside.with_name(f"{part}{suffix}") for suffix in EXTENSION_SUFFIXES]
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                found.append((file.resolve(), known_as))
            if not inside.is_dir() or (file is not None and file.name != "__init__.py"):
                break
            folder = inside
        if found:
            return found
    return []


def _is_own(path: Path, roots: Sequence[Path], package: Path | None) -> bool:
    if package is not None and path.is_relative_to(package):
        return True
    if any(part in _INSTALLED for part in path.parts) or path.is_relative_to(_GRADSIFT):
        return False
    standard = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return any(path.is_relative_to(root) for root in roots) and not any(map(path.is_relative_to, standard))


def _literal_files(tree: ast.AST | None) -> tuple[str, ...]:
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == FILES for target in node.targets):
            try:
                found = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                return ()
            return tuple(found) if isinstance(found, list | tuple) and all(isinstance(f, str) for f in found) else ()
    return ()


_GRADSIFT = Path(__file__).resolve().parents[1]
