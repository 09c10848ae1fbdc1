"""Where rows come from: files, folders and patterns of them, data sets, and values in memory.

Nothing that lies beside the rows is passed over in silence: a `Source` names the files that were not read.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.base import hub
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.types import Skipped
from gradsift.data.files import (
    FileError,
    Row,
    batch_rows,
    file_rows,
    is_data_file,
    not_utf8,
    readable_types,
    refuse_repeated,
    suffix_of,
    unpadded,
    why_unread,
)

if TYPE_CHECKING:
    from datasets import Dataset

# What lies beside data and holds no rows: for people, for version control, for `datasets` itself.
_COMPANION_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_COMPANION_SUFFIXES = (".md", ".rst", ".py", ".yaml", ".yml", ".toml", ".bib", ".cff", ".md5", ".sha256", ".lock")
_COMPANION_NAMES = (  # without an ending, or with .txt
    *("readme", "license", "licence", "notice", "copying", "citation", "changelog", "authors", "contributing"),
    *("_success", "checksums", "md5sums", "sha256sums", "makefile"),
)
# The split that a file of a folder is of, by the last of these words in its path, as `datasets` tells them.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.:\[\]%+-]+)?")
_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/(.+)")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a source, as they are read.

    name:   for a person; "" for rows in memory
    unread: files of a folder or pattern that are not read, with the reason; complete once all rows are read, as a file
        that breaks off is known only then
    notes:  what else a person may want to know, a sentence each
    """

    rows: Iterator[Row]
    name: str
    unread: list[Skipped] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def read_rows(source: Any, what: str) -> Source:
    """The rows of any source of `load_examples`, as they are; DataError also later, where a file breaks off."""
    if isinstance(source, str | os.PathLike):
        return _open_named(os.fspath(source), what)
    if _is_of("datasets", source):  # a DatasetDict is a mapping of splits; any other is one row in the wrong place
        dataset = _pick_split(source, None, "the dataset", what) if isinstance(source, Mapping) else source
        return Source(_dataset_rows(dataset, "dataset"), "dataset", notes=_other_splits(source, None))
    if isinstance(source, Mapping):
        raise DataError(f"{what}: got one mapping; wanted a list of them: [{{...}}].")
    table = source if _is_of("pandas", source) else getattr(source, "schema", None) if _is_of("pyarrow", source) else ()
    columns = getattr(table, "columns", getattr(table, "names", ()))
    try:
        refuse_repeated(columns)
    except FileError as error:
        raise DataError(f"{what}: the table {error}.") from error
    if _is_of("pyarrow", source):
        batches = source.to_batches() if hasattr(source, "to_batches") else source
        return Source(batch_rows([batches] if hasattr(batches, "to_pylist") else batches, "table"), "table")
    if _is_of("pandas", source) and hasattr(source, "columns"):
        return _in_memory(unpadded(_plain(row)) for row in source.to_dict("records"))
    if _is_of("polars", source) and hasattr(source, "iter_rows"):
        return _in_memory(map(unpadded, source.iter_rows(named=True)))
    if not isinstance(source, Iterable):
        raise DataError(f"{what}: got {kind_of(source)}; wanted a path, a dataset name, a table or rows.")
    rows = list(source)
    if rows and all(isinstance(row, str | os.PathLike) for row in rows):
        opened = [_open_named(os.fspath(row), what) for row in rows]
        return Source(
            (row for part in opened for row in part.rows),
            ", ".join(part.name for part in opened),
            [file for part in opened for file in part.unread],
            tuple(note for part in opened for note in part.notes),
        )
    return _in_memory(rows)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- in memory ----------------------------------------------------------------------------------------------------


def _is_of(package: str, source: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(source).__mro__)


def _in_memory(rows: Iterable[Any]) -> Source:
    return Source((Row(row, "rows", number) for number, row in enumerate(rows, start=1)), "")


