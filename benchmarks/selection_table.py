"""Which choice of 10 % trains the better model: the papers' tables in miniature, by `gradsift compare`, demo model.

    python benchmarks/selection_table.py --out runs/table          # goes on where it stopped

Pool: 800 rows of ../shared/data/pool.jsonl. Two targets, word problems (`math`) and the sentiment of reviews, with 24
validation rows each to choose by and 60 others to test on; of sentiment the reward of sampled answers as well. One
warm-up of two epochs serves all methods; each choice is trained on for two epochs, once per seed. Both targets share
the run folder, and with it the trainings on choices that look at neither. After each comparison, OUT/<target>.json and
the tables OUT/results.md are written anew.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from relevance_table import DATA, rows_of

from gradsift import Comparison, Pool, Reporter, Warmup, open_pool, run_compare
from gradsift.base.types import TokenizedExample
from gradsift.compare.statistics import mean_and_spread, mean_jaccard, paired_difference
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.demo.model import demo_model
from gradsift.model.models import load_tokenizer
from gradsift.recipe import Recipe

VALIDATION, TEST = 24, 60
LONGEST = {"validation": 224, "test": 160}  # tokens of a target's row
ROW_TOKENS = 112  # of the pool's
# As in the demo: these adapters see 100 and 80 rows, not thousands.
TRAINING = {"epochs": 2, "rank": 16, "alpha": 32, "learning_rate": 5e-4, "batch_size": 8, "dropout": 0.0}
WARMUP = {**TRAINING, "fraction": 0.125}
ANSWER_TOKENS = 8  # a sentiment is one word
DRAWS = {"samples": 10, "max_new_tokens": ANSWER_TOKENS}  # for NICE; at the paper's temperature
MEASURED = {"samples": 4, "temperature": 1.0, "top_k": None, "top_p": None, "max_new_tokens": ANSWER_TOKENS}
REWARD = {"kind": "exact", "within": True}
JOINT = {"kind": "ji2s", "joint_weight": 0.1}
OFFLINE = {"kind": "ifd"}

# Those that look at no target come first: both targets share them.
UNTARGETED: list[dict[str, Any]] = [
    {"base": True},
    {"full": True, "seeds": [0]},
    {"name": "random", "estimator": {"kind": "random"}, "seeds": [0, 1, 2]},
    {"name": "AlpaGasus (IFD)", "estimator": {"kind": "alpagasus", "rater": OFFLINE}},
    {
        "name": "DEITA (IFD × length)",
        "estimator": {"kind": "deita", "complexity": OFFLINE, "quality": {"kind": "length"}},
        "selection": {"kind": "diverse"},
    },
]
TARGETED: list[dict[str, Any]] = [
    {"estimator": {"kind": "less"}},
    {"estimator": {"kind": "bm25"}},
    {"name": "RDS", "estimator": {"kind": "rds"}},
    {"name": "JI2S, λ = 0", "estimator": {**JOINT, "joint_weight": 0}},
    {"name": "JI2S, λ = 0.1", "estimator": JOINT},
    {"name": "JI2S, λ = 0.1, greedy", "estimator": JOINT, "selection": {"kind": "joint_greedy"}},
    {"estimator": {"kind": "datainf"}},
    {"name": "TSDS", "estimator": {"kind": "less"}, "selection": {"kind": "tsds"}},
    {"name": "DSIR", "estimator": {"kind": "dsir"}, "selection": {"kind": "gumbel"}},
    {"name": "inverse", "estimator": {"kind": "projected_inverse"}},
    {"name": "EK-FAC", "estimator": {"kind": "ekfac"}},
    {"name": "RDS+", "estimator": {"kind": "rds_plus"}},
    {
        "name": "RDS+, then LESS",
        "estimator": {"kind": "rerank", "first": "rds_plus", "then": "less", "candidates": 160},
    },
    {"name": "MAGIC", "estimator": {"kind": "magic"}},
    {
        "name": "metagradient descent",
        "estimator": {"kind": "less"},
        "selection": {"kind": "metagradient", "rounds": 4},
    },
]
REWARDED: list[dict[str, Any]] = [
    {"name": "NICE", "estimator": {"kind": "nice", "sampling": DRAWS}},
    {"name": "NICE-IF", "estimator": {"kind": "nice_if", "sampling": DRAWS}},
]
TARGETS = {"math": False, "sentiment": True}  # whether the reward of its answers is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/selection-table")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3, help="trainings on each choice")
    parser.add_argument("--targets", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--arms", nargs="*", metavar="NAME", help="those alone, such as LESS BM25")
    args = parser.parse_args()
    if not (DATA / "pool.jsonl").exists():
        print(f"skipped: the rows to choose from are not there ({DATA / 'pool.jsonl'})")
        return
    reporter = Reporter()
    model = args.model or str(demo_model(reporter))
    out = Path(args.out)
    files = write_data(model, out, args.rows)
    for target in args.targets:
        result = run_compare(recipe(target, files, model, args), reporter)
        content = {**result.as_dict(), "items": items(result), "sizes": sizes(result)}
        (out / f"{target}.json").write_text(json.dumps(content, indent=1) + "\n")
        text = markdown(out, pool_of(files, model, out))
        (out / "results.md").write_text(text)
    print(text)
    print(f"tables in {out / 'results.md'}")


def write_data(model: str, out: Path, rows: int) -> dict[str, Path]:
    """The pool, and each target's validation and test rows, as files."""
    chat = ChatFormat(load_tokenizer(model), max_length=100_000)
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"pool": rows_of(model, rows, ROW_TOKENS)}
    for target in TARGETS:
        for part, count in (("validation", VALIDATION), ("test", TEST)):
            content[f"{target}-{part}"] = target_rows(chat, target, part, count)
    files = {}
    for name, lines in content.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return files


