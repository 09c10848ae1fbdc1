"""Files of random and of altered content: an error that says so, or a result; never another exception, hang or escape.

A test run takes the same few examples each time; `GRADSIFT_FUZZ=10000` asks for as many new ones.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.base.errors import CorruptError, GradsiftError
from gradsift.base.types import Prompt
from gradsift.data.load import load_examples
from gradsift.generation.samples import _SCHEMA, Samples
from gradsift.model.models import adapter_identity
from gradsift.options import template
from gradsift.recipe import Recipe, as_yaml, load_recipes
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns
from gradsift.store.manifest import read_json
from gradsift.store.run import Run
from gradsift.store.storage import LocalStorage
from gradsift.warmup.checkpoint import open_checkpoint
from tiny_world import pool_rows

EXAMPLES = int(os.environ.get("GRADSIFT_FUZZ", "25"))
few = settings(max_examples=EXAMPLES, deadline=20_000, print_blob=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def altered(draw: st.DrawFn, *wholes: bytes) -> bytes:
    """One of some files with a few changes: bytes set, cut out, doubled, put in, or the rest missing."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 40))
        change = draw(st.sampled_from(["set", "cut", "double", "insert", "end"]))
        if change == "set" and data:
            data[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[place : place + length]
        elif change == "double":
            data[place:place] = data[place : place + length]
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=20) | st.sampled_from([b"[" * 3000, b"9" * 5000, b'"', b"\n"]))
        else:
            del data[place:]
    return bytes(data)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