def _plain(value: Any) -> Any:
    """A value of a pandas cell as Python has it: arrays are lists, and what is missing is None."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist") and not isinstance(value, str):  # numpy's arrays and numbers
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    # NaN, NaT and NA are what pandas writes where there is nothing; NA is equal to nothing, not even unequal.
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value


# --- named sources ------------------------------------------------------------------------------------------------


def _open_named(text: str, what: str) -> Source:
    on_hub = _HUB_FILE.fullmatch(text)
    if on_hub is not None:
        return _hub_file(on_hub[1], on_hub[2], on_hub[3], what)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, what)
    if path.exists():
        if not path.is_file() or not is_data_file(path):
            raise DataError(
                f"{what}: {path} is {why_unread(path)}; wanted {readable_types()}, a folder of them, "
                "or a Hugging Face dataset name."
            )
        name = _in_utf8(path.name)
        return Source(_named_rows(path, name, what), name)
    if glob.has_magic(text) and not _HUB_NAME.fullmatch(text):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute patterns
        return _open_files(sorted(map(Path, matches)), _in_utf8(text), _in_utf8(text), what)
    folder, colon, split = text.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _open_folder(Path(folder).expanduser(), what, split)
    if _HUB_NAME.fullmatch(text) and not is_data_file(path):
        return _hub_dataset(text, what)
    near = _near(path)
    raise DataError(
        f"{what}: {path} does not exist{near}. Give a file, a folder, a glob or a Hugging Face dataset name."
    )


def _near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does the folder {parent})"
    names = sorted(entry.name for entry in parent.iterdir() if is_data_file(entry))
    listed = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f" (readable files in {parent.resolve()}: {listed})" if names else ""


# --- folders ------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, what: str, split: str | None = None) -> Source:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_dataset(folder, split, what)
    # A link to a folder is not followed, and named like a file that is not read.
    inside = sorted(entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return _open_files(inside, f"{_in_utf8(folder.name or folder)}/", _in_utf8(folder), what, folder, split)


def _open_files(
    found: Sequence[Path], name: str, where: str, what: str, root: Path | None = None, split: str | None = None
) -> Source:
    names = {path: _in_utf8(path.relative_to(root) if root is not None else path.name) for path in found}
    inside = {parent for path in found if not path.is_dir() for parent in path.parents}
    aside, readable, unread = [], [], []
    for path in found:
        if path.is_dir() and (path in inside or not any(path.iterdir())):
            continue  # a pattern with ** names folders as well as what is in them
        if _is_aside(path, names[path]):
            aside.append(names[path])
        elif path.is_file() and is_data_file(path):
            readable.append(path)
        else:
            unread.append(_unread(names[path], "unread_file", why_unread(path)))
    if root is not None:
        splits = {path: _split_of(names[path]) for path in readable}
        readable, others = _of_split(splits, split, where, what)
        unread += [
            _unread(names[path], "unread_file", f"of the split {splits[path]}: name {where}:{splits[path]} to read it")
            for path in others
        ]
    if not readable:
        kinds = ", ".join(sorted({suffix_of(path) or path.name for path in found})[:10]) or "no files at all"
        raise DataError(f"{what}: nothing readable in {where}: wanted {readable_types()}, found {kinds}.")
    notes = []
    if aside:
        listed = ", ".join(aside[:3]) + (", …" if len(aside) > 3 else "")
        many = "1 other file" if len(aside) == 1 else f"{len(aside):,} other files"
        notes.append(f"{where} also holds {many}, taken to be no data: {listed}")
    full_name = name if len(readable) == 1 else f"{name}: {len(readable):,} files"
    return Source(_rows_of(readable, names, unread), full_name, unread, tuple(notes))


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


def _of_split(
    splits: Mapping[Path, str | None], split: str | None, where: str, what: str
) -> tuple[list[Path], list[Path]]:
    """The files to be read, and those of other splits: without a name all but what lies beside a training split."""
    there = sorted({own for own in splits.values() if own is not None})
    if split is not None and split not in there:
        having = f"it has {', '.join(there)}" if there else "its files name none"
        raise DataError(f"{what}: {where} has no split {split!r}; {having}: name one of them, or the files.")
    wanted = {split} if split is not None else {"train", None} if "train" in there else {*there, None}
    own = [path for path, one in splits.items() if one in wanted]
    return own, [path for path in splits if path not in own]


def _rows_of(files: Sequence[Path], names: Mapping[Path, str], unread: list[Skipped]) -> Iterator[Row]:
    """The rows of files; one that cannot be read costs its own rows only, and is told."""
    for path in files:
        count = 0
        try:
            for row in file_rows(path, names[path]):
                yield row
                count += 1
        except FileError as error:
            reason, done = ("broken_file", f"read up to row {count:,} only: ") if count else ("unread_file", "")
            unread.append(_unread(names[path], reason, f"{done}{error}"))


def _in_utf8(path: str | Path) -> str:
    """A file's name as files of ours can hold it: bytes that are not UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _unread(name: str, reason: str, why: str) -> Skipped:
    return Skipped(name, reason, why, name, left_out="file")


