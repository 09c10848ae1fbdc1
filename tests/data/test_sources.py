"""Where rows come from: nothing that lies beside them is passed over in silence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError
from gradsift.data.load import Loaded, load_examples
from gradsift.data.sources import read_rows

ROW = {"id": "a", "prompt": "Hi", "completion": "Hello"}
LINE = (json.dumps(ROW) + "\n").encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def ids(loaded: Loaded) -> list[str]:
    return [example.id for example in loaded.examples]


@pytest.mark.parametrize("packed", PACK)
class TestCompression:
    """Every compression of every type of text."""

    @pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
    def test_a_compressed_file_is_read_like_its_content(self, packed: str, suffix: str, tmp_path: Path) -> None:
        """Rows come out the same, whatever packs them; a second frame of the archive follows the first."""
        delimiter = "\t" if suffix == ".tsv" else ","
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([list(ROW), list(ROW.values())])
        content = text.getvalue().encode() if suffix in (".csv", ".tsv") else LINE
        path = tmp_path / f"x{suffix}{packed}"
        path.write_bytes(PACK[packed](content))
        assert load_examples(path).examples[0].row == ROW
        if suffix == ".jsonl":
            path.write_bytes(PACK[packed](LINE) + PACK[packed](LINE.replace(b'"a"', b'"b"')))
            assert ids(load_examples(path)) == ["a", "b"]

    @pytest.mark.parametrize("damage", ["cut", "foreign"])
    def test_a_damaged_file_is_named(self, packed: str, damage: str, tmp_path: Path) -> None:
        """By itself it is an error; in a folder the other files are used, and it is told."""
        path = tmp_path / f"b.jsonl{packed}"
        whole = PACK[packed](LINE * 5000)
        path.write_bytes(whole[: len(whole) * 2 // 3] if damage == "cut" else b"no archive at all, but long enough")
        with pytest.raises(DataError, match=r"b\.jsonl.* cannot be read"):
            load_examples(path)
        (tmp_path / "a.jsonl").write_bytes(LINE)
        loaded = load_examples(tmp_path)
        assert ids(loaded)[0] == "a"
        (file,) = loaded.unread
        assert (file.id, file.left_out) == (path.name, "file")
        assert "cannot be read" in file.detail


class TestFoldersAndPatterns:
    """What lies in a folder, or matches a pattern, is read, counted or named."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a.jsonl", "sub/b.jsonl"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(LINE.replace(b'"a"', f'"{Path(name).stem}"'.encode()))
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("x.jsonl.lz4", "compressed as .lz4"),
            ("x.csv.zip", "compressed as .zip"),
            ("x.parquet.gz", "compressed as .gz"),
            ("x.arrow", "is not an Arrow file that can"),
            ("x.txt", "of a type that cannot be read"),
            ("sub/x.xlsx", "of a type that cannot be read"),
            ("rows", "of a type that cannot be read"),
            ("x.csv", "has the column 'a' twice"),
            ("x.parquet", "is not a parquet file"),
        ],
    )
    def test_a_file_that_is_not_read_is_named_with_its_reason(self, name: str, why: str, folder: Path) -> None:
        """Other types, other compressions and damaged files are each told once, and the rest is used."""
        (folder / name).write_bytes(b"a,a\n1,2\n")
        loaded = load_examples(folder)
        assert ids(loaded) == ["a", "b"]
        assert [(file.id, file.source, file.left_out) for file in loaded.unread] == [(name, name, "file")]
        assert why in loaded.unread[0].detail

    @pytest.mark.parametrize(
        "name",
        [
            "README.md",
            "LICENSE",
            "license.txt",
            "dataset_infos.json",
            "load.py",
            ".hidden.jsonl",
            ".git/x.jsonl",
            "_SUCCESS",
        ],
    )
    def test_what_usually_lies_beside_data_is_counted_only(self, name: str, folder: Path) -> None:
        """A note counts it; it is no file that should have been read."""
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(LINE)
        loaded = load_examples(folder)
        assert ids(loaded) == ["a", "b"]
        assert not loaded.unread
        assert len(loaded.notes) == 1
        assert f"1 other file, taken to be no data: {name}" in loaded.notes[0]

    @pytest.mark.parametrize("name", ["readme.jsonl", "authors.csv", "license.json"])
    def test_data_with_such_a_name_is_data(self, name: str, folder: Path) -> None:
        """The type of a file goes before its name."""
        (folder / name).write_bytes(b"id,prompt,completion\nz,b,c\n" if name.endswith("csv") else LINE)
        assert len(load_examples(folder).examples) == 3

    def test_a_pattern_names_folders_and_links(self, folder: Path) -> None:
        """`*` does not open a folder that it matches, which is told; `**` does. A link to nothing is told, too."""
        (folder / "c.jsonl").symlink_to("nowhere")
        (folder / "empty").mkdir()
        loaded = load_examples(f"{folder}/*")
        assert ids(loaded) == ["a"]
        assert {file.id: file.detail.split(":")[0] for file in loaded.unread} == {
            "c.jsonl": "a link to nothing",
            "sub": "a folder",
        }
        loaded = load_examples(f"{folder}/**")
        assert ids(loaded) == ["a", "b"]
        assert [file.id for file in loaded.unread] == ["c.jsonl"]

    def test_a_link_to_a_folder_is_not_followed_and_told(
        self, folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A folder elsewhere is not read by a link to it."""
        other = tmp_path_factory.mktemp("other")
        (other / "z.jsonl").write_bytes(LINE)
        (folder / "more").symlink_to(other)
        assert [(file.id, "a folder" in file.detail) for file in load_examples(folder).unread] == [("more", True)]

    def test_a_folder_of_files_that_cannot_be_read_is_an_error_that_says_so(self, tmp_path: Path) -> None:
        """The first reason is in the message."""
        (tmp_path / "x.jsonl.zst").write_bytes(b"no archive")
        with pytest.raises(DataError, match=r"Not read: x\.jsonl\.zst, cannot be read"):
            load_examples(tmp_path)

    def test_other_splits_are_told(self, tmp_path: Path) -> None:
        """Of several splits one is read where none was named."""
        from datasets import Dataset, DatasetDict

        splits = DatasetDict({name: Dataset.from_list([ROW]) for name in ("train", "test")})
        splits.save_to_disk(tmp_path / "both")
        for source in (splits, tmp_path / "both"):
            assert load_examples(source).notes == ("of the splits only train is read, not test",)
        assert load_examples(f"{tmp_path}/both:test").notes == ()


CELLS = st.text(st.sampled_from('ab,;\t"\n '), max_size=6)
TABLES = st.integers(2, 4).flatmap(
    lambda width: st.tuples(
        st.lists(CELLS.filter(bool), min_size=width, max_size=width, unique=True),
        st.lists(st.lists(CELLS, min_size=width, max_size=width).filter(any), min_size=1, max_size=5),
    )
)


def written(rows: Iterable[list[str]], delimiter: str, path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


class TestDelimiters:
    """What separates the fields of a csv file is told from its first rows."""

    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_each_delimiter_is_recognised_under_each_name(self, delimiter: str, suffix: str, tmp_path: Path) -> None:
        """Texts hold the other characters, quoted where they must be."""
        rows = [["id", "prompt", "completion"], ["1", "a, b; c", "d\te; f, g"], ["2", "x", "y"]]
        loaded = load_examples(written(rows, delimiter, tmp_path / f"x{suffix}"))
        assert [list(example.row.values()) for example in loaded.examples] == rows[1:]

    @example(table=([";", "\n;a"], [["", ";"]]), suffix=(".csv", ","))  # with ; it has two rows of two fields
    @given(table=TABLES, suffix=st.sampled_from([(".csv", ","), (".tsv", "\t")]))
    def test_a_well_formed_file_is_never_read_otherwise(
        self,
        table: tuple[list[str], list[list[str]]],
        suffix: tuple[str, str],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        """Whatever commas, semicolons, tabs, quotes and line breaks a well-formed file holds, its rows come back."""
        header, rows = table
        path = written([header, *rows], suffix[1], tmp_path_factory.mktemp("csv") / f"x{suffix[0]}")
        found = [row.value for row in read_rows(path, "pool").rows]
        assert found == [dict(zip(header, row, strict=True)) for row in rows]

    def test_a_bad_row_does_not_change_the_delimiter(self, tmp_path: Path) -> None:
        """Rows with too few fields, or broken quotes, are told as before."""
        path = tmp_path / "x.csv"
        path.write_text('id,prompt,completion\n1;2\n3,"a"b;c,d\n4,e;f,g\n')
        rows = list(read_rows(path, "pool").rows)
        assert [row.problem is None for row in rows] == [False, False, True]
        assert rows[2].value == {"id": "4", "prompt": "e;f", "completion": "g"}


class TestPython:
    """Values in memory."""

    MESSAGES = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0.5})

    def rows(self) -> list[dict[str, Any]]:
        chat = {"id": "m", "messages": list(self.MESSAGES), "system": None, "n": 1}
        return [chat, {"id": "s", "messages": list(self.MESSAGES), "system": "S", "n": 2}]

    def check(self, loaded: Loaded) -> None:
        assert ids(loaded) == ["m", "s"]
        assert [len(example.messages) for example in loaded.examples] == [2, 3]
        assert loaded.examples[1].flags[2] is not None
        assert loaded.examples[1].flags[2].weight == 0.5
        assert not loaded.skipped

    def test_a_pandas_frame(self, tmp_path: Path) -> None:
        """Its rows are plain values: arrays that parquet gives are lists, and what is missing is None."""
        import pandas

        frame = pandas.DataFrame(self.rows())
        frame["rating"] = [None, 4.5]
        self.check(load_examples(frame))
        assert load_examples(frame).examples[0].row["rating"] is None
        frame.to_parquet(tmp_path / "x.parquet")
        self.check(load_examples(pandas.read_parquet(tmp_path / "x.parquet")))
        json.dumps([example.row for example in load_examples(frame).examples], allow_nan=False)

    @pytest.mark.filterwarnings("ignore:DataFrame columns are not unique")
    def test_a_table_with_two_columns_of_one_name_is_refused(self, tmp_path: Path) -> None:
        """One would hide the other, as in csv, where the same is said."""
        import pandas
        import pyarrow
        import pyarrow.parquet

        frame = pandas.DataFrame([["Hi", "Hello", "other"]], columns=["prompt", "completion", "prompt"])
        table = pyarrow.table([["Hi"], ["Hello"], ["other"]], names=["prompt", "completion", "prompt"])
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        for source in (frame, table, table.to_reader(), tmp_path / "x.parquet"):
            with pytest.raises(DataError, match="has the column 'prompt' twice"):
                load_examples(source)

    def test_a_polars_frame(self) -> None:
        """Rows by name."""
        polars = pytest.importorskip("polars")
        self.check(load_examples(polars.DataFrame(self.rows())))

    @pytest.mark.parametrize("kind", ["table", "batch", "reader", "dataset"])
    def test_what_pyarrow_has(self, kind: str) -> None:
        """Tables, batches, readers of batches and data sets."""
        import pyarrow.dataset

        table = pa.Table.from_pylist(self.rows())
        source = {
            "table": lambda: table,
            "batch": lambda: table.to_batches()[0],
            "reader": lambda: table.to_reader(max_chunksize=1),
            "dataset": lambda: pyarrow.dataset.dataset(table),
        }[kind]()
        self.check(load_examples(source))

    def test_any_iterable(self) -> None:
        """A generator, a tuple and a view of a mapping are rows as a list is; a generator of paths are files."""
        self.check(load_examples(row for row in self.rows()))
        self.check(load_examples(tuple(self.rows())))
        self.check(load_examples(dict(enumerate(self.rows())).values()))

    def test_a_generator_of_paths(self, tmp_path: Path) -> None:
        """Each is a source of its own, with its own files that are not read."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.jsonl").write_bytes(LINE)
            (tmp_path / name / f"{name}.zip").write_bytes(b"")
        loaded = load_examples(tmp_path / name for name in ("a", "b"))
        assert ids(loaded) == ["a", "a-2"]
        assert [file.id for file in loaded.unread] == ["a.zip", "b.zip"]


def test_data_sets_of_the_library_say_which_extra_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without datasets, which is an extra, a hub's name and a saved data set name it; files need it not."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for source in ("someone/something", str(tmp_path / "saved")):
        with pytest.raises(ConfigError, match=r"pip install 'gradsift\[datasets\]'"):
            read_rows(source, "pool")
