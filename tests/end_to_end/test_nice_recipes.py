"""NICE's recipes: what they say is what the paper says, and each runs dry.

A tiny model, tiny rows with the columns of the hub's data sets, a tiny reward model, a judge and an assistant on this
machine; fewer samples, shorter texts, and no RDS, which needs an encoder. Everything else is as written. Recipes with
the same pool share a run folder, and so a warm-up.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from gradsift.evaluation.arms import contenders
from gradsift.influence.nice import NICE
from gradsift.recipe import Recipe, load_recipes
from loopback import Server, completion, serving
from tiny_world import ANIMALS, COLOURS, Cli, World, pool_rows, save_model, target_rows, write_rows

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PAPER = ("alpacaeval", "tldr", "rlhf", "humaneval")
USER = ("nice.yaml", "nice-amc.yaml", "nice-code.yaml", "nice-compare-small.yaml")
LLAMA, MISTRAL = "meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"


def paper(task: str) -> list[Recipe]:
    return load_recipes(RECIPES / f"nice-compare-{task}.yaml")


# --- what the recipes say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PAPER)
def test_the_papers_settings(task: str) -> None:
    """Appendices A.2, B.2 and C: warm-up, projection, sampling, budgets, the assistant; the baselines of Table 3."""
    recipes = paper(task)
    assert {LLAMA, MISTRAL} <= {recipe.model for recipe in recipes}
    for recipe in recipes:
        warmup, share = recipe.warmup, 0.2 if recipe.out.endswith("aware") else 0.05
        assert (warmup.fraction, recipe.budget) == (share, share)
        assert (warmup.epochs, warmup.learning_rate, warmup.batch_size, warmup.warmup_ratio) == (4, 2e-5, 128, 0.03)
        assert (warmup.rank, warmup.alpha, warmup.dropout, warmup.target_modules) == (128, 512, 0.1, None)
        assert (warmup.schedule, warmup.weight_decay) == ("linear", 0)
        assert recipe.gradients.projection.dim == 8192
        estimator, assisted = recipe.estimator, recipe.controls[0]
        assert isinstance(estimator, NICE)
        assert isinstance(assisted, NICE)
        assert (estimator.optimizer, estimator.normalise, estimator.checkpoints) == ("adam", True, "all")
        assert (estimator.policy.variant, estimator.policy.baseline) == ("plain", "none")
        samples = 500 if task == "humaneval" else 20
        own = estimator.sampling
        assert (own.samples, own.top_k, own.top_p) == (samples, 50, 0.95)
        assert own.temperature == (1.0 if task == "alpacaeval" else 1.2)
        assert assisted.assistant is not None
        assert assisted.assistant.model.model == "gpt-4-turbo-2024-04-09"  # type: ignore[union-attr]
        g = assisted.assistant.sampling
        assert (g.samples, g.temperature, g.top_k, g.top_p) == (samples, 0.8, None, None)
        assert own.max_new_tokens == g.max_new_tokens
        kinds = [control.kind for control in recipe.controls[1:]]
        assert kinds == ["less", "rds", "bm25", "dsir", "random", "random", "random"]
        assert (recipe.aggregation, recipe.selection.kind) == ("max_of_means", "top_k")


def test_the_papers_tasks() -> None:
    """Table 2 and Appendices B and C.2: validation sets, subtasks, reward models, judge, the assistant's prompts."""
    alpaca, tldr, rlhf, humaneval = (paper(task)[0] for task in PAPER)
    assert alpaca.target_sample is not None
    assert (alpaca.target_sample.size, alpaca.target_sample.within, alpaca.subtask) == (2, "dataset", "dataset")
    assert alpaca.reward is not None
    assert (alpaca.reward.kind, alpaca.reward.mode) == ("judge", "pairwise")  # type: ignore[union-attr]
    assert alpaca.judge is not None
    assert round(6447 * tldr.target_sample.size) == 322  # type: ignore[union-attr]
    assert tldr.reward.model == "OpenAssistant/reward-model-deberta-v3-large-v2"  # type: ignore[union-attr]
    assert (tldr.subtask, rlhf.subtask) == (None, None)
    assert rlhf.target == "trl-lib/hh-rlhf-helpful-base:train[:5%]"
    assert rlhf.reward.model == "Ray2333/gpt2-large-helpful-reward_model"  # type: ignore[union-attr]
    assert humaneval.target_sample.size == 10  # type: ignore[union-attr]
    assert humaneval.subtask == "task_id"
    assert humaneval.reward.kind == "unit_tests"  # type: ignore[union-attr]
    suffix = tldr.controls[0].assistant.prompt_suffix  # type: ignore[union-attr]
    assert suffix.strip() == "A brief summary of my post is (TL;DR) :"
    assert humaneval.controls[0].assistant.prompt_prefix == (  # type: ignore[union-attr]
        "Complete the following python function to return only the function body (completion).\n"
        "Do not include the function header or docstring.\n"
    )


