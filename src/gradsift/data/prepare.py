"""From a source to a data set in a run folder, a few hundred rows at a time: nothing of it need fit into memory.

Rows are read once. What tokenising needs of each goes to a file without a name, as only after the last row it is known
whether the run holds this very data already. Then they are tokenised, on every core where there are many.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError
from gradsift.base.progress import Advance, Reporter, untold
from gradsift.base.strings import Strings
from gradsift.base.types import Example, Flags, Skipped, TokenizedExample
from gradsift.data.account import Account, Entries, as_line, count_reasons, counts_text
from gradsift.data.chat import ChatFormat
from gradsift.data.dataset import DataManifest, Dataset
from gradsift.data.formats import Answer
from gradsift.data.load import Columns, ExampleReader
from gradsift.data.overlap import Duplicates, normalised_hash
from gradsift.execution.forks import cores, in_order
from gradsift.model.loss import label_weights
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run
from gradsift.store.tensors import GrowingArrays

_FILES = ("tokens.safetensors", "rows.jsonl", "account.jsonl")
_BATCH = 256  # rows that are tokenised together
_MANY = 16 * _BATCH  # rows for which a copy of this process on every core is worth its making
_IN_MEMORY = 1 << 24  # bytes of a file without a name that need no file
_COLUMNS = {
    **{"token_ids": np.int32, "supervised": np.bool_, "weights": np.float32, "offsets": np.int64},
    **{"ids": np.uint8, "id_ends": np.int64, "hashes": np.uint8, "hash_ends": np.int64, "line_ends": np.int64},
}


def prepare(
    run: Run,
    source: Any,
    chat: ChatFormat,
    *,
    what: str = "pool",
    columns: Columns | Mapping[str, str] | None = None,
    keep_duplicates: bool = False,
    check: Callable[[str, Mapping[str, Any]], None] | None = None,
    answer: Answer | None = None,
    reporter: Reporter,
) -> Dataset:
    """Load, tokenise and store a data set, or open it if the run holds it already; DataError if no row is usable.

    Exact duplicates (normalised content) are left out unless `keep_duplicates`. Rows with nothing to learn are left
    out. Both are in its `account`, as is what of the other rows is not shown. `check` is given the fingerprint of what
    was read, and what its manifest will say, before anything is tokenised or written. With `answer`, rows are
    preference pairs, each read with that one.
    """
    require_answer = answer is not None or chat.supervise != "all_tokens"
    reading = ExampleReader(source, columns=columns, what=what, require_answer=require_answer, answer=answer)
    named = bool(Columns.of(columns).model_dump(exclude={"id"}, exclude_none=True))
    with _Rows(str(run.folder) if run.folder.is_dir() else None) as rows:
        rows.read(reporter.counted(f"reading the {what}", reading), chat, keep_duplicates=keep_duplicates, named=named)
        config = {"content": rows.content, "skipped": rows.left_out, "template": chat.fingerprint}
        told = {"description": reading.description, "announcement": chat.announcement, "settings": chat.settings}
        if check is not None:
            check(fingerprint(config), {"config": config, **told})
        prefix = run.prefix("data", config)
        if run.intact(prefix, reporter, DataManifest) is None:
            with reporter.stage(f"tokenising the {what}", rows.count) as advance:
                rows.write(run, prefix, rows.tokenised(chat), advance, f"the {what} ({reading.description})")
            run.complete(prefix, "data", config, files=_FILES, **told)
    return Dataset(run, prefix)._with(Account(files=reading.unread, notes=reading.notes))


def joined(first: Dataset, second: Dataset, before: str, reporter: Reporter) -> Dataset:
    """The rows of two data sets, tokens, labels and weights as they are; ids of the second begin with `before`."""
    run, config = first.run, {"rows": [first.fingerprint, second.fingerprint, before], "template": first.template}
    prefix = run.prefix("data", config)
    if run.intact(prefix, reporter, DataManifest) is None:
        with _Rows(str(run.folder) if run.folder.is_dir() else None) as rows:
            found = [rows.taken(first), rows.taken(second, before)]
            rows.write(run, prefix, found, untold, prefix)
        told = {"description": f"{first.description} and {second.description}", "announcement": None}
        run.complete(prefix, "data", config, files=_FILES, **told)
    return Dataset(run, prefix)


class _Rows(ExitStack):
    """The rows of a source on their way into a run folder.

    Attributes, once they are read:
        content, left_out: fingerprints of the rows that are used, and of those that are not.
        count: how many are used.
    """

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self._folder = folder
        # What becomes a line of rows.jsonl, and what tokenising needs to know; then the account, in the order it has.
        self._lines, self._facts = self._file(), self._file()
        self._skipped, self._duplicates, self._unusable, self._parts = (self._file() for _ in range(4))
        self.content, self.left_out, self.count = "", "", 0

    def read(
        self, reading: Iterable[Example | Skipped], chat: ChatFormat, *, keep_duplicates: bool, named: bool
    ) -> None:
        """With columns that were `named`, a row of the same messages may have other flags, weights and tools."""
        content, known = hashlib.sha256(), Duplicates()
        for one in _in_chunks(reading, chat):
            if isinstance(one, Skipped):
                _add(self._skipped, as_line(one))
                continue
            digest = normalised_hash(one.messages)
            copy = None if keep_duplicates else known.add(one, digest)
            if copy is not None:
                _add(self._duplicates, as_line(copy))
                continue
            id_, messages, row = json.dumps(one.id), json.dumps(list(one.messages)), _row_text(one)
            options = f'"options":{json.dumps(one.options)},' if one.options else ""
            content.update(f"[{id_}, {messages}, {json.dumps(row)}]".encode())
            _add(self._lines, f'{{"id":{id_},"messages":{messages},{options}"row":{row}}}')
            flags = [flag and [flag.learn, flag.weight] for flag in one.flags]
            asked = one.prompt if chat.supervise == "trl" else 0
            if named and (flags or one.options or one.weight != 1 or asked):
                content.update(json.dumps([flags, one.options, one.weight, asked]).encode())
            unused = [[skip.reason, skip.detail, skip.part] for skip in one.unused]
            beside = [one.source, one.line, one.token_ids, one.weight, one.prompt]
            rest = json.dumps([digest, one.options, flags, unused, *beside])
            _add(self._facts, f"[{id_}, {messages}, {rest[1:]}")
            self.count += 1
        self.content = content.hexdigest()[:16]
        self.left_out = _of_all(self._skipped, self._duplicates)

    def tokenised(self, chat: ChatFormat) -> Iterator[_Tokenised]:
        """What becomes of the rows that were read."""
        facts = _from_start(self._facts)
        batches = iter(lambda: list(islice(facts, _BATCH)), [])
        return in_order(partial(_tokenised, chat), batches, processes=cores() if self.count >= _MANY else 1)

    def taken(self, data: Dataset, before: str = "") -> _Tokenised:
        """All rows of a data set, with this before their ids."""
        ids = [f"{before}{id_}" for id_ in data.ids]
        for own, id_ in zip(data.ids, ids, strict=True):
            _add(self._lines, json.dumps({**json.loads(data.line(own)), "id": id_}, separators=(",", ":")))
        return _of_rows([replace(data[n], id=id_) for n, id_ in enumerate(ids)], list(data.hashes))

    def write(self, run: Run, prefix: str, found: Iterable[_Tokenised], advance: Advance, name: str) -> None:
        """Publish the files of a data set."""
        arrays = self.enter_context(closing(GrowingArrays(_COLUMNS, self._folder)))
        run.storage.publish_with(f"{prefix}rows.jsonl", partial(self._write_rows, arrays, found, advance, name))
        run.storage.publish_with(f"{prefix}tokens.safetensors", arrays.write)
        run.storage.publish_with(f"{prefix}account.jsonl", self._write_account)

    def _write_rows(
        self, arrays: GrowingArrays, parts: Iterable[_Tokenised], advance: Advance, name: str, path: Path
    ) -> None:
        """Write rows.jsonl, and everything else meanwhile."""
        lines = _from_start(self._lines)
        used = weighted = 0
        arrays.append("offsets", np.zeros(1, np.int64))
        with path.open("wb") as file:
            for found in parts:
                kept = list(compress(islice(lines, len(found.usable)), found.usable))
                file.writelines(kept)
                arrays.append_ends("line_ends", [len(line) for line in kept])
                for texts, data, ends in ((found.ids, "ids", "id_ends"), (found.hashes, "hashes", "hash_ends")):
                    encoded = [text.encode() for text in texts]
                    arrays.append(data, b"".join(encoded))
                    arrays.append_ends(ends, [len(text) for text in encoded])
                arrays.append("token_ids", found.token_ids)
                arrays.append("supervised", found.weights > 0)
                arrays.append("weights", found.weights)
                arrays.append_ends("offsets", found.lengths)
                used, weighted = used + len(kept), weighted or found.weighted
                self._unusable.writelines(found.unusable)
                self._parts.writelines(found.parts)
                advance(len(found.usable))
        if not used:
            files = (self._skipped, self._duplicates, self._unusable)
            lines_of = (Strings.of(line.decode() for line in _from_start(file)) for file in files)
            entries = Entries(*map(Entries.of_lines, lines_of))
            counts = counts_text(count_reasons(entries))
            raise DataError(f"no row of {name} can be used: {counts}. First: {entries[0].detail}")
        if not weighted:
            arrays.drop("weights")

    def _write_account(self, path: Path) -> None:
        with path.open("wb") as file:
            for part in (self._skipped, self._duplicates, self._unusable, self._parts):
                file.writelines(_from_start(part))

    def _file(self) -> IO[bytes]:
        """A file without a name."""
        return self.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=self._folder))


def _in_chunks(reading: Iterable[Example | Skipped], chat: ChatFormat) -> Iterator[Example | Skipped]:
    """What is read, with the rows that are made of plain texts in their place."""
    for one in reading:
        yield from (one,) if isinstance(one, Skipped) else chat.chunks(one)


def _add(file: IO[bytes], line: str) -> None:
    file.write(line.encode() + b"\n")


def _from_start(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    return iter(file)


def _of_all(*files: IO[bytes]) -> str:
    """What `fingerprint` gives of the list of all values that stand in files, one a line in its own form."""
    digest, between = hashlib.sha256(b"["), b""
    for file in files:
        for line in _from_start(file):
            digest.update(between + line[:-1])
            between = b","
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _row_text(example: Example) -> str:
    """One line of JSON; a raw text that spans lines (never from jsonl) is written anew."""
    if example.raw is not None and "\n" not in example.raw and "\r" not in example.raw:
        return example.raw.strip()
    text = json.dumps(dict(example.row), ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column beside the conversation
        text = json.dumps(dict(example.row), default=str)
    return text


@dataclass(slots=True)
class _Tokenised:
    """Some rows, tokenised.

    usable:    of each row
    ids, hashes, lengths: of those that are
    token_ids, weights: int32 and float32 `[token]`, of all of those
    weighted:  whether any label weighs other than 1
    unusable, parts: lines of the account
    """

    usable: list[bool]
    ids: list[str]
    hashes: list[str]
    lengths: list[int]
    token_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    weighted: bool
    unusable: list[bytes]
    parts: list[bytes]


def _tokenised(chat: ChatFormat, lines: Sequence[bytes]) -> _Tokenised:
    """What becomes of rows, by the facts about them."""
    facts = [json.loads(line) for line in lines]
    found = chat.tokenize_batch([_example(fact) for fact in facts])
    return _of_rows(found, [fact[2] for fact in facts])


def _of_rows(found: Sequence[TokenizedExample | Skipped], hashes: Sequence[str]) -> _Tokenised:
    usable = [isinstance(one, TokenizedExample) for one in found]
    kept = [one for one in found if isinstance(one, TokenizedExample)]
    return _Tokenised(
        usable,
        [one.id for one in kept],
        [*compress(hashes, usable)],
        [len(one.token_ids) for one in kept],
        np.concatenate([np.empty(0, np.int32), *(one.token_ids for one in kept)]),
        np.concatenate([np.empty(0, np.float32), *(label_weights(one) for one in kept)]),
        any(one.weights is not None for one in kept),
        [as_line(one).encode() + b"\n" for one in found if isinstance(one, Skipped)],
        [as_line(part).encode() + b"\n" for one in kept for part in one.unshown],
    )


def _example(fact: Sequence[Any]) -> Example:
    id_, messages, _digest, options, flags, unused, source, line, token_ids, weight, prompt = fact
    parts = tuple(Skipped(id_, reason, detail, source, line, "part", part) for reason, detail, part in unused)
    return Example(
        id_, tuple(messages), {}, flags=tuple(flag and Flags(*flag) for flag in flags), options=options, unused=parts,
        source=source, line=line, token_ids=tuple(token_ids), weight=weight, prompt=prompt,
    )  # fmt: skip
