"""What docs/your-own-training.md says of selected.jsonl is true of its rows, and of what loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradsift as gs
from tiny_world import World, pool_rows

PAGE = (
    (Path(__file__).parents[2] / "docs" / "your-own-training.md")
    .read_text(encoding="utf-8")
    .partition("elsewhere\n")[2]
)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module", params=["messages", "completions"])
def chosen(request: Any, tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A form of rows, and the folder of a choice of some."""
    folder = tmp_path_factory.mktemp("hand_over")
    rows = pool_rows(8)
    if request.param == "completions":
        rows = [{"prompt": one["messages"][0]["content"], "completion": one["messages"][1]["content"]} for one in rows]
    pool = gs.open_pool(rows, model=tiny.model, out=str(folder / "run"), max_length=64, device="cpu")
    lines = gs.select(gs.score(pool, None, gs.Random()), budget=5).lines()
    (folder / "runs" / "math").mkdir(parents=True)
    (folder / "runs" / "math" / "selected.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return request.param, folder


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "math" / "selected.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_llama_factory(chosen: tuple[str, Path]) -> None:
    """The columns and tags that dataset_info.json names are those of the rows, and the file lies where it says."""
    form, folder = chosen
    entry = json.loads(block("json"))["chosen_chats" if form == "messages" else "chosen_completions"]
    (folder / "data").mkdir(exist_ok=True)
    assert (folder / "data" / entry["file_name"]).resolve().is_file()
    for row in read(folder):
        assert set(entry["columns"].values()) <= set(row)
        for message in row.get("messages", ()):
            assert set(message) == {entry["tags"]["role_tag"], entry["tags"]["content_tag"]}
            assert message["role"] in {entry["tags"]["user_tag"], entry["tags"]["assistant_tag"]}


def test_axolotl(chosen: tuple[str, Path]) -> None:
    """Its data set is the file, of messages with the roles that are trained."""
    form, folder = chosen
    (entry,) = yaml.safe_load(block("yaml"))["datasets"]
    assert (folder / entry["path"]).is_file()
    for row in read(folder) if form == "messages" else ():
        assert {message["role"] for message in row[entry["field_messages"]]} >= set(entry["roles_to_train"])


def test_datasets(chosen: tuple[str, Path]) -> None:
    """The library datasets loads the file, alone and as a folder's."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    _, folder = chosen
    place = folder / "runs" / "math"
    cache = str(folder / "cache")
    for found in (
        datasets.load_dataset("json", data_files=str(place / "selected.jsonl"), split="train", cache_dir=cache),
        datasets.load_dataset(str(place), data_files="selected.jsonl", split="train", cache_dir=cache),
        datasets.load_dataset(str(place), split="train", cache_dir=cache),
    ):
        assert found["gradsift_id"] == [row["gradsift_id"] for row in read(folder)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl(chosen: tuple[str, Path], tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFTTrainer takes the choice as the page has it, but for the labels of this template, which TRL does not know."""
    pytest.importorskip("trl", reason="TRL, which loads the choice, is not installed: pip install trl")
    _, folder = chosen
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"model": tiny.model}
    exec(block("py").replace("assistant_only_loss=True", "use_cpu=True, bf16=False, report_to=[]"), names)
    assert len(names["trainer"].train_dataset) == 5
    assert {"input_ids", "labels"} <= set(next(iter(names["trainer"].get_train_dataloader())))
