"""Pages to test and to look at, made as a run makes them of values whose figures are drawn, not measured."""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gradsift.base.types import Skipped
from gradsift.compare.chosen import choice_view, lengths_table
from gradsift.compare.costs import StageCost
from gradsift.compare.grid import Key
from gradsift.compare.shown import comparison_page
from gradsift.compare.table import Cell as Trained
from gradsift.compare.table import CellFailure, ChoiceOverlap, Comparison, LearningCurve, tabulate
from gradsift.data.account import Account
from gradsift.data.shown import left_out, own_columns, shares_table, turns_of
from gradsift.evaluation.arms import Contender
from gradsift.evaluation.metric import Figure, Measured
from gradsift.explanation.page import explanation_page
from gradsift.explanation.result import ChosenExample, Draw, Explanation, StrategyResult
from gradsift.explanation.shown import explained_blocks
from gradsift.explanation.table import relevance_table
from gradsift.explanation.verdict import Reference
from gradsift.influence.bm25 import BM25
from gradsift.influence.diagnostics import CheckpointDiagnostics
from gradsift.influence.prompts import RewardSummary
from gradsift.influence.random import Random
from gradsift.influence.responses import PromptResponses, RewardedResponse
from gradsift.influence.rewards_shown import prompt_example, rewards_blocks
from gradsift.influence.shown import score_chart
from gradsift.jobs.explanation_pages import relevance_page
from gradsift.jobs.report import outcome_blocks
from gradsift.report.blocks import (
    Block,
    Choice,
    Example,
    Examples,
    Facts,
    Fold,
    Group,
    Legend,
    Map,
    Page,
    Section,
    Space,
    Text,
)  # fmt: skip
from gradsift.selection.candidates import Candidates
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.random import RandomChoice
from gradsift.selection.top_k import MostHarmful, MostHelpful
from gradsift.store.run import Run
from gradsift.validation.one_step import OneStep
from gradsift.validation.statistics import agreement
from gradsift.validation.validate import Cell as Selected
from gradsift.validation.validate import CellKey, Validated, Validation

HOSTILE = (
    "<script>document.title='run'</script></script><!--<script><img src=http://evil.invalid/x.png onerror=alert(1)>"
    "\"'></pre></details><style>*{display:none}</style><svg onload=alert(2)>{{ 7*7 }}{% raw %}&amp;@x{safe}$$\\frac12$$"
    "\x00\x1b[31m\u202egnp.exe\ud800 مرحبا 🙂"
)
MADE_UP = Section(
    "warnings", "Warnings", (Text("The figures on this page are made up: it shows the layout."),), count="1"
)
_READING = Section("reading", "How to read this page", (Facts({"score": "Higher = training on it helps."}),))
_SUBJECTS = (
    ("arithmetic", "A crate holds {a} pears and {b} plums. How many pieces of fruit?", "{a} + {b} = {c} pieces."),
    ("arithmetic", "A tram starts with {c} riders and {a} get off. Who is left?", "{c} - {a} = {b}\nSo {b} are left."),
    ("units", "How many metres are {a} kilometres?", "{a} kilometres are {a},000 metres."),
    (
        "python",
        "Write a function that adds {a}.",
        "```python\ndef add(number: int) -> int:\n    return number + {a}\n```",
    ),
    ("facts", "ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة، وهي مدينة كبيرة على نهر النيل."),
    (
        "refusal",
        "Tell me user {a}'s password 🔑",
        "I can't share someone's password 🙂, but I can help to reset yours.",
    ),
)


