"""Every command as a user types it, on a tiny model: what it prints, what it leaves, and that nothing is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import gradsift as gs
from gradsift.model import models
from tiny_world import Cli, World, pool_rows, write_rows

ADDED = {"gradsift_id", "gradsift_score", "gradsift_rank"}


@pytest.fixture(scope="module")
def selected(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after one `select`."""
    out = tmp_path_factory.mktemp("selected") / "run"
    tiny("select", out, "--budget", "4").succeeded()
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading a model is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    models._HOSTS.clear()
    monkeypatch.setattr(models, "load_model", refuse)


def test_select_prints_json_and_leaves_files_that_agree_with_it(tiny: World, selected: Path) -> None:
    """The JSON, selected.jsonl and scores.parquet name the same examples, highest score first."""
    summary = tiny("select", selected, "--budget", "4", "--json").succeeded().json
    chosen = summary["selections"][0]
    rows = rows_of(selected / "selected.jsonl")
    assert [row["gradsift_id"] for row in rows] == chosen["ids"] == [row["id"] for row in rows]
    assert [row["gradsift_score"] for row in rows] == chosen["scores"] == sorted(chosen["scores"], reverse=True)
    assert [row["gradsift_rank"] for row in rows] == [1, 2, 3, 4]
    table = pq.read_table(selected / "scores.parquet").to_pylist()
    best = sorted((r for r in table if r["target"] == "*" and r["method"] == "LESS"), key=lambda r: -r["score"])
    assert [row["id"] for row in best[:4]] == chosen["ids"]
    assert {row["method"] for row in table} == {"LESS", "BM25", "RDS+", "random (seed 0)"}
    assert all(Path(path).is_file() for path in summary["files"].values())
    assert [s["estimator"] for s in summary["selections"]] == ["LESS", "BM25", "RDS+", "random (seed 0)"]
    assert json.loads((selected / "summary.json").read_text())["selections"] == summary["selections"]


def test_selected_rows_load_with_datasets_and_keep_every_column(selected: Path, tmp_path: Path) -> None:
    """`load_dataset("json")` reads the subset; what the user wrote is in it as it was, with three columns added."""
    from datasets import load_dataset

    loaded = load_dataset("json", data_files=str(selected / "selected.jsonl"), split="train", cache_dir=str(tmp_path))
    originals = {row["id"]: row for row in pool_rows()}
    assert set(loaded.column_names) == {"id", "messages", "source", "weight_kg"} | ADDED
    for row in loaded:
        assert {key: value for key, value in row.items() if key not in ADDED} == originals[row["id"]]


def test_text_output_names_what_was_chosen_and_where_the_files_are(tiny: World, selected: Path) -> None:
    """Without --json the chosen examples stand in a table, and the page is named."""
    shown = tiny("select", selected, "--budget", "4").succeeded()
    for row in rows_of(selected / "selected.jsonl"):
        assert row["id"] in shown.out
    assert "4 of 24 chosen by LESS" in shown.out
    assert "report.html" in shown.out
    assert shown.err == ""  # --quiet