def test_the_tasks_own_pools() -> None:
    """Section 4.2: RLHF also takes from the rest of its training data, last turns alone, HumanEval from Code Alpaca."""
    rlhf = [recipe for recipe in paper("rlhf") if recipe.out.endswith("aware")]
    assert [recipe.model for recipe in rlhf[:2]] == [LLAMA, MISTRAL]
    assert {recipe.model for recipe in rlhf[2:]} == {"meta-llama/Llama-2-13b-hf", "meta-llama/Meta-Llama-3-8B"}
    assert {(recipe.pool, recipe.supervise) for recipe in rlhf} == {
        ("trl-lib/hh-rlhf-helpful-base:train[5%:]", "last_turn")
    }
    code = [recipe for recipe in paper("humaneval") if recipe.out.endswith("aware")]
    assert [(recipe.model, recipe.pool) for recipe in code] == [
        (model, "sahil2801/CodeAlpaca-20k") for model in (LLAMA, MISTRAL)
    ]


# --- dry runs -----------------------------------------------------------------------------------------------------


def alpaca_rows() -> list[dict[str, Any]]:
    sources = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna")
    return [
        {"instruction": f"what says {animal} {n}", "output": "it says", "generator": "g", "dataset": sources[n % 5]}
        for n, animal in enumerate(ANIMALS * 2)
    ]


def tldr_rows() -> list[dict[str, Any]]:
    return [
        {"id": f"t{n}", "subreddit": "pets", "title": f"my {animal}", "post": f"the {animal} {n}", "summary": "it says"}
        for n, animal in enumerate(ANIMALS * 5)
    ]


def dialogue_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        {
            "prompt": [turn("user", f"{COLOURS[n % 8]} {n}"), turn("assistant", "it is"), turn("user", ANIMALS[n % 8])],
            "chosen": [turn("assistant", f"the {ANIMALS[n % 8]} {n}")],
            "rejected": [turn("assistant", "no")],
        }
        for n in range(start, start + count)
    ]


def problem_rows(count: int = 3) -> list[dict[str, Any]]:
    """Problems that end in a comment, so that a model that knows no Python solves them while it writes no new line."""
    return [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"def add_{n}(x):\n    return x + {n}\n    # ",
            "canonical_solution": " the end",
            "test": f"def check(candidate):\n    assert candidate(2) == {2 + n}\n",
            "entry_point": f"add_{n}",
        }
        for n in range(count)
    ]


def code_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"instruction": f"write {ANIMALS[n % 8]} {n}", "input": "red" * (n % 2), "output": f"print({n})"}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under names of their own, and a reward function for the templates."""
    root = tmp_path_factory.mktemp("nice-recipes")
    (root / "tulu").mkdir()
    rows = [{**row, "dataset": row["source"]} for row in pool_rows(40)]
    write_rows(root / "tulu" / "a_data.jsonl", rows[:30])
    write_rows(root / "tulu" / "b_data.jsonl", rows[30:])
    write_rows(root / "prompts.jsonl", [{"prompt": f"what says the {animal}"} for animal in ANIMALS[:3]])
    (root / "alpaca_eval.json").write_text(json.dumps(alpaca_rows()))
    write_rows(root / "tldr.jsonl", tldr_rows())
    write_rows(root / "tldr_test.jsonl", [{**row, "id": f"test-{row['id']}"} for row in tldr_rows()[:2]])
    write_rows(root / "helpful.jsonl", dialogue_rows(3))
    write_rows(root / "helpful_rest.jsonl", dialogue_rows(40, start=3))
    write_rows(root / "problems.jsonl", problem_rows())
    write_rows(root / "human_eval.jsonl", problem_rows(4))
    write_rows(root / "code_alpaca.jsonl", code_rows())
    for name, rows in (("target", target_rows(3)), ("test", target_rows(5)[3:])):
        write_rows(root / f"{name}.jsonl", rows)
    reward = "def length(completions, **columns):\n    return [len(c) / 9 for c in completions]\n"
    (root / "rewards.py").write_text(reward)
    return root


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("reward-model")
    save_model(path)
    config = LlamaConfig.from_pretrained(path)
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return str(path)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that likes one text better than another whatever the order, and an assistant that knows animals."""
    question = body["messages"][-1]["content"]
    said = dict(re.findall(r"response ([AB]) begins\]\n(.*?)\n\[\w+ response \1 ends", question, re.DOTALL))
    if said:
        better = max(said, key=lambda name: zlib.crc32(said[name].encode()))
        return completion(f"One is better.\nBetter: {better}")
    return completion(*(f"{ANIMALS[n % 8]} {body['seed'] % 7}" for n in range(body.get("n", 1))))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(answer) as opened:
        yield opened


