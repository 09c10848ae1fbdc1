"""What was hardly meant, and files that are something else: one message, and never an error of another's."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gradsift import cli
from gradsift.base.errors import ConfigError, CorruptError, GradsiftError, ModelError
from gradsift.base.inputs import open_input
from gradsift.base.secrets import Secret
from gradsift.base.settings import Settings
from gradsift.compare.costs import StageClock
from gradsift.data import template
from gradsift.data.bounded import OverrunError, at_most
from gradsift.data.load import Columns, load_examples
from gradsift.data.template import render
from gradsift.jobs.train_evaluate import read_ids
from gradsift.model.models import load_tokenizer
from gradsift.recipe import Recipe, load_recipe, set_fields
from gradsift.rewards.function import load_function
from gradsift.rewards.reward import reward_samples
from gradsift.rewards.samples import Sample
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns
from gradsift.store.run import Run
from gradsift.store.storage import LocalStorage
from gradsift.store.writers import machine, temporary_name
from gradsift.warmup.checkpoint import load_moments, open_checkpoint
from tiny_world import Cli, World, pool_rows


def options() -> list[tuple[str, str, bool, str]]:
    """(command, option, whether it may be repeated, what it takes) of every option that takes a value."""
    return [
        (name, f"--{option.name}", option.form == "many", "text" if option.type is str else "number")
        for name, command in cli.app.commands.items()
        for option in command.options  # type: ignore[attr-defined]
        if option.form in ("value", "many")
    ]


def test_every_option_of_every_command() -> None:
    """An empty or blank text, as a shell variable that is not set leaves it, a text that is not UTF-8, and an option of
    one value given twice are refused with 2 and the option's name; nothing else is looked at."""
    assert len(options()) > 300
    for name, option, repeats, kind in options():
        wrong = [[option, ""], [option, "  "], [option, os.fsdecode(b"a\xff")]] if kind == "text" else [[option, ""]]
        wrong += [] if repeats else [[option, "1", option, "2"]]
        for arguments in wrong:
            with pytest.raises(click.BadParameter, match=f"^{option} ") as refused:
                cli.app.commands[name].make_context(name, arguments)
            assert refused.value.exit_code == 2
    assert Cli("select", "-e", "less", "-e", "bm25").code == 2
    assert "--estimator is given 2 times" in Cli("select", "-e", "less", "--estimator", "bm25").err


@pytest.mark.parametrize("word", ["numeric:", "judge:", "length:", "exact: ", "perplexity:"])
def test_nothing_after_a_colon(word: str) -> None:
    """`--reward "numeric:$COLUMN"` without the variable is no default."""
    option = "--rater" if word == "perplexity:" else "--reward"
    method = "alpagasus" if word == "perplexity:" else "nice"
    result = Cli("select", "-m", "m", "-p", "p", "-o", "o", "-t", "t", "-e", method, option, word)
    assert (result.code, "nothing after the colon" in result.err) == (2, True), result.err


def models(kind: type[BaseModel] = Settings) -> list[type[BaseModel]]:
    """All settings."""
    ours = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("gradsift")]
    return [one for sub in ours for one in (sub, *models(sub))]


WRONG = {
    "": "it is empty", " \n": "it is empty", 2**70: "whole number", -(2**70): "whole number", "a\0b": "zero byte",
    "\ud800": "surrogate",
}  # fmt: skip


def test_every_field_of_every_setting() -> None:
    """No field takes an empty text that is not its default, a number that nothing can be, a text that no file can hold,
    or true and false where its type does not say so; nor do lists in it."""
    fields = [(model, name) for model in models() for name in model.model_fields]
    assert len(fields) > 150
    for model, name in fields:
        field = model.model_fields[name]
        for value, why in WRONG.items():
            for wrong in (value, [value]):
                if value == field.default or (isinstance(value, int) and "seed" in name):  # seeds have their own
                    continue
                with pytest.raises((ValidationError, ConfigError)) as refused:
                    model.model_validate({name: wrong})
                errors = [e for e in refused.value.errors() if e["type"] == "not_meant"]  # type: ignore[union-attr]
                assert errors, (model, name, value)
                assert why in errors[0]["msg"]
        if "bool" not in str(field.annotation) and "Any" not in str(field.annotation):
            with pytest.raises((ValidationError, ConfigError), match=r"neither true nor false"):
                model.model_validate({name: True})