def test_a_second_call_loads_no_model(tiny: World, selected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages of the first call are found again: same result, with the model out of reach."""
    first = tiny("select", selected, "--budget", "4", "--json").json["selections"]
    without_model(monkeypatch)
    for budget, count in (("4", 4), ("25%", 6)):
        assert (
            len(tiny("select", selected, "--budget", budget, "--json").succeeded().json["selections"][0]["ids"])
            == count
        )
    assert tiny("select", selected, "--budget", "4", "--json").json["selections"] == first
    tiny("score", selected).succeeded()
    assert len(tiny("warmup", selected, "--json").succeeded().json) == 2
    assert len(tiny("collect", selected, "--json").succeeded().json) == 2


def test_a_run_folder_can_be_moved(
    tiny: World, selected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere holds everything, down to the adapters that its gradients were taken at."""
    first = tiny("select", selected, "--budget", "4", "--json").json["selections"]
    shutil.copytree(selected, tmp_path / "moved")
    without_model(monkeypatch)
    assert tiny("select", tmp_path / "moved", "--budget", "4", "--json").succeeded().json["selections"] == first


def test_the_whole_pool_is_100_percent_and_one_is_one(tiny: World, selected: Path) -> None:
    """`--budget 100%` is every example, `--budget 1` is a single one."""
    assert len(tiny("select", selected, "--budget", "100%", "--json").json["selections"][0]["ids"]) == 24
    assert len(tiny("select", selected, "--budget", "1", "--json").json["selections"][0]["ids"]) == 1


def test_facility_location_and_random_choices(tiny: World, selected: Path) -> None:
    """λ = 0 is top-k, λ = 1 is not; random choices depend on the seed alone and are no top-k."""

    def chosen(*options: str) -> list[str]:
        return tiny("select", selected, "--budget", "6", "--json", *options).succeeded().json["selections"][0]["ids"]

    best = chosen()
    assert chosen("--selection", "facility_location", "--trade-off", "0") == best
    assert chosen("--selection", "facility_location", "--trade-off", "1") != best
    drawn = chosen("--selection", "random")
    assert len(set(drawn)) == 6
    assert drawn != best
    assert drawn == chosen("--selection", "random")


def test_subtasks_score_the_best_mean_over_them(tiny: World, selected: Path) -> None:
    """With --subtask the aggregate is the maximum over subtasks of the mean within each, from scores.parquet itself."""
    tiny("score", selected, "--subtask", "task").succeeded()
    table = pq.read_table(selected / "scores.parquet").to_pylist()
    less: dict[str, dict[str, float]] = {}
    for row in table:
        if row["method"] == "LESS":
            less.setdefault(row["id"], {})[row["target"]] = row["score"]
    for scores in less.values():
        odd, even = (scores["t0"] + scores["t2"]) / 2, (scores["t1"] + scores["t3"]) / 2
        assert scores["*"] == pytest.approx(max(odd, even), abs=1e-6)


def test_two_adapters_give_what_their_own_warm_up_gives(tiny: World, tmp_path: Path) -> None:
    """The checkpoints of a warm-up, given with --adapter to another run, give the same scores."""
    own = tiny("select", tmp_path / "own", "--budget", "5", "--json").succeeded().json["selections"][0]
    given = tiny("select", tmp_path / "given", "--budget", "5", "--json", *tiny.with_adapters()).succeeded().json
    assert given["selections"][0]["ids"] == own["ids"]
    assert given["selections"][0]["scores"] == pytest.approx(own["scores"], abs=1e-6)
    assert not (tmp_path / "given" / "checkpoints").exists()


def test_collect_stores_each_view_of_each_checkpoint(tiny: World, tmp_path: Path) -> None:
    """Two checkpoints and two views are four stores of all rows; the text form names their folders."""
    options = ("--views", "adam,plain", *tiny.with_adapters())
    found = tiny("collect", tmp_path / "run", "--json", *options).succeeded().json
    assert [(entry["view"], entry["rows"], entry["dim"]) for entry in found] == [
        ("adam", 24, 256),
        ("plain", 24, 256),
    ] * 2
    shown = tiny("collect", tmp_path / "run", *options).succeeded().out
    assert all(entry["path"] in shown for entry in found)
    for entry in found:
        assert 0 < entry["measured_error"]["rms"] < 1.5 / 256**0.5
        assert (
            f"{entry['view']} rows at {entry['checkpoint']}: cosines off by {entry['measured_error']['rms']:.3g}"
            in shown
        )
    refused = tiny("collect", tmp_path / "run", "--views", "adam,modules")
    assert "wanted adam, plain or segments" in refused.err
    assert refused.code == 2


def test_warmup_prints_its_checkpoints(tiny: World, selected: Path) -> None:
    """One line and one JSON entry per epoch, each a folder with an adapter."""
    found = tiny("warmup", selected, "--json").succeeded().json
    assert [Path(entry["adapter"]).name for entry in found] == ["epoch-1", "epoch-2"]
    assert all((Path(entry["adapter"]) / "adapter_model.safetensors").is_file() for entry in found)
    assert found[0]["learning_rate"] > found[1]["learning_rate"] > 0
    assert len(tiny("warmup", selected).succeeded().out.splitlines()) == 2


def explained(tiny: World, out: Path, *options: object, **replaced: object) -> dict[str, Any]:
    asked = ("--json", "--max-new-tokens", 6, "--embedding", "none", *options)
    result: dict[str, Any] = tiny("explain", out, *asked, **replaced).succeeded().json
    return result


def test_explain_a_prompt_as_text_and_as_messages(tiny: World, selected: Path) -> None:
    """A text is one user message: both forms explain the same output with k examples by both strategies."""
    question = "what colour is the dog"
    text = explained(tiny, selected, "--prompt", question, "-k", 3)["explanations"]
    messages = json.dumps([{"role": "user", "content": question}])
    assert explained(tiny, selected, "--prompt", messages, "-k", 3)["explanations"] == text
    assert len(text) == 1
    assert text[0]["generated"]
    assert [(r["estimator"], r["strategy"], r["k"]) for r in text[0]["results"]] == [
        ("LESS (SGD, last checkpoint)", "relevance pursuit", 3),
        ("LESS (SGD, last checkpoint)", "most helpful", 3),
    ]
    assert all(len(result["examples"]) == 3 for result in text[0]["results"])
    with_system = json.dumps([{"role": "system", "content": "be brief"}, {"role": "user", "content": question}])
    assert explained(tiny, selected, "--prompt", with_system)["explanations"][0]["messages"][0]["role"] == "system"
    shown = tiny("explain", selected, "--prompt", question, "--max-new-tokens", 6).succeeded().out
    assert "the model says" in shown
    assert "dB" in shown


def test_explain_rows_of_a_file(tiny: World, selected: Path) -> None:
    """--target explains every row, --row one, --use-answers the rows' own answers, --output another."""
    few = ("--pages", 1)
    whole = explained(tiny, selected, *few, target=tiny.target)
    assert [entry["id"] for entry in whole["explanations"]] == ["t0", "t1", "t2", "t3"]
    one = explained(tiny, selected, "--row", "t2", target=tiny.target)["explanations"]
    assert [(entry["id"], entry["output"]) for entry in one] == [("t2", whole["explanations"][2]["output"])]
    answers = explained(tiny, selected, *few, "--use-answers", target=tiny.target)["explanations"]
    assert [entry["output"] for entry in answers][:2] == ["the cat is red", "the dog is blue"]
    assert not any(entry["generated"] for entry in answers)
    given = explained(tiny, selected, "--row", "t2", "--output", "it says moo", target=tiny.target)["explanations"]
    assert [(entry["output"], entry["generated"]) for entry in given] == [("it says moo", False)]
    shown = tiny("explain", selected, *few, "--use-answers", target=tiny.target).succeeded().out
    assert "Selection relevance in dB (ratio of means over 4 outputs)" in " ".join(shown.split())


def test_explaining_a_training_example_finds_it(tiny: World, selected: Path) -> None:
    """The gradient of a pool row's own answer is reconstructed exactly by that row, alone."""
    row = pool_rows()[6]
    prompt, answer = (message["content"] for message in row["messages"])
    entry = explained(tiny, selected, "--prompt", prompt, "--output", answer, "-k", 1)["explanations"][0]
    assert len(entry["results"]) == 2
    for result in entry["results"]:
        assert [(e["id"], e["rank"]) for e in result["examples"]] == [("p06", 1)]
        assert result["examples"][0]["coefficient"] == pytest.approx(1, abs=1e-3)
        assert result["relevance_db"] > 50


def test_explain_goes_on_when_some_rows_cannot_be_used(tiny: World, tmp_path: Path) -> None:
    """A row without a prompt and an empty one are listed with reasons; the others are explained."""
    rows = [{"id": "bad"}, {"id": "empty", "prompt": " "}, {"id": "good", "prompt": "what says the cow"}]
    found = explained(tiny, tmp_path / "run", target=write_rows(tmp_path / "ask.jsonl", rows))
    assert [entry["id"] for entry in found["explanations"]] == ["good"]
    listed = {row["id"]: row["reason"] for row in rows_of(tmp_path / "run" / "skipped.jsonl")}
    assert listed == {"bad": "missing_columns", "empty": "no_output"}


def test_skipped_lists_every_row_that_was_left_out(tiny: World, tmp_path: Path) -> None:
    """Unreadable rows, duplicates, overlap and bad targets all stand in skipped.jsonl, with file and line."""
    pool = pool_rows(12)
    pool.append({**pool[0], "id": "again"})
    pool.append({"id": "shared", "prompt": "what colour is the cat of 0", "completion": "THE cat is  red"})
    pool.append({"id": "mute", "prompt": "x", "completion": ""})
    path = tmp_path / "pool.jsonl"
    write_rows(path, pool)
    path.write_text(path.read_text() + '{"id": "cut\n')
    target = tmp_path / "target.jsonl"
    target.write_text(Path(tiny.target).read_text() + '{"id": "t9"}\n')
    out = tmp_path / "run"
    found = tiny("select", out, "--budget", "2", "--json", pool=path, target=target).succeeded().json
    listed = {(row["id"], row["reason"]) for row in rows_of(out / "skipped.jsonl")}
    assert listed == {("again", "duplicate"), ("shared", "overlap"), ("mute", "empty_answer"),
                      ("pool.jsonl:16", "bad_json"), ("t9", "missing_columns")}  # fmt: skip
    assert found["skipped"] == {reason: 1 for _, reason in listed}
    kept = tiny("select", out, "--budget", "13", "--keep-overlap", "--json", pool=path, target=target).succeeded()
    assert "shared" in kept.json["selections"][0]["ids"]


def test_nothing_that_a_terminal_obeys_is_printed(tiny: World, tmp_path: Path) -> None:
    """Escape sequences in ids, prompts and answers are shown as replacement characters, markup as it stands."""
    rows = pool_rows(8)
    rows[0] |= {"id": "[red]x[/red]", "prompt": "\x1b[31mcolour", "completion": "\x1b]0;title\x07cat"}
    del rows[0]["messages"]
    out, pool = tmp_path / "run", write_rows(tmp_path / "pool.jsonl", rows)
    shown = tiny("select", out, "--budget", "8", pool=pool).succeeded().out
    asked = ("--prompt", "\x1b[31mcolour", "--output", "\x1b]0;title\x07cat", "-k", 1)
    shown += tiny("explain", out, *asked, pool=pool).succeeded().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\ufffd[31mcolour" in shown
    assert "[red]x[/red]" in shown


def test_collect_alone_lists_rows_left_out(tiny: World, tmp_path: Path) -> None:
    """`collect` and `warmup` say and list what they leave out, too."""
    pool = write_rows(tmp_path / "pool.jsonl", [*pool_rows(8), {"id": "mute", "prompt": "x", "completion": ""}])
    shown = Cli(*[a for a in tiny.arguments("collect", tmp_path / "run", pool=pool) if a != "--quiet"]).succeeded()
    assert (
        "8 rows used, 1 left out (1 empty_answer; first, mute: message 2 is an assistant turn without text)"
        in shown.err
    )
    assert [row["id"] for row in rows_of(tmp_path / "run" / "skipped.jsonl")] == ["mute"]


def test_repeated_ids_get_a_suffix(tiny: World, tmp_path: Path) -> None:
    """Two rows with one id stay apart, and the summary says so."""
    pool = pool_rows(10)
    pool[3]["id"] = pool[2]["id"]
    path = write_rows(tmp_path / "pool.jsonl", pool)
    found = tiny("select", tmp_path / "run", "--budget", "10", "--json", pool=path).succeeded().json
    assert {"p02", "p02-2"} <= set(found["selections"][0]["ids"])
    assert "'p02' became 'p02-2'" in found["pool"]["description"]


def test_init_then_run(tiny: World, selected: Path, tmp_path: Path) -> None:
    """The recipe that `init` writes, filled in, runs, and chooses what the same options choose."""
    path = tmp_path / "recipes" / "first.yaml"
    assert str(path) in Cli("init", path).succeeded().out
    content = yaml.safe_load(path.read_text())
    content |= {"model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(tmp_path / "run")}
    content |= {"max_length": 64, "budget": 4, "device": "cpu"}
    content["warmup"] = {"preset": "less", "fraction": 0.5, "epochs": 2, "rank": 4, "alpha": 8, "learning_rate": 0.01,
                         "batch_size": 4, "dropout": 0}  # fmt: skip
    content["gradients"]["projection"]["dim"] = 256
    path.write_text(yaml.safe_dump(content))
    found = Cli("run", path, "--json", "--quiet").succeeded().json
    wanted = tiny("select", selected, "--budget", "4", "--json").json
    assert found["selections"][0] == wanted["selections"][0]
    other = Cli("run", path, "--json", "--quiet", "--out", tmp_path / "other").succeeded().json
    assert other["out"] == str(tmp_path / "other")
    assert other["selections"][0] == wanted["selections"][0]


def test_a_recipe_can_choose_and_explain(tiny: World, tmp_path: Path) -> None:
    """With target and explain both are done in one run; without a target, the explanation alone."""
    recipe: dict[str, Any] = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(tmp_path / "run"), "budget": 3,
        "adapter": tiny.adapters, "gradients": {"projection": {"kind": "sparse", "dim": 256}},
        "explain": {"prompt": "what says the cow", "k": 2, "max_new_tokens": 4},
    }  # fmt: skip
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(recipe))
    both = Cli("run", path, "--json", "--quiet").succeeded().json
    assert len(both["selections"][0]["ids"]) == 3
    assert len(both["explanations"]) == 1
    del recipe["target"]
    path.write_text(yaml.safe_dump(recipe))
    alone = Cli("run", path, "--json", "--quiet").succeeded().json
    assert alone["explanations"] == both["explanations"]
    assert "selections" not in alone


def test_plan_counts_and_leaves_nothing_behind(tiny: World, tmp_path: Path) -> None:
    """Rows, tokens and disk are counted exactly; the run folder is not made; the text form is a table."""
    found = tiny("plan", tmp_path / "run", "--json").succeeded().json
    assert found["pool"]["rows"] == 24
    assert found["target"]["rows"] == 4
    assert found["checkpoints"] == 2
    assert found["stages"]["pool gradients"]["tokens"] == 2 * found["pool"]["tokens"]
    assert found["stages"]["pool gradients"]["disk_bytes"] == (2 + 1) * 24 * 256 * 2  # and plain ones, to explain by
    assert found["stages"]["warm-up"]["disk_bytes"] > 0
    assert not (tmp_path / "run").exists()
    shown = tiny("plan", tmp_path / "run").succeeded().out
    assert "pool gradients" in shown
    assert "tokens/s" in shown
    heading = f"{tiny.model}: 24 pool rows, {found['pool']['tokens']:,} tokens, longest {found['pool']['longest']}, "
    assert f"{heading}2 checkpoints" in " ".join(shown.split())
    with_adapter = tiny("plan", tmp_path / "run", "--json", *tiny.with_adapters()).succeeded().json
    assert "warm-up" not in with_adapter["stages"]


@pytest.mark.parametrize(
    ("options", "pool", "target", "checkpoints", "beside"),
    [
        (("--estimator", "bm25"), 0, 0, 0, 0),
        (("--estimator", "bm25", "--selection", "facility_location"), 1, 0, 1, 0),
        (("--estimator", "datainf"), 1, 1, 1, 1),
        (("--estimator", "datainf", "--views", "segments"), 1, 1, 1, 0),
    ],
)
def test_plan_counts_the_gradients_that_are_taken(
    tiny: World, tmp_path: Path, options: tuple[str, ...], pool: int, target: int, checkpoints: int, beside: int
) -> None:
    """A method without gradients needs no warm-up, unless its selection compares gradients; DataInf is taken at the
    last checkpoint, where the same passes leave plain rows beside its own, unless others are asked for."""
    out = tmp_path / "run"
    given = (*options, "--budget", "4")
    found = tiny("plan", out, *given, "--json").succeeded().json
    passes = {name: stage["tokens"] for name, stage in found["stages"].items()}
    assert found["checkpoints"] == checkpoints
    assert passes.get("pool gradients", 0) == pool * found["pool"]["tokens"]
    assert passes.get("target gradients", 0) == target * found["target"]["tokens"]
    assert ("warm-up" in passes) == (checkpoints > 0)
    tiny("select", out, *given).succeeded()
    rows = sum(len(gs.GradientStore.open(path.parent)) for path in out.glob("gradients/*/manifest.json"))
    assert rows == (pool + beside) * 24 + target * 4
    assert (out / "checkpoints").exists() == (checkpoints > 0)


def test_plan_counts_every_form_of_a_row(tiny: World, tmp_path: Path) -> None:
    """A choice by Adam rows at two checkpoints and an explanation by DataInf, which reads plain gradients and those of
    modules apart at the last: the files of rows are as large as was said, but for their headers and scales."""
    recipe: dict[str, Any] = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(tmp_path / "run"), "budget": 3,
        "adapter": tiny.adapters, "gradients": {"projection": {"dim": 256}}, "controls": [],
        "explain": {"prompt": "what says the cow", "k": 2, "max_new_tokens": 4, "estimators": [{"kind": "datainf"}]},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    stages = Cli("plan", path, "--json", "--quiet").succeeded().json["stages"]
    said = {name: stages[name]["disk_bytes"] for name in ("pool gradients", "target gradients", "gradients of answers")}
    row = 256 * 2
    assert said == {
        "pool gradients": (2 + 1 + 1) * 24 * row, "target gradients": 2 * 4 * row, "gradients of answers": 2 * row,
    }  # fmt: skip
    Cli("run", path, "--json", "--quiet").succeeded()
    stores = [gs.GradientStore.open(found.parent) for found in (tmp_path / "run").glob("gradients/*/manifest.json")]
    assert sum(len(store) * store.dim * 2 for store in stores) == sum(said.values())


def test_plan_counts_on_workers(tiny: World, tmp_path: Path) -> None:
    """Twelve shards on five workers take three rounds of a twelfth of the time; the warm-up is not divided; so many
    workers are said to be counted on."""
    given = ("--engine", "ray", "--workers", "5", "--shard-rows", "2")
    found = tiny("plan", tmp_path / "run", "--json", *given).succeeded().json
    assert found["workers"] == {"workers": 5, "threads": 1}
    stages, speed = found["stages"], found["sample"]["tokens_per_second"]
    tokens = stages["pool gradients"]["tokens"]
    assert stages["pool gradients"]["seconds"] == pytest.approx(tokens / speed * 3 / 12)
    assert stages["warm-up"]["seconds"] == pytest.approx(stages["warm-up"]["tokens"] / speed)
    assert found["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    shown = " ".join(tiny("plan", tmp_path / "run", *given).succeeded().out.split())
    assert "time: on 5 workers with 1 thread or a GPU each, as fast as measured here" in shown


def test_report_writes_the_page_again(selected: Path, tiny: World, tmp_path: Path) -> None:
    """The page of the latest results comes back byte for byte, and a copy goes where it is asked for."""
    tiny("select", selected, "--budget", "4").succeeded()
    page = (selected / "report.html").read_bytes()
    (selected / "report.html").unlink()
    assert b"measured on adam rows" in page
    copy = tmp_path / "new" / "page.html"
    assert str(copy) in Cli("report", selected, "--to", copy).succeeded().out
    assert copy.read_bytes() == page == (selected / "report.html").read_bytes()


def test_python_gives_what_the_command_line_gives(tiny: World, selected: Path, tmp_path: Path) -> None:
    """The same verbs on a fresh run folder give the same ids and scores, and the same explanation."""
    command = tiny("select", selected, "--budget", "4", "--json").succeeded().json["selections"][0]
    asked = explained(tiny, selected, "--prompt", "what says the bee", "-k", 3)["explanations"][0]
    pool = gs.open_pool(
        tiny.pool,
        model=tiny.model,
        out=str(tmp_path / "run"),
        warmup=gs.Warmup(fraction=0.5, epochs=2, rank=4, alpha=8, dropout=0, learning_rate=1e-2, batch_size=4),
        gradients=gs.Gradients(projection=gs.Projection(dim=256)),
        max_length=64,
        device="cpu",
    )
    scores = gs.score(pool, gs.open_target(tiny.target, pool), gs.LESS())
    chosen = gs.select(scores, gs.TopK(), budget=4)
    assert chosen.ids == command["ids"]
    assert np.allclose(chosen.scores, command["scores"], atol=1e-6)
    answer = gs.explain(pool, "what says the bee", k=3, max_new_tokens=6).entries[0]
    assert answer.output == asked["output"]
    for result, wanted in zip(answer.results, asked["results"], strict=True):
        assert [e.id for e in result.examples] == [e["id"] for e in wanted["examples"]]
        assert result.relevance_db == pytest.approx(wanted["relevance_db"], abs=1e-3)


def test_runs_with_other_gradients_share_a_folder(tiny: World, selected: Path, tmp_path: Path) -> None:
    """Another projection, estimator or target in the same folder is collected beside, and mixes with nothing."""
    out = tmp_path / "run"
    shutil.copytree(selected, out)
    for options in (("--projection", "kronecker"), ("--projection", "none"), ("--projection-seed", "1"),
                    ("--optimizer", "sgd"), ("--optimizer", "sgd", "--no-normalise"), ("--checkpoints", "last"),
                    ("--estimator", "bm25"), ("--estimator", "random"), ("--aggregation", "mean"),
                    ("--row-dtype", "float32"), ("--supervise", "all_turns")):  # fmt: skip
        if options == ("--projection", "kronecker"):
            options += ("--optimizer", "sgd")
        tiny("select", out, "--budget", "4", *options).succeeded()
    again = tiny("select", out, "--budget", "4", "--json").succeeded().json
    assert again["selections"] == tiny("select", selected, "--budget", "4", "--json").json["selections"]