LOCAL = {
    "data/train/processed": "tulu",
    "pool.jsonl": "tulu",
    "prompts.jsonl": "prompts.jsonl",
    "target.jsonl": "target.jsonl",
    "test.jsonl": "test.jsonl",
    "problems.jsonl": "problems.jsonl",
    "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json": "alpaca_eval.json",
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered:validation": "tldr.jsonl",
    "trl-lib/hh-rlhf-helpful-base:train[:5%]": "helpful.jsonl",
    "trl-lib/hh-rlhf-helpful-base:train[5%:]": "helpful_rest.jsonl",
    "openai/openai_humaneval:test": "human_eval.jsonl",
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered:test": "tldr_test.jsonl",
    "trl-lib/hh-rlhf-helpful-base:test": "helpful.jsonl",
    "sahil2801/CodeAlpaca-20k": "code_alpaca.jsonl",
}


class Dry:
    """Recipes with tiny things in place of the hub's."""

    def __init__(self, folder: Path, tiny: World, reward_model: str, server: Server) -> None:
        self.folder, self.tiny, self.reward_model, self.server = folder, tiny, reward_model, server

    def written(self, name: str, entry: int | None = None) -> Path:
        """A recipe (of several models, one) as a file."""
        content = yaml.safe_load((RECIPES / name).read_text())
        if entry is not None:
            content["models"] = [content["models"][entry]]
        for settings in [content, *content.get("models", [])]:
            self.replace(settings)
        path = self.folder / f"dry-{entry}-{name}"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def replace(self, settings: dict[str, Any]) -> None:
        if "model" in settings:
            settings["model"] = self.tiny.model
            settings["out"] = str(self.folder / f"run-{LOCAL[settings.get('pool', 'pool.jsonl')].partition('.')[0]}")
        for key in ("pool", "target"):
            if key in settings:
                settings[key] = str(self.folder / LOCAL[settings[key]])
        if "target_sample" in settings and settings["target_sample"]["size"] > 2:
            settings["target_sample"]["size"] = 3
        reward = settings.get("reward", {})
        if "model" in reward:
            reward["model"] = self.reward_model
        if "name" in reward:
            reward["name"] = str(self.folder / reward["name"].partition(":")[0])
        methods = [settings.get("estimator", {}), *settings.get("controls", [])]
        methods = [method for method in methods if isinstance(method, dict)]
        samplings = [method["sampling"] for method in methods if "sampling" in method]
        for assistant in (method["assistant"] for method in methods if "assistant" in method):
            self.to_server(assistant["model"])
            samplings.append(assistant["sampling"])
        for sampling in samplings:
            sampling |= {"samples": 2, "max_new_tokens": 5}
        if "judge" in settings:
            self.to_server(settings["judge"])
        if "compare" in settings:
            self.replace_compared(settings["compare"])
        if "controls" in settings:  # an encoder is no tiny thing
            settings["controls"] = [control for control in settings["controls"] if control != "rds"]
        settings |= {key: value for key, value in (("max_length", 96), ("dtype", "float32")) if key in settings}

    def replace_compared(self, compare: dict[str, Any]) -> None:
        """One seed, no encoder, and short answers; methods are those of `estimator` and `controls`, or ways of them."""
        compare |= {"seeds": [0], "embedding": None}
        for place in [*compare.get("metrics", []), compare.get("curve", {})]:
            place |= {key: str(self.folder / LOCAL[place[key]]) for key in ("data",) if place.get(key) in LOCAL}
            if "sampling" in place:
                place["sampling"] = {"samples": 1, "temperature": 0, "max_new_tokens": 5}
        for arm in compare.get("arms", []):
            methods = arm.get("estimator", [])
            for method in (
                one for one in (methods if isinstance(methods, list) else [methods]) if isinstance(one, dict)
            ):
                method.get("sampling", method.get("assistant", {}).get("sampling", {})).update(max_new_tokens=5)
                if isinstance(method.get("assistant", {}).get("model"), list):
                    method["assistant"]["model"] = [self.tiny.model]
            if isinstance(methods, list):
                arm["estimator"] = [method for method in methods if method != "rds"]

    def to_server(self, endpoint: dict[str, Any]) -> None:
        endpoint |= {"base_url": self.server.url, "longest_wait": 1}


