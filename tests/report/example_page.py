"""Report pages to test and to look at: one as a run would fill it, one whose every field is hostile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gradsift.base.types import Skipped
from gradsift.report.data import (
    CheckpointRewards,
    Choice,
    Explained,
    ExplainedExample,
    ExplainedStrategy,
    Extremes,
    Helper,
    Outcome,
    ReportData,
    ReportExample,
    ReportPrompt,
    ReportResponse,
    Rewards,
    ScoreSummary,
)

HOSTILE = (
    "<script>document.title='run'</script><img src=http://evil.invalid/x.png onerror=alert(1)>"
    "\"'></pre></details><style>*{display:none}</style><svg onload=alert(2)>{{ 7*7 }}{% raw %}&amp;"
    "\x00\x1b[31m\u202egnp.exe\ud800"
)

_SUBJECTS = (
    (
        "arithmetic",
        "A crate holds {a} pears and {b} plums. How many pieces of fruit?",
        "{a} + {b} = {c} pieces of fruit.",
    ),
    (
        "arithmetic",
        "A tram starts with {c} riders and {a} get off. Who is left?",
        "{c} - {a} = {b}\nSo {b} riders are left.",
    ),
    ("units", "How many metres are {a} kilometres?", "{a} kilometres are {a},000 metres."),
    (
        "python",
        "Write a function that adds {a}.",
        "```python\ndef add(number: int) -> int:\n    return number + {a}\n```",
    ),
    ("rewriting", "Say it politely: send page {a} now.", "Could you send me page {a} when you have a moment?"),
    ("facts", "ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة، وهي مدينة كبيرة على نهر النيل."),
    (
        "refusal",
        "Tell me user {a}'s password 🔑",
        "I can't share someone's password 🙂, but I can help to reset your own.",
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
        made.append(
            {
                "id": f"{skill}-{number:03d}",
                "messages": messages,
                "skill": skill,
                "quality": draw.choice(["good", "good", "bad"]),
            }
        )
    return made


def page(
    pool: Sequence[Mapping[str, Any]],
    *,
    budget: int = 24,
    title: str = "",
    group: str = "skill",
    favoured: str = "arithmetic",
) -> ReportData:
    """A filled page over `pool`, whose scores are drawn, not measured: `favoured` rows score higher."""
    draw = random.Random(1)
    scores = {row["id"]: draw.gauss(0.9 if row[group] == favoured else -0.15, 0.45) * 0.1 for row in pool}
    lengths = {row["id"]: max(4, sum(len(m["content"]) for m in row["messages"]) // 4) for row in pool}
    other = {name: draw.random() * 20 for name in scores}

    extra = [name for name in pool[0] if name not in ("id", "messages")]

    def ranked(key: Mapping[str, float]) -> list[ReportExample]:
        return [
            ReportExample(
                row["id"], row["messages"], key[row["id"]], rank, lengths[row["id"]], {n: row[n] for n in extra}
            )
            for rank, row in enumerate(sorted(pool, key=lambda row: -key[row["id"]]), start=1)
        ]

    def choice(method: str, key: Mapping[str, float]) -> Choice:
        examples = ranked(key)[:budget]
        return Choice(method, budget, examples, {name: Counter(e.columns[name] for e in examples) for name in extra})

    blend = {name: 12 * scores[name] + other[name] * 0.05 for name in scores}
    choices = [choice("LESS", scores), choice("BM25", blend), choice("random, seed 0", other)]
    best = choices[0].examples
    strategies = [
        ExplainedStrategy("facility location, λ = 0.5", 6.84, _explaining(best[:5], [0.42, 0.27, 0.19, 0.12, 0.0])),
        ExplainedStrategy("most helpful", 4.1, _explaining(best[:5], [0.51, 0.33, 0.09, 0.07, 0.0])),
        ExplainedStrategy(
            "relevance pursuit",
            9.27,
            _explaining(best[3:8], [0.37, 0.24, 0.21, 0.11, 0.07]),
            "What the relevance score itself would choose: the upper reference.",
        ),
        ExplainedStrategy("random (mean of 5)", -0.62, []),
    ]
    return ReportData(
        title=title or "Which 24 examples teach worked arithmetic?",
        summary=[
            f"LESS chose {budget} of {len(pool)} examples for a target of 12 worked sums. "
            f"Trained on them, the model's held-out loss falls to 1.41; "
            "on a random choice of the same size to 1.98.",
        ],
        facts={
            "model": "SmolLM2-135M-Instruct",
            "method": "LESS (Adam directions, 4 checkpoints)",
            "pool": f"{len(pool)} examples, pool.jsonl",
            "target": "12 examples, target_validation.jsonl",
            "budget": f"{budget} examples",
            "gradients": "8,192 dimensions, sparse projection, seed 0",
            "time": "6 min 12 s on 2 CPU cores",
        },
        pool_size=len(pool),
        pool_shares={name: Counter(row[name] for row in pool) for name in pool[0] if name not in ("id", "messages")},
        choices=choices,
        score_summaries=[
            ScoreSummary("LESS", list(scores.values()), [e.score for e in best], -0.21),
            ScoreSummary(
                "BM25", list(blend.values()), [e.score for e in choices[1].examples], -0.63, "Texts only: no gradients."
            ),
        ],
        extremes=[
            Extremes(name, len(pool), ranked(key)[:10], ranked(key)[::-1][:10])
            for name, key in (("LESS", scores), ("BM25", blend))
        ],
        rewards=_rewards(draw),
        outcomes=[
            Outcome("no training", {"held-out loss": 2.674, "exact answers": 0.083}),
            Outcome(
                "LESS",
                {"held-out loss": 1.412, "exact answers": 0.625},
                {"held-out loss": 0.031, "exact answers": 0.042},
            ),
            Outcome(
                "BM25",
                {"held-out loss": 1.588, "exact answers": 0.542},
                {"held-out loss": 0.028, "exact answers": 0.055},
            ),
            Outcome(
                "random",
                {"held-out loss": 1.983, "exact answers": 0.333},
                {"held-out loss": 0.094, "exact answers": 0.080},
            ),
            Outcome("whole pool", {"held-out loss": 1.437, "exact answers": 0.583}),
        ],
        outcome_notes=["Mean over 3 seeds, 24 held-out examples."],
        explained=[
            Explained(
                "A vase holds 5 roses and 8 tulips. How many flowers?",
                "5 + 8 = 13 flowers, so 13",
                True,
                "LESS",
                strategies,
                0.412,
            ),
        ],
        skipped=[
            Skipped(
                "row-17",
                "no_assistant_turn",
                "The conversation ends with a user turn: there is nothing to learn from.",
                "pool.jsonl",
                17,
            ),
            Skipped(
                "row-90",
                "truncated_answer",
                "All 512 tokens that fit belong to the prompt: no supervised token is left.",
                "pool.jsonl",
                90,
            ),
        ],
        skipped_counts={"no_assistant_turn": 240, "truncated_answer": 3},
        parts=[
            Skipped(
                "row-3",
                "not_shown",
                "message 1 (system) is not shown by the chat template: 'Answer in one sentence.'",
                "pool.jsonl",
                3,
                "part",
                "system message not shown by the template",
            ),
            Skipped(
                "row-8",
                "cut",
                "the last 776 of 1,800 tokens are cut off, 512 of the 700 tokens to learn among them",
                "pool.jsonl",
                8,
                "part",
                "cut at 1,024 tokens",
            ),
        ],
        parts_total=12,
        part_counts={"system message not shown by the template": 7, "cut at 1,024 tokens": 5},
        rows_in_part=12,
        files=[
            Skipped(
                "part-1.jsonl.lz4",
                "unread_file",
                "the file is not read: it is compressed as .lz4, which cannot be read",
                "part-1.jsonl.lz4",
                left_out="file",
            )
        ],
        warnings=[
            "The figures on this page are made up: it shows the layout, not a result.",
            "Two target examples also stand in the pool (units-012, facts-025): their scores are too high.",
        ],
        repeat={
            "command": "gradsift run recipe.yaml --output runs/arithmetic",
            "recipe": "model: SmolLM2-135M-Instruct\npool: pool.jsonl\ntarget: target_validation.jsonl\n"
            "method:\n  kind: less\n  optimizer: adam\nselect: {kind: top_k, budget: 24}\nseed: 0\n",
            "versions": {"gradsift": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "fingerprints": {
                "pool": "xxh3-64:9f3c61c2b07d5e11",
                "target": "xxh3-64:07d5e1119f3c61c2",
                "model": "xxh3-64:c2b07d5e119f3c61",
            },
        },
        created="2025-11-22 10:42 UTC",
    )


def _rewards(draw: random.Random) -> Rewards:
    """What 12 prompts with 20 responses each might earn at two checkpoints; the last prompt has none."""
    checkpoints = []
    for number, chance in enumerate((0.3, 0.5), start=1):
        rewards = [float(draw.random() < chance) for _ in range(240)]
        mean = sum(rewards) / len(rewards)
        checkpoints.append(
            CheckpointRewards(
                f"epoch-{number}", 12, rewards, mean, 0.41, [0, 0, 0, 1, 1], mean, 3, 2, 0.125, 31.5, 0.18 * number,
                -0.02,
            )
        )  # fmt: skip
    right = ReportResponse("17 + 25 = 42, so the answer is **42**.", 1.0, "stop", 14, 3)
    wrong = ReportResponse("Let us count.\n\n" + "One, two, three. " * 90, 0.0, "length", 256)
    prompts = [
        ReportPrompt(
            f"sum-{number}", [{"role": "user", "content": f"What is {number} + 25? {'Think well. ' * number}"}], 20,
            0.55, True, [right], [wrong, ReportResponse("", 0.0, "stop", 1)], {"answer": str(number + 25)},
            [Helper("arithmetic-003", 0.1412, "A crate holds 3 → 3 + 4 = 7"), Helper("units-001", -0.02, "لا → 1")],
        )
        for number in range(10)
    ]  # fmt: skip
    prompts.append(ReportPrompt("same", [{"role": "user", "content": "Say no."}], 20, 0.0, False, [wrong], []))
    prompts.append(ReportPrompt("none", [{"role": "user", "content": "Say nothing."}], 0, None, False, [], []))
    return Rewards(
        "NICE (M=20)",
        "Responses sampled from the model at each checkpoint: 20 for each prompt, temperature 1.2.",
        checkpoints,
        prompts,
        all_prompts=14,
        warnings=["88% of the responses at epoch-2 were cut off: raise max_new_tokens"],
    )


def _explaining(examples: Sequence[ReportExample], coefficients: Sequence[float]) -> list[ExplainedExample]:
    return [
        ExplainedExample(example.id, example.messages, example.score, example.rank, coefficient)
        for example, coefficient in zip(examples, coefficients, strict=True)
    ]


def hostile_page(text: str = HOSTILE) -> ReportData:
    """A page in which every text of every field, keys and ids included, is `text`."""
    messages = [
        {"role": text, "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text * 40},
    ]
    example = ReportExample(text, messages, 0.5, 1, 10, {text: text, f"{text}2": [text, {text: None}]}, {text: 0.5})
    explained = ExplainedExample(text, [*messages, {"role": "user", "content": "second"}], -0.5, 2, 0.25)
    choice = Choice(text, 1, [example], {text: {text: 1}})
    response = ReportResponse(text * 40, 1.0, text, 3, 2)
    prompt = ReportPrompt(
        text, messages, 2, 0.5, False, [response], [response], {text: text}, [Helper(text, 0.5, text)]
    )
    checkpoint = CheckpointRewards(text, 1, [0.0, 1.0], 0.5, 0.7, [0, 0, 0.5, 1, 1], 0.5, 0, 1, 0.5, 3.0, None, 0.5)
    return ReportData(
        title=text,
        summary=[text],
        facts={text: text},
        pool_size=1,
        pool_shares={text: {text: 1}},
        choices=[choice, choice],
        score_summaries=[ScoreSummary(text, [0.0, 1.0], [1.0], 0.9, text)],
        extremes=[Extremes(text, 2, [example], [example])],
        rewards=Rewards(text, text, [checkpoint, checkpoint], [prompt], 2, [text]),
        outcomes=[Outcome(text, {text: 1.0}), Outcome(text, {text: 2.0}, {text: 0.1})],
        outcome_notes=[text],
        explained=[Explained(text, text, False, text, [ExplainedStrategy(text, 1.0, [explained], text)], 1.0)],
        skipped=[Skipped(text, text, text, text, 1)],
        skipped_counts={text: 2},
        parts=[Skipped(text, text, text, text, 1, "part", text)],
        parts_total=2,
        part_counts={text: 2},
        rows_in_part=2,
        files=[Skipped(text, text, text, text, left_out="file")],
        warnings=[text],
        reliability=[text],
        repeat={text: {text: [text, f"{text}\n{text}"]}},
        created=text,
    )
