from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gradsift.base.errors import ConfigError, CorruptError, MismatchError, StorageError
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns, _decode, _encode
from gradsift.store.precision import ExactRows
from gradsift.store.storage import LocalStorage

DIM = 7
PREFIX = "gradients/abc/"


def config(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    return {
        "view": "plain",
        "model": {"weights": "m"},
        "adapter": {"weights": "a"},
        "template": "t",
        "modules": "lora",
        "projection": {"kind": "sparse", "dim": DIM, "seed": 0},
        "dtype": dtype,
        "segments": [
            {"name": "first", "start": 0, "stop": 3, "shape": [3, 4]},
            {"name": "second", "start": 3, "stop": DIM, "shape": [2, 5]},
        ],
        **changes,
    }


def columns(ids: Sequence[str], rows: Tensor, excluded: dict[str, str] | None = None) -> ShardColumns:
    norms = rows.double().norm(dim=1).tolist()
    return ShardColumns(
        ids=list(ids),
        loss=[0.5 + position for position in range(len(ids))],
        supervised_tokens=list(range(1, len(ids) + 1)),
        norm=[2 * norm for norm in norms],
        projected_norm=norms,
        excluded=excluded or {},
    )


def shards(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[tuple[list[str], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made, count = [], 0
    for size in sizes:
        rows = torch.randn(size, DIM, generator=generator, dtype=torch.float64).to(dtype)
        made.append(([f"id-{count + position}" for position in range(size)], rows))
        count += size
    return made


def write(folder: Path, sizes: Sequence[int] = (3, 2, 4), dtype: str = "float32", **changes: Any) -> Tensor:
    """A complete store in `folder/PREFIX`; returns its rows."""
    writer = GradientStoreWriter(LocalStorage(folder), PREFIX, config(dtype, **changes))
    parts = shards(sizes, torch.float64 if dtype == "float64" else torch.float32)
    for shard, (ids, rows) in enumerate(parts):
        writer.write_shard(shard, rows, columns(ids, rows))
    writer.finish(len(parts))
    return torch.cat([rows for _, rows in parts])


def open_store(folder: Path, **options: Any) -> GradientStore:
    return GradientStore.open(folder / PREFIX, **options)


@pytest.mark.parametrize(
    ("dtype", "relative"), [("float64", 0.0), ("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_rows_come_back_in_every_dtype(tmp_path: Path, dtype: str, relative: float) -> None:
    """Rows, ids, norms, losses and segments read back as written, to the rounding of the stored dtype."""
    rows = write(tmp_path, dtype=dtype)
    store = open_store(tmp_path)
    assert store.ids == [f"id-{position}" for position in range(9)]
    assert (len(store), store.dim) == (9, DIM)
    found = store.rows(0, 9)
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert ((found.double() - rows.double()).abs() <= relative * rows.double().abs() + 1e-7 * (relative > 0)).all()
    torch.testing.assert_close(store.projected_norms, rows.double().norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(store.norms, 2 * store.projected_norms, rtol=0, atol=0)
    assert store.losses.tolist() == [0.5, 1.5, 2.5, 0.5, 1.5, 0.5, 1.5, 2.5, 3.5]
    assert store.supervised_tokens.tolist() == [1, 2, 3, 1, 2, 1, 2, 3, 4]
    assert store.segments == {"first": (0, 3), "second": (3, 7)}
    assert "id-3" in store
    assert "id-9" not in store
    assert repr(store) == f"GradientStore(9 rows × 7, {dtype}, plain)"


@given(st.integers(-140, 110), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_fp16_rows_of_any_size_keep_their_digits(exponent: int, seed: int) -> None:
    """A row's scale keeps tiny and huge rows within 2⁻¹¹ of their largest entry, without infinity or zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(3, DIM, generator=generator, dtype=torch.float64) * 2.0**exponent).float()
    stored = _encode(rows, "float16")
    found = _decode(stored["rows"], stored["scale"])
    top = rows.abs().amax(1, keepdim=True).double()
    # Below 2⁻¹²⁶ the scale stops shrinking, so that it stays a normal float32 number.
    error = torch.maximum(top * 2**-11, torch.tensor(2.0**-149, dtype=torch.float64))
    assert ((found - rows).double().abs() <= error).all()
    assert torch.isfinite(found).all()


def test_fp16_keeps_zero_rows_and_extremes() -> None:
    """Zero rows stay zero; float32 numbers next to the largest and the smallest come back, subnormal ones as finite."""
    limits = torch.finfo(torch.float32)
    rows = torch.zeros(4, DIM)
    rows[1, 0], rows[2, 0], rows[3, 0] = limits.max / 2, limits.tiny, 1e-44
    stored = _encode(rows, "float16")
    assert torch.log2(stored["scale"]).frac().eq(0).all()
    found = _decode(stored["rows"], stored["scale"])
    assert not found[0].any()
    torch.testing.assert_close(found[1:3], rows[1:3], rtol=2**-11, atol=0)
    assert torch.isfinite(found).all()


def test_fp16_takes_float64_rows_too() -> None:
    """Rows of a float64 model, smaller than any float32 number, become zero, not infinity."""
    stored = _encode(torch.full((1, DIM), 1e-60, dtype=torch.float64), "float16")
    assert not _decode(stored["rows"], stored["scale"]).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_total_is_that_of_the_stored_rows(tmp_path: Path, dtype: str) -> None:
    """The shards' sums add up to all rows as they are read back; where a shard holds none, there is no total."""
    write(tmp_path, (4, 0, 5), dtype)
    store = open_store(tmp_path)
    torch.testing.assert_close(store.total(), store.rows(0, 9).double().sum(dim=0), rtol=1e-12, atol=1e-12)
    store._tensors(2).pop("total")
    assert store.total() is None


def test_any_range_of_rows_reads_across_shards(tmp_path: Path) -> None:
    """Every `[start, stop)` gives those rows, empty shards included; other ranges are refused."""
    rows = write(tmp_path, (0, 3, 0, 0, 2, 1, 0))
    store = open_store(tmp_path)
    for start in range(7):
        for stop in range(start, 7):
            assert torch.equal(store.rows(start, stop), rows[start:stop])
    for start, stop in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(ConfigError, match="store of 6 rows"):
            store.rows(start, stop)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted on Linux alone")
def test_a_store_of_many_shards_holds_few_files_open(tmp_path: Path) -> None:
    """However many shards were read: a million short rows are in thousands of them."""
    rows = write(tmp_path, [2] * 60)
    store = GradientStore(LocalStorage(tmp_path), PREFIX)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert torch.equal(store.rows(0, 120), rows)
    assert torch.equal(store.rows_by_id([f"id-{n}" for n in range(0, 120, 7)]), rows[::7])
    assert store.total() is not None
    assert len(os.listdir("/proc/self/fd")) < before + 40  # noqa: PTH208


@pytest.mark.parametrize("block", [1, 2, 100])
def test_stored_blocks_cover_the_rows_in_order(tmp_path: Path, block: int) -> None:
    """Blocks are at most as long as asked for, in order, and stored·scale is the row."""
    write(tmp_path, dtype="float16")
    store = open_store(tmp_path)
    blocks = list(store.stored_blocks(1, 8, block))
    assert all(0 < len(stored) <= block for stored, _ in blocks)
    assert torch.equal(torch.cat([_decode(*pair) for pair in blocks]), store.rows(1, 8))


def test_reading_changes_no_file(tmp_path: Path) -> None:
    """What a caller does with rows, even in place, never reaches the disk."""
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    store = open_store(tmp_path)
    store.rows(0, 9).zero_()
    next(iter(store.stored_blocks(0, 3, 3)))[0].zero_()
    del store
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_rows_by_id_come_in_the_order_asked_for(tmp_path: Path) -> None:
    """Ids pick their rows in any order, twice if asked twice; none gives no row."""
    rows = write(tmp_path)
    store = open_store(tmp_path)
    asked = ["id-8", "id-0", "id-4", "id-0"]
    assert torch.equal(store.rows_by_id(asked), rows[[8, 0, 4, 0]])
    assert store.positions(asked) == [8, 0, 4, 0]
    assert store.rows_by_id([]).shape == (0, DIM)


def test_missing_ids_are_named_with_the_reason(tmp_path: Path) -> None:
    """An id left out says why; an unknown one that the store is of other data."""
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    ids, rows = shards([2])[0]
    writer.write_shard(0, rows, columns(ids, rows, {"broken": "the loss is nan"}))
    writer.finish(1)
    store = open_store(tmp_path)
    assert store.excluded == {"broken": "the loss is nan"}
    with pytest.raises(MismatchError, match=r"1 of 2 ids .*'broken' \(left out: the loss is nan\)"):
        store.rows_by_id(["id-0", "broken"])
    with pytest.raises(MismatchError, match=r"2 of 2 ids .*'x': the store was collected from other data"):
        store.rows_by_id(["x", "y"])


def test_a_shard_without_rows_is_a_shard(tmp_path: Path) -> None:
    """A shard whose rows were all left out is stored, and is complete."""
    for dtype in ("float16", "float32", "bfloat16"):
        writer = GradientStoreWriter(LocalStorage(tmp_path / dtype), PREFIX, config(dtype))
        empty = torch.zeros(0, DIM)
        writer.write_shard(0, empty, columns([], empty, {"a": "the loss is nan"}))
        assert writer.shard_state(0, ["a"]) == "complete"
        writer.finish(1)
        store = open_store(tmp_path / dtype)
        assert len(store) == 0
        assert store.rows(0, 0).shape == (0, DIM)


def test_full_sums_add_up_over_shards(tmp_path: Path) -> None:
    """The sums of all shards are added in float64; a store without them says how to get them."""
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config(full_sum=True))
    for shard, (ids, rows) in enumerate(shards([2, 3])):
        sums = {"first": torch.full((3, 4), shard + 1.0), "second": torch.full((2, 5), -1.0)}
        writer.write_shard(shard, rows, columns(ids, rows), sums)
    writer.finish(2)
    total = open_store(tmp_path).full_sum()
    assert torch.equal(total["first"], torch.full((3, 4), 3.0, dtype=torch.float64))
    assert torch.equal(total["second"], torch.full((2, 5), -2.0, dtype=torch.float64))
    write(tmp_path / "without")
    with pytest.raises(ConfigError, match="full_sum=True"):
        open_store(tmp_path / "without").full_sum()


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "emptied": lambda _data: b"",
    "flipped-bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "sum-00001.safetensors", "rows.parquet"])
def test_damage_is_found_on_opening(tmp_path: Path, name: str, damage: str) -> None:
    """A truncated or altered file, or one that is gone, raises with its name and the way to mend it."""
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config(full_sum=True))
    for shard, (ids, rows) in enumerate(shards([2, 3, 1])):
        writer.write_shard(shard, rows, columns(ids, rows), {"first": torch.ones(3, 4), "second": torch.ones(2, 5)})
    writer.finish(3)
    path = tmp_path / PREFIX / name
    data = path.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    with pytest.raises(CorruptError, match=rf"{name}.*run `gradsift collect` again"):
        open_store(tmp_path)
    states = [writer.shard_state(shard, ids) for shard, (ids, _) in enumerate(shards([2, 3, 1]))]
    assert states == ["complete", "complete" if name == "rows.parquet" else "damaged", "complete"]
    path.unlink()
    with pytest.raises(CorruptError, match=name):
        open_store(tmp_path)
    path.write_bytes(data)
    assert len(open_store(tmp_path)) == 6


def test_the_measured_error_is_kept_and_guarded(tmp_path: Path) -> None:
    """What was measured in each shard comes back as one error; a store that holds none says so; and a digit that was
    altered, in a shard's cosines or in the manifest, is found."""
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    parts = shards([3, 2, 4])
    for shard, (ids, rows) in enumerate(parts):
        sample = list(range(len(ids)))
        writer.write_shard(shard, rows, columns(ids, rows), exact=ExactRows(sample, rows.double() @ rows.double().T))
    writer.finish(3)
    error = open_store(tmp_path).measured_error
    assert error is not None
    assert (error.rows, error.pairs) == (9, 3 + 1 + 6)
    assert error.rms < 1e-7  # the rows are what they are measured by
    for name, key in (("manifest.json", '"pairs": 10'), ("shard-00002.json", '"rows": [')):
        path = tmp_path / PREFIX / name
        before = path.read_text()
        assert key in before
        path.write_text(before.replace(key, key.replace("10", "11").replace("[", "[9, ")))
        if name == "manifest.json":
            with pytest.raises(CorruptError, match="does not match its digest"):
                open_store(tmp_path)
        else:
            assert writer.shard_state(2, parts[2][0]) == "damaged"
        path.write_text(before)
    write(tmp_path / "another")
    assert GradientStore.open(tmp_path / "another" / PREFIX).measured_error is None


@pytest.mark.parametrize("name", ["manifest.json", "store.json", "shard-00001.json"])
@pytest.mark.parametrize("content", [b"", b'{"kind": "gradi', b"[]", b"\xff\xfe"])
def test_damaged_json_is_reported_not_a_traceback(tmp_path: Path, name: str, content: bytes) -> None:
    """Damaged JSON is a CorruptError with the file's name, or a damaged shard; a configuration is written again."""
    write(tmp_path)
    path = tmp_path / PREFIX / name
    before = path.read_bytes()
    path.write_bytes(content)
    if name == "manifest.json":
        with pytest.raises(CorruptError, match=name):
            open_store(tmp_path)
        return
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    states = [writer.shard_state(shard, ids) for shard, (ids, _) in enumerate(shards([3, 2, 4]))]
    assert states == ["complete", "complete" if name == "store.json" else "damaged", "complete"]
    assert (path.read_bytes() == before) == (name == "store.json")


def test_shards_of_other_examples_are_damaged(tmp_path: Path) -> None:
    """Where the record of how rows were cut is lost and they are cut otherwise, shards that hold others are found."""
    (ids, _), (more, _) = parts = shards([2, 3])
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    assert writer.layout({"shard_rows": 2, "token_budget": 100})["shard_rows"] == 2
    writer.remember_token_budget(50)
    for shard, (part, of_part) in enumerate(parts):
        writer.write_shard(shard, of_part, columns(part, of_part))
    path = tmp_path / PREFIX / "layout.json"
    path.write_bytes(path.read_bytes()[:-9])
    again = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    assert again.layout({"shard_rows": 3, "token_budget": 70}) == {"shard_rows": 3, "token_budget": 70}
    assert again.shard_state(0, [*ids, more[0]]) == "damaged"
    assert again.shard_state(0, ids[::-1]) == "damaged"
    assert again.shard_state(0, ids) == "complete"


def test_a_resumed_writer_keeps_good_shards(tmp_path: Path) -> None:
    """A new writer of the same configuration finds the shards that are there and needs only the rest."""
    parts = shards([3, 2, 4])
    first = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    first.write_shard(1, parts[1][1], columns(*parts[1]))
    kept = (tmp_path / PREFIX / "shard-00001.safetensors").stat().st_mtime_ns
    with pytest.raises(StorageError, match=r"unfinished gradient store.*goes on where it stopped"):
        open_store(tmp_path)
    second = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    states = [second.shard_state(shard, ids) for shard, (ids, _) in enumerate(parts)]
    assert states == [
        "missing",
        "complete",
        "missing",
    ]
    for shard in (2, 0):
        second.write_shard(shard, parts[shard][1], columns(*parts[shard]))
    second.finish(3)
    assert (tmp_path / PREFIX / "shard-00001.safetensors").stat().st_mtime_ns == kept
    assert torch.equal(open_store(tmp_path).rows(0, 9), torch.cat([rows for _, rows in parts]))


def test_a_layout_is_fixed_by_who_began(tmp_path: Path) -> None:
    """The first recorded cut into shards stays, whatever is wanted later."""
    writer = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    assert writer.layout({"shard_rows": 8, "token_budget": 100}) == {"shard_rows": 8, "token_budget": 100}
    again = GradientStoreWriter(LocalStorage(tmp_path), PREFIX, config())
    assert again.layout({"shard_rows": 5, "token_budget": 50}) == {"shard_rows": 8, "token_budget": 100}


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    """A folder of other gradients refuses the writer and says which settings differ."""
    write(tmp_path)
    other = config(template="u", projection={"kind": "sparse", "dim": DIM, "seed": 1})
    with pytest.raises(MismatchError, match=r'projection\.seed is 0, wanted 1; template is "t", wanted "u"'):
        GradientStoreWriter(LocalStorage(tmp_path), PREFIX, other)


def test_stores_of_different_spaces_do_not_compare(tmp_path: Path) -> None:
    """Another seed, adapter or model is refused by name; data, view and dtype may differ."""
    write(tmp_path / "pool")
    write(tmp_path / "seed", projection={"kind": "sparse", "dim": DIM, "seed": 1})
    write(tmp_path / "adapter", adapter={"weights": "b"})
    write(tmp_path / "target", dtype="float16", view="adam", data="other")
    pool = open_store(tmp_path / "pool")
    pool.check_comparable(open_store(tmp_path / "target"))
    with pytest.raises(MismatchError, match=r"projection\.seed is 1, wanted 0.*Collect one of them again"):
        pool.check_comparable(open_store(tmp_path / "seed"))
    with pytest.raises(MismatchError, match=r'adapter\.weights is "b", wanted "a"'):
        pool.check_comparable(open_store(tmp_path / "adapter"))


def test_a_folder_that_is_no_store_says_so(tmp_path: Path) -> None:
    """Opening anything else says what to run."""
    with pytest.raises(StorageError, match="not a gradient store: run `gradsift collect` first"):
        GradientStore.open(tmp_path)


KILLED_WRITER = """
import os, signal, sys, torch
sys.path[:0] = [sys.argv[2]]
import test_gradient_store as t
from gradsift.store.gradient_store import GradientStoreWriter
from gradsift.store.storage import LocalStorage
writer = GradientStoreWriter(LocalStorage(sys.argv[1]), t.PREFIX, t.config())
(ids, rows), (more_ids, more) = t.shards([3, 2])
writer.write_shard(0, rows, t.columns(ids, rows))
flush = os.fsync
def killed(handle):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
writer.write_shard(1, more, t.columns(more_ids, more))
"""


def test_a_killed_writer_leaves_no_part(tmp_path: Path) -> None:
    """A process killed in the middle of a shard leaves whole shards only, and its temporary file is never listed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path), str(Path(__file__).parent)],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / PREFIX
    assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]
    storage = LocalStorage(tmp_path)
    assert storage.list(PREFIX) == [
        f"{PREFIX}{name}" for name in ("shard-00000.json", "shard-00000.safetensors", "store.json")
    ]
    writer = GradientStoreWriter(storage, PREFIX, config())
    states = [writer.shard_state(shard, ids) for shard, (ids, _) in enumerate(shards([3, 2]))]
    assert states == ["complete", "missing"]
    assert torch.equal(load_file(folder / "shard-00000.safetensors")["rows"], shards([3])[0][1])