BAD_RECIPES = {
    "out: ''": r"line 4: out: it is empty",
    'pool: " "': r"line 4: pool: it is empty",
    "budget: true": r"line 4: budget: it is true, and neither",
    "budget: 5%%": r"line 4: budget is '5%%': wanted a number of examples, or a share",
    "budget: .nan": "budget is nan: it should be a finite number",
    "budget: .inf": "budget",
    "budget: [5]": "budget",
    f"seed: {2**70}": "line 4: seed is .*must be a whole number from 0 to 4294967295",
    "seed: -1": "seed is -1: it must be a whole number from 0 to 4294967295",
    "seed: 4294967296": "must be a whole number from 0 to 4294967295",
    "seed: 1.5": "seed is 1.5",
    "subtask: 2026-01-01": "subtask",
    "subtask: null\nsubtask: x": "line 5: 'subtask' stands on line 4 already",
    "gradients: {dtype: float16, dtype: float32}": "line 4: 'dtype' stands on line 4 already",
    "gradients: {projection: {seed: yes}}": "seed: it is true",
    "adapter: [a, '']": "adapter: it is empty",
    "compare: {budgets: [5%, 5%%]}": "budgets",
    "group_by: x": "wanted a list",
}


@pytest.mark.parametrize("line", BAD_RECIPES)
def test_recipes_that_mean_something_else(line: str, tmp_path: Path) -> None:
    """Each is refused with the line, the key and what is wrong with it."""
    path = tmp_path / "recipe.yaml"
    others = [f"{key}: x\n" for key in ("model", "pool", "out") if not line.startswith(f"{key}:")]
    path.write_text("".join(others) + "\n" * (3 - len(others)) + line)
    with pytest.raises(ConfigError, match=BAD_RECIPES[line]):
        load_recipe(path)


@pytest.mark.parametrize(
    "given", [["seed="], ["seed= "], ["seed=1", "seed=2"], ["estimator={kind: less, kind: bm25}"], ["a=" + "[" * 3000]]
)
def test_fields_that_are_set_to_something_else(given: list[str]) -> None:
    """`--set field=$VALUE` without the variable is no null, and the last of two does not count in silence."""
    with pytest.raises(ConfigError, match=r"--set 'a=|--set 'seed|stands on line 1 already"):
        set_fields({}, given)


def test_columns_as_a_mapping() -> None:
    """`columns={...}` is a `Columns`; what is none says which fields there are."""
    (example,) = load_examples([{"q": "1", "a": "2"}], columns={"prompt": "q", "completion": "a"}).examples
    assert example.messages[0]["content"] == "1"
    for wrong in ({"promt": "q"}, {"prompt": 5}, {"prompt": ""}, "prompt=q", [1]):
        with pytest.raises(ConfigError, match=r"columns: .*wanted names of columns for id, messages, prompt"):
            Columns.of(wrong)  # type: ignore[arg-type]


# --- files that are none


@pytest.fixture
def specials(tmp_path: Path) -> list[Path]:
    """What a path may name beside a file: a pipe, a device, a socket, a folder, a link to nothing."""
    made = [tmp_path / f"{name}.jsonl" for name in ("pipe", "zero", "socket", "folder", "broken")]
    os.mkfifo(made[0])
    made[1].symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(made[2]))
    made[3].mkdir()
    made[4].symlink_to(tmp_path / "nowhere")
    return made


def test_no_special_file_is_waited_for(specials: list[Path]) -> None:
    """Every reader of a file that somebody names refuses it at once."""
    began = time.monotonic()
    readers: tuple[Callable[[Path], Any], ...] = (
        load_recipe, lambda path: load_examples(str(path)), lambda path: read_ids(str(path)), open_input,
        lambda path: LocalStorage(path.parent).read(path.name), lambda path: open_checkpoint(str(path)),
        lambda path: load_function(f"{path}:f"),
    )  # fmt: skip
    for path in specials:
        for reader in readers:
            with pytest.raises((GradsiftError, OSError)):
                reader(path)
    assert time.monotonic() - began < 10
    assert Cli("run", specials[0]).code == 2


