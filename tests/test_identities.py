"""What an artifact is found by: every input that decides it changes its address, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import gradsift.explanation.exact as exact_module
import gradsift.influence.scores as scoring
from gradsift.base.errors import ConfigError, CorruptError, GradsiftError
from gradsift.base.progress import silent
from gradsift.base.settings import Settings
from gradsift.base.types import Prompt
from gradsift.compare.costs import StageClock
from gradsift.context import Pool, open_pool, open_target
from gradsift.data.pairs import Preference, prepare_pairs
from gradsift.evaluation.evaluate import evaluate
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mean_reward import MeanReward
from gradsift.evaluation.setup import open_model
from gradsift.explanation.explain import DEFAULT_STRATEGIES, Explanations
from gradsift.explanation.matches import _Work as MatchWork
from gradsift.explanation.outputs import OutputSource, answers, question_of
from gradsift.generation.samples import Samples
from gradsift.generation.sampling import Sampling
from gradsift.gradients.collect import Adam, Gradients
from gradsift.gradients.projection import Projection
from gradsift.gradients.self_check import kept_check
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf, ProjectedInverse
from gradsift.influence.deita import DEITA
from gradsift.influence.dsir import DSIR
from gradsift.influence.ekfac import EKFAC
from gradsift.influence.estimator import Influence
from gradsift.influence.ji2s import JI2S, _full_direction
from gradsift.influence.less import LESS
from gradsift.influence.magic import MAGIC
from gradsift.influence.nice import NICE, NICEIF, PolicyTargets, sampler_of
from gradsift.influence.prompts import PromptTarget, open_prompts
from gradsift.influence.random import Random
from gradsift.influence.ratings import FunctionRating, rate
from gradsift.influence.rds import RDS, kept_embeddings
from gradsift.influence.rerank import Rerank
from gradsift.influence.scores import score
from gradsift.influence.states import RDSPlus, states
from gradsift.influence.trak import TRAK
from gradsift.model.models import adapter_identity, generation_ends, model_identity, whole_identity
from gradsift.rewards.function import function_identity
from gradsift.rewards.matching import Numeric
from gradsift.rewards.reward_model import RewardModel
from gradsift.selection.metagradient import MetagradientDescent
from gradsift.selection.select import _candidates
from gradsift.store import digests
from gradsift.store import run as runs
from gradsift.store.run import REVISIONS, Run
from gradsift.validation.one_step import OneStep
from gradsift.validation.validate import _Bench
from gradsift.warmup.train import Training, Warmup
from tiny_world import World, pool_rows, target_rows

Address = Callable[[str, Callable[[], Any]], str]


class _FoundError(Exception):
    pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Address:
    """Where a call looks for the first artifact of a kind; it is stopped there."""
    prefix = Run.prefix

    def address(kind: str, call: Callable[[], Any]) -> str:
        def stop(run: Run, asked: str, config: Any) -> str:
            found = prefix(run, asked, config)
            if asked == kind:
                raise _FoundError(found)
            return found

        monkeypatch.setattr(Run, "prefix", stop)
        try:
            with pytest.raises(_FoundError) as caught:
                call()
        finally:
            monkeypatch.setattr(Run, "prefix", prefix)
        return str(caught.value)

    return address


# --- models and adapters ------------------------------------------------------------------------------------------


def fake_model(folder: Path, *, tensors: int = 5, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{n}": torch.randn(7, 3, generator=generator).to(dtype) for n in range(tensors)}
    save_file(weights, folder / "model-1.safetensors")
    save_file({"head": torch.ones(4)}, folder / "model-2.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 3}')
    return folder


@pytest.mark.parametrize("file", ["model-1", "model-2"])
def test_one_element_of_any_tensor_makes_another_model(file: str, tmp_path: Path) -> None:
    """Size and names stay; one number of one tensor is another."""
    model = fake_model(tmp_path / "model")
    seen = {model_identity(str(model))["weights"]}
    for name in load_file(model / f"{file}.safetensors"):
        changed = load_file(model / f"{file}.safetensors")
        changed[name].view(-1)[-1] += 1
        save_file(changed, model / f"{file}.safetensors")
        seen.add(model_identity(str(model))["weights"])
    assert len(seen) == 1 + len(changed)


def test_configuration_decides_and_places_and_texts_do_not(tmp_path: Path) -> None:
    """A moved, copied, linked or described model is the same one; another config.json or shard index is not."""
    model = fake_model(tmp_path / "model")
    before = model_identity(str(model))
    copied = shutil.copytree(model, tmp_path / "copy")
    assert model_identity(str(copied)) == before
    assert model_identity(str(model.rename(tmp_path / "moved"))) == before
    (copied / "README.md").write_text("a model")
    (copied / "generation_config.json").write_text("{}")
    assert model_identity(str(copied)) == before
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"  # as the hub's cache has it
    shutil.move(copied, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert model_identity(str(snapshot)) == before
    (blobs / "config.json").write_text('{"hidden_size": 4}')
    assert model_identity(str(snapshot)) != before
    (tmp_path / "moved" / "model.safetensors.index.json").write_text("{}")
    assert model_identity(str(tmp_path / "moved")) != before
    single = tmp_path / "a.gguf"
    single.write_bytes(b"GGUF" * 10)
    assert model_identity(str(single)) == model_identity(str(single.rename(tmp_path / "b.gguf")))


def test_adapters_are_their_weights_and_configuration(tmp_path: Path) -> None:
    """The base's name and the folder's are not part of it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "/somewhere"}

    def identity() -> dict[str, str]:
        return adapter_identity(folder)

    save_file({"lora_A": torch.ones(3), "lora_B": torch.zeros(3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    before = identity()
    assert adapter_identity(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere"}))
    assert identity() == before
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    assert identity() != before
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_A": torch.ones(3), "lora_B": torch.tensor([0.0, 0.0, 1e-9])}, folder / "adapter_model.safetensors")
    assert identity() != before


def test_a_model_used_as_its_folder_has_it_is_all_of_its_files(tmp_path: Path) -> None:
    """Tokenizers and poolings decide what reward models and sentence embeddings say; where the folder lies does not."""
    model = fake_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    for file in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "chat_template.jinja"):
        before, reward = whole_identity(str(model)), PromptTarget(None, reward=RewardModel(model=str(model)))  # type: ignore[arg-type]
        rewarded = reward.reward_identity()
        (model / file).write_text("another")
        assert whole_identity(str(model)) != before, file
        assert reward.reward_identity() != rewarded, file
    before, rewarded = whole_identity(str(model)), reward.reward_identity()
    for unread in ("README.md", ".gitattributes"):
        (model / unread).write_text("another")
    moved = model.rename(tmp_path / "moved")
    assert whole_identity(str(moved)) == before
    assert PromptTarget(None, reward=RewardModel(model=str(moved))).reward_identity() == rewarded  # type: ignore[arg-type]


# --- digests that are kept ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose bytes were read; all files count as large, and as written long ago."""
    read: list[str] = []
    digest = digests._digest

    def listed(path: Path, before: bytes) -> str:
        read.append(path.name)
        return digest(path, before)

    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_WORTH", 1)
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    monkeypatch.setattr(digests, "_digest", listed)
    digests._known.clear()
    yield read
    digests._known.clear()


def another_process() -> None:
    digests._known.clear()


def test_a_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    """By this process and the next one, wherever the file goes; once more after it was written to, though it looks the
    same."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = digests.file_digest(file)
    another_process()
    assert digests.file_digest(file) == first
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(file)
    assert digests.file_digest(tmp_path / "link") == first
    assert reads == ["weights"]
    times = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.file_digest(file) != first
    assert digests.file_digest(file, b"before") != digests.file_digest(file)
    assert reads == ["weights"] * 3


def test_what_was_just_written_is_not_kept(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next write may fall into the same tick of the file system's clock."""
    monkeypatch.setattr(digests, "_SETTLED", 2.0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert digests.file_digest(file) == digests.file_digest(file)
    assert reads == ["weights", "weights"]
    assert not (tmp_path / "cache").exists()


def spoilt(record: Path, how: str) -> None:
    content = json.loads(record.read_text())
    (key,) = content["digests"]
    if how == "cut":
        record.write_text(record.read_text()[:-20])
    elif how == "altered":
        record.write_text(record.read_text().replace(content["digests"][key][:4], "0000"))
    elif how == "without seal":
        record.write_text(json.dumps({"digests": {key: "0" * 64}}))
    elif how == "of others":
        record.chmod(0o666)
    elif how == "a link":
        record.rename(record.with_name("elsewhere"))
        record.symlink_to(record.with_name("elsewhere"))
    elif how == "too large":
        record.write_text(record.read_text() + " " * (1 << 21))
    elif how == "deep":
        record.write_text("[" * 100_000)
    else:
        record.unlink()
        record.mkdir()


@pytest.mark.parametrize(
    "how", ["cut", "altered", "without seal", "of others", "a link", "too large", "deep", "a folder"]
)
def test_a_record_that_may_not_be_believed_is_not(how: str, tmp_path: Path, reads: list[str]) -> None:
    """The file is read again, and its digest is what it was."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = digests.file_digest(file)
    spoilt(tmp_path / "cache" / "digests.json", how)
    another_process()
    assert digests.file_digest(file) == first
    assert reads == ["weights", "weights"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its place is taken, files are read again."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "taken"))
    (tmp_path / "weights").write_bytes(b"one")
    found = [digests.file_digest(tmp_path / "weights")]
    another_process()
    assert [*found, digests.file_digest(tmp_path / "weights")] == found * 2
    assert len(reads) == 2


# --- users' functions ---------------------------------------------------------------------------------------------

FILES = {
    "rewards.py": "import json\nfrom helper import weigh\ngradsift_files = ['words.txt']\n"
    "def _unused():\n    import late\n"
    "def reward(completions, **columns):\n    return [weigh(c) for c in completions]\n",
    "helper.py": "from pack.deep import scale\ngradsift_files = ('sub/more.txt',)\n"
    "def weigh(text):\n    return scale * len(text)\n",
    "pack/__init__.py": "from . import early\n",
    "pack/early.py": "",
    "pack/deep.py": "from . import sibling\nscale = sibling.scale\n",
    "pack/sibling.py": "scale = 1.0\n",
    "late.py": "import importlib\nplugin = importlib.import_module('plugin')\n",
    "plugin.py": "",
    "words.txt": "one\n",
    "sub/more.txt": "two\n",
    "unrelated.py": "",
    "notes.txt": "",
}


@pytest.fixture
def function(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "mine" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    return tmp_path / "mine" / "rewards.py"


@pytest.mark.parametrize("name", FILES)
def test_a_function_is_what_it_imports_and_names(name: str, function: Path) -> None:
    """Its module, the user's modules that it imports at once, late or by a written name, and files that are named."""
    before = function_identity(f"{function}:reward")
    file = function.parent / name
    file.write_text(file.read_text() + ("\n# changed\n" if file.suffix == ".py" else "changed"))
    assert (function_identity(f"{function}:reward") == before) == (name in ("unrelated.py", "notes.txt"))


def test_a_function_keeps_its_identity_where_it_goes(function: Path) -> None:
    """Moved with what it imports it is the same one; another function of the file is another."""
    before = function_identity(str(function))
    assert before["function"] == "reward"
    assert set(before["sources"]) == {
        "rewards", "helper", "pack", "pack.early", "pack.deep", "pack.sibling", "late", "plugin",
    }  # fmt: skip
    assert set(before["files"]) == {"words.txt", "sub/more.txt"}
    moved = function.parent.rename(function.parent.with_name("elsewhere")) / "rewards.py"
    assert function_identity(str(moved)) == before
    moved.write_text(moved.read_text() + "def other(completions, **columns):\n    return []\n")
    one, other = (function_identity(f"{moved}:{name}") for name in ("reward", "other"))
    assert {**one, "function": "other"} == other


def test_an_edited_module_runs_as_it_stands(function: Path) -> None:
    """What is named by new sources is computed by them, in a process that has imported the old ones, too."""
    from gradsift.rewards.function import load_function

    assert load_function(str(function))(completions=["ab"]) == [2.0]
    beside = shutil.copytree(function.parent, function.parent.with_name("beside"))
    (beside / "helper.py").write_text("def weigh(text):\n    return -1.0\n")
    assert load_function(str(beside / "rewards.py"))(completions=["ab"]) == [-1.0]
    assert load_function(str(function))(completions=["ab"]) == [2.0]
    (function.parent / "pack" / "sibling.py").write_text("scale = 10.0\n")
    assert load_function(str(function))(completions=["ab"]) == [20.0]


def test_declared_versions_and_files(function: Path) -> None:
    """A version that only running tells is part of the identity; a file that is not there, or no list, is refused."""
    text = function.read_text()

    def declaring(line: str) -> dict[str, Any]:
        function.write_text(f"{line}\n{text.replace('gradsift_files', 'unused')}")
        return function_identity(str(function))

    assert declaring("import helper; gradsift_version = str(1 + 1)")["version"] == "2"
    for line, words in (
        ("gradsift_files = ['absent.txt']", "names 'absent.txt', but there is no file"),
        ("gradsift_files = 'words.txt'", "expected a list of paths"),
        ("gradsift_version = [1]", "gradsift_version is a list"),
    ):
        with pytest.raises(ConfigError, match=words):
            declaring(line)


def test_modules_of_a_package_and_of_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module name the whole package counts, installed or not; what a function takes from a library is that file."""
    package = tmp_path / "site-packages" / "graders"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("from .lexicon import known\ndef grade(completions, **c):\n    return known\n")
    (package / "lexicon.py").write_text("known = [1.0]\n")
    (package.parent / "neighbour.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    before = function_identity("graders.words:grade")
    assert set(before["sources"]) == {"graders.words", "graders", "graders.lexicon"}
    (package / "lexicon.py").write_text("known = [2.0]\n")
    assert function_identity("graders.words:grade") != before
    assert function_identity("operator:itemgetter")["function"] == "itemgetter"
    (tmp_path / "mine.py").write_text("from textwrap import dedent as reward\n")
    assert set(function_identity(f"{tmp_path / 'mine.py'}:reward")["sources"]) == {"mine", "textwrap"}


# --- artifacts ----------------------------------------------------------------------------------------------------


def opened(world: World, out: Path, rows: Any = None, **options: Any) -> Pool:
    return world.open_pool(out, pool_rows() if rows is None else rows, gradients=Gradients(), **options)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return opened(tiny, tmp_path_factory.mktemp("identities") / "run")


def changed_rows(how: str) -> list[dict[str, Any]]:
    rows = pool_rows()
    if how == "text":
        rows[3]["messages"][1]["content"] += " indeed"
    elif how == "id":
        rows[3]["id"] = "another"
    elif how == "order":
        rows = rows[::-1]
    elif how == "column":
        rows[3]["weight_kg"] = -1
    elif how == "duplicate":
        rows.append({**rows[0], "id": "again"})
    elif how == "bad row":
        rows.append({"nothing": 1})
    return rows


@pytest.mark.parametrize("how", ["text", "id", "order", "column", "duplicate", "bad row", "max_length", "template"])
def test_rows_and_their_tokens_decide_data(how: str, tiny: World, pool: Pool, tmp_path: Path) -> None:
    """Also what was left out of them, which is listed with them."""
    if how == "template":
        model = tiny.variant("template", tiny.model)
        template = model / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
        found = open_pool(pool_rows(), model=str(model), out=str(tmp_path / "run"), max_length=64, device="cpu")
    else:
        options = {"max_length": 63} if how == "max_length" else {}
        found = opened(tiny, tmp_path / "run", changed_rows(how), **options)
    assert found.data.fingerprint != pool.data.fingerprint
    again = opened(tiny, tmp_path / "again")
    assert again.data.fingerprint == pool.data.fingerprint


def altered_values(cls: type[Settings], name: str, given: Settings) -> Iterator[Any]:
    """Values that a field may take and does not have."""
    field, own = cls.model_fields[name], getattr(given, name)
    literals = [value for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal
                for value in get_args(part)]  # fmt: skip
    candidates = [*literals, True, False, 3, 2, 0.37, None, (0.5, 0.7), ("q_proj",), "another", "q_proj"]
    for value in candidates:
        if value != own and type(value) is not type(None):
            yield value


def other(given: Settings, name: str) -> Settings | None:
    """The settings with another value of one field."""
    cls = type(given)
    inner = getattr(given, name)
    if isinstance(inner, Settings):
        return next(
            (
                cls(**{**fields_of(given), name: changed})
                for own in type(inner).model_fields
                if own != "kind" and (changed := other(inner, own)) is not None
            ),
            None,
        )
    for value in altered_values(cls, name, given):
        try:
            found = cls(**{**fields_of(given), name: value})
        except (ValidationError, GradsiftError):
            continue
        if getattr(found, name) != inner:
            return found
    return None


def fields_of(given: Settings) -> dict[str, Any]:
    return {name: getattr(given, name) for name in type(given).model_fields}


def fields(*settings: Settings) -> list[Any]:
    return [
        pytest.param(given, name, id=f"{type(given).__name__}.{name}")
        for given in settings
        for name in type(given).model_fields
        if name != "kind"
    ]


METHODS = (
    LESS(), DataInf(), ProjectedInverse(), TRAK(), BM25(), RDS(), DSIR(), Random(), AlpaGasus(), DEITA(),
    JI2S(), JI2S(hessian="fisher_projected"), JI2S(standardise_terms=False),
    NICE(sampling=Sampling(samples=4)), NICEIF(sampling=Sampling(samples=4)),
)  # fmt: skip


@pytest.mark.parametrize(("method", "name"), fields(*METHODS))
def test_every_setting_of_every_method_decides_its_scores(
    method: Any, name: str, pool: Pool, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is computed from the same inputs with one other setting lies elsewhere."""
    changed = other(method, name)
    if changed is None:
        assert name in ("normalise", "subtract_bias", "pair_reduction", "server", "assistant"), (method, name)
        return
    ids, zeros = list(pool.data.ids), np.zeros((len(pool.data), 4), dtype=np.float32)
    monkeypatch.setattr(scoring, "collect_together", lambda *_: None)
    monkeypatch.setattr(scoring, "influence_of", lambda *_: Influence(ids, zeros))
    monkeypatch.setattr("gradsift.influence.rds.embedding_identity", lambda model: {"model": "one"})
    target: Any = open_target(target_rows(), pool)
    if isinstance(method, NICE | NICEIF):
        target = open_prompts(target_rows(), pool, Numeric(answer="completion"))
    first, second = (address("scores", lambda m=m: score(pool, target, m)) for m in (method, changed))
    assert first != second


def test_targets_their_order_and_their_subtasks_decide_scores(pool: Pool, address: Address, tmp_path: Path) -> None:
    """And how they are aggregated, and what is left out as overlap."""
    rows = target_rows()

    def found(rows: list[dict[str, Any]], aggregation: Any = "mean", **options: Any) -> str:
        target = open_target(rows, pool, **options)
        return address("scores", lambda: score(pool, target, BM25(), aggregation=aggregation))

    otherwise = [{**rows[0], "completion": "nothing"}, *rows[1:]]
    tasks = [{**row, "task": "one"} for row in rows]
    overlapping = [*rows[1:], {"id": "t0", "messages": pool_rows()[0]["messages"], "task": "odd"}]
    addresses = [
        found(rows), found(otherwise), found(rows[::-1]), found(rows, subtask="task"), found(tasks, subtask="task"),
        found(rows, "max_of_means"), found(overlapping), found(overlapping, keep_overlap=True),
    ]  # fmt: skip
    assert len(set(addresses)) == len(addresses)
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert address("scores", lambda: score(pool, open_target(str(tmp_path / "moved.jsonl"), pool), BM25(),
                                           aggregation="mean")) == addresses[0]  # fmt: skip


ROW_SETTINGS = (Gradients(), Adam(), Projection())
NO_PART = ("token_budget", "shard_rows", "module_groups", "gradient_checkpointing")


@pytest.mark.parametrize(("settings", "name"), fields(*ROW_SETTINGS))
def test_settings_of_rows_decide_stores(settings: Any, name: str, pool: Pool, address: Address) -> None:
    """All but those that change batches and passes: seeds, sizes, kinds, decay rates."""
    from dataclasses import replace

    changed = other(settings, name)
    assert changed is not None
    inside = {Adam: "adam", Projection: "projection"}.get(type(settings))

    def found(settings: Any) -> str:
        gradients = settings if inside is None else Gradients(**{inside: settings})
        own = replace(pool, gradients=gradients)
        return address("gradients", lambda: own.stores(own.checkpoints()[-1], ["adam"]))

    assert (found(settings) == found(changed)) == (name in NO_PART)


@pytest.mark.parametrize("what", ["weights", "config", "moments", "rate", "place"])
def test_checkpoints_decide_rows_and_scores(
    what: str, tiny: World, pool: Pool, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and configuration every view, Adam's moments their own, learning rates the sum; places nothing."""
    from dataclasses import replace

    adapter = tiny.variant(f"checkpoint-{what}", tiny.adapters[-1])

    def addresses() -> tuple[str, str, str]:
        own = replace(pool, adapters=(tiny.adapters[0], str(adapter)))
        last = own.checkpoints()[-1]
        views = (address("gradients", lambda v=view: own.stores(last, [v])) for view in ("plain", "adam"))  # type: ignore[misc]
        ids = list(pool.data.ids)
        monkeypatch.setattr(scoring, "collect_together", lambda *_: None)
        monkeypatch.setattr(scoring, "influence_of", lambda *_: Influence(ids, np.zeros((len(ids), 4), np.float32)))
        return *views, address("scores", lambda: score(own, open_target(target_rows(), pool), LESS()))  # type: ignore[return-value]

    before = addresses()
    if what == "weights":
        weights = load_file(adapter / "adapter_model.safetensors")
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, adapter / "adapter_model.safetensors")
    elif what == "config":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    elif what == "moments":
        moments = load_file(adapter / "adam.safetensors")
        next(tensor for name, tensor in moments.items() if name.endswith("exp_avg")).view(-1)[0] += 1
        save_file(moments, adapter / "adam.safetensors")
    elif what == "rate":
        info = json.loads((adapter / "checkpoint.json").read_text())
        (adapter / "checkpoint.json").write_text(json.dumps({**info, "learning_rate": 0.5}))
    else:
        adapter = adapter.rename(adapter.with_name("elsewhere"))
    same = [old == new for old, new in zip(before, addresses(), strict=True)]
    if what == "place":
        shutil.rmtree(adapter)
    assert same == {
        "weights": [False, False, False], "config": [False, False, False], "moments": [True, False, False],
        "rate": [True, True, False], "place": [True, True, True],
    }[what]  # fmt: skip


@pytest.mark.parametrize(("settings", "name"), fields(Sampling(samples=4)))
def test_settings_of_a_draw_decide_samples(settings: Any, name: str, pool: Pool, address: Address) -> None:
    """The seed, too; how many are drawn does not, as more are added to those that are there."""
    target = open_prompts(target_rows(), pool)
    first, second = (
        address("samples", lambda s=s: PolicyTargets(pool, target, NICE(sampling=s)).samples_at(pool.checkpoints()[0]))
        for s in (settings, other(settings, name))
    )
    assert (first == second) == (name == "samples")


def test_the_model_and_what_ends_its_turns_decide_what_it_says(
    tiny: World, pool: Pool, address: Address, tmp_path: Path
) -> None:
    """Samples, answers and evaluations of one that ends its turns otherwise, or computes otherwise, lie elsewhere."""
    from dataclasses import replace

    target = open_prompts(target_rows(), pool)

    def addresses(pool: Pool) -> list[str]:
        place = open_model(pool.model, out=pool.run, max_length=64, device="cpu", dtype=pool.dtype)
        reward = MeanReward(data=target_rows(), reward=Numeric(answer="completion"))
        return [
            address("samples", lambda: PolicyTargets(pool, target, NICE()).samples_at(pool.checkpoints()[0])),
            address("outputs", lambda: answers(pool, [question_of("what?")])),
            address("evaluations", lambda: evaluate(place, None, [reward])),
        ]

    before = addresses(pool)
    copied = replace(pool, model=str(tiny.variant("ends", tiny.model)))
    assert addresses(copied) == before
    assert all(a != b for a, b in zip(before, addresses(replace(pool, dtype="float64")), strict=True))
    settings = Path(copied.model) / "generation_config.json"
    (settings).write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [2, 5]}))
    assert generation_ends(copied.model) == {"ends": [2, 5]}
    assert all(a != b for a, b in zip(before, addresses(copied), strict=True))


def every_address(pool: Pool, address: Address, tmp_path: Path) -> dict[str, str]:
    """Of one artifact of each kind."""
    from dataclasses import replace

    checkpoint, source = pool.checkpoints()[-1], SimpleNamespace(fingerprint="s")
    target, prompts = open_target(target_rows(), pool), open_prompts(target_rows(), pool, Numeric(answer="completion"))
    encoder = tmp_path / "encoder"
    encoder.mkdir(exist_ok=True)
    (encoder / "modules.json").write_text("{}")
    (tmp_path / "rate.py").write_text("def rate(rows):\n    return [1.0] * len(rows)\n")
    rater = AlpaGasus(rater=FunctionRating(name=str(tmp_path / "rate.py")))
    descent = MetagradientDescent()
    chosen_from = _candidates(score(pool, target, BM25()), descent, 4)
    settings: dict[str, Any] = {"estimators": (LESS(),), "strategies": DEFAULT_STRATEGIES, "budgets": (5,),
                                "coefficients": "MSEProjUSimp", "candidates": 100, "aggregation": "ratio_of_means",
                                "exact": True}  # fmt: skip
    work: Any = Explanations(pool=pool, source=None, store=source, gradients=None, **settings)  # type: ignore[arg-type]
    place = open_model(pool.model, out=pool.run, max_length=64, device="cpu")
    identity = sampler_of(pool, prompts, NICE(), checkpoint).identity()
    samples = Samples(pool.run, identity, [Prompt("p", ())], {"p": {0}}, 1)

    both = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in target_rows()]
    preferred = prepare_pairs(
        pool.run, both, pool.chat, columns=None, preference=Preference(objective="dpo"), reporter=silent()
    )

    def timed() -> None:
        with StageClock(pool.run, {}).timed("train", None, {}):
            pass

    found = {
        "data": lambda: open_pool(pool_rows(), model=pool.model, out=pool.run, max_length=64, device="cpu"),
        "checkpoints": lambda: replace(pool, adapters=()).checkpoints(),
        "gradients": lambda: pool.stores(checkpoint, ["plain"]),
        "samples": lambda: PolicyTargets(pool, prompts, NICE()).samples_at(checkpoint),
        "scores": lambda: score(pool, target, BM25()),
        "ratings": lambda: rate(pool, rater),
        "embeddings": lambda: kept_embeddings(pool.run, ["a"], str(encoder)),
        "curvature": lambda: _full_direction(pool, _Nothing(), source, target.data, JI2S(), checkpoint, set()),  # type: ignore[arg-type]
        "outputs": lambda: answers(pool, [question_of("what?")]),
        "explanations": lambda: work._prefix,
        "matches": lambda: MatchWork(pool, LESS(), [checkpoint]).prefix(pool.data.sequences(0, 1)),
        "validation": lambda: _Bench(pool, OneStep(), "trained", checkpoint),
        "evaluations": lambda: evaluate(place, None, [HeldOutLoss(target_rows())]),
        "checks": lambda: kept_check(pool.run, torch.nn.Linear(2, 2), (), (), model=pool.model, pattern="lora"),
        "states": lambda: states(pool, pool.data, None, "position_weighted", -1),
        "replays": lambda: MAGIC()._replay(pool, set(), 0),
        "descents": lambda: pool.run.prefix("descents", descent._descent(chosen_from, 4)),
        "kronecker": lambda: EKFAC()._factors(pool, checkpoint).prefix(pool.run),
        "candidates": lambda: pool.run.prefix("candidates", Rerank(first=BM25(), then=LESS())._config(pool, target)),
        "products": lambda: exact_module._prefix(
            pool, checkpoint, OutputSource((pool.data.by_id("p00"),), pool.chat.fingerprint), ("plain",)
        ),
        "contrasts": lambda: pool.weighed(preferred, checkpoint),
        "times": timed,
    }
    addresses = {kind: address(kind, call) for kind, call in found.items()}
    addresses["rewards"] = samples._reward_key(prompts.reward_identity() or {}, "p")
    reward = MeanReward(data=target_rows(), reward=Numeric(answer="completion"))
    addresses["evaluated rewards"] = address("evaluations", lambda: evaluate(place, None, [reward]))
    addresses["labels"] = open_model(pool.model, out=pool.run, max_length=64, device="cpu").chat.fingerprint
    addresses["merge"] = str(runs.revised("merge", {}))
    addresses["scores of rows"] = str(LESS().inputs(pool))
    addresses["scores of states"] = str(RDSPlus().inputs(pool))
    addresses["scores of factors"] = str(EKFAC().inputs(pool))
    addresses["scores of replays"] = str(MAGIC().inputs(pool))
    addresses["scores of embeddings"] = str(RDS(model=str(encoder)).inputs(pool))
    return addresses


