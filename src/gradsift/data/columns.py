"""Columns of ours in the user's rows: the one way in which they are added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_DECODER = json.JSONDecoder()


def add_columns(rows: Sequence[str], added: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Rows with columns added at their end, and where columns of these names that they had before have gone.

    A row, JSON text with every key once, is kept byte for byte where none clashes. What has a name of ours already gets
    the first number that is free in all rows: `gradsift_id_1`, after a third stage `gradsift_id_2`.

    >>> add_columns(['{"a":1}', '{"gradsift_id": "x"}'], [{"gradsift_id": "p"}, {"gradsift_id": "q"}])[0]
    ['{"a":1, "gradsift_id": "p"}', '{"gradsift_id_1": "x", "gradsift_id": "q"}']
    """
    members = [_members(row) for row in rows]
    there = {key for own in members for key in own}
    clashing = sorted({key for columns in added for key in columns} & there)
    number = 1
    while any(f"{key}_{number}" in there for key in clashing):
        number += 1
    moved = {key: f"{key}_{number}" for key in clashing}
    lines = []
    for row, own, columns in zip(rows, members, added, strict=True):
        if moved.keys() & own.keys():
            body = "{" + ", ".join(f"{_json(moved.get(key, key))}: {value}" for key, value in own.items())
        else:
            body = row.rstrip()[:-1].rstrip()
        extra = ", ".join(f"{_json(key)}: {_json(value)}" for key, value in columns.items())
        lines.append(f"{body}{'' if body.endswith('{') else ', '}{extra}}}")
    return lines, moved


def _members(row: str) -> dict[str, str]:
    """The keys of a JSON object, with the text of their values."""
    members = {}
    at = _skip(row, row.index("{") + 1, ",")
    while row[at] != "}":
        key, at = _DECODER.raw_decode(row, at)
        start = _skip(row, at, ":")
        _, at = _DECODER.raw_decode(row, start)
        members[key] = row[start:at]
        at = _skip(row, at, ",")
    return members


def _skip(row: str, at: int, separator: str) -> int:
    while row[at].isspace() or row[at] == separator:
        at += 1
    return at


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