@pytest.fixture(scope="module")
def dry(folder: Path, tiny: World, reward_model: str, server: Server) -> Dry:
    return Dry(folder, tiny, reward_model, server)


def ran(path: Path, prompts: int) -> tuple[dict[str, Any], Path]:
    """Run a recipe and look at what every choice by NICE leaves behind."""
    found = Cli("run", path, "--json").succeeded().json
    (recipe,) = load_recipes(path)
    out = Path(found["out"])
    table = pq.read_table(out / "scores.parquet")
    methods = {estimator.label for estimator in (recipe.estimator, *recipe.controls)}
    assert methods == set(table["method"].to_pylist())
    assert all(abs(value) < 1e9 for value in table["score"].to_pylist())
    chosen = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
    assert len(chosen) == max(1, round(recipe.budget * len(set(table["id"].to_pylist()))))
    assert [row["gradsift_rank"] for row in chosen] == list(range(1, len(chosen) + 1))
    diagnostics = json.loads((out / "diagnostics.json").read_text())
    assert len(diagnostics["prompts"]) == prompts
    assert len(diagnostics["checkpoints"]) == 4  # one for each epoch
    return diagnostics, out


def test_nice_runs(dry: Dry) -> None:
    """The template with a reward function: own samples at each of four checkpoints."""
    ran(dry.written("nice.yaml"), prompts=3)


@pytest.mark.slow
def test_nice_amc_runs(dry: Dry) -> None:
    """The template with an assistant: a server writes the responses, once for all checkpoints."""
    before = len(dry.server.requests)
    ran(dry.written("nice-amc.yaml"), prompts=3)
    asked = dry.server.requests[before:]
    assert len(asked) == 3 * 2
    assert {request["temperature"] for request in asked} == {0.8}


def test_nice_code_runs(dry: Dry) -> None:
    """The template with unit tests: programs are run in the sandbox, and each problem is a subtask."""
    diagnostics, _ = ran(dry.written("nice-code.yaml"), prompts=3)
    assert diagnostics["prompts"] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]


@pytest.mark.slow
def test_alpacaeval_runs(dry: Dry) -> None:
    """Two prompts of each of five sources; the judge sees each pair in both orders, the assistant's responses too."""
    before = len(dry.server.requests)
    ran(dry.written("nice-compare-alpacaeval.yaml", 0), prompts=10)
    judged = [request for request in dry.server.requests[before:] if "Better: tie" in str(request["messages"])]
    assert len(judged) % 2 == 0
    assert {request["model"] for request in judged} == {"gpt-4-1106-preview"}


@pytest.mark.slow
def test_tldr_runs(dry: Dry) -> None:
    """5% of the posts, with the authors' prompt; the assistant alone is asked for a brief summary."""
    before = len(dry.server.requests)
    diagnostics, _ = ran(dry.written("nice-compare-tldr.yaml", 0), prompts=2)
    assert all(id_.startswith("t") for id_ in diagnostics["prompts"])
    asked = {request["messages"][-1]["content"] for request in dry.server.requests[before:]}
    assert len(asked) == 2
    assert all(
        re.fullmatch(r"Subreddit: r/pets\n\nTitle: my \w+\n\nthe .+\n\nTL;DR: A brief .* :", text) for text in asked
    )