class _Nothing:
    fingerprint = "n"

    def __contains__(self, _: object) -> bool:
        return False


# What is made from each kind, besides itself and the times that it takes, among `every_address`.
MADE_FROM = {
    "labels": {"data", "checkpoints", "gradients", "samples", "rewards", "scores", "scores of rows", "explanations",
               "validation", "evaluations", "evaluated rewards", "states", "scores of states", "replays",
               "scores of replays", "descents", "kronecker", "scores of factors", "candidates", "products",
               "contrasts"},
    "products": {"explanations"},
    "data": {"checkpoints", "gradients", "scores", "scores of rows", "explanations", "validation", "evaluations",
             "states", "replays", "scores of replays", "descents", "kronecker", "scores of factors", "candidates",
             "products", "contrasts"},
    "gradients": {"scores of rows", "explanations", "scores of factors", "products"},
    "kronecker": {"scores of factors"},
    "samples": {"rewards", "evaluated rewards"},
    "rewards": {"evaluated rewards"},
    "scores": {"explanations", "descents", "candidates"},
    "embeddings": {"scores of embeddings"},
    "states": {"scores of states"},
    "replays": {"scores of replays", "descents"},
    "evaluations": {"evaluated rewards"},
}  # fmt: skip


@pytest.fixture(scope="module")
def unraised(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("kinds")}