def test_rows_that_are_named_by_no_file(tmp_path: Path) -> None:
    """`train --selected` that is not there is not blamed on `--ids`."""
    for name in ("nofile", "none.jsonl"):
        result = Cli("train", "-m", "m", "-p", "p", "-o", tmp_path / "run", "--selected", tmp_path / name)
        assert (result.code, result.err.startswith("error: --selected: ")) == (1, True), result.err


def test_paths_with_colons(tmp_path: Path) -> None:
    """A function's file may have colons in its path; one that is no Python file says so."""
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "c:d.py").write_text("def f(prompts, completions):\n    return []\n")
    (folder / "plain").write_text("")
    assert load_function(f"{folder}/c:d.py").__name__ == load_function(f"{folder}/c:d.py:f").__name__ == "f"
    for name in (f"{folder}/plain:f", f"{folder}/plain", f"{folder}/none.py:f", "a:b:c", "..:f"):
        with pytest.raises(ConfigError, match=re.escape(f"the function {name!r}")):
            load_function(name)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file in a folder may have any name: what is written of it is text."""
    folder = tmp_path / "pool"
    folder.mkdir()
    lines = json.dumps(pool_rows(1)[0]) + "\n{}\n"
    (folder / os.fsdecode(b"a\xff.jsonl")).write_text(lines)
    (folder / os.fsdecode(b"b\xff.bin")).write_text("")
    loaded = load_examples(str(folder))
    for entry in (*loaded.skipped, *loaded.unread):
        assert r"\xff" in entry.source
        json.dumps(asdict(entry), ensure_ascii=False).encode()


# --- models and adapters that are hostile


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["hostile", "junk", "", "number"])
def test_weights_that_are_code(tiny: World, tmp_path: Path, content: str) -> None:
    """A pickle in place of weights is an error that names the folder, and never runs."""
    made = {"hostile": pickle.dumps(Hostile(tmp_path / "ran")), "junk": b"junk", "": b"", "number": pickle.dumps(5)}
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny.model, model)
    shutil.copytree(tiny.adapters[-1], adapter)
    for folder, old, new in (
        (model, "model.safetensors", "pytorch_model.bin"), (adapter, "adapter_model.safetensors", "adapter_model.bin"),
    ):  # fmt: skip
        (folder / old).unlink()
        (folder / new).write_bytes(made[content])
    for options in ({"model": model}, {}):
        more = () if options else ("--adapter", adapter)
        result = tiny("select", tmp_path / f"run-{len(more)}", *more, **options)
        assert result.code == 1
        assert "should not have happened" not in result.err
        assert str(adapter if more else model) in result.err
    assert not (tmp_path / "ran").exists()


STATES = [
    5, {"state": 5}, {"state": {0: 5}}, {"state": {0: {"exp_avg": 1, "exp_avg_sq": 2}}},
    {"state": {0: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1), "step": "x"}}, "param_groups": 5},
    {"state": {"a": {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1), "step": "x"}}, "param_groups": [5]},
    {"state": {"a": {"exp_avg": "x", "exp_avg_sq": None}}}, {"state": {"x": [1, 2]}}, {"state": {(1, 2): {}}},
    {"state": {0: [1]}, "param_groups": [{"params": "a"}]},
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=str)
def test_optimizer_states_of_other_types(state: Any, tiny: World, tmp_path: Path) -> None:
    """Whatever torch.load gives, it is moments or an error of ours that names the file."""
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny.adapters[-1], adapter)
    (adapter / "adam.safetensors").unlink()
    torch.save(state, adapter / "optimizer.pt")
    with pytest.raises(GradsiftError, match=r"optimizer\.pt"):
        load_moments(open_checkpoint(str(adapter)), {"a": (2, 2)})


TEMPLATES = {
    "a constant of 10 GB": "{{ 'x' * 10000000000 }}",
    "loops without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a long text": "{{ 'x' * 300000000 }}",
    "a width": "{{ '%10000000000d' % 3 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_bounds(name: str, tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template is given so many seconds and bytes, also before it runs; then the model is refused."""
    monkeypatch.setattr(template, "_RENDER_SECONDS", 1.0)
    tokenizer = load_tokenizer(tiny.model)
    tokenizer.chat_template = TEMPLATES[name]
    began = time.thread_time()
    with pytest.raises(ModelError, match="the chat template"):
        render(tokenizer, [{"role": "user", "content": "?"}])
    assert time.thread_time() - began < 20
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert render(tokenizer, [{"role": "user", "content": "?"}]) == "?"


