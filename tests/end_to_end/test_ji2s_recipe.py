"""JI2S's recipe: what it says is what the paper says, and it runs dry.

A tiny model, rows with the columns that the hub's and the authors' files have, a judge and a grader on this machine,
one seed and one small budget, and gradients in place of DEITA's encoder. lm-eval's tasks are tasks of our own, where it
is installed. Everything else is as written.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsift.evaluation.arms import Compare, Contender, contenders
from gradsift.influence.ji2s import JI2S
from gradsift.recipe import Recipe, load_recipes
from loopback import Server, completion, serving
from tiny_world import ANIMALS, COLOURS, Cli, World, write_lm_eval_task, write_rows

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "ji2s-paper.yaml"
LM_EVAL = importlib.util.find_spec("lm_eval") is not None
SETS = ("lima", "vicuna", "koala", "wizardlm", "sinstruct")


def compared(recipe: Recipe) -> tuple[Compare, dict[str, Contender]]:
    assert recipe.compare is not None
    found = contenders(recipe.compare.arms, recipe.estimator, recipe.selection)
    return recipe.compare, {one.name: one for one in found}


def test_the_papers_settings() -> None:
    """Sections 5 and 6.3, Appendix B.2 and Table 4: models, warm-up, projection, λ, sizes, baselines, trainings."""
    recipes = load_recipes(RECIPE)
    assert [recipe.model.split("/")[1] for recipe in recipes] == ["Llama-2-7b-hf", "Mistral-7B-v0.1", "Llama-2-13b-hf"]
    rates = {"Llama-2-7b-hf": (5, 2e-5), "Mistral-7B-v0.1": (5, 2e-6), "Llama-2-13b-hf": (10, 1e-5)}
    whole = {"Llama-2-7b-hf": (3, 2e-5), "Mistral-7B-v0.1": (3, 4e-6), "Llama-2-13b-hf": (5, 1e-5)}
    for recipe in recipes:
        name = recipe.model.split("/")[1]
        assert (recipe.pool, recipe.target) == ("tatsu-lab/alpaca", "hf://datasets/GAIR/lima/train.jsonl")
        warmup = recipe.warmup
        assert (warmup.fraction, warmup.epochs, warmup.learning_rate, warmup.batch_size) == (0.05, 4, 2e-5, 128)
        assert (warmup.rank, warmup.alpha, warmup.dropout, warmup.schedule) == (128, 512, 0.1, "cosine")
        assert recipe.gradients.projection.dim == 8192
        job, arms = compared(recipe)
        assert job.budgets == ((1000, 2000, 3000) if name == "Llama-2-7b-hf" else (1000,))
        assert len(job.seeds) == 3
        weights = {arm.setting for arm in arms.values() if isinstance(arm.estimator, JI2S)}
        assert weights == {0, 0.05, 0.1, 0.15, 0.2}
        assert {"LIMA-1k", "Alpaca-52k", "AlpaGasus", "DEITA", "random"} < set(arms)
        training, full = job.training, arms["Alpaca-52k"].training
        assert (training.epochs, training.learning_rate) == rates[name]
        assert (training.batch_size, training.schedule, training.weight_decay) == (128, "linear", 0.1)
        assert training.warmup_ratio == 0
        assert full is not None
        assert (full.epochs, full.learning_rate) == whole[name]
        assert (full.schedule, full.warmup_ratio, full.weight_decay, full.batch_size) == ("cosine", 0.3, 0, 128)


def test_the_papers_tests() -> None:
    """Appendix C and Table 1: four benchmarks by their shots, MT-Bench for the 7B models, five sets for LLaMA2-7B."""
    shots = {("arc_challenge",): 25, ("hellaswag",): 10, ("mmlu",): 5, ("winogrande",): 5}
    jobs = [compared(recipe)[0] for recipe in load_recipes(RECIPE)]
    for job in jobs:
        harness = {metric.tasks: metric.num_fewshot for metric in job.metrics if metric.kind == "lm_eval"}
        assert harness == shots
    assert [sum(metric.kind == "grading" for metric in job.metrics) for job in jobs] == [1, 1, 0]
    judged = [metric for metric in jobs[0].metrics if metric.kind == "pairwise"]
    assert [Path(metric.data).name for metric in judged] == [f"{name}_test_set.jsonl" for name in SETS]
    assert {(metric.opponent, metric.budget) for metric in judged} == {("JI2S (λ=0.1)", 1000)}


# --- dry run ------------------------------------------------------------------------------------------------------


def questions(name: str) -> list[dict[str, Any]]:
    """Rows as the authors' five files have them."""
    texts = [f"what colour is the {animal} {name}" for animal in ANIMALS[:2]]
    if name == "sinstruct":
        return [{"instruction": text, "instances": [{"input": "red", "output": "no"}]} for text in texts]
    key = {"lima": "conversations", "vicuna": "text", "koala": "prompt", "wizardlm": "Instruction"}[name]
    return [{key: text} for text in texts]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A grader, an examiner and a judge in one, each by the form that it is asked for."""
    question = body["messages"][-1]["content"]
    draw = zlib.crc32(question.encode())
    if "Score:" in question:
        return completion(f"Score: {1 + draw % 9 / 2}")
    return completion(f"Grade: {1 + draw % 10}" if "Grade:" in question else f"Better: {('A', 'B', 'tie')[draw % 3]}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(answer) as opened:
        yield opened


def dry(tiny: World, folder: Path, server: Server) -> Path:
    """The first model's part with tiny things in place of the hub's."""
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    tests = folder / "Cherry_LLM"
    tests.mkdir()
    for name in SETS:
        write_rows(tests / f"{name}_test_set.jsonl", questions(name))
    alpaca = [
        {"instruction": f"what says {ANIMALS[n % 8]} {n}", "input": "", "output": COLOURS[n % 8], "text": "…"}
        for n in range(24)
    ]
    lima = [{"conversations": [f"what colour is {n}", COLOURS[n]], "source": "stackexchange"} for n in range(4)]
    lima.append({"conversations": ["why", "so", "really", "yes"], "source": "multi_turn"})
    turns = {"category": "writing", "prompt": ["what is red", "and blue"], "reference": [], "prompt_id": 7}
    content["models"] = [{"model": tiny.model, "out": str(folder / "run")}]
    content |= {"pool": write_rows(folder / "alpaca.jsonl", alpaca), "max_length": 96, "dtype": "float32"}
    content["target"] = write_rows(folder / "lima.jsonl", lima)
    content["judge"]["base_url"] = server.url
    job = content["compare"]
    job |= {"seeds": [0], "budgets": [6], "training": {"preset": "ji2s", "epochs": 1}}
    for arm in job["arms"]:
        if arm.get("name") == "LIMA-1k":
            arm["data"] = content["target"]
        if arm.get("name") == "Alpaca-52k":
            arm["training"] = {"preset": arm["training"], "epochs": 2}
        for rater in ("rater", "complexity", "quality"):
            if rater in arm.get("estimator", {}):
                arm["estimator"][rater]["endpoint"]["base_url"] = server.url
        if arm.get("selection") == {"kind": "diverse"}:  # an encoder is no tiny thing
            arm["selection"] |= {"by": "gradients", "max_cosine": 1}
    rows = [{"question": f"what is {n}", "choices": [" red", " blue"], "gold": n % 2} for n in range(4)]
    tasks = write_lm_eval_task(folder / "tasks", rows)
    metrics = []
    for metric in job["metrics"]:
        if metric["kind"] == "lm_eval":
            if LM_EVAL and metric["tasks"] == ["mmlu"]:
                own = {"tasks": ["colours"], "num_fewshot": 1, "include_path": tasks}
                metrics.append({**metric, **own})
            continue
        if metric["kind"] == "grading":
            metric |= {"questions": write_rows(folder / "mt_bench.jsonl", [turns])}
            metric["sampling"] = {"samples": 1, "temperature": 0, "top_k": None, "top_p": None, "max_new_tokens": 4}
        else:
            metric |= {"data": str(tests / Path(metric["data"]).name), "budget": 6}
            metric["sampling"] = {**metric["sampling"], "max_new_tokens": 4}
        metrics.append(metric)
    job["metrics"] = metrics
    path = folder / "dry.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("default" if LM_EVAL else "error")  # lm-eval's own
def test_the_recipe_runs(tiny: World, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arms are chosen, trained by their own settings and measured by every metric; JI2S at λ = 0.1 is whom the
    others are compared with, and not itself."""
    if LM_EVAL:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = Cli("compare", dry(tiny, tmp_path, server), "--quiet", "--json").succeeded().json
    assert found["failures"] == []
    cells = {cell["arm"]: cell for cell in found["cells"]}
    weights = [f"JI2S (λ={weight})" for weight in ("0", "0.05", "0.1", "0.15", "0.2")]
    assert set(cells) == {*weights, "LIMA-1k", "Alpaca-52k", "AlpaGasus", "DEITA", "random"}
    assert {cell["examples"] for name, cell in cells.items() if name not in ("LIMA-1k", "Alpaca-52k")} == {6}
    assert (cells["LIMA-1k"]["examples"], cells["Alpaca-52k"]["examples"]) == (5, 24)
    assert (cells["LIMA-1k"]["kept_epoch"], cells["Alpaca-52k"]["kept_epoch"]) == (1, 2)
    labels = [f"wins against JI2S (λ=0.1), 6 examples on {name}_test_set.jsonl" for name in SETS]
    for name, cell in cells.items():
        measured = {one["metric"]: one for one in cell["measured"]}
        assert all(one["error"] is None for one in measured.values()), measured
        wanted = {"grades on mt_bench.jsonl", *(labels if name != "JI2S (λ=0.1)" else ())}
        assert set(measured) - {"lm-eval colours"} == wanted
        assert ("lm-eval colours" in measured) == LM_EVAL
    page = (tmp_path / "run" / "comparison.html").read_text(encoding="utf-8")
    assert "Alpaca-52k" in page
    asked = {request["model"] for request in server.requests}
    assert asked == {"gpt-4", "gpt-3.5-turbo"}
    shown = [json.dumps(request["messages"]) for request in server.requests]
    assert any("sinstruct\\n\\nred" in text for text in shown)  # an instruction with its input


def test_the_recipe_can_be_planned(tiny: World, tmp_path: Path, server: Server) -> None:
    """`plan` tells the cost of the choice from the recipe as it is."""
    found = Cli("plan", dry(tiny, tmp_path, server), "--json", "--quiet").succeeded().json
    stages = (found[0] if isinstance(found, list) else found)["stages"]
    assert {"warm-up", "pool gradients"} <= set(stages)