ROWS = pool_rows(4)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'prompt,completion\r\nhi,"a, b"\r\n"x ""y""",z\r\n'
POOLS = {
    ".jsonl": (LINES, b'{"prompt": "a", "completion": "b"}\n', b"\xef\xbb\xbf" + LINES),
    ".json": (json.dumps(ROWS).encode(), json.dumps({"data": ROWS}).encode(), LINES),
    ".csv": (CSV,),
    ".tsv": (CSV.replace(b",", b"\t"),),
    ".parquet": (parquet(ROWS), parquet([{"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}])),
    ".jsonl.gz": (gzip.compress(LINES, mtime=0),),
}


def result_or_error(call: Callable[[], Any], error: type[Exception] = GradsiftError) -> Any:
    with suppress(error):
        return call()
    return None


@pytest.mark.parametrize("suffix", POOLS)
@few
@given(data=st.data())
def test_pools(suffix: str, data: st.DataObject) -> None:
    """Whatever a file holds, its rows are examples or are left out with a reason, or the file is refused."""
    content = data.draw(altered(*POOLS[suffix]) | st.binary(max_size=200))
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"pool{suffix}"
        path.write_bytes(content)
        loaded = result_or_error(lambda: load_examples(str(path)))
        if loaded is not None:
            assert loaded.examples
            assert len({example.id for example in loaded.examples}) == len(loaded.examples)
            json.dumps([list(example.messages) for example in loaded.examples]).encode()


RECIPES = (
    template("recipe.yaml").encode(),
    as_yaml(Recipe(model="m", pool="p", out="o", target="t", budget=0.1)).encode(),
    *(path.read_bytes() for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))),
)
YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Recipe.model_fields, "models", "kind"]) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@few
@given(content=altered(*RECIPES) | st.binary(max_size=200) | YAML.map(lambda value: yaml.safe_dump(value).encode()))
def test_recipes(content: bytes) -> None:
    """Whatever a recipe says, it is one or several, or a message."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        recipes = result_or_error(lambda: load_recipes(path))
        assert recipes is None or all(isinstance(recipe, Recipe) for recipe in recipes)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
HOSTILE_RECIPES = {
    "a billion laughs": LAUGHS,
    "an alias inside itself": "warmup: &a {x: *a}\nmodels: [*a]\n",
    "nested": "[" * 5000,
    "a day that is none": "model: 2026-02-31\n",
    "an object of Python": "model: !!python/object/apply:os.system [touch /tmp/x]\n",
    "a long one": "# " + "x" * 2_000_000,
}


@pytest.mark.parametrize("name", HOSTILE_RECIPES)
def test_hostile_recipes(name: str, tmp_path: Path) -> None:
    """Aliases that stand for billions of values, endless ones, deep ones and code are refused at once."""
    (tmp_path / "recipe.yaml").write_text(HOSTILE_RECIPES[name])
    with pytest.raises(GradsiftError, match=r"recipe\.yaml"):
        load_recipes(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a gradient store of three shards."""
    folder = tmp_path_factory.mktemp("store")
    segments = [{"name": "a", "start": 0, "stop": 5, "shape": [5, 1]}]
    writer = GradientStoreWriter(LocalStorage(folder), "", {"dtype": "float16", "view": "plain", "segments": segments})
    writer.layout({"shard_rows": 2})
    for shard in range(3):
        columns = ShardColumns([f"{shard}a", f"{shard}b"], [1.0, 2.0], [3, 4], [1.0, 1.0], [1.0, 1.0], {})
        writer.write_shard(shard, torch.randn(2, 5), columns)
    writer.finish(3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NAMES = ("manifest.json", "rows.parquet", "shard-00000.safetensors", "shard-00001.safetensors")


@few
@given(data=st.data())
def test_stores(data: st.DataObject, store: dict[str, bytes]) -> None:
    """A store with an altered file is CorruptError when its checksums are compared; also where they are not, reading
    it is rows or CorruptError, within the file."""
    name = data.draw(st.sampled_from(NAMES))
    content = data.draw(altered(store[name]) | st.binary(max_size=100))
    with TemporaryDirectory() as folder:
        for other, whole in store.items():
            (Path(folder) / other).write_bytes(whole if other != name else content)
        if content != store[name]:
            opened = result_or_error(lambda: GradientStore.open(folder), CorruptError)
            assert opened is None or name == "manifest.json"  # an added blank is no other value
        unchecked = result_or_error(lambda: GradientStore.open(folder, verify=False), CorruptError)
        if unchecked is not None:
            rows = result_or_error(lambda: unchecked.rows(0, len(unchecked)), GradsiftError)
            assert rows is None or rows.shape == (len(unchecked), rows.shape[1])


@few
@given(content=altered(b'{"kind": "x", "config": {"a": [1, 2.5, null]}}') | st.binary(max_size=99))
def test_manifests(content: bytes) -> None:
    """A manifest is an object or CorruptError, and to a run none at all then."""
    with TemporaryDirectory() as folder:
        run = Run(folder)
        run.storage.publish("data/1/manifest.json", content)
        found = result_or_error(lambda: read_json(run.storage, "data/1/manifest.json"), CorruptError)
        assert run.manifest("data/1/") == found
        run.storage.publish("run.json", content)
        result_or_error(run.identity, CorruptError)


def responses() -> bytes:
    table = pa.table(
        {
            "prompt_id": ["p", "p"], "number": [0, 1], "prompt_ids": [[1, 2], [1, 2]], "token_ids": [[3], [4, 5]],
            "finish_reason": ["stop", "length"], "text": ["a", "b"], "logprobs": [[-1.0], None],
            "sampler_logprobs": [None, [-1.0, -2.0]],
        },
        schema=_SCHEMA.with_metadata({"usage": b'{"requests": 1}'}),
    )  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


@few
@given(content=altered(responses()) | st.binary(max_size=99))
def test_responses(content: bytes) -> None:
    """A file of responses is responses or CorruptError."""
    with TemporaryDirectory() as folder:
        run, prompt = Run(folder), Prompt("p", ({"role": "user", "content": "x"},))
        samples = Samples(run, {}, [prompt], {"p": [0, 1]}, 2)
        run.storage.publish(f"{samples.prefix}{_folder_of(prompt)}/000000.parquet", content)
        result_or_error(lambda: samples["p"], CorruptError)


def test_responses_with_an_altered_footer() -> None:
    """Checksums are of pages: a column's name, the schema and the metadata lie outside of them."""
    whole = responses()
    prompt = Prompt("p", ({"role": "user", "content": "x"},))
    with TemporaryDirectory() as folder:
        run = Run(folder)
        samples = Samples(run, {}, [prompt], {"p": [0, 1]}, 2)
        for old, new in ((b"number", b"\x80umber"), (b"number", b"numbed"), (b'{"requests"', b'{"requestz"')):
            assert old in whole
            run.storage.publish(f"{samples.prefix}{_folder_of(prompt)}/000000.parquet", whole.replace(old, new))
            with pytest.raises(CorruptError, match=r"000000\.parquet"):
                samples["p"]


def _folder_of(prompt: Prompt) -> str:
    from gradsift.generation.samples import prompt_key

    return prompt_key(prompt)


CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}).encode()
STATE = json.dumps({"epoch": 2.0, "log_history": [{"epoch": 1.5, "learning_rate": 1e-4}]}).encode()
JSON_FILES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["epoch", "log_history", "learning_rate"]), inner, max_size=3)
    ),
).map(lambda value: json.dumps(value).encode())


@few
@given(config=altered(CONFIG) | JSON_FILES, state=altered(STATE) | JSON_FILES, info=st.booleans())
def test_adapters(config: bytes, state: bytes, info: bool) -> None:
    """An adapter's folder is a checkpoint or an error of ours."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "adapter_config.json").write_bytes(config)
        (path / "adapter_model.safetensors").write_bytes(b"")
        (path / ("checkpoint.json" if info else "trainer_state.json")).write_bytes(state)
        result_or_error(lambda: adapter_identity(path))
        found = result_or_error(lambda: open_checkpoint(folder))
        assert found is None or found.learning_rate is None or isinstance(found.learning_rate, float)


def test_hostile_ids_stay_inside_files(tmp_path: Path) -> None:
    """Ids that are paths name no file: responses lie below the run folder, wherever their prompt's id points to."""
    out = tmp_path / "run"
    for id_ in ("../../escaped", "/escaped", "a/../../b", "x\0y", "." * 5, "~root"):
        prompt = Prompt(id_, ({"role": "user", "content": "x"},))
        samples = Samples(Run(out), {}, [prompt], {id_: [0]}, 1)
        key = f"{samples.prefix}{_folder_of(prompt)}/x"
        assert (out / key).resolve().is_relative_to(out.resolve())
        assert "escaped" not in key
    assert np.all([path == out for path in tmp_path.iterdir()])