@pytest.mark.parametrize("kind", REVISIONS)
def test_a_raised_revision_makes_everything_anew(
    kind: str, tiny: World, address: Address, unraised: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind itself and what is made from it; nothing else. A folder still belongs to the same pool."""
    folder: Path = unraised["folder"]
    if "addresses" not in unraised:
        unraised["addresses"] = every_address(opened(tiny, folder / "run"), address, folder)
    monkeypatch.setitem(REVISIONS, kind, REVISIONS[kind] + 1)
    where = "labels" if kind == "labels" else "run"  # another template is another pool
    found = every_address(opened(tiny, folder / where), address, folder)
    changed = {name for name, value in found.items() if value != unraised["addresses"][name]}
    assert changed == {kind, "times"} | MADE_FROM.get(kind, set())


def test_an_unknown_kind_has_no_revision(tmp_path: Path) -> None:
    """Nothing is kept without one."""
    with pytest.raises(AssertionError, match="needs a revision in REVISIONS"):
        Run(tmp_path).prefix("guesses", {})


def test_fingerprints_of_first_revisions_are_those_without(tmp_path: Path) -> None:
    """What was made before there were revisions is found."""
    from gradsift.store.manifest import fingerprint

    assert Run(tmp_path).prefix("data", {"a": 1}) == f"data/{fingerprint({'kind': 'data', 'a': 1})}/"


def test_damaged_adapters_are_said(tmp_path: Path) -> None:
    """A configuration that is no JSON object has no identity."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CorruptError, match="is damaged"):
        adapter_identity(tmp_path)


def test_warm_ups_are_their_settings_rows_and_seed(pool: Pool, address: Address) -> None:
    """Every field of a training, which rows it takes, and its seed."""
    from dataclasses import replace

    fresh = replace(pool, adapters=())
    first = address("checkpoints", fresh.checkpoints)
    changed = [other(Warmup(), name) for name in Training.model_fields]
    assert None not in changed
    places = [address("checkpoints", replace(fresh, warmup=warmup).checkpoints) for warmup in changed]  # type: ignore[arg-type]
    places += [address("checkpoints", replace(fresh, warmup=Warmup(fraction=0.9)).checkpoints)]
    places += [address("checkpoints", replace(fresh, seed=1).checkpoints)]
    assert len({first, *places}) == 1 + len(places)