def target_rows(chat: ChatFormat, target: str, part: str, count: int) -> list[dict[str, Any]]:
    """The first so many rows that fit; `answer` is what a reward compares with."""
    found = []
    for example in load_examples(str(DATA / f"target_{target}_{part}.jsonl")).examples:
        entry = chat.tokenize(example)
        if isinstance(entry, TokenizedExample) and len(entry.token_ids) <= LONGEST[part]:
            answer = example.row.get("answer", example.messages[-1]["content"])
            found.append({**example.row, "id": example.id, "answer": answer})
    assert len(found) >= count, f"{target}, {part}: only {len(found)} rows have at most {LONGEST[part]} tokens"
    return found[:count]


def recipe(target: str, files: Mapping[str, Path], model: str, args: argparse.Namespace) -> Recipe:
    """The comparison for one target."""
    rewarded = TARGETS[target]
    metrics: list[dict[str, Any]] = [{"kind": "loss"}]
    if rewarded:
        metrics.append({"kind": "reward", "reward": REWARD, "sampling": MEASURED})
    arms = [*UNTARGETED, *TARGETED, *(REWARDED if rewarded else [])]
    if args.arms:
        arms = [arm for arm in arms if arm_name(arm) in args.arms]
    return Recipe.model_validate(
        {
            "model": model,
            "pool": str(files["pool"]),
            "target": str(files[f"{target}-validation"]),
            "out": args.out,
            "max_length": LONGEST["validation"],
            "warmup": WARMUP,
            "budget": args.budget,
            "reward": REWARD if rewarded else None,
            "seed": 42,
            "compare": {
                "test": str(files[f"{target}-test"]),
                "metrics": metrics,
                "training": TRAINING,
                "seeds": list(range(args.seeds)),
                "arms": [own_seeds(arm, args.seeds) for arm in arms],
            },
        }
    )


def arm_name(arm: Mapping[str, Any]) -> str:
    """What to call an arm on the command line: its name, or its method's."""
    of = next((key for key in ("base", "full") if key in arm), None)
    return str(arm.get("name") or of or arm["estimator"]["kind"])


def own_seeds(arm: dict[str, Any], seeds: int) -> dict[str, Any]:
    """With one seed for all, arms with seeds of their own keep the first of them."""
    return arm if "seeds" not in arm or seeds > 1 else {**arm, "seeds": arm["seeds"][:1]}


