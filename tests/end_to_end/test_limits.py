"""Absurd sizes: each gets a message that names the limit, before anything heavy is done."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradsift.data.files
from gradsift.base.errors import DataError
from gradsift.data.load import load_examples
from tiny_world import World, pool_rows, write_rows

Options = Callable[[Path], tuple[tuple[object, ...], dict[str, object]]]


def options(*given: object, **replaced: object) -> Options:
    return lambda _folder: (given, replaced)


def long_rows(folder: Path) -> tuple[tuple[object, ...], dict[str, object]]:
    """A pool with a row of a thousand tokens, for a model of 256 positions."""
    rows = pool_rows(6)
    rows[4]["messages"][0]["content"] = "zyx " * 500
    return ("--max-length", "4096"), {"pool": write_rows(folder / "long.jsonl", rows)}


ABSURD: dict[str, tuple[Options, str]] = {
    "dim": (options("--projection-dim", 2**31), "projection dim 2,147,483,648 is more than 16,777,216"),
    "rank": (options("--rank", 10**9), "rank"),
    "epochs": (options("--epochs", 10**9), "epochs"),
    "seed": (options("--seed", 10**30), "must be a whole number from 0 to 4294967295"),
    "budget": (options("--budget", 10**12), "is larger than the pool: 24 examples can be chosen from"),
    "share": (options("--budget", "1e300%"), "a share lies between 0% and 100%"),
    "infinite budget": (options("--budget", "1e999"), "budget"),
    "shard rows": (options("--shard-rows", 0), "shard_rows"),
    "max length": (long_rows, "1 rows of the pool have more tokens than"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_options_are_refused(name: str, tiny: World, tmp_path: Path) -> None:
    """Sizes that no machine has are one sentence and exit status 1, and nothing is trained or collected."""
    given, message = ABSURD[name]
    more, replaced = given(tmp_path)
    result = tiny("select", tmp_path / "run", *more, **replaced)
    assert result.code == 2
    assert message in result.err
    assert "should not have happened" not in result.err
    assert not list((tmp_path / "run").glob("gradients/*"))


def test_as_many_targets_as_memory_holds(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of each pool row for each target must fit into the free memory; the message has both numbers."""
    import psutil

    free = psutil.virtual_memory()._replace(available=700)  # 24 rows × 4 targets × 8 bytes are 768
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    result = tiny("select", tmp_path / "run", "--estimator", "bm25")
    assert result.code == 2
    assert "scores of 24 pool rows for each of 4 targets take 0.0 GiB of memory" in result.err
    assert "draw fewer targets" in result.err


class TestLargeFiles:
    """Rows and files that no example needs, with the limits lowered."""

    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradsift.data.files, "MAX_ROW_BYTES", 1000)
        monkeypatch.setattr(gradsift.data.files, "MAX_JSON_BYTES", 5000)

    def row(self, length: int) -> dict[str, Any]:
        return {"prompt": "x" * length, "completion": "y"}

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    def test_a_long_line_is_left_out_by_its_number(self, suffix: str, tmp_path: Path) -> None:
        """The rows around it are read; the last line may be the long one, with or without a line break."""
        lines = [json.dumps(self.row(length)) for length in (10, 5000, 20, 1100, 900, 100_000)]
        path = tmp_path / f"pool{suffix}"
        text = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
        loaded = load_examples(str(path))
        assert [len(example.messages[0]["content"]) for example in loaded.examples] == [10, 20, 900]
        assert [(skip.line, skip.reason) for skip in loaded.skipped] == [
            (2, "too_large"),
            (4, "too_large"),
            (6, "too_large"),
        ]
        assert "is it one row a line?" in loaded.skipped[0].detail

    def test_a_line_of_exactly_the_limit_is_read(self, tmp_path: Path) -> None:
        """The limit counts the line break."""
        text = json.dumps(self.row(1))
        for extra, read in ((0, 1), (1, 0)):
            line = json.dumps(self.row(1 + 1000 - 1 - len(text) + extra)) + "\n"
            (tmp_path / "pool.jsonl").write_text(line + text)
            assert len(load_examples(str(tmp_path / "pool.jsonl")).examples) == 1 + read

    def test_a_long_csv_field_is_left_out(self, tmp_path: Path) -> None:
        """The row is told, and the rest is read."""
        (tmp_path / "pool.csv").write_text(f"prompt,completion\na,b\n{'x' * 2000},b\nc,d\n")
        loaded = load_examples(str(tmp_path / "pool.csv"))
        assert len(loaded.examples) == 2
        assert [skip.reason for skip in loaded.skipped] == ["bad_csv"]

    def test_a_json_file_is_read_whole_up_to_a_size(self, tmp_path: Path) -> None:
        """Beyond it the message names .jsonl."""
        (tmp_path / "pool.json").write_text(json.dumps([self.row(100)] * 60))
        with pytest.raises(DataError, match=r"save it as \.jsonl, one row a line"):
            load_examples(str(tmp_path / "pool.json"))
