"""NICE's tables in miniature: what a model earns after training on 10 % chosen by each method, for two rewards.

    python benchmarks/nice.py --out runs/nice                          # the main comparison; goes on where it stopped
    python benchmarks/nice.py --out runs/nice --arms main samples      # and the reward against M

Pool: 400 rows of ../shared/data/pool.jsonl. One warm-up and its two checkpoints serve all methods. A model is trained
afresh on each choice, once per seed; seeds differ in training and, for random, in the choice. Its expected reward is
measured on 48 prompts that nothing was chosen by, with draws that all models share. Further arms:

    samples      M = 5 and 10 beside 20: the smaller are the first of the larger (Figures 3, 7)
    influence    DataInf against NICE-IF (Table 6)
    written      LESS on labels that the assistant wrote (Table 14)
    variants     discrete, PPO, and plain with a leave-one-out baseline (Table 13, I.3)
    temperature  responses sampled at 1.0 and 1.2; pass@1, 10, 100 on the sums (Tables 8, 9)
    split        another 24 validation prompts (Figure 5)
    enlarged     half as many rows again to choose from, without a new warm-up (section 4.4)
    full         training on all rows (Table 3)

Results: OUT/results.md and OUT/results.json, written anew after each model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nice_prompts
import numpy as np
from relevance_table import DATA, rows_of

from gradsift import (
    BM25,
    LESS,
    NICE,
    NICEIF,
    Assistant,
    DataInf,
    Pool,
    PromptTarget,
    Random,
    Reporter,
    Sampling,
    Target,
    Training,
    Warmup,
    diagnose,
    open_pool,
    open_prompts,
    open_target,
    score,
    select,
    train,
)
from gradsift.base.ranks import spearman
from gradsift.compare.statistics import mean_and_spread, paired_difference
from gradsift.demo.model import demo_model
from gradsift.generation.local import LocalSampler
from gradsift.generation.samples import Samples, sample
from gradsift.gradients.policy import PolicyGradient
from gradsift.influence.estimator import Estimator
from gradsift.influence.nice import PolicyTargets, checkpoint_name, sampler_of
from gradsift.influence.prompts import reward_responses
from gradsift.rewards.estimators import pass_at_k
from gradsift.rewards.form import Sentiment
from gradsift.rewards.matching import Numeric
from gradsift.warmup.checkpoint import Checkpoint

TOKENS = 24
BUDGET = 0.1
# As in the demo: these adapters see 100 and 40 rows, not thousands.
WARMUP = Warmup(fraction=0.25, epochs=2, rank=16, alpha=32, learning_rate=5e-4, batch_size=8)
FINE_TUNE = Training(epochs=2, rank=16, alpha=32, learning_rate=5e-4, batch_size=8, dropout=0.0)
SAMPLING = Sampling(max_new_tokens=TOKENS)  # the paper's: 20 samples at temperature 1.2
COOL = Sampling(temperature=0.3, top_k=None, top_p=None, max_new_tokens=TOKENS)
EXACT = Sampling(temperature=1.0, top_k=None, top_p=None, max_new_tokens=TOKENS)  # what is measured: E r under f itself
SUFFIXES = (" Answer with the sum in a short sentence.", " Answer in a cheerful tone.")
BEFORE, WARM, WRITTEN, FULL = "base model", "warm-up, epoch 2", "written", "all rows"
REWARDS: dict[str, tuple[Any, Callable[[], dict[str, list[dict[str, Any]]]]]] = {
    "sums": (Numeric(), nice_prompts.sums),
    "sentiment": (Sentiment(), nice_prompts.openings),
}


@dataclass(frozen=True)
class Way:
    """One way to choose rows.

    name:     in tables
    method:   scores the pool; None takes all of it. Random is drawn anew with each seed
    part:     the prompts that it chooses by: `validation`, `other`, or `written`: the first with an assistant's labels
    enlarged: choose from the larger pool
    samples:  per test prompt, where it is not the default
    """

    name: str
    method: Estimator | None
    part: str = "validation"
    enlarged: bool = False
    samples: int | None = None


@dataclass
class Bench:
    """Pools, targets, and the results that there are."""

    args: argparse.Namespace
    reporter: Reporter
    model: str
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier call left."""
        path = self.out / "results.json"
        of = {name: getattr(self.args, name) for name in ("assistant", "rows", "row_tokens", "suffixes")}
        empty: dict[str, Any] = {"settings": of, "choices": {}, "cells": {}, "seconds": {}, "diagnostics": {}}
        self.results = json.loads(path.read_text()) if path.exists() else empty
        if self.results["settings"] != of:
            sys.exit(f"{path} is of other settings ({self.results['settings']}; wanted {of}): use another --out")

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.args.out)

    @cached_property
    def pool(self) -> Pool:
        """The rows to choose from."""
        return self._open(self.args.rows, self.out)

    @cached_property
    def enlarged(self) -> Pool:
        """Half as many rows again, with the adapters of the smaller pool's warm-up."""
        adapters = [str(checkpoint.adapter) for checkpoint in self.pool.checkpoints()]
        return self._open(self.args.rows * 3 // 2, self.out / "enlarged", adapters)

    def _open(self, rows: int, out: Path, adapters: list[str] | None = None) -> Pool:
        return open_pool(
            rows_of(self.model, rows, self.args.row_tokens), model=self.model, out=str(out), adapters=adapters or (),
            warmup=WARMUP, max_length=self.args.row_tokens, seed=42, reporter=self.reporter,
        )  # fmt: skip

    def assistant(self, task: str) -> Assistant:
        """The model itself, before any training and at a low temperature, told what is wanted."""
        suffix = self.args.suffixes[list(REWARDS).index(task)]
        return Assistant(model=self.args.assistant or self.model, sampling=COOL, prompt_suffix=suffix)

    def target(self, pool: Pool, task: str, part: str) -> PromptTarget | Target:
        """A task's prompts with their reward, or its validation prompts with labels that the assistant wrote."""
        reward, parts = REWARDS[task]
        if part != WRITTEN:
            return open_prompts(parts()[part], pool, reward)
        method = NICE(assistant=self.assistant(task))
        asked = open_prompts(parts()["validation"], pool, reward)
        said = sample(pool.run, asked.data.prompts, sampler_of(pool, method, Checkpoint(None)), reporter=self.reporter)
        rows = [
            {"id": id_, "messages": [*said.prompt(id_).messages, {"role": "assistant", "content": said[id_][0].text}]}
            for id_ in said
        ]
        return open_target(rows, pool)

    def ways(self, arm: str, task: str) -> list[Way]:
        """What an arm compares."""
        assistant = self.assistant(task)
        plain = NICE(sampling=SAMPLING)
        exact = SAMPLING.model_copy(update={"temperature": 1.0})
        passes = self.args.pass_samples
        match arm:
            case "main":
                return [
                    Way("NICE", plain), Way("NICE-AMC", NICE(assistant=assistant)), Way("LESS", LESS()),
                    Way("BM25", BM25()), Way("random", Random()),
                ]  # fmt: skip
            case "samples":
                sizes = [SAMPLING.model_copy(update={"samples": count}) for count in (5, 10)]
                return [Way(f"NICE M={sampling.samples}", NICE(sampling=sampling)) for sampling in sizes]
            case "influence":
                return [Way("NICE-IF", NICEIF(sampling=SAMPLING)), Way("DataInf", DataInf())]
            case "written":
                return [Way("LESS, written labels", LESS(), WRITTEN)]
            case "variants":
                policies = {
                    "leave-one-out": PolicyGradient(baseline="leave_one_out"),
                    "discrete": PolicyGradient(variant="discrete"), "PPO": PolicyGradient(variant="ppo"),
                }  # fmt: skip
                return [Way(f"NICE {name}", NICE(sampling=SAMPLING, policy=p)) for name, p in policies.items()]
            case "temperature":
                if task != "sums":
                    return []
                return [
                    Way("NICE T=1.0", NICE(sampling=exact), samples=passes), Way("NICE", plain, samples=passes),
                    Way("LESS", LESS(), samples=passes), Way("random", Random(), samples=passes),
                ]  # fmt: skip
            case "split":
                return [Way("NICE, other prompts", plain, "other")]
            case "enlarged":
                methods: dict[str, Estimator] = {"NICE": plain, "NICE-AMC": NICE(assistant=assistant), "LESS": LESS()}
                return [Way(f"{name}, larger pool", method, enlarged=True) for name, method in methods.items()]
            case "full":
                return [Way(FULL, None)]
        raise AssertionError(arm)

    def run(self) -> None:
        """Every arm in turn: choices first, then a model for each seed, then how far the rewards can be trusted."""
        with self.timed("warm-up"):
            checkpoints = self.pool.checkpoints()
        for checkpoint in checkpoints:
            views = ["adam", "plain"] if checkpoint is checkpoints[-1] else ["adam"]
            with self.timed(f"pool gradients, {checkpoint_name(checkpoint)}"):
                self.pool.stores(checkpoint, views)  # type: ignore[arg-type]
        for arm in self.args.arms:
            plan = [(task, way) for task in self.args.tasks for way in self.ways(arm, task)]
            for task, way in plan:
                for seed in range(self.args.seeds if isinstance(way.method, Random) else 1):
                    self.choose(task, way, seed)
            if arm == "main":
                for task in self.args.tasks:
                    self.measure(task, BEFORE, Checkpoint(None), None, 0)
                    self.measure(task, WARM, checkpoints[-1], None, 0)
            for seed in range(self.args.seeds):
                for task, way in plan:
                    self.fine_tune(task, way, seed)
            if arm == "main":
                for task in self.args.tasks:
                    self.diagnose(task)
            self.write()

    def choose(self, task: str, way: Way, seed: int) -> list[str]:
        """The rows that a way takes, with the seconds of each stage and what can be said of the choice."""
        key = f"{task}|{way.name}" + (f"|{seed}" if isinstance(way.method, Random) else "")
        pool = self.enlarged if way.enlarged else self.pool
        if way.method is None:
            return list(pool.data.ids)
        if key in self.results["choices"]:
            return list(self.results["choices"][key]["ids"])
        method = way.method.model_copy(update={"seed": seed}) if isinstance(way.method, Random) else way.method
        target = self.target(pool, task, way.part)
        rewards = self._target_gradients(key, pool, target, method)
        with self.timed(f"{key}|scores"):
            scores = score(pool, target, method)
            chosen = select(scores, budget=BUDGET)
        self.results["choices"][key] = {
            "ids": chosen.ids,
            "scores": scores.by_id(),
            "sources": dict(Counter(str(pool.data.row(id_)["source"]) for id_ in chosen.ids)),
            "tokens": float(np.mean(pool.data.supervised_tokens[pool.data.positions(chosen.ids)])),
            "length_correlation": scores.length_correlation,
            "warnings": list(scores.warnings),
            "rewards": rewards,
        }
        self.write()
        return chosen.ids

    def _target_gradients(
        self, key: str, pool: Pool, target: PromptTarget | Target, method: Estimator
    ) -> list[dict[str, Any]]:
        """Responses, rewards and gradients of the target, each stage timed by itself; what the responses earn."""
        if isinstance(method, BM25 | Random):
            return []
        checkpoints = pool.checkpoints()[-1:] if method.last_checkpoint else pool.checkpoints()
        if not isinstance(method, NICE | NICEIF):
            rows = target.labels if isinstance(target, PromptTarget) else target.data
            with self.timed(f"{key}|gradients"):
                for checkpoint in checkpoints:
                    pool.collect(rows, checkpoint, ["plain"], what="target")
            return []
        assert isinstance(target, PromptTarget), target
        policy = PolicyTargets(pool, target, method)
        with self.timed(f"{key}|sampling"):
            for checkpoint in checkpoints:
                sample(pool.run, target.data.prompts, sampler_of(pool, method, checkpoint), reporter=self.reporter)
        with self.timed(f"{key}|rewards"):
            sources = [policy.at(checkpoint) for checkpoint in checkpoints]
        with self.timed(f"{key}|gradients"):
            for checkpoint, source in zip(checkpoints, sources, strict=True):
                pool.collect(source, checkpoint, ["plain"], what="target")
        return [
            {"checkpoint": s.checkpoint, "mean": s.mean, "within": s.within, "silent": s.silent, "cut_off": s.cut_off}
            for s in policy.summaries
        ]

    def fine_tune(self, task: str, way: Way, seed: int) -> None:
        """Train on a choice and measure what the model earns."""
        if self._key(task, way.name, seed, way.samples) in self.results["cells"]:
            return
        pool = self.enlarged if way.enlarged else self.pool
        with self.timed(f"fine-tuning|{task}|{way.name}|{seed}"):
            checkpoint = train(
                pool.run, pool.data, self.choose(task, way, seed), FINE_TUNE, model=pool.model, dtype=pool.dtype,
                device=pool.device, seed=seed, what=f"{task}, {way.name}, seed {seed}", reporter=self.reporter,
            )[-1]  # fmt: skip
        self.measure(task, way.name, checkpoint, way.samples, seed)

    def measure(self, task: str, name: str, checkpoint: Checkpoint, samples: int | None, seed: int) -> None:
        """The expected reward of each test prompt. All models draw with the same random numbers."""
        key = self._key(task, name, seed, samples)
        if key in self.results["cells"]:
            return
        pool = self.pool
        target = self.target(pool, task, "test")
        assert isinstance(target, PromptTarget), target
        sampling = EXACT.model_copy(update={"samples": samples or self.args.eval_samples})
        sampler = LocalSampler(
            pool.model, sampling, checkpoint.adapter, checkpoint="test", dtype=pool.dtype, device=pool.device
        )
        with self.timed(f"evaluation|{key}"):
            drawn = sample(pool.run, target.data.prompts, sampler, reporter=self.reporter)
            rewards = reward_responses(target, drawn, self.reporter).values
        self.results["cells"][key] = _cell(drawn, rewards)
        self.reporter.say(f"{key}: mean reward {self.results['cells'][key]['mean']:.4f}")
        self.write()

    def _key(self, task: str, name: str, seed: int, samples: int | None) -> str:
        return f"{task}|{name}|{seed}|{samples or self.args.eval_samples}"

    def diagnose(self, task: str) -> None:
        """How far NICE's ranking would come again with new samples, and how its target compares with the labels'."""
        if task in self.results["diagnostics"]:
            return
        target = self.target(self.pool, task, "validation")
        assert isinstance(target, PromptTarget), target
        with self.timed(f"{task}|diagnostics"):
            found = diagnose(self.pool, target, NICE(sampling=SAMPLING))
        self.results["diagnostics"][task] = {
            "reliability": found.reliability.as_dict(), "words": found.reliability.words,
            "warnings": list(found.warnings),
            "half_cosine": [entry.median_half_cosine for entry in found.checkpoints],
            "loss_cosine": [entry.median_loss_cosine for entry in found.checkpoints],
        }  # fmt: skip
        self.write()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Keep wall and processor seconds of a stage; a repetition that found the work done does not count."""
        wall, processor = time.monotonic(), time.process_time()
        yield
        taken = [time.monotonic() - wall, time.process_time() - processor]
        known = self.results["seconds"].get(stage, [0.0, 0.0])
        self.results["seconds"][stage] = max(known, taken)

    def write(self) -> None:
        """results.json and results.md."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name, text in (("results.json", json.dumps(self.results, indent=1)), ("results.md", markdown(self))):
            part = self.out / f"{name}.part"
            part.write_text(text + "\n")
            part.replace(self.out / name)


def _cell(drawn: Samples, rewards: dict[tuple[str, int], float]) -> dict[str, Any]:
    """What one model's responses to the test prompts earn."""
    responses = [response for id_ in drawn for response in drawn[id_]]
    by_prompt = {id_: [rewards[r.key] for r in drawn[id_] if r.key in rewards] for id_ in drawn}
    return {
        "mean": float(np.mean([np.mean(own) for own in by_prompt.values()])),
        "by_prompt": {id_: float(np.mean(own)) for id_, own in by_prompt.items()},
        "samples": drawn.samples,
        "tokens": float(np.mean([len(response.token_ids) for response in responses])),
        "cut_off": float(np.mean([response.finish_reason == "length" for response in responses])),
    }


def markdown(bench: Bench) -> str:
    """The tables for RESULTS.md."""
    parts = [reward_table(bench, task) for task in bench.args.tasks]
    parts += [choice_table(bench, task) for task in bench.args.tasks]
    parts += [diagnostics_table(bench), pass_table(bench), seconds_table(bench)]
    return "\n\n".join(part for part in parts if part)


def cells_of(bench: Bench, task: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(name, samples per prompt) → a cell per seed, in the order in which they were made."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for key, cell in bench.results["cells"].items():
        of, name, _, samples = key.split("|")
        if of == task:
            found.setdefault((name, int(samples)), []).append(cell)
    return found


def reward_table(bench: Bench, task: str) -> str:
    """Mean reward with its standard error over seeds, and what it is above random and LESS."""
    cells = cells_of(bench, task)
    lines = [
        f"**{task}**: mean reward on the test prompts ± standard error over seeds; intervals over prompts",
        "",
        "| trained on the choice of | reward | seeds | minus random (95 %) | minus LESS (95 %) | tokens | cut off |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, samples), own in cells.items():
        if samples != bench.args.eval_samples:
            continue
        means = [cell["mean"] for cell in own]
        others = [cells.get((other, samples), []) if other != name else [] for other in ("random", "LESS")]
        lines.append(
            f"| {name} | {_with_error(means)} | {len(means)} | {' | '.join(_paired(own, other) for other in others)} "
            f"| {np.mean([cell['tokens'] for cell in own]):.1f} | {np.mean([cell['cut_off'] for cell in own]):.0%} |"
        )
    return "\n".join(lines) if len(lines) > 4 else ""


def _paired(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Mean over prompts of the difference of seed means, with its 95 % interval over prompts; empty without a peer."""
    if not other:
        return ""
    first, second = (
        {id_: float(np.mean([cell["by_prompt"][id_] for cell in cells])) for id_ in cells[0]["by_prompt"]}
        for cells in (own, other)
    )
    found = paired_difference(first, second, interval="bootstrap")
    assert found is not None, "no test prompt in common"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _with_error(values: list[float]) -> str:
    found = mean_and_spread(values)
    assert found is not None, "a row of the table has no cell"
    error = "" if found.spread is None else f" ± {found.spread / found.count**0.5:.3f}"
    return f"{found.mean:.3f}{error}"


def choice_table(bench: Bench, task: str) -> str:
    """What each method chose, and how far its ranking is that of LESS."""
    choices = {key.split("|", 1)[1]: c for key, c in bench.results["choices"].items() if key.startswith(f"{task}|")}
    sources = sorted({str(source) for source in bench.pool.data.column("source")})
    of_pool = Counter(str(source) for source in bench.pool.data.column("source"))
    lines = [
        f"**{task}**: what was chosen",
        "",
        f"| chosen by | {' | '.join(sources)} | tokens of an answer | ρ with length | shared with LESS | ρ with LESS |",
        "|---|" + "---|" * (len(sources) + 4),
        "| (pool) | " + " | ".join(f"{of_pool[s] / of_pool.total():.0%}" for s in sources)
        + f" | {bench.pool.data.supervised_tokens.mean():.0f} | | | |",
    ]  # fmt: skip
    less = choices.get("LESS")
    for name, choice in choices.items():
        shared = rho = ""
        if less is not None and choice is not less:
            shared = f"{len(set(choice['ids']) & set(less['ids'])) / len(choice['ids']):.0%}"
            both = [id_ for id_ in choice["scores"] if id_ in less["scores"]]
            a, b = (np.array([c["scores"][id_] for id_ in both]) for c in (choice, less))
            rho = f"{spearman(a, b) or 0.0:+.2f}"
        shares = " | ".join(f"{choice['sources'].get(s, 0) / len(choice['ids']):.0%}" for s in sources)
        lines.append(
            f"| {name.replace('|', ', seed ')} | {shares} | {choice['tokens']:.0f} "
            f"| {choice['length_correlation']:+.2f} | {shared} | {rho} |"
        )
    return "\n".join(lines) if choices else ""


def diagnostics_table(bench: Bench) -> str:
    """What the validation responses earn, and how far a ranking by them can be trusted."""
    lines = [
        "**Signal** of the validation prompts' responses, per checkpoint",
        "",
        "| reward | responses | mean | spread within a prompt | prompts without signal | cut off |",
        "|---|---|---|---|---|---|",
    ]
    for key, choice in bench.results["choices"].items():
        task, name = key.split("|")[:2]
        lines += [
            f"| {task} | {name}, {entry['checkpoint']} | {entry['mean']:.3f} | {entry['within']:.3f} "
            f"| {entry['silent']:.0%} | {entry['cut_off']:.0%} |"
            for entry in choice["rewards"]
        ]
    for task, found in bench.results["diagnostics"].items():
        cosines = ", ".join(f"{value:+.2f}" for value in found["half_cosine"])
        labels = ", ".join("none" if value is None else f"{value:+.2f}" for value in found["loss_cosine"])
        lines += [""] * lines[-1].startswith("|")
        lines.append(
            f"- {task}: {found['words']}; median cosine of the halves' gradients {cosines}, with the labels' {labels}"
        )
    return "\n".join(lines) if len(lines) > 4 else ""


def pass_table(bench: Bench) -> str:
    """pass@1, 10 and 100 on the sums, where there are enough samples."""
    lines = []
    for (name, samples), own in cells_of(bench, "sums").items():
        if samples < 10:
            continue
        columns = []
        for k in (1, 10, 100):
            each = [
                np.mean([pass_at_k(samples, round(mean * samples), k) for mean in cell["by_prompt"].values()])
                for cell in own
                if k <= samples
            ]
            columns.append(_with_error([float(value) for value in each]) if each else "")
        lines.append(f"| {name} | {samples} | " + " | ".join(columns) + " |")
    head = [
        "**sums**: pass@k",
        "",
        "| trained on the choice of | samples | pass@1 | pass@10 | pass@100 |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + lines) if lines else ""


def seconds_table(bench: Bench) -> str:
    """Wall and processor seconds of each stage (Tables 4, 5)."""
    stages = ("sampling", "rewards", "gradients", "scores")
    by_way: dict[str, dict[str, str]] = {}
    repeated: dict[str, list[list[float]]] = {}
    once = []
    for key, taken in bench.results["seconds"].items():
        name, _, stage = key.rpartition("|")
        if stage in stages:
            by_way.setdefault(name.replace("|", ", "), {})[stage] = _seconds(taken)
        elif key.startswith(("fine-tuning", "evaluation")):
            repeated.setdefault(key.split("|")[0], []).append(taken)
        else:
            once.append(f"- {key.replace('|', ', ')}: {_seconds(taken)}")
    for name, each in repeated.items():
        done = [taken for taken in each if taken[0] > 1] or each  # what was found done took no time
        once.append(f"- {name} of one model: {_seconds(list(np.mean(done, axis=0)))} (mean of {len(done)})")
    lines = ["**Seconds** of each stage, wall (processor); what an earlier row had made already is not made again", ""]
    lines += [f"| reward, method | {' | '.join(stages)} |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cells.get(s, '') for s in stages)} |" for name, cells in by_way.items()]
    return "\n".join([*lines, "", *once]) if once else ""


def _seconds(taken: list[float]) -> str:
    return f"{taken[0]:.1f} ({taken[1]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/nice")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument(
        "--assistant", help="folder or hub id of the model that writes for AMC; the model itself if not given"
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--row-tokens", type=int, default=160)
    parser.add_argument("--tasks", nargs="*", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["main"])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--eval-samples", type=int, default=4, help="responses to each test prompt")
    parser.add_argument("--pass-samples", type=int, default=100, help="the same in the arm temperature")
    parser.add_argument(
        "--suffixes", nargs=len(REWARDS), default=list(SUFFIXES), help="added to the prompts for AMC's writer alone"
    )
    args = parser.parse_args()
    if not (DATA / "pool.jsonl").exists():
        print(f"skipped: the rows to choose from are not there ({DATA / 'pool.jsonl'})")
        return
    reporter = Reporter()
    bench = Bench(args, reporter, args.model or str(demo_model(reporter)))
    with bench.pool.run.lock():
        bench.run()
    print(markdown(bench))
    print(f"\ntables in {bench.out / 'results.md'}, everything behind them in {bench.out / 'results.json'}")


ARMS = ("main", "samples", "influence", "written", "variants", "temperature", "split", "enlarged", "full")

if __name__ == "__main__":
    main()