def test_what_ends_in_time_is_not_stopped_later() -> None:
    """The exception comes inside, or not at all."""

    def run_on(seconds: float) -> None:
        with at_most(seconds, 1 << 30):
            while True:
                pass

    for seconds in (0.05, 0.3):
        with pytest.raises(OverrunError):
            run_on(seconds)
    with at_most(0.2, 1 << 30):
        time.sleep(0.6)  # a machine that is busy with something else
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        pass


# --- what servers and functions say


def test_secrets_in_every_field() -> None:
    """Whole, in part, in a URL, in base64, as a key or a value: what is written has stars in its place."""
    key = "sk-live/0123456789abcdef+xyz"
    secret = Secret(key)
    said = {"error": {"message": f"no {key}", key: [f"Bearer {key[:12]}", "sk-live%2F0123456789"]}, "n": 5, "ok": None}
    masked = json.dumps(secret.masked(said))
    assert not any(key[n : n + 8] in masked for n in range(len(key) - 7))
    assert "***" in masked
    assert secret.masked("nothing of it") == "nothing of it"
    assert Secret("EMPTY", None).masked("EMPTY") == "EMPTY"
    assert "0123" not in repr(secret)


@pytest.mark.parametrize(
    "value",
    [1e308, -1e308, float("inf"), float("nan"), 10**5000, "x", object()],
    ids=lambda value: type(value).__name__,
)
def test_rewards_that_are_none(value: Any) -> None:
    """The reward is blamed by its function's name, and not the model."""

    def score(prompts: Any, completions: Any) -> list[Any]:
        return [value, 1.0]

    samples = [Sample("p", n, "?", "a", (1,), {}) for n in range(2)]
    found = reward_samples(samples, score)
    assert list(found.values) == [None, 1.0]
    assert found.problems[0].reason.startswith("score: returned ")


