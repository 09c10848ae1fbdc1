"""The demo: both jobs on a small real model, with data of its own, and whether the choice helped."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path

from gradsift.base.progress import Reporter, silent
from gradsift.context import Pool
from gradsift.data.prepare import prepare
from gradsift.demo.model import demo_model
from gradsift.evaluation.fine_tune import train_on
from gradsift.evaluation.loss import held_out_loss
from gradsift.gradients.collect import Gradients
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.influence.random import Random
from gradsift.jobs.report import print_result, write_results
from gradsift.jobs.results import Result
from gradsift.jobs.select_explain import choose, explain_into, score_all, trust
from gradsift.recipe import Explain, Recipe
from gradsift.report.terminal import console
from gradsift.selection.select import Selection
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import Training, Warmup

_SKILL = "arithmetic"
_WARMUP = Warmup.preset("small")
_FINE_TUNE = Training.preset("small")


def run_demo(out: str = "runs/demo", *, model: str | None = None, reporter: Reporter | None = None) -> Result:
    """Choose 24 of 240 examples for a target of worked arithmetic, fine-tune on them, and explain two answers.

    The pool has seven skills and 24 planted mistakes, which no method is told of; the likes of the first answer, a
    conversion of units; and none of the second, a line of verse. A second call finds in `out` what the first has done.
    """
    reporter = reporter or silent()
    start = time.monotonic()
    data = resources.files("gradsift.demo") / "data"
    with resources.as_file(data) as folder, Run(out).lock():
        recipe = demo_recipe(out, model or str(demo_model(reporter)), folder)
        result = score_all(recipe, reporter, command="demo")
        choose(result)
        trust(result)
        _fine_tune(result, folder / "target_heldout.jsonl", reporter)
        explain_into(result)
        result.seconds = time.monotonic() - start
        write_results(result)
    return result


def demo_recipe(out: str, model: str, data: Path) -> Recipe:
    """What the demo runs."""
    return Recipe(
        model=model,
        pool=str(data / "pool.jsonl"),
        target=str(data / "target_validation.jsonl"),
        out=out,
        max_length=64,
        warmup=_WARMUP,
        gradients=Gradients(),
        estimator=LESS(),
        controls=(BM25(), Random()),
        budget=24,
        group_by=("skill", "quality"),
        explain=Explain(target=str(data / "questions.jsonl"), use_answers=True, k=5, candidates=20),
    )


def print_demo(result: Result) -> None:
    """The demo's tables, and what to try next."""
    print_result(result)
    out = console()
    folder = result.pool.run.folder
    out.print(f"\nThe demo took {result.seconds:.0f} s. Open {folder / 'report.html'} in a browser.\n", markup=False)
    out.print("What to try next, with your own files:", style="bold")
    out.print("  gradsift plan    --model MODEL --pool pool.jsonl --target target.jsonl --out runs/first", markup=False)
    out.print("  gradsift select  --model MODEL --pool pool.jsonl --target target.jsonl --budget 5% --out runs/first",
              markup=False)  # fmt: skip
    out.print('  gradsift explain --model MODEL --pool pool.jsonl --out runs/first --prompt "…"', markup=False)


def _fine_tune(result: Result, held_out: Path, reporter: Reporter) -> None:
    """Held-out loss of the target's skill before and after training on the choice and on random examples."""
    pool = result.pool
    data = prepare(pool.run, str(held_out), pool.chat, what="held-out examples", reporter=reporter)
    before = held_out_loss(pool, data, Checkpoint(None), what="held-out loss before")
    result.outcomes = {"before fine-tuning": {"held-out loss": before.mean}}
    for chosen in (result.selections[0], result.selections[-1]):
        name = chosen.estimator
        trained = train_on(pool, chosen, _FINE_TUNE, what=f"fine-tuning on the choice of {name}")
        after = held_out_loss(pool, data, trained.checkpoint, what=f"held-out loss, {name}")
        result.outcomes[f"24 chosen by {name}"] = {**_shares(pool, chosen), "held-out loss": after.mean}
    pairs = list(zip(pool.data.column("skill"), pool.data.column("quality"), strict=True))
    bad_within_skill = pairs.count((_SKILL, "bad")) / sum(skill == _SKILL for skill, _ in pairs)
    result.outcome_notes = [
        f"{_SKILL}: share of the target's skill among the chosen (pool: {_share(pool, 'skill', _SKILL):.0%}). "
        f"planted mistakes: share of rows with a wrong answer (pool: {_share(pool, 'quality', 'bad'):.0%}; among the "
        f"pool's {_SKILL} rows: {bad_within_skill:.0%}). Held-out loss: nats per token on {len(data)} "
        f"{_SKILL} examples that nothing was trained on or chosen by; lower is better.",
        "One seed and 24 examples: a demonstration, not evidence. Compare over seeds before you believe a difference.",
    ]


def _shares(pool: Pool, chosen: Selection) -> dict[str, float]:
    rows = [pool.data.row(id_) for id_ in chosen.ids]
    return {
        _SKILL: sum(row["skill"] == _SKILL for row in rows) / len(rows),
        "planted mistakes": sum(row["quality"] == "bad" for row in rows) / len(rows),
    }


def _share(pool: Pool, column: str, value: str) -> float:
    values = pool.data.column(column)
    return values.count(value) / len(values)