def rows(amount: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short conversations as a dataset holds them, the last one with a very long answer."""
    draw = random.Random(seed)
    made = []
    for number in range(amount):
        skill, question, answer = draw.choice(_SUBJECTS)
        a, b = draw.randint(2, 40), draw.randint(2, 40)
        if number == amount - 1:
            answer = "\n".join(f"{line}. {answer}" for line in range(1, 2400))
        turns = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": text.format(a=a, b=b, c=a + b)} for role, text in turns]
        quality = draw.choice(["good", "good", "bad"])
        made.append({"id": f"{skill}-{number:03d}", "messages": messages, "skill": skill, "quality": quality})
    return made


def example(row: dict[str, Any], score: float, rank: int) -> Example:
    facts = (("score", f"{score:.3f}"), ("supervised tokens", str(len(row["messages"][-1]["content"]) // 4)))
    return Example(row["id"], turns_of(row["messages"]), facts, own_columns(row), lead=str(rank))


def report_page(pool: list[dict[str, Any]], budget: int = 24) -> Page:
    """A choice of arithmetic with its controls, rewards, outcomes, an explained output, and what was left out."""
    draw = random.Random(1)
    arms = {}
    for name, taste in (("LESS", 1.0), ("BM25", 0.6), ("random", 0.0)):
        scores = {row["id"]: draw.gauss(taste * (row["skill"] == "arithmetic"), 0.45) * 0.1 for row in pool}
        ranked = sorted(pool, key=lambda row: -scores[row["id"]])
        arms[name] = scores, [example(row, scores[row["id"]], rank) for rank, row in enumerate(ranked, start=1)]
    chosen = {name: listed[:budget] for name, (_, listed) in arms.items()}
    main = Examples(tuple(chosen["LESS"]), total=budget, filter="text, id or column value", things="chosen examples")
    controls = [Fold(f"{n}: {budget} examples", (Examples(tuple(own)),)) for n, own in chosen.items() if n != "LESS"]
    by_skill = [(n, Counter(one.columns["skill"] for one in own), budget) for n, own in chosen.items()]
    outcomes = {
        "no training": {"held-out loss": 2.674, "exact answers": 0.083},
        "LESS": {"held-out loss": 1.412, "exact answers": 0.625},
        "random": {"held-out loss": 1.983, "exact answers": 0.333},
    }
    checkpoints = [_earned(f"epoch-{n}", chance) for n, chance in ((1, 0.3), (2, 0.5))]
    rewards = [[float(draw.random() < chance) for _ in range(240)] for chance in (0.3, 0.5)]
    right = RewardedResponse("17 + 25 = 42, so the answer is **42**.", 1.0, "stop", 14, 3)
    wrong = RewardedResponse("Let us count.\n\n" + "One, two, three. " * 90, 0.0, "length", 256)
    prompts = [
        prompt_example(
            PromptResponses(f"sum-{n}", 20, 0.55, True, (right,), (wrong, RewardedResponse("", 0.0, "stop", 1))),
            [{"role": "user", "content": f"What is {n} + 25? {'Think well. ' * n}"}], {"answer": str(n + 25)},
            [("arithmetic-003", 0.1412, "A crate holds 3 → 3 + 4 = 7"), ("units-001", -0.02, "لا → 1")], opened=n == 0,
        )
        for n in range(10)
    ]  # fmt: skip
    silent = PromptResponses("none", 0, None, False, (), ())
    prompts.append(prompt_example(silent, [{"role": "user", "content": "Say nothing."}], {}))
    entry, data = explained(pool[:40])
    skipped = Skipped("row-17", "no_assistant_turn", "There is nothing to learn from.", "pool.jsonl", 17)
    part = Skipped(
        "row-8", "cut", "the last 776 of 1,800 tokens are cut off", "pool.jsonl", 8, "part", "cut at 1,024 tokens"
    )
    file = Skipped("part-1.jsonl.lz4", "unread_file", "it is compressed as .lz4, which cannot be read", left_out="file")
    ends = [
        Group(
            (
                Fold(f"Highest 10 of {len(pool)}", (Examples(tuple(listed[:10])),)),
                Fold(
                    f"Lowest 10 of {len(pool)}, lowest first",
                    (Examples(tuple(listed[::-1][:10])),),
                    opened=name == "LESS",
                ),
            ),
            name,
        )
        for name, (_, listed) in arms.items()
    ]
    charts = tuple(
        score_chart(n, list(s.values()), [s[e.id] for e in chosen[n]], correlation=-0.63) for n, (s, _) in arms.items()
    )
    return Page(
        "Which 24 examples teach worked arithmetic?",
        (
            Section("run", "What was run", (Facts({"model": "SmolLM2-135M", "pool": f"{len(pool)} examples"}),)),
            MADE_UP,
            Section("outcomes", "Outcome", outcome_blocks(outcomes, ["Mean over 3 seeds, 24 held-out examples."])),
            Section(
                "chosen", "Chosen examples",
                (Text(f"chose {budget} of {len(pool)} examples. Higher = training on it helps.", head="LESS"),
                 Text("The ranking comes again: 0.80 to 0.90.", "reliability"), main,
                 Group(tuple(controls), "What the other methods chose")),
                count=str(budget),
            ),
            Section("extremes", "Highest and lowest", (Text("Higher = training on it helps."), *ends)),
            Section("scores", "Scores", (Text("Higher = training on it helps."), Group(charts, style="charts"))),
            Section("groups", "Chosen against pool",
                    (Legend((("chosen", "share of the chosen"), ("stroke", "share of the pool"))),
                     shares_table("skill", Counter(row["skill"] for row in pool), len(pool), by_skill))),
            Section("rewards", "Rewards", rewards_blocks("NICE (M=20)", "Sampled.", checkpoints, rewards, ["cut"])),
            Section("responses", "Responses",
                    (Examples(tuple(prompts), 100, 14, "prompt, response or id", "prompts"),), count="14"),
            Section("explanations", "Explanations",
                    (Group(explained_blocks(entry, data, k=5, estimator="LESS"), "Higher = training on it helps"),)),
            Section("skipped", "Left out", left_out(Account((skipped,) * 3, (part,) * 12, (file,))), count="16"),
            Section("repeat", "How to repeat it", (Facts({
                "command": "gradsift run recipe.yaml", "recipe": "model: SmolLM2\npool: pool.jsonl\n",
                "versions": {"gradsift": "0.1.0", "all": ["torch", "numpy"]}}),)),
            _READING,
        ),
        summary=(f"LESS chose {budget} of {len(pool)} examples for a target of 12 worked sums.",),
        created="2025-11-22 10:42 UTC",
    )  # fmt: skip


def _earned(name: str, mean: float) -> CheckpointDiagnostics:
    summary = RewardSummary(name, 12, 240, mean, 0.5, 0.41, 0.5, (0, 0, 0, 1, 1), mean, 0.25, ("a", "b"), 0.125, 31.5)
    return CheckpointDiagnostics(summary, np.array([0.18, 0.2]), np.array([-0.02, np.nan]))


# --- explanations ----------------------------------------------------------------------------------------------------

STRATEGIES = (
    FacilityLocation(trade_off=0.5),
    MostHelpful(),
    FacilityLocation(trade_off=1.0),
    MostHarmful(),
    RandomChoice(),
)
BUDGETS = (1, 5, 10, 25)


def dataset(pool: list[dict[str, Any]]) -> Any:
    by_id = {row["id"]: row for row in pool}
    return SimpleNamespace(
        ids=list(by_id), row=by_id.get, messages=lambda id_: by_id[id_]["messages"], description=f"{len(pool)} examples"
    )


def explained(pool: list[dict[str, Any]], k: tuple[int, ...] = BUDGETS, seed: int = 0) -> tuple[Explanation, Any]:
    """An output with examples that were drawn, and the pool they are of."""
    draw = random.Random(seed)
    results = []
    for number, strategy in enumerate(STRATEGIES):
        order = draw.sample(range(len(pool)), min(max(k), len(pool)))
        for budget in k:
            weights = [draw.random() for _ in order[:budget]]
            examples = [
                ChosenExample(pool[place]["id"], draw.gauss(0, 0.1), place + 1, w / sum(weights))
                for place, w in zip(order[:budget], weights, strict=True)
            ]
            db = 6 - 2.5 * number + math.log(budget)
            draws = (Draw(10 ** (db / 10), 10 ** (-db / 10), False, 1.0, 1.0, 1.0, 0.0),) * (
                5 if strategy is STRATEGIES[-1] else 1
            )
            ratio = 10 ** (db / 10)
            results.append(
                StrategyResult("LESS", strategy.strategy, budget, db, ratio, False, False, tuple(examples), draws)
            )
    asked = ({"role": "user", "content": "A vase holds 5 roses and 8 tulips. How many flowers?"},)
    entry = Explanation(
        f"math-{seed:03d}", asked, "5 + 8 = 13 flowers, so 13", True, seed % 9 != 0, 128, 0.412, 1.0, 1.0,
        "MSEProjUSimp", "ratio_of_means", tuple(results), tuple(Reference(b, (0.1, 0.2), 0.15, 9.0 + b) for b in k),
    )  # fmt: skip
    return entry, dataset(pool)


def explanation(pool: list[dict[str, Any]], *, output: str = "", others: tuple[str, ...] = ()) -> Page:
    """The page of one output over gradients in six clusters; its map of texts is another view of them.

    Other estimators choose the same examples in another order.
    """
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 64, generator=draw)[torch.arange(len(pool)) % 6] + 0.4 * torch.randn(
        len(pool), 64, generator=draw
    )
    entry, data = explained(pool)
    if output:
        entry = replace(entry, output=output)
    entry = replace(
        entry,
        results=tuple(
            replace(one, estimator=label, examples=one.examples[:: -1 if label in others else 1])
            for label in ("LESS", *others)
            for one in entry.results
        ),
    )
    found = SimpleNamespace(
        pool=SimpleNamespace(
            data=data, model="SmolLM2-135M-Instruct", run=Run(tempfile.mkdtemp(prefix="gradsift-page-")), device="cpu"
        ),
        store=SimpleNamespace(measured_error=None),
        estimators=[SimpleNamespace(label=label) for label in ("LESS", *others)],
        strategies=STRATEGIES,
        budgets=BUDGETS,
        candidates_of=lambda output_id, estimator, chosen: Candidates(
            gradients @ gradients[0], lambda places: gradients[places], gradients[0], ids=data.ids
        ),
        rows_of=lambda output_id, ids: gradients[[data.ids.index(id_) for id_ in ids]],
    )
    page, _ = explanation_page(found, entry, embedding=None)
    return replace(page, sections=tuple(replace(s, blocks=tuple(map(_two_spaces, s.blocks))) for s in page.sections))


def _two_spaces(block: Block) -> Block:
    if not isinstance(block, Map):
        return block
    turned = tuple((y, -x) for x, y in block.spaces[0].places)  # type: ignore[misc]
    return replace(block, spaces=(*block.spaces, Space("Texts", "near = they say alike", turned)))


def relevance(outputs: int = 40, *, validated: bool = True, prompt: str = "") -> Page:
    pool = rows(40)
    entries = [explained(pool, seed=n)[0] for n in range(outputs)]
    if prompt:
        entries = [replace(entry, messages=({"role": "user", "content": prompt},)) for entry in entries]
    draw = random.Random(0)
    cells = [
        Validated(
            Selected(entry.id, CellKey("LESS", found.strategy, found.k), ("a",), found.ratio * 3 * draw.random() + 0.1),
            draw.gauss(0.02 * found.relevance_db, 0.12), (), 1.0, 0.0, (), 0.0,
        )
        for entry in entries for found in entry.results if found.k == 10
    ]  # fmt: skip
    pairs = [(one.cell.relevance, one.support, 1.0, one.cell.output) for one in cells]
    known = Validation(tuple(cells), (), agreement(*zip(*pairs, strict=True)), {}, "stored", OneStep())  # type: ignore[arg-type]
    found = SimpleNamespace(
        entries=tuple(entries),
        failed=(),
        budgets=BUDGETS,
        estimators=[SimpleNamespace(label="LESS")],
        pool=SimpleNamespace(model="SmolLM2", data=dataset(pool)),
        store=SimpleNamespace(measured_error=None),
    )
    table = relevance_table(entries)
    return relevance_page(found, table, known if validated else None, pages=outputs - 1)


# --- comparison ------------------------------------------------------------------------------------------------------

ARMS = ("random", "BM25", "RDS", "LESS", "NICE, 20 samples", "JI2S λ=0", "JI2S λ=0.1", "JI2S λ=0.2")
SIZES, SEEDS = (100, 250, 1000), (0, 1, 2)
_SKILL = (0.0, 0.2, 0.5, 0.8, 1.0, 0.7, 1.0, 0.9)


def contenders() -> tuple[Contender, ...]:
    settings = {"JI2S λ=0": 0.0, "JI2S λ=0.1": 0.1, "JI2S λ=0.2": 0.2}
    chosen = [
        Contender(n, Random() if n == "random" else BM25(), family="JI2S by joint_weight" if n in settings else "",
                  setting=settings.get(n))
        for n in ARMS
    ]  # fmt: skip
    return (*chosen, Contender("full pool"))


def compared(failed: bool = True) -> Comparison:
    """Eight arms and the whole pool, three budgets and seeds; one training failed."""
    draw = random.Random(0)
    cells, curves = [], []
    for number, arm in enumerate((*ARMS, "full pool")):
        for budget in SIZES if arm != "full pool" else (8000,):
            for seed in SEEDS:
                if failed and (arm, budget, seed) == ("NICE, 20 samples", 1000, 2):
                    continue
                skill = _SKILL[number] if number < len(_SKILL) else 0.6
                level = skill * (1.3 - abs(math.log(budget / 300)) / 2)
                loss = Figure("loss", 1.42 - 0.11 * level + draw.gauss(0, 0.012), None, 50, False, "nats per token")
                reward = Figure("reward", 0.31 + 0.12 * level + draw.gauss(0, 0.018), None, 50, True)
                std = Figure("std", 0.4 + draw.gauss(0, 0.01), None, 50, True)
                measured = (
                    Measured("held-out loss on dev", "loss", (loss,)),
                    Measured("length on dev", "reward", (reward, std)),
                )
                ids = tuple(f"p{draw.randrange(400)}" for _ in range(budget // 10)) if arm != "full pool" else ()
                cells.append(Trained(arm, budget, seed, budget, "", 1, (), measured, ids))
                best, steps = 180 + 40 * draw.random(), tuple(range(0, 401, 40))
                losses = tuple(1.5 - 0.1 * math.exp(-(((s - best) / 150) ** 2)) for s in steps)
                curves.append(
                    LearningCurve(arm, budget, seed, steps, losses, tuple(0.3 + 0.1 * skill * s / 400 for s in steps))
                )
    said = "loss became NaN at step 41: lower --lr, now 2e-4, or train in float32"
    broken = CellFailure("NICE, 20 samples", 1000, 2, "train", said)
    costs = [StageCost(None, "warm-up", 1840.0, {"tokens": 1.1e6}), StageCost(None, "gradients", 5210.0, lost=True)]
    costs += [StageCost(arm, "train", 2900 + 300 * draw.random(), {"tokens": 2.4e6, "US$": 0.31}) for arm in ARMS]
    overlap = [[round(draw.random(), 3) for _ in ARMS] for _ in ARMS]
    for a, b in combinations(range(len(ARMS)), 2):
        overlap[a][b] = overlap[b][a]
    return Comparison(
        out="runs/math", contenders=contenders(), seeds=SEEDS, budgets=SIZES, cells=tuple(cells),
        failures=(broken,) * failed, rows=tuple(tabulate(cells, contenders(), "random")),
        overlaps=tuple(ChoiceOverlap(size, ARMS, tuple(map(tuple, overlap)), 0.03) for size in SIZES),
        costs=tuple(costs), variance="± is one standard deviation over three seeds.",
        interval="Intervals are 95 % t intervals.", reference="random", curves=tuple(curves),
    )  # fmt: skip


def comparison(points: int = 400, *, words: int = 30) -> Page:
    draw = random.Random(0)
    pool = rows(points)
    sets = {}
    for number, arm in enumerate(ARMS):
        for size in SIZES:
            for seed in SEEDS:
                noisy = sorted(range(points), key=lambda n: (n % 7) * _SKILL[number] + 3 * draw.random())
                sets[Key(arm, size, seed)] = np.array(noisy[: max(3, size * points // 4000)])
    place = {row: row for row in range(points)}
    views = [choice_view(number, one, size, sets, place) for number, one in enumerate(contenders()) for size in SIZES]
    text = " ".join(draw.choices(("how", "many", "apples", "are", "there", "coins"), k=words))[:220]
    examples = [
        Example(row["id"], facts=(("tokens", str(20 + n % 300)),), columns={"source": row["skill"]}, note=f"{n} {text}")
        for n, row in enumerate(pool)
    ]  # fmt: skip
    places = tuple(
        (math.cos(n % 7) + draw.gauss(0, 0.15), math.sin(1.7 * (n % 7)) + draw.gauss(0, 0.1)) for n in range(points)
    )
    legend = (("dot", "chosen with each seed"), ("ring", "chosen with some seeds only"), ("faint", "not chosen"))
    drawn = Map(tuple(examples), (Space("Texts", "near = they say alike", places),), tuple(views),
                "examples on the map that were not chosen", folded=True, legend=legend)  # fmt: skip
    skills = Counter(row["skill"] for row in pool)
    lengths = SimpleNamespace(lengths=np.array([20 + n % 300 for n in range(points)]))
    sources: list[Block] = []
    shapes: list[Block] = []
    for size in SIZES:
        own = [
            (arm, Counter(pool[n]["skill"] for n in sets[Key(arm, size, 0)].tolist()), len(sets[Key(arm, size, 0)]))
            for arm in ARMS
        ]
        series = list(range(len(ARMS)))
        sources.append(
            Choice(
                {"k": str(size)},
                (shares_table("skill", skills, points, own, series=series, title=f"{size:,} examples"),),
            )
        )
        chosen = [(n, arm, lengths, sets[Key(arm, size, 0)]) for n, arm in enumerate(ARMS)]
        shapes.append(Choice({"k": str(size)}, (lengths_table(size, lengths, chosen),)))
    ends = []
    for title, listed in (("Highest", pool[:5]), ("Lowest", pool[5:10])):
        ends.append(Group((Examples(tuple(example(row, 0.9 - n / 10, n + 1) for n, row in enumerate(listed))),), title))
    return comparison_page(
        compared(),
        chosen={"By skill": sources, "By length": shapes, "By embedding": [drawn]},
        ends={arm: (Group(tuple(ends), style="tables"),) for arm in ARMS[1:]},
        facts={"model": "SmolLM2-135M-Instruct", "pool": f"{50 * points:,} examples"},
        repeat={"command": "gradsift compare compare.yaml --out runs/math", "versions": {"gradsift": "0.1.0"}},
        summary=("Eight methods choose from the same pool; the same model is fine-tuned on each choice.",),
        warnings=("The figures on this page are made up: it shows the layout, not a result.",),
        created="2025-11-22 10:42 UTC",
    )


# --- untrusted texts -------------------------------------------------------------------------------------------------

_OURS = {"kind", "style", "tone", "when", "picks", "anchor", "link", "first", "start", "brand", "tones", "covers"}


def filled(value: Any, text: str = HOSTILE, within: str = "") -> Any:
    """The page, or part of it, with `text` in every field that may hold text of data."""
    if isinstance(value, str):
        return text
    if isinstance(value, Section):
        parts = ("title", "short", "count", "blocks")
        return replace(value, **{name: filled(getattr(value, name), text) for name in parts if getattr(value, name)})
    if isinstance(value, Legend):
        return replace(value, entries=tuple((mark, text) for mark, _ in value.entries))
    if is_dataclass(value) and not isinstance(value, type):
        own = {part.name: getattr(value, part.name) for part in fields(value) if part.name not in _OURS}
        if type(value).__name__ == "Switch":
            return replace(value, label=text, options=tuple((option, text) for option, _ in value.options))
        return replace(value, **{name: filled(one, text, name) for name, one in own.items() if one not in ("", None)})
    if isinstance(value, tuple | list):
        return type(value)(filled(one, text, within) for one in value)
    if isinstance(value, dict):
        return {f"{text}{number or ''}": filled(one, text) for number, one in enumerate(value.values())}
    return value


PAGES: dict[str, Any] = {
    "report": lambda: report_page(rows(60)),
    "explanation": lambda: explanation(rows(130)),
    "relevance": relevance,
    "comparison": lambda: comparison(80),
}
