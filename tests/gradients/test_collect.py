from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_llama, with_lora
from torch import Tensor

import oracles
from gradsift.base.errors import ConfigError, DataError, MismatchError, ModelError, StorageError
from gradsift.data.dataset import Dataset
from gradsift.gradients import collect as collect_module
from gradsift.gradients.capture import find_modules
from gradsift.gradients.collect import Adam, AtCheckpoint, Gradients, ShardSpec, _Cut, collect, collect_shard
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.model.models import host
from gradsift.store.gradient_store import GradientStore
from gradsift.store.precision import MeasuredError
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint
from reporters import Listening

COUNT = 10
RARE = VOCABULARY - 1
SETTINGS = Gradients(projection=Projection(dim=60), dtype="float32", shard_rows=4, token_budget=40)


def save_adapter(model: Any, folder: Path) -> str:
    """The adapter and random Adam moments of every parameter of it."""
    model.save_pretrained(folder, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(11)
    tensors = {"step": torch.tensor(7)}
    for captured in find_modules(model).captured:
        tensors[f"{captured.name}.exp_avg"] = torch.randn(captured.shape, generator=generator) * 0.1
        tensors[f"{captured.name}.exp_avg_sq"] = torch.rand(captured.shape, generator=generator) * 0.01
    save_file(tensors, folder / "adam.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model's folder and two adapters'."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama().save_pretrained(folder / "model")
    made = {"model": str(folder / "model")}
    for name, seed in (("adapter", 1), ("other", 2)):
        made[name] = save_adapter(with_lora(tiny_llama(), seed=seed), folder / name)
    return made


def make_dataset(run: Run, *, count: int = COUNT, seed: int = 0) -> Dataset:
    """A tokenised data set as `prepare` writes it, of random tokens; only row 3 holds the rare one."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 15, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.concatenate([np.zeros(0, dtype=bool), *(np.arange(length) >= length // 2 for length in lengths)])
    supervised[offsets[:-1]] = False
    tokens = generator.integers(3, RARE, int(offsets[-1])).astype(np.int32)
    tokens[offsets[3:4]] = RARE
    prefix = f"data/{seed}/"
    run.storage.publish(
        f"{prefix}tokens.safetensors", save({"token_ids": tokens, "supervised": supervised, "offsets": offsets})
    )
    index = {"ids": [f"row-{row}" for row in range(count)], "hashes": [str(row) for row in range(count)]}
    run.storage.publish(f"{prefix}index.json", json.dumps(index).encode())
    run.complete(
        prefix,
        "data",
        {"template": "t", "seed": seed, "count": count},
        description="random tokens",
        skipped=[],
        announcement=None,
    )
    return Dataset(run, prefix)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def data(run: Run) -> Dataset:
    return make_dataset(run)


def collect_both(run: Run, data: Dataset, files: dict[str, str], **options: Any) -> dict[Any, GradientStore]:
    """Both views at the first adapter, unless told otherwise."""
    checkpoint = options.pop("checkpoint", open_checkpoint(files["adapter"]))
    defaults = {"views": ("plain", "adam"), "settings": SETTINGS, "device": "cpu"}
    return collect(run, data, checkpoint, model=files["model"], **(defaults | options))


def shard_bytes(store: GradientStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.path.glob("shard-*"))}


def test_stores_hold_the_oracles_rows(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Collected rows, norms, losses and token counts are the oracle's, by id; Adam's moments are matched by name."""
    stores = collect_both(run, data, files)
    model = host(files["model"], "auto", "cpu").with_adapter(files["adapter"])
    modules = find_modules(model).captured
    plain, losses = oracles.per_example_gradients(model, modules, data.sequences(0, COUNT), COUNT)
    moments = load_file(Path(files["adapter"]) / "adam.safetensors")
    adam = oracles.adam_directions(
        plain, {c.name: (moments[f"{c.name}.exp_avg"], moments[f"{c.name}.exp_avg_sq"]) for c in modules}
    )
    projector = Projector(
        plan_segments({c.name: c.shape for c in modules}, SETTINGS.projection), SETTINGS.projection, dtype=torch.float64
    )
    for view, gradients in (("plain", plain), ("adam", adam)):
        store = stores[view]
        assert store.ids == data.ids
        assert oracles.relative_error(store.rows(0, COUNT), oracles.projected_rows(gradients, projector)) < 1e-4
        torch.testing.assert_close(store.norms, oracles.row_norms(gradients), rtol=1e-4, atol=0)
        torch.testing.assert_close(store.losses, losses, rtol=1e-4, atol=0)
        torch.testing.assert_close(store.projected_norms, store.rows(0, COUNT).double().norm(dim=1), rtol=1e-6, atol=0)
        assert store.supervised_tokens.tolist() == data.supervised_tokens.tolist()
        assert list(store.segments) == [c.name for c in modules]
    stores["plain"].check_comparable(stores["adam"])


@pytest.mark.parametrize(
    "projection", [Projection(dim=60), Projection(kind="kronecker", dim=60), Projection(kind="none")]
)
def test_the_measured_error_is_that_of_the_stored_rows(
    run: Run, data: Dataset, files: dict[str, str], projection: Projection
) -> None:
    """Root mean square over the pairs within shards of what cosines of stored rows, as they are read, differ by from
    the oracle's; for Adam rows also with plain rows, as they are read from a store of the same projection."""
    views: tuple[Any, ...] = ("plain",) if projection.kind == "kronecker" else ("plain", "adam")
    settings = SETTINGS.model_copy(update={"projection": projection, "dtype": "float16"})
    stores = collect_both(run, data, files, settings=settings, views=views)
    model = host(files["model"], "auto", "cpu").with_adapter(files["adapter"])
    modules = find_modules(model).captured
    plain, _ = oracles.per_example_gradients(model, modules, data.sequences(0, COUNT), COUNT)
    moments = load_file(Path(files["adapter"]) / "adam.safetensors")
    adam = oracles.adam_directions(
        plain, {c.name: (moments[f"{c.name}.exp_avg"], moments[f"{c.name}.exp_avg_sq"]) for c in modules}
    )
    exact = {
        view: torch.cat([g.flatten(1) for g in rows.values()], 1) for view, rows in (("plain", plain), ("adam", adam))
    }
    within = [(i, j) for i in range(COUNT) for j in range(COUNT) if i != j and i // 4 == j // 4]  # shards of four

    def rms(left: str, right: str, pairs: list[tuple[int, int]]) -> float:
        stored = [stores[view].rows(0, COUNT).double() for view in (left, right)]  # type: ignore[index]
        differences = [
            torch.cosine_similarity(stored[0][i], stored[1][j], dim=0)
            - torch.cosine_similarity(exact[left][i], exact[right][j], dim=0)
            for i, j in pairs
        ]
        return float(torch.stack(differences).square().mean().sqrt())

    upper = [(i, j) for i, j in within if i < j]
    for view in views:
        error = stores[view].measured_error
        assert error is not None
        assert error.rms == pytest.approx(rms(view, view, upper), rel=0.01)
        assert (error.pairs, error.rows) == (len(upper), COUNT)
    if "adam" in views:
        error = stores["adam"].measured_error
        assert error is not None
        assert error.to_plain is not None
        assert error.to_plain.rms == pytest.approx(rms("adam", "plain", within), rel=0.01)
    else:
        assert stores["plain"].measured_error is not None
        assert stores["plain"].measured_error.to_plain is None


def test_the_adam_view_alone_measures_the_same(tmp_path: Path, files: dict[str, str]) -> None:
    """Its error with plain rows does not take a store of them, and the run tells it without opening a store."""
    runs = [Run(tmp_path / name) for name in ("both", "alone")]
    both = collect_both(runs[0], make_dataset(runs[0]), files)["adam"].measured_error
    alone = collect_both(runs[1], make_dataset(runs[1]), files, views=("adam",))["adam"].measured_error
    assert both is not None
    assert alone is not None
    assert alone.rms == pytest.approx(both.rms, rel=1e-4)
    assert alone.to_plain is not None
    assert both.to_plain is not None
    assert alone.to_plain.rms == pytest.approx(both.to_plain.rms, rel=1e-4)
    at = AtCheckpoint(open_checkpoint(files["adapter"]), files["model"], SETTINGS)
    known = [at.kept(runs[1], make_dataset(runs[1]), view) for view in ("adam", "plain")]
    assert known[0] is not None
    assert MeasuredError.of_dict(known[0]["measured_error"]) == alone
    assert known[1] is None


def test_rows_are_measured_by_their_ids(tmp_path: Path, files: dict[str, str]) -> None:
    """Whatever their order; the rows left out are others' business, and too few rows are not measured."""
    ids = [f"row-{number}" for number in range(100)]
    sample = [ids[row] for row in collect_module._sample(ids, 16, {})]
    assert len(sample) == 16
    turned = ids[::-1]
    assert {turned[row] for row in collect_module._sample(turned, 16, {})} == set(sample)
    without = [ids[row] for row in collect_module._sample(ids, 16, {ids.index(sample[0])})]
    assert set(sample[1:]) < set(without)
    run = Run(tmp_path / "few")
    few = collect_both(run, make_dataset(run, count=5).subset([0, 1]), files, views=("plain",))["plain"]
    assert few.measured_error is None


def test_rows_are_measured_as_far_as_memory_holds_them(
    run: Run, data: Dataset, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where unprojected gradients would take more than their share of the free memory, fewer are held; where not two
    fit, nothing is measured, and everything else is as it was."""
    calm = collect_both(Run(run.folder.parent / "calm"), make_dataset(Run(run.folder.parent / "calm")), files)
    entries = sum(math.prod(segment["shape"]) for segment in calm["plain"].config["segments"])
    available = collect_module.psutil.virtual_memory().available

    def with_room_for(rows: float) -> None:
        share = rows * entries * 4 * 2 / available  # both views are held
        monkeypatch.setattr(collect_module, "_MEASURED_SHARE", share)

    monkeypatch.setattr(collect_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    with_room_for(3.5)
    three = collect_both(run, data, files)
    assert three["adam"].measured_error is not None
    assert three["adam"].measured_error.rows == 3 + 3 + 2
    shutil.rmtree(run.folder / "gradients")
    with_room_for(1.5)
    none = collect_both(run, data, files)
    assert none["adam"].measured_error is none["plain"].measured_error is None
    for view, store in none.items():
        assert torch.equal(store.rows(0, COUNT), calm[view].rows(0, COUNT))


def test_segments_are_plain_rows_with_modules_apart(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Each module has columns of its own, the shares of `proportional`; where the settings keep modules apart anyway,
    the plain store serves and nothing is kept twice."""
    stores = collect_both(run, data, files, views=("plain", "segments"))
    apart = SETTINGS.model_copy(update={"projection": Projection(dim=60, sizes="proportional")})
    wanted = collect_both(run, data, files, views=("segments", "plain"), settings=apart)
    assert wanted["segments"] is wanted["plain"]
    assert len(run.artifacts("gradients")) == 3
    assert torch.equal(stores["segments"].rows(0, COUNT), wanted["plain"].rows(0, COUNT))
    assert stores["segments"].blocks() == wanted["plain"].blocks() == list(wanted["plain"].segments.values())
    assert set(stores["plain"].segments.values()) == {(0, 60)}
    with pytest.raises(MismatchError, match=r"all modules in the same columns.*view `segments`"):
        stores["plain"].blocks()
    with pytest.raises(MismatchError, match=r"projection.sizes is \"proportional\", wanted \"whole\""):
        stores["plain"].check_comparable(stores["segments"])


def test_a_complete_store_opens_without_the_model(
    run: Run, data: Dataset, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again for what is there loads nothing and computes nothing."""
    first = collect_both(run, data, files)

    def tripwire(*_args: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(collect_module, "_engine", tripwire)
    notes = Listening()
    again = collect_both(run, data, files, reporter=notes)
    assert torch.equal(again["adam"].rows(0, COUNT), first["adam"].rows(0, COUNT))
    assert notes.done == 0


def test_only_a_deleted_shard_is_collected_again(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """A missing shard is made anew, bit-equal, and no other file of rows is touched."""
    stores = collect_both(run, data, files)
    before = shard_bytes(stores["plain"])
    victim = stores["plain"].path / "shard-00001.safetensors"
    others = {p: p.stat().st_mtime_ns for p in run.folder.rglob("shard-*") if p != victim and p.suffix != ".json"}
    victim.unlink()
    notes = Listening()
    again = collect_both(run, data, files, reporter=notes)
    assert notes.done == 4
    assert notes.said == ["6 of 10 pool rows are there already"]
    assert shard_bytes(again["plain"]) == before
    assert others == {path: path.stat().st_mtime_ns for path in others}


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:-5] + b"\0\1\2\3\4"])
def test_a_damaged_shard_is_told_and_collected_again(
    run: Run, data: Dataset, files: dict[str, str], damage: Callable[[bytes], bytes]
) -> None:
    """A truncated or altered shard raises a warning and is made anew."""
    stores = collect_both(run, data, files)
    before = shard_bytes(stores["adam"])
    path = stores["adam"].path / "shard-00002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    notes = Listening()
    again = collect_both(run, data, files, reporter=notes)
    assert notes.warned == ["shard 2 of the pool's adam gradients is truncated or altered: collecting it again"]
    assert notes.done == 2
    assert shard_bytes(again["adam"]) == before


@pytest.mark.parametrize("name", ["manifest.json", "rows.parquet"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_index_is_mended_from_the_shards(
    run: Run, data: Dataset, files: dict[str, str], name: str, damage: Callable[[Path], None]
) -> None:
    """Manifest and rows.parquet are made again without computing a row."""
    stores = collect_both(run, data, files)
    damage(stores["plain"].path / name)
    notes = Listening()
    again = collect_both(run, data, files, reporter=notes)
    assert notes.done == 0
    assert again["plain"].ids == data.ids
    assert torch.equal(again["plain"].rows(0, COUNT), stores["plain"].rows(0, COUNT))


@pytest.mark.parametrize("killed_after", [0, 5, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, files: dict[str, str], killed_after: int) -> None:
    """Interrupted in any shard and run again, a collection has the bytes of one that was never disturbed."""
    calm_run, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    calm = collect_both(calm_run, make_dataset(calm_run), files)
    data = make_dataset(run)
    stopped = Listening(stop_after=killed_after)
    with pytest.raises(KeyboardInterrupt):
        collect_both(run, data, files, reporter=stopped)
    # Sizes asked for later do not change how a store was begun.
    notes = Listening()
    again = collect_both(
        run, data, files, reporter=notes, settings=SETTINGS.model_copy(update={"shard_rows": 3, "token_budget": 7})
    )
    assert notes.done == COUNT - stopped.done
    for view in calm:
        assert shard_bytes(again[view]) == shard_bytes(calm[view])
        assert again[view].ids == calm[view].ids
        assert again[view].measured_error == calm[view].measured_error is not None


def test_views_begun_with_other_shards_are_finished_apart(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Two views cut into shards differently keep their own cuts: every row once, in order, in both."""
    for view, rows in (("plain", 4), ("adam", 3)):
        with pytest.raises(KeyboardInterrupt):
            collect_both(
                run,
                data,
                files,
                views=(view,),
                settings=SETTINGS.model_copy(update={"shard_rows": rows}),
                reporter=Listening(stop_after=5),
            )
    stores = collect_both(run, data, files)
    assert stores["plain"].ids == stores["adam"].ids == data.ids
    assert len(shard_bytes(stores["plain"])) == 2 * 3
    assert len(shard_bytes(stores["adam"])) == 2 * 4


def test_shards_are_work_for_any_process(tmp_path: Path, files: dict[str, str]) -> None:
    """A shard's specification survives pickling and gives the bytes that `collect` writes."""
    calm_run, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    calm = collect_both(calm_run, make_dataset(calm_run), files)
    data = make_dataset(run)
    spec = ShardSpec(
        run,
        data,
        AtCheckpoint(open_checkpoint(files["adapter"]), files["model"], SETTINGS, device="cpu"),
        {"plain": "gradients/p/", "adam": "gradients/a/"},
        shard=1,
        start=4,
        stop=8,
        cut=_Cut(4, token_budget=40, measured=16),
    )
    shipped = pickle.loads(pickle.dumps(spec))  # noqa: S301 - the test's own bytes
    collect_shard(shipped)
    for view, prefix in spec.stores.items():
        for name in ("shard-00001.safetensors", "shard-00001.json"):
            assert run.storage.read(f"{prefix}{name}") == shard_bytes(calm[view])[name]


def poisoned(files: dict[str, str], folder: Path, tokens: list[int]) -> dict[str, str]:
    """The same model with NaN in the embeddings of some tokens."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens] = float("nan")
    model.save_pretrained(folder)
    return {**files, "model": str(folder)}


def test_rows_that_are_not_finite_are_left_out_and_told(
    run: Run, data: Dataset, files: dict[str, str], tmp_path: Path
) -> None:
    """A row of NaN loss is excluded with its reason, the others stay, and its absence is explained by id."""
    notes = Listening()
    stores = collect_both(run, data, poisoned(files, tmp_path / "bad", [RARE]), reporter=notes)
    for store in stores.values():
        assert store.excluded == {"row-3": "the loss is nan"}
        assert store.ids == [id_ for id_ in data.ids if id_ != "row-3"]
        assert torch.isfinite(store.rows(0, COUNT - 1)).all()
    whole = SETTINGS.model_copy(update={"projection": Projection(kind="none"), "shard_rows": 6})
    for store in collect_both(run, data, poisoned(files, tmp_path / "bad", [RARE]), settings=whole).values():
        assert store.measured_error is not None  # of the others, each compared with itself
        assert store.measured_error.rms < 1e-6
        assert store.measured_error.rows == COUNT - 1
    assert notes.warned == ["1 of 10 pool rows were left out: row-3 (the loss is nan)"]
    with pytest.raises(MismatchError, match="left out: the loss is nan"):
        stores["plain"].rows_by_id(["row-3"])


def test_a_model_without_a_finite_row_is_refused(
    run: Run, data: Dataset, files: dict[str, str], tmp_path: Path
) -> None:
    """When no row is finite the error says so, the first time and the second."""
    broken = poisoned(files, tmp_path / "bad", list(range(VOCABULARY)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"all 10 pool rows have a non-finite plain gradient.*row-0"):
            collect_both(run, data, broken)


def test_an_empty_source_is_refused(run: Run, files: dict[str, str]) -> None:
    """No rows, no store."""
    with pytest.raises(DataError, match="the target has no rows"):
        collect_both(run, make_dataset(run, count=0, seed=3), files, what="target")


def test_an_untrained_adapter_is_refused(run: Run, data: Dataset, files: dict[str, str], tmp_path: Path) -> None:
    """With every B at zero the gradients of A vanish: refused, with what to do."""
    fresh = with_lora(tiny_llama())
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    checkpoint = open_checkpoint(save_adapter(fresh, tmp_path / "fresh"))
    with pytest.raises(ModelError, match=r"untrained.*Warm it up first"):
        collect_both(run, data, files, checkpoint=checkpoint)


def test_the_adam_view_needs_optimizer_state(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Without moments the Adam view is refused with what to do, and the plain view works."""
    bare = Checkpoint(files["adapter"])
    with pytest.raises(ConfigError, match=r"without optimizer state.*--optimizer sgd"):
        collect_both(run, data, files, checkpoint=bare)
    assert len(collect_both(run, data, files, checkpoint=bare, views=("plain",))["plain"]) == COUNT


def test_the_adam_view_is_of_trained_parameters_only(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Plain linears have no moments: the Adam view of them is refused by name, their plain gradients are collected."""
    settings = SETTINGS.model_copy(update={"modules": "q_proj"})
    with pytest.raises(ConfigError, match=r"no moments of .*q_proj.*--optimizer sgd"):
        collect_both(run, data, files, settings=settings)
    base = collect_both(run, data, files, settings=settings, views=("plain",), checkpoint=Checkpoint(None))
    assert list(base["plain"].segments) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"projection": Projection(dim=60, seed=1)},
        {"projection": Projection(dim=61)},
        {"modules": "v_proj"},
        {"dtype": "float16"},
        {"full_sum": True},
    ],
    ids=str,
)
def test_other_settings_are_other_stores(
    run: Run, data: Dataset, files: dict[str, str], change: dict[str, Any]
) -> None:
    """Settings that change rows give a store of their own; the first is left as it was."""
    first = collect_both(run, data, files, views=("plain",))["plain"]
    before = shard_bytes(first)
    other = collect_both(run, data, files, views=("plain",), settings=SETTINGS.model_copy(update=change))["plain"]
    assert other.path != first.path
    assert shard_bytes(first) == before
    comparable = change.keys() <= {"dtype", "full_sum"}
    if comparable:
        first.check_comparable(other)
    else:
        with pytest.raises(MismatchError, match=next(iter(change))):
            first.check_comparable(other)


def test_other_adam_options_are_other_stores(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Adam's options change the Adam view's rows and store, not the plain view's."""
    first = collect_both(run, data, files)
    inside = SETTINGS.model_copy(update={"adam": Adam(eps_placement="inside", bias_correction=True)})
    second = collect_both(run, data, files, settings=inside)
    assert second["plain"].path == first["plain"].path
    assert second["adam"].path != first["adam"].path
    assert not torch.allclose(second["adam"].rows(0, COUNT), first["adam"].rows(0, COUNT), rtol=1e-3)


def test_another_adapter_is_another_store_and_back_again(tmp_path: Path, files: dict[str, str]) -> None:
    """Adapters take turns on one loaded model: each gets its own rows, whichever came before."""
    apart = {}
    for name in ("adapter", "other"):
        run = Run(tmp_path / name)
        stores = collect_both(run, make_dataset(run), files, checkpoint=open_checkpoint(files[name]))
        apart[name] = stores["adam"].rows(0, COUNT)
    assert not torch.allclose(apart["adapter"], apart["other"], rtol=1e-2)
    run = Run(tmp_path / "turns")
    data = make_dataset(run)
    for turn, name in enumerate(("adapter", "other", "adapter", "other")):
        settings = SETTINGS.model_copy(update={"shard_rows": 4 - turn // 2})
        if turn >= 2:
            shutil.rmtree(run.folder / "gradients")
        stores = collect_both(run, data, files, checkpoint=open_checkpoint(files[name]), settings=settings)
        torch.testing.assert_close(stores["adam"].rows(0, COUNT), apart[name], rtol=1e-4, atol=1e-6)


def test_another_stage_may_change_the_adapter_in_between(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """After another stage has used the loaded model bare or with another adapter, rows are those of the checkpoint."""
    before = collect_both(run, data, files)["plain"].rows(0, COUNT)
    for name in (None, files["other"]):
        shutil.rmtree(run.folder / "gradients")
        host(files["model"], "auto", "cpu").with_adapter(name)
        assert torch.equal(collect_both(run, data, files)["plain"].rows(0, COUNT), before)


def test_an_adapter_trained_anew_in_its_folder_is_read_anew(
    tmp_path: Path, run: Run, data: Dataset, files: dict[str, str]
) -> None:
    """The same path with other weights is another checkpoint, in the same process too."""
    wanted = collect_both(run, data, files, checkpoint=open_checkpoint(files["other"]))["adam"].rows(0, COUNT)
    folder = tmp_path / "adapter"
    shutil.copytree(files["adapter"], folder)
    first = collect_both(run, data, files, checkpoint=open_checkpoint(str(folder)))
    shutil.copytree(files["other"], folder, dirs_exist_ok=True)
    fresh_run = Run(tmp_path / "fresh")
    second = collect_both(fresh_run, make_dataset(fresh_run), files, checkpoint=open_checkpoint(str(folder)))
    assert not torch.equal(first["adam"].rows(0, COUNT), wanted)
    assert torch.equal(second["adam"].rows(0, COUNT), wanted)


def test_full_sums_are_stored(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """The stored sum, projected, is the sum of the rows; a damaged sum is collected again."""
    settings = SETTINGS.model_copy(update={"full_sum": True})
    stores = collect_both(run, data, files, settings=settings)
    for store in stores.values():
        total = store.full_sum()
        projector = Projector(
            plan_segments({name: tuple(total[name].shape) for name in store.segments}, SETTINGS.projection),
            SETTINGS.projection,
            dtype=torch.float64,
        )
        rows: Tensor = store.rows(0, COUNT).double()
        torch.testing.assert_close(projector.apply(total)[0], rows.sum(0), rtol=1e-4, atol=1e-5)
    path = stores["plain"].path / "sum-00001.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-4] + bytes(4))
    notes = Listening()
    collect_both(run, data, files, settings=settings, reporter=notes)
    assert (len(notes.warned), notes.done) == (1, 4)
    assert path.read_bytes() == before


def test_rows_do_not_depend_on_threads(tmp_path: Path, files: dict[str, str]) -> None:
    """One thread or two: rows agree to 1e-5 of their norm."""
    found = []
    kept = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = Run(tmp_path / str(threads))
            found.append(collect_both(run, make_dataset(run), files)["adam"].rows(0, COUNT))
    finally:
        torch.set_num_threads(kept)
    assert oracles.relative_error(*found) < 1e-5


def test_automatic_sizes_are_sound(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Without sizes of one's own the rows are the same to rounding."""
    fixed = collect_both(run, data, files)["plain"].rows(0, COUNT)
    shutil.rmtree(run.folder / "gradients")
    automatic = SETTINGS.model_copy(update={"shard_rows": None, "token_budget": None, "module_groups": 3})
    found = collect_both(run, data, files, settings=automatic)["plain"].rows(0, COUNT)
    assert oracles.relative_error(found, fixed) < 1e-5


@pytest.mark.parametrize("field", ["token_budget", "shard_rows", "module_groups"])
def test_sizes_below_one_are_refused(field: str) -> None:
    """A size of zero raises when the settings are made, by name."""
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        Gradients(**{field: 0})


@contextmanager
def memory_for(files: dict[str, str], tokens: int) -> Iterator[list[int]]:
    """The process's model fits no more than so many tokens, and notes the sizes of the batches that it ran."""
    ran: list[int] = []

    def refuse(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(inputs[0].numel())

    own = host(files["model"], "auto", "cpu")
    handle = own.base().get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        yield ran
    finally:
        handle.remove()
        own.token_limit = None


def token_budgets(run: Run) -> list[int]:
    return [json.loads(path.read_text())["token_budget"] for path in run.folder.rglob("layout.json")]


def test_a_run_that_ran_out_of_memory_remembers_what_fits(tmp_path: Path, files: dict[str, str]) -> None:
    """Every row is there; later shards, a resumed run and the next checkpoint begin with batches that fit."""
    calm_run, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    calm = collect_both(calm_run, make_dataset(calm_run), files)
    data, notes = make_dataset(run), Listening()
    with memory_for(files, 20) as ran:
        with pytest.raises(KeyboardInterrupt):
            collect_both(run, data, files, reporter=Listening(stop_after=5))
        host(files["model"], "auto", "cpu").token_limit = None  # as in another process
        assert max(token_budgets(run)) <= 20
        kept = token_budgets(run)
        stores = collect_both(run, data, files, reporter=notes)
        assert token_budgets(run) == kept
        other = collect_both(run, data, files, checkpoint=open_checkpoint(files["other"]))
    assert max(ran) <= 20
    for view, store in stores.items():
        assert store.ids == other[view].ids == data.ids
        assert oracles.relative_error(store.rows(0, COUNT), calm[view].rows(0, COUNT)) < 1e-5
    fresh, told = Run(tmp_path / "fresh"), Listening()
    with memory_for(files, 20):
        collect_both(fresh, make_dataset(fresh), files, views=("plain",), reporter=told)
    assert [text for text in told.warned if "memory ran out" in text] == [
        "memory ran out: batches of the pool's plain gradients were cut from 40 to "
        f"{token_budgets(fresh)[0]} tokens; --token-budget sets where to begin"
    ]


def test_a_row_too_long_for_the_memory_is_left_out(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """The longest rows are excluded with their reason, the others stay: the run does not end."""
    longest = max(data.token_counts())
    left_out = {id_ for id_, count in zip(data.ids, data.token_counts(), strict=True) if count == longest}
    with memory_for(files, longest - 1):
        stores = collect_both(run, data, files)
    reason = f"a sequence of {longest} tokens does not fit in the memory of cpu even alone"
    for store in stores.values():
        assert store.excluded == dict.fromkeys(sorted(left_out), reason)
        assert store.ids == [id_ for id_ in data.ids if id_ not in left_out]


def test_gradient_checkpointing_makes_the_same_store(tmp_path: Path, files: dict[str, str]) -> None:
    """With layers that run again a fresh run has the same bytes, and a run that began without goes on with them."""
    runs = [Run(tmp_path / name) for name in ("without", "with")]
    again = SETTINGS.model_copy(update={"gradient_checkpointing": True})
    found = [
        collect_both(run, make_dataset(run), files, settings=settings)
        for run, settings in zip(runs, (SETTINGS, again), strict=True)
    ]
    for view in found[0]:
        assert shard_bytes(found[0][view]) == shard_bytes(found[1][view])
    notes = Listening()
    collect_both(runs[0], make_dataset(runs[0]), files, settings=again, reporter=notes)
    assert notes.done == 0


def test_a_disk_that_fills_up_is_told_while_the_next_shard_is_computed(
    run: Run, data: Dataset, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that cannot be written ends the run with the reason; what was written before is kept and used."""
    publish = type(run.storage).publish

    def full(self: Any, key: str, content: Any) -> None:
        if "shard-00001" in key:
            raise StorageError("the disk is full")
        publish(self, key, content)

    with monkeypatch.context() as patch:
        patch.setattr(type(run.storage), "publish", full)
        with pytest.raises(StorageError, match="the disk is full"):
            collect_both(run, data, files)
    notes = Listening()
    collect_both(run, data, files, reporter=notes)
    assert notes.done == COUNT - 4


def test_a_pool_of_which_no_row_fits_says_what_to_try(run: Run, data: Dataset, files: dict[str, str]) -> None:
    """Where memory holds no row at all, the error is about memory and names the options that save it."""
    with (
        memory_for(files, 1),
        pytest.raises(DataError, match=r"none of the 10 pool rows fits.*--gradient-checkpointing"),
    ):
        collect_both(run, data, files)


def test_unprojected_rows_make_small_shards(run: Run, data: Dataset, files: dict[str, str], monkeypatch: Any) -> None:
    """A shard's rows are held until they are written: their bytes bound it, and the rows stay the same."""
    settings = SETTINGS.model_copy(update={"shard_rows": None, "projection": Projection(kind="none")})
    whole = collect_both(run, data, files, views=("plain",), settings=settings)["plain"]
    assert len(shard_bytes(whole)) == 2
    expected = whole.rows(0, COUNT)
    shutil.rmtree(run.folder / "gradients")
    monkeypatch.setattr(collect_module, "_SHARD_BYTES", 1)
    parts = collect_both(run, data, files, views=("plain",), settings=settings)["plain"]
    assert len(shard_bytes(parts)) == 2 * 2  # at least eight rows in each
    assert oracles.relative_error(parts.rows(0, COUNT), expected) < 1e-5