@pytest.mark.parametrize(
    ("entry", "count"), [pytest.param(0, 2, marks=pytest.mark.slow), (4, 8)], ids=["task-agnostic", "task-aware"]
)
def test_rlhf_runs(dry: Dry, entry: int, count: int) -> None:
    """5% of a mixed pool, or 20% of the task's own, by a reward model that reads conversations as Anthropic's are."""
    _, out = ran(dry.written("nice-compare-rlhf.yaml", entry), prompts=3)
    assert len((out / "selected.jsonl").read_text().splitlines()) == count


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "count"), [(0, 2), (2, 8)], ids=["task-agnostic", "task-aware"])
def test_humaneval_runs(dry: Dry, entry: int, count: int) -> None:
    """A sample of the problems, whole programs or bodies, of the model's own and of the assistant's."""
    diagnostics, out = ran(dry.written("nice-compare-humaneval.yaml", entry), prompts=3)
    assert len((out / "selected.jsonl").read_text().splitlines()) == count
    assert set(diagnostics["prompts"]) <= {row["task_id"] for row in problem_rows(4)}


@pytest.mark.parametrize("name", [*USER, *(f"nice-compare-{task}.yaml" for task in PAPER)])
def test_the_recipes_can_be_planned(dry: Dry, name: str) -> None:
    """`plan` reads the pool and the prompts, and estimates the stages without sampling anything."""
    before = len(dry.server.requests)
    found = Cli("plan", dry.written(name, None if name in USER else 0), "--json", "--quiet").succeeded().json
    assert found["checkpoints"] == (1 if "small" in name else 4)
    assert found["target"]["rows"] == {"nice-compare-alpacaeval.yaml": 10, "nice-compare-tldr.yaml": 2}.get(name, 3)
    stage = found["stages"]["pool gradients"]
    assert stage["done"] or stage["seconds"] > 0  # another recipe's run may have made them
    assert len(dry.server.requests) == before


def test_the_papers_arms() -> None:
    """Tables 3, 9, 10, 12, 13 and 14, App. I.3, Figures 3 and 7: which models train on whose choices."""
    arms = {
        recipe.out.removeprefix("runs/nice-paper/"): {
            one.name.partition(" (gpt")[0]
            for one in contenders(recipe.compare.arms, recipe.estimator, recipe.selection)
        }
        for task in PAPER
        for recipe in paper(task)
        if recipe.compare is not None
    }
    others = {"full pool", "random", "NICE-AMC", "LESS", "RDS", "BM25", "DSIR", "LESS, TSDS"}
    table3, written = {*others, "NICE"}, {"LESS+GPT"}
    more = {"NICE (M=5)", "NICE (M=10)", "NICE (discrete)"}
    more |= {"NICE-AMC (Qwen2.5-7B-Instruct)", "NICE-AMC (Qwen2.5-3B-Instruct)"}
    code = {*others, "NICE (M=500)"}
    assert (
        arms["tldr/Llama-2-7b-hf"] == arms["alpacaeval/Mistral-7B-v0.1"] == arms["rlhf/mistral-7b"] == table3 | written
    )
    assert arms["rlhf/llama-2-7b"] == table3 | written | more
    assert arms["rlhf/llama-3-8b"] == arms["rlhf/llama-2-13b-aware"] == {"random", "RDS", "BM25", "LESS", "NICE"}
    assert arms["rlhf/llama-2-7b-aware"] == arms["rlhf/mistral-7b-aware"] == table3 | {"NICE (ppo)"}
    assert arms["humaneval/llama-2-7b"] == code | written
    assert arms["humaneval/mistral-7b-aware"] == code | {"NICE (M=500, ppo)", "NICE at temperature 1"}
    assert len(arms) == 2 + 2 + 8 + 4


@pytest.mark.slow
def test_tldr_is_compared(dry: Dry) -> None:
    """Every arm of Table 3 but RDS is chosen, trained on and measured, LESS+GPT and TSDS among them, with a curve on
    the posts that the sample leaves."""
    path = dry.written("nice-compare-tldr.yaml", 0)
    found = Cli("compare", path, "--quiet", "--json").succeeded().json
    measured = {row["arm"].partition(" (gpt")[0] for row in found["rows"] if row["figure"] == "reward"}
    assert measured == {
        "full pool",
        "random",
        "NICE (M=2)",
        "NICE-AMC",
        "LESS",
        "BM25",
        "DSIR",
        "LESS, TSDS",
        "LESS+GPT",
    }
    assert found["failures"] == []