def _is_aside(path: Path, name: str) -> bool:
    """Hidden files, and what usually lies beside data."""
    lower = path.name.lower()
    named = path.suffix.lower() in ("", ".txt") and lower.removesuffix(".txt") in _COMPANION_NAMES
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return hidden or named or lower in _COMPANION_FILES or path.suffix.lower() in _COMPANION_SUFFIXES


def _named_rows(path: Path, name: str, what: str) -> Iterator[Row]:
    """The rows of a file that was asked for by its name: without it there is nothing to do."""
    try:
        yield from file_rows(path, name)
    except FileError as error:
        raise DataError(f"{what}: {path} {error}. Check the file and its permissions.") from error


# --- datasets -----------------------------------------------------------------------------------------------------


def _datasets(needed: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{needed} needs the package datasets, which is not installed: pip install 'gradsift[datasets]'"
        ) from error
    return datasets


def _saved_dataset(folder: Path, split: str | None, what: str) -> Source:
    datasets = _datasets(f"{what}: {folder}, a saved dataset,")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{what}: {folder} looks like a saved dataset but cannot be read: {error}.") from error
    name = f"{folder.name or folder}/" + (f":{split}" if split else "")
    notes = _other_splits(dataset, split)
    if isinstance(dataset, datasets.DatasetDict):
        dataset = _pick_split(dataset, split, str(folder), what)
    elif split is not None:
        raise DataError(f"{what}: {folder} is a dataset without splits; leave ':{split}' away.")
    return Source(_dataset_rows(dataset, name), name, notes=notes)


def _pick_split(splits: Mapping[str, Any], split: str | None, where: str, what: str) -> Any:
    wanted = split or _usual_split(splits)
    if wanted not in splits:
        raise DataError(f"{what}: {where} has no split {wanted!r}; it has {', '.join(splits)}: name one of them.")
    return splits[wanted]


def _usual_split(splits: Mapping[str, Any]) -> str:
    return "train" if "train" in splits or len(splits) != 1 else next(iter(splits))


def _other_splits(dataset: Any, split: str | None) -> tuple[str, ...]:
    """Which splits are not read, where none was named."""
    if not isinstance(dataset, Mapping) or split is not None:
        return ()
    others = [name for name in dataset if name != _usual_split(dataset)]
    return (f"of the splits only {_usual_split(dataset)} is read, not {', '.join(others)}",) if others else ()


def _hub_dataset(text: str, what: str) -> Source:
    name, _, split = text.partition(":")
    datasets = _datasets(f"{what}: there is no file or folder {text!r} here, and a Hugging Face dataset of that name")
    hub.look()
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # hub, network and builder errors have no common base; all are told
        raise DataError(
            f"{what}: there is no file or folder {text!r} here, and no Hugging Face dataset of that name could be "
            f"loaded ({type(error).__name__}: {error}). Check the path, or the name and the network."
        ) from error
    return Source(_dataset_rows(dataset, text), text)


def _hub_file(dataset: str, revision: str | None, name: str, what: str) -> Source:
    """One file of a data set's repository, by way of the hub's own cache."""
    from huggingface_hub import hf_hub_download

    if not is_data_file(Path(name)):
        raise DataError(f"{what}: {name} in {dataset} is of a type that cannot be read; wanted {readable_types()}.")
    hub.look()
    try:
        path = Path(hf_hub_download(dataset, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub, the network and the file system have no common base; all are told
        raise DataError(
            f"{what}: the file {name} of the Hugging Face dataset {dataset} could not be loaded "
            f"({type(error).__name__}: {error}). Check the name and the network."
        ) from error
    return Source(_named_rows(path, f"{dataset}/{name}", what), f"{dataset}/{name}")


def _dataset_rows(dataset: Dataset, name: str) -> Iterator[Row]:
    # A torch or numpy format would turn the user's values into tensors.
    plain, number = dataset.with_format(None), 0
    exact = {column for column, kind in (plain.features or {}).items() if "Json(" in repr(kind)}  # has nulls of its own
    rest = plain
    while True:
        try:
            for row in rest:
                number += 1
                yield Row(unpadded(row) | {column: row[column] for column in exact}, name, number)
            return
        except UnicodeDecodeError as error:
            number += 1
            yield Row(None, name, number, problem=not_utf8(error))
            if number == getattr(plain, "num_rows", None):  # the end, where `skip` raises; streams have no length
                return
            rest = plain.skip(number)