def items(result: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    """figure -> arm -> test item -> its mean over seeds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for cell in result.cells:
        for measured in cell.measured:
            for figure in measured.figures:
                arm = found.setdefault(figure.name, {}).setdefault(cell.arm, {})
                for item, value in figure.per_item.items():
                    arm.setdefault(str(item), []).append(value)
    return {
        figure: {arm: {item: float(np.mean(v)) for item, v in values.items()} for arm, values in arms.items()}
        for figure, arms in found.items()
    }


def sizes(result: Comparison) -> dict[str, int]:
    """Examples that each arm was trained on."""
    return {cell.arm: cell.examples for cell in result.cells}


def pool_of(files: Mapping[str, Path], model: str, out: Path) -> Pool:
    warmup = Warmup.model_validate(WARMUP)
    return open_pool(
        str(files["pool"]), model=model, out=str(out), max_length=LONGEST["validation"], warmup=warmup, seed=42
    )


def markdown(out: Path, pool: Pool) -> str:
    """All tables of the targets that there are."""
    parts = []
    for target in TARGETS:
        path = out / f"{target}.json"
        if path.exists():
            content = json.loads(path.read_text())
            parts += [results_table(target, content), choice_table(target, content, pool), cost_table(target, content)]
    return "\n\n".join(parts) + "\n"


def results_table(target: str, content: Mapping[str, Any]) -> str:
    """Each figure's mean ± standard deviation over seeds, and the difference to random with an interval over items."""
    figures = [figure for figure in ("loss", "reward") if any(row["figure"] == figure for row in content["rows"])]
    heads = [f"{figure} | seeds | minus random (95 %)" for figure in figures]
    lines = [f"**{target}**: test rows; intervals over rows, of means over seeds", ""]
    lines += [f"| trained on | examples | {' | '.join(heads)} |", "|---" * (2 + 3 * len(figures)) + "|"]
    for arm in (arm["name"] for arm in content["arms"]):
        if arm not in content["sizes"]:
            lines.append(f"| {arm} | failed |" + " | |" * len(figures))
            continue
        columns = []
        for figure in figures:
            row = next(r for r in content["rows"] if (r["arm"], r["figure"]) == (arm, figure))
            found = mean_and_spread(list(row["by_seed"].values()))
            assert found is not None, (arm, figure)
            spread = "" if found.spread is None else f" ± {found.spread:.3f}"
            columns.append(f"{found.mean:.3f}{spread} | {found.count} | {versus_random(content, figure, arm)}")
        lines.append(f"| {arm} | {content['sizes'][arm]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def versus_random(content: Mapping[str, Any], figure: str, arm: str) -> str:
    """Mean paired difference over test items to random's mean, with a bootstrap interval over items."""
    values = content["items"][figure]
    if arm == "random" or "random" not in values:
        return ""
    found = paired_difference(values[arm], values["random"], interval="bootstrap")
    assert found is not None, (figure, arm)
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def choice_table(target: str, content: Mapping[str, Any], pool: Pool) -> str:
    """What each arm chose: sources, length of answers, and overlap with LESS."""
    cells: dict[str, dict[int, Sequence[str]]] = {}
    for cell in content["cells"]:
        if cell["ids"]:
            cells.setdefault(cell["arm"], {})[cell["seed"]] = cell["ids"]
    of_pool = Counter(str(source) for source in pool.data.column("source"))
    sources = sorted(of_pool)
    lines = [f"**{target}**: what was chosen", ""]
    lines += [f"| chosen by | {' | '.join(sources)} | tokens of an answer | Jaccard with LESS |"]
    lines += ["|---" * (len(sources) + 3) + "|"]
    lines += [_choice_line("(pool)", of_pool, sources, pool.data.ids, pool, "")]
    for arm, by_seed in cells.items():
        chosen = [id_ for ids in by_seed.values() for id_ in ids]
        counts = Counter(str(pool.data.row(id_)["source"]) for id_ in chosen)
        shared = mean_jaccard([by_seed, cells["LESS"]])[0][1] if "LESS" in cells and arm != "LESS" else None
        lines.append(_choice_line(arm, counts, sources, chosen, pool, "" if shared is None else f"{shared:.2f}"))
    return "\n".join(lines)


def _choice_line(
    name: str, counts: Counter[str], sources: Sequence[str], ids: Sequence[str], pool: Pool, shared: str
) -> str:
    shares = " | ".join(f"{counts[source] / counts.total():.0%}" for source in sources)
    tokens = pool.data.supervised_tokens[pool.data.positions(list(ids))].mean()
    return f"| {name} | {shares} | {tokens:.0f} | {shared} |"


def cost_table(target: str, content: Mapping[str, Any]) -> str:
    """Wall seconds of each stage; what an earlier comparison had made costs nothing again."""
    stages = list(dict.fromkeys(cost["stage"] for cost in content["costs"]))
    by_arm: dict[str, dict[str, float]] = {}
    for cost in content["costs"]:
        own = by_arm.setdefault(cost["arm"] or "(shared)", {})
        own[cost["stage"]] = own.get(cost["stage"], 0.0) + cost["seconds"]
    lines = [f"**{target}**: wall seconds, all seeds together", "", f"| arm | {' | '.join(stages)} |"]
    lines += ["|---" * (len(stages) + 1) + "|"]
    lines += [
        f"| {arm} | {' | '.join(f'{own[s]:.0f}' if s in own else '' for s in stages)} |" for arm, own in by_arm.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