# --- records that gradsift goes on from

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def misshapen(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """A record in which a field, at any depth, is missing or of another value."""
    record = json.loads(json.dumps(whole))
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(VALUES)
        else:
            del place[key]
        break
    return json.dumps(record).encode()


CONFIG = {"dtype": "float16", "view": "plain", "segments": [{"name": "a", "start": 0, "stop": 5, "shape": [5, 1]}]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gradient store of two shards."""
    folder = tmp_path_factory.mktemp("store")
    writer = GradientStoreWriter(LocalStorage(folder), "", CONFIG)
    writer.layout({"shard_rows": 2, "token_budget": 64})
    for shard in range(2):
        columns = ShardColumns([f"{shard}a", f"{shard}b"], [1.0, 2.0], [3, 4], [1.0, 1.0], [1.0, 1.0], {})
        writer.write_shard(shard, torch.randn(2, 5), columns)
    writer.finish(2)
    return folder


@settings(max_examples=int(os.environ.get("GRADSIFT_FUZZ", "40")), deadline=20_000)
@given(data=st.data())
def test_records_of_a_store(finished: Path, data: st.DataObject) -> None:
    """Well-formed records of other shapes are a store all the same, or CorruptError; who goes on
    with such a store finds its shards damaged, and no other exception."""
    name = data.draw(st.sampled_from(["manifest.json", "store.json", "layout.json", "shard-00000.json"]))
    path = finished / name
    whole = path.read_bytes()
    content = {key: value for key, value in json.loads(whole).items() if key != "_digest"}
    path.write_bytes(data.draw(misshapen(content) | VALUES.map(lambda value: json.dumps(value).encode())))
    try:
        with suppress(CorruptError):
            store = GradientStore.open(finished)
            assert store.rows(0, len(store)).shape[0] == 4
            assert all(isinstance(reason, str) for reason in store.excluded.values())
        try:
            writer = GradientStoreWriter(LocalStorage(finished), "", CONFIG)
        except GradsiftError:
            return
        layout = writer.layout({"shard_rows": 2, "token_budget": 64})
        assert layout["shard_rows"] >= 1
        assert layout["token_budget"] >= 1
        assert writer.shard_state(0, ["0a", "0b"]) in ("complete", "damaged")
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path, list[list[str]]]:
    """A run in which something of most kinds is finished, and the commands that go on from it."""
    folder = tmp_path_factory.mktemp("used")
    tiny, out = World.make(folder), folder / "run"
    nice = (
        "--estimator",
        "nice",
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--reward",
        "length:1-3",
        "--budget",
        "5",
    )
    explain = tiny.arguments("explain", out, "--prompt", "what", "--max-new-tokens", "4", "-k", "3", "--json")
    commands = [tiny.arguments("select", out, *nice, "--json"), explain, ["report", str(out)]]
    for command in commands:
        Cli(*command).succeeded()
    return tiny, out, commands


@pytest.mark.slow
def test_every_json_file_of_a_run(used: tuple[World, Path, list[list[str]]]) -> None:
    """Each file that a run goes on from, replaced by `{}` or by an object whose values are all of another type, is made
    again, not read, or named in an error that says what to do."""
    _, out, commands = used
    kinds: dict[tuple[str, str], Path] = {}
    for path in sorted(out.rglob("*.json")):
        inside = path.relative_to(out)
        kinds.setdefault((inside.parts[0], re.sub("[0-9a-f]{12,}", "#", path.name)), path)
    assert len(kinds) > 15
    for path in kinds.values():
        whole = path.read_bytes()
        for content in ({}, dict.fromkeys(json.loads(whole), 5)):
            path.write_text(json.dumps({key: value for key, value in content.items() if key != "_digest"}))
            command = commands[2] if path.parent == out and path.name != "run.json" else commands[0]
            result = Cli(*command)
            assert "should not have happened" not in result.err, (path, content, result.err)
            assert result.code == 0 or path.name in result.err, (path, content, result.err)
        path.write_bytes(whole)


# --- what the dead leave


def test_what_dead_writers_left(tmp_path: Path) -> None:
    """Whoever holds the folder removes half-written files and folders of processes that are there no more; those of
    living ones, and young ones of other machines, stay. None is listed."""
    storage = LocalStorage(tmp_path)
    mine = temporary_name(tmp_path / "a" / "x")
    names = {
        mine: True, mine.with_name(f".tmp-{machine()}-4194304-0-x"): False, mine.with_name(".tmp-abc-x"): False,
        mine.with_name(".tmp-ffffffff-1-0-x"): True, tmp_path / ".tmp-old" / "part": False,
    }  # fmt: skip
    for path in names:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    os.utime(mine)
    assert storage.list("") == []
    with storage.lock():
        assert {path: path.exists() for path in names} == names
    os.utime(mine.with_name(".tmp-ffffffff-1-0-x"), (0, 0))
    with storage.lock():
        assert not mine.with_name(".tmp-ffffffff-1-0-x").exists()


def test_costs_say_where_an_attempt_was_killed(tmp_path: Path) -> None:
    """The time of an interrupted attempt is counted; that of a killed one is lost, and is told from then on."""
    identity = {"a": 1}

    def attempt(error: type[BaseException] | None) -> StageClock:
        clock = StageClock(Run(tmp_path), {})
        try:
            with clock.timed("train", "arm", identity):
                time.sleep(0.01)
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        return clock

    attempt(KeyboardInterrupt)
    (cost,) = attempt(None).costs()
    assert cost.seconds >= 0.02
    assert not cost.lost
    (path,) = tmp_path.glob("times/*")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "done": False, "open": True}))  # as a process leaves it that is killed
    for _ in range(2):
        (cost,) = attempt(None).costs()
        assert cost.lost
    path.write_text('{"seconds": "x"}')
    assert not attempt(None).costs()[0].lost


def test_recipes_of_yaml_values(tmp_path: Path) -> None:
    """Every key of a recipe with every value that YAML has for another: a recipe, or a message."""
    path = tmp_path / "recipe.yaml"
    values = ["", None, True, 2**70, -1, 1.5, float("nan"), float("inf"), [], {}, [None], {"kind": 5}, "2026-01-01"]
    for key in Recipe.model_fields:
        for value in values:
            path.write_text(yaml.safe_dump({"model": "m", "pool": "p", "out": "o"} | {key: value}))
            with suppress(ConfigError):
                assert isinstance(load_recipe(path), Recipe)
