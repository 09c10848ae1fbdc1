"""Texts by the million: columns of them in a few arrays, which may be mapped files, and what has come before."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 4096  # texts that are made Python objects of at once


def let_go(array: NDArray[Any]) -> None:
    """Have what was read of a mapped file, by those who go through it, count as this process's memory no longer."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


_RECENT = 4096  # keys that are not in arrays yet, at least


class Strings(Sequence[str]):
    """A column of texts: equal to a list of them, and of a few bytes a text beside what they say.

    data: uint8 `[byte]`, all texts in UTF-8, one after the other.
    ends, begins: int64 `[text]`, where each of them ends and begins; by default where the one before ends.
    """

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64], begins: NDArray[np.int64] | None = None):
        self._data, self._ends = data, ends
        self._begins = np.concatenate([[0], ends[:-1]]).astype(np.int64) if begins is None else begins

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """A column of these."""
        if isinstance(texts, Strings):
            return texts
        data = bytearray()
        ends = []
        for text in texts:
            data += text.encode()
            ends.append(len(data))
        return cls(np.frombuffer(bytes(data), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def take(self, positions: Sequence[int] | NDArray[np.int64]) -> Strings:
        """The texts at these positions, in this order; their bytes stay where they are."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Strings(self._data, self._ends[chosen], self._begins[chosen])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self.take(np.arange(len(self))[index]))
        return self._data[self._begins[index] : self._ends[index]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            begins, ends = self._begins[start : start + _BLOCK].tolist(), self._ends[start : start + _BLOCK].tolist()
            first, last = min(begins), max(ends)
            if last - first > 64 * (_BLOCK + ends[-1]):  # of a choice from far places
                yield from (self._data[b:e].tobytes().decode() for b, e in zip(begins, ends, strict=True))
                continue
            data = self._data[first:last].tobytes()
            let_go(self._data)
            yield from (data[b - first : e - first].decode() for b, e in zip(begins, ends, strict=True))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings) and self._is(other):
            return True
        if not isinstance(other, Sequence) or isinstance(other, str) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def _is(self, other: Strings) -> bool:
        """Whether they are the same bytes, as most columns are that are compared."""
        same = self._data is other._data and len(self) == len(other)
        return same and bool((self._ends == other._ends).all() and (self._begins == other._begins).all())

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 10 else f"<{len(self):,} texts, first {self[0]!r}>"

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self.find(text) is not None

    def find(self, text: str) -> int | None:
        """The first position of a text; None where it is not."""
        hashes, order = self._index
        own = _hash(text)
        at = int(np.searchsorted(hashes, own))
        while at < len(hashes) and hashes[at] == own:
            position = int(order[at])
            if self[position] == text:
                return position
            at += 1
        return None

    def positions(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The first position of each text, int64 `[text]`; −1 where it is not."""
        if len(texts) == len(self) and self == texts:
            return np.arange(len(self))
        hashes, order = self._index
        if not len(hashes):
            return np.full(len(texts), -1)
        own = np.fromiter(map(_hash, texts), dtype=np.int64, count=len(texts))
        found = order[np.minimum(hashes.searchsorted(own), len(order) - 1)]
        for number, (text, there) in enumerate(zip(texts, self.take(found), strict=True)):
            if text != there:  # another text of the same hash, or none
                at = self.find(text)
                found[number] = -1 if at is None else at
        return found

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of the texts, ascending, and whose each is; of equal ones the first text comes first."""
        hashes = np.fromiter(map(_hash, self), dtype=np.int64, count=len(self))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


_hash = hash  # of 64 bits, and another one in every process: nothing of it is kept


class FirstSeen:
    """Which of many keys came before, and where: two halves of a digest and a place for each, in sorted arrays.

    Keys are compared by 128 bits of a digest: among a billion of them two share one with probability 1e-21.
    """

    def __init__(self) -> None:
        self._first, self._second = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._places = np.empty(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def add(self, key: str, place: int) -> int | None:
        """The place of a key that came before; None for one that is new, which has this place from now on."""
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        found = self._recent.get(digest)
        if found is None:
            found = self._kept(digest)
        if found is None:
            self._recent[digest] = place
            if len(self._recent) > max(_RECENT, len(self._places) // 8):
                self._keep()
        return found

    def _kept(self, digest: bytes) -> int | None:
        first, second = np.frombuffer(digest, np.uint64)
        at = int(self._first.searchsorted(first))
        while at < len(self._first) and self._first[at] == first:
            if self._second[at] == second:
                return int(self._places[at])
            at += 1
        return None

    def _keep(self) -> None:
        halves = np.frombuffer(b"".join(self._recent), np.uint64).reshape(-1, 2)
        places = np.fromiter(self._recent.values(), np.int64, len(self._recent))
        order = np.argsort(halves[:, 0], kind="stable")
        at = self._first.searchsorted(halves[order, 0])
        for name, values in (("_first", halves[:, 0]), ("_second", halves[:, 1]), ("_places", places)):
            setattr(self, name, np.insert(getattr(self, name), at, values[order]))
        self._recent = {}
