"""Compact's tables in miniature: all estimators × strategies × budgets on the demo model, with validation by training.

    python benchmarks/relevance_table.py --out runs/relevance          # goes on where it was stopped

The demo model is fine-tuned for one epoch with Compact's settings on rows of ../shared/data/pool.jsonl; its own answers
to held-out prompts are explained. Prints the tables as Markdown and writes them to OUT/tables.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from gradsift import BM25, LESS, TRAK, DataInf, Gradients, Pool, ProjectedInverse, Projection, Reporter, open_pool
from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.data.overlap import normalised_hash
from gradsift.demo.model import demo_model
from gradsift.explanation.coefficients import MODELS
from gradsift.explanation.explain import ALL_STRATEGIES, Explanations, explain
from gradsift.explanation.outputs import OutputSource, Question, questions_of
from gradsift.explanation.relevance import relevance_of_choices, to_db
from gradsift.explanation.shown import explanation_file, explanation_page
from gradsift.explanation.table import gain_over_naive, relevance_table
from gradsift.influence.estimator import Estimator
from gradsift.jobs.pages import publish_page
from gradsift.model.models import load_tokenizer
from gradsift.selection.selector import choose_all
from gradsift.validation.validate import Validated, cells_of, sanity_check, validate
from gradsift.warmup.train import PRESETS

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TARGETS = ("math", "code", "instruction", "sentiment")
BUDGETS = (1, 5, 10, 25)
ESTIMATORS: tuple[Estimator, ...] = (
    DataInf(),
    LESS(optimizer="sgd", checkpoints="last"),
    BM25(tokens="model"),
    ProjectedInverse(kernel="segments", damping="auto", checkpoints="last"),
    TRAK(kernel="whole", damping="auto", checkpoints="last"),
    LESS(optimizer="sgd", checkpoints="last", normalise=False),
)
# Compact, Table 1 (k = 10, mean of three models): what to compare with, never what is printed as ours.
PUBLISHED = {
    ("DataInf", "most influential"): -22.87, ("DataInf", "FL most influential λ=1"): -19.54,
    ("DataInf", "least influential"): -0.14, ("DataInf", "random"): -2.57,
    ("LESS", "most influential"): -22.28, ("LESS", "FL most influential λ=1"): -19.28,
    ("LESS", "least influential"): -0.14, ("LESS", "random"): -2.57,
    ("BM25", "most influential"): 22.24, ("BM25", "FL most influential λ=0.5"): 30.00,
    ("BM25", "least influential"): -1.01, ("BM25", "random"): -2.57,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/relevance-table")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--row-tokens", type=int, default=112)
    parser.add_argument("--outputs", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--validated-outputs", type=int, default=12)
    parser.add_argument("--validated-estimators", type=int, default=3, help="the first so many")
    parser.add_argument("--validated-k", type=int, nargs="*", default=[10])
    args = parser.parse_args()
    reporter = Reporter()
    model = args.model or str(demo_model(reporter))
    pool = open_pool(
        rows_of(model, args.rows, args.row_tokens),
        model=model,
        out=args.out,
        warmup=PRESETS["compact"].model_copy(update={"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}),
        max_length=args.row_tokens,
        seed=42,
        reporter=reporter,
    )
    with pool.run.lock():
        tables = measure(pool, args)
    print(markdown(tables))
    path = Path(args.out) / "tables.json"
    path.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    print(f"tables in {path}, pages of the best and worst selections in {Path(args.out) / 'pages'}")


def rows_of(model: str, count: int, most_tokens: int) -> list[dict[str, Any]]:
    """Rows of the shared pool that fit, the sources in turn as long as they last, so that each has its share."""
    chat = ChatFormat(load_tokenizer(model), max_length=100_000)
    by_source: dict[str, list[dict[str, Any]]] = {}
    for example in load_examples(str(DATA / "pool.jsonl")).examples:
        entry = chat.tokenize(example)
        if isinstance(entry, TokenizedExample) and len(entry.token_ids) <= most_tokens:
            by_source.setdefault(str(example.row["source"]), []).append({**example.row, "id": example.id})
    in_turn = [row for rows in zip_longest(*by_source.values()) for row in rows if row is not None]
    assert len(in_turn) >= count, f"only {len(in_turn)} rows have at most {most_tokens} tokens"
    return in_turn[:count]


def questions(pool: Pool, count: int) -> list[Question]:
    """Prompts of the test files, as many of each, none longer than the pool's rows."""
    each = -(-count // len(TARGETS))
    found: list[Question] = []
    for name in TARGETS:
        examples = load_examples(str(DATA / f"target_{name}_test.jsonl")).examples
        short = [q for q in questions_of(examples) if len(pool.chat.prompt_ids(q.messages)) <= 200]
        found += short[:each]
    return found


def measure(pool: Pool, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed."""
    asked = questions(pool, args.outputs)
    found = explain(
        pool, asked, k=BUDGETS, estimator=ESTIMATORS, strategies=ALL_STRATEGIES, max_new_tokens=args.max_new_tokens
    )
    tables: dict[str, Any] = {
        "rows": len(pool.data), "outputs": len(found.entries), "failed": [f"{f.id}: {f.detail}" for f in found.failed],
        "tokens": int(pool.data.lengths.sum()), "cut": sum(not entry.finished for entry in found.entries),
    }  # fmt: skip
    tables["duplicates"] = duplicates(pool, found)
    for how in ("ratio_of_means", "mean_of_ratios", "median_db"):
        table = relevance_table(found, how=how)
        tables[how] = [row_of(row) for row in table.rows]
        tables[f"{how}_gain"] = gain_over_naive(table, naive_of)
    tables["coefficients"] = coefficient_table(found)
    tables["causes"] = causes(pool, found)
    tables["pages"] = extremes(pool, found)
    tables["validation"] = validation(pool, found, args)
    return tables


def row_of(row: Any) -> dict[str, Any]:
    """A table's row as JSON."""
    return {
        "estimator": row.estimator, "strategy": row.strategy, "db": {k: s.db for k, s in row.by_budget.items()},
        "db_without_capped": {k: s.db_without_capped for k, s in row.by_budget.items()},
        "capped": {k: s.capped for k, s in row.by_budget.items()},
        "auc": row.auc_db, "auc_per_unit": row.auc_per_unit_db,
        "near_zero": {k: s.near_zero for k, s in row.by_budget.items()}, "above": dict(row.above),
    }  # fmt: skip


def naive_of(strategy: str) -> str | None:
    """The naive choice that a strategy's label re-ranks."""
    if strategy.startswith(("FL", "DIVINE")):
        for order in ("most harmful", "most influential", "least influential"):
            if order in strategy:
                return order
        return "most helpful"
    return "most influential" if strategy == "AIDE" else None


def duplicates(pool: Pool, found: Explanations) -> dict[str, int]:
    """Outputs whose conversation, or whose prompt alone, is also in the pool (normalised)."""
    whole = set(pool.data.hashes)
    prompts = {normalised_hash(pool.data.messages(id_)[:-1]) for id_ in pool.data.ids}  # type: ignore[arg-type]
    said = [[*entry.messages, {"role": "assistant", "content": entry.output}] for entry in found.entries]
    return {
        "conversations": sum(normalised_hash(messages) in whole for messages in said),  # type: ignore[arg-type]
        "prompts": sum(normalised_hash(entry.messages) in prompts for entry in found.entries),
    }


def coefficient_table(found: Explanations) -> list[dict[str, Any]]:
    """Compact's Table 4 at k = 10, and the relevance under each model, over every estimator and strategy."""
    strategies = [s for s in ALL_STRATEGIES if not s.last]
    values: dict[str, list[list[float]]] = {model: [] for model in MODELS}
    for entry in found.entries:
        for estimator in found.estimators:
            competing = found.candidates_of(entry.id, estimator)
            choices = choose_all(strategies, competing, [10])
            for by_budget in relevance_of_choices(competing, choices):
                for model, relevances in by_budget[10].items():
                    for relevance in relevances:
                        t = relevance.coefficients.double()
                        values[model].append([
                            float(t.abs().sum()), float(t.norm()), float((t != 0).double().mean()),
                            float((t < 0).double().mean()), relevance.squared_norm, relevance.squared_error,
                        ])  # fmt: skip
    rows = []
    for name, numbers in values.items():
        a = np.array(numbers)
        rows.append({
            "model": name, "l1": a[:, 0].mean(), "l2": a[:, 1].mean(), "l2_median": float(np.median(a[:, 1])),
            "nonzero": a[:, 2].mean(), "negative": a[:, 3].mean(), "db": to_db(a[:, 4].sum() / a[:, 5].sum()),
        })  # fmt: skip
    return rows


def causes(pool: Pool, found: Explanations) -> dict[str, Any]:
    """What the low relevance of gradient-based choices may come from: long gradients, and end-of-turn tokens."""
    store = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"]
    source = found.source
    assert source is not None
    cut = []
    for tokens in source.entries:  # the same outputs without the token that ends the turn
        supervised = tokens.supervised.copy()
        if supervised.sum() > 1 and int(tokens.token_ids[-1]) in pool.chat.end_of_turn_ids:
            supervised[-1] = False
        cut.append(replace(tokens, supervised=supervised))
    without_end = OutputSource(tuple(cut), source.template, conversations=source.conversations)
    ended = pool.collect(without_end, pool.checkpoints()[-1], ["plain"], what="output")["plain"]
    result: dict[str, Any] = {"strategies": []}
    labels = ("most influential", "most helpful", "least influential", "FL most influential λ=0.5", "random")
    norms = store.projected_norms.numpy()
    targets = np.array([float(found.gradient_of(entry.id).norm()) for entry in found.entries])
    result["pool_norm_median"], result["output_norm_median"] = float(np.median(norms)), float(np.median(targets))
    for estimator in found.estimators:
        for label in labels:
            ratios, scaled, unended, lengths = [], [], [], []
            for entry in found.entries:
                chosen = next(
                    (r for r in entry.results if (r.estimator, r.strategy, r.k) == (estimator.label, label, 10)), None
                )
                if chosen is None or entry.id not in ended:
                    continue
                rows = store.rows_by_id([example.id for example in chosen.examples])
                g = found.gradient_of(entry.id)
                size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                ratios.append(one(g, rows))
                scaled.append(one(g, rows / size.clamp_min(1e-30) * g.norm()))
                position = ended.positions([entry.id])[0]
                unended.append(one(ended.rows(position, position + 1)[0], rows))
                lengths.append(float(size.median() / g.norm()))
            if ratios:
                result["strategies"].append({
                    "estimator": estimator.label, "strategy": label, "db": mean_db(ratios), "scaled": mean_db(scaled),
                    "without_end": mean_db(unended), "norm_ratio": float(np.median(lengths)),
                })  # fmt: skip
    return result


def one(g: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """‖g‖² and ‖g − At‖²."""
    from gradsift import selection_relevance

    found = selection_relevance(g, rows)
    return found.squared_norm, found.squared_error


def mean_db(pairs: SequenceABC[tuple[float, float]]) -> float:
    """Ratio of means in dB."""
    a = np.array(pairs)
    return to_db(a[:, 0].sum() / max(a[:, 1].sum(), 1e-12 * a[:, 0].sum()))


def extremes(pool: Pool, found: Explanations) -> list[dict[str, Any]]:
    """Per estimator the most and the least relevant selection of five, each on a page (App. E)."""
    made = []
    for estimator in found.estimators:
        cells = [
            (result.ratio, entry, result)
            for entry in found.entries
            for result in entry.results
            if result.estimator == estimator.label and result.k == 5
            and result.strategy not in ("random", "relevance pursuit")
        ]  # fmt: skip
        for word, (ratio, entry, result) in (
            ("highest", max(cells, key=lambda cell: cell[0])),
            ("lowest", min(cells, key=lambda cell: cell[0])),
        ):
            strategy = next(s for s in found.strategies if s.label == result.strategy)
            shown = replace(found, estimators=(estimator,), strategies=(strategy,))
            own = replace(entry, results=tuple(r for r in entry.results if r.strategy == result.strategy))
            key = f"pages/{explanation_file(f'{word} {estimator.label} {entry.id}')}"
            publish_page(pool.run, key, explanation_page(shown, own)[0])
            made.append({
                "estimator": estimator.label, "which": word, "strategy": result.strategy, "output": entry.id,
                "db": to_db(ratio), "page": key,
            })  # fmt: skip
    return made


def validation(pool: Pool, found: Explanations, args: argparse.Namespace) -> dict[str, Any]:
    """Support and shift by one training step from unprojected gradients, and how relevance predicts them."""
    unprojected = replace(pool, gradients=Gradients(projection=Projection(kind="none"), dtype="float16"))
    wanted = {entry.id for entry in found.entries[:: max(1, len(found.entries) // args.validated_outputs)]}
    estimators = found.estimators[: args.validated_estimators]
    labels = {estimator.label for estimator in estimators}
    cells = [
        cell
        for cell in cells_of(found)
        if cell.output in wanted and cell.key.k in args.validated_k and cell.key.estimator in labels
    ]
    outputs = [entry for entry in found.outputs if entry.id in wanted]
    checked = validate(unprojected, outputs, cells, route="stored")
    sanity = sanity_check(unprojected, found.outputs, route="stored")
    result = checked.as_dict()
    del result["cells"]
    result["facts"] = checked.facts()
    result["outputs"] = len(outputs)
    result["sanity"] = {"support": sanity.support.share, "shift": sanity.shift.share, "pairs": sanity.support.count}
    result["reranking"] = [
        reranking(checked.cells, estimator.label, trade_off)
        for estimator in estimators
        for trade_off in (0.25, 0.5, 0.75, 1)
    ]
    return result


def reranking(cells: SequenceABC[Validated], estimator: str, trade_off: float, draws: int = 1000) -> dict[str, Any]:
    """Does facility location change ρ(ξ, ξ⁺) of the naive choices? Difference, and its 95 % interval over outputs."""
    naive = {"most helpful", "most harmful", "most influential", "least influential"}
    ours = [c for c in cells if c.cell.key.estimator == estimator]
    ending = f"λ={trade_off:g}"
    groups = [
        pairs(c for c in ours if c.cell.key.strategy in naive),
        pairs(c for c in ours if c.cell.key.strategy.startswith("FL") and c.cell.key.strategy.endswith(ending)),
    ]  # fmt: skip
    ids = sorted(groups[0].keys() & groups[1].keys())
    generator = np.random.default_rng(0)
    rho = [correlation(np.concatenate([group[id_] for id_ in ids])) for group in groups]
    changes = []
    for _ in range(draws):
        drawn = [ids[n] for n in generator.integers(0, len(ids), len(ids))]
        before, after = (correlation(np.concatenate([group[id_] for id_ in drawn])) for group in groups)
        changes.append(after - before)
    low, high = np.nanpercentile(changes, [2.5, 97.5])
    return {
        "estimator": estimator, "trade_off": trade_off, "naive": rho[0], "re-ranked": rho[1],
        "change": rho[1] - rho[0], "low": float(low), "high": float(high),
    }  # fmt: skip


def pairs(cells: Iterable[Validated]) -> dict[str, NDArray[np.float64]]:
    """Output → [cell, (relevance, support)]."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        found.setdefault(cell.cell.output, []).append((cell.cell.relevance, cell.support))
    return {id_: np.array(values) for id_, values in found.items()}


def correlation(values: NDArray[np.float64]) -> float:
    """Spearman's ρ of the two columns."""
    a, b = rankdata(values[:, 0]), rankdata(values[:, 1])
    return float(spearmanr(a, b).statistic) if a.std() > 0 and b.std() > 0 else float("nan")


def markdown(tables: dict[str, Any]) -> str:
    """The tables for RESULTS.md."""
    lines = [
        f"{tables['rows']} pool rows ({tables['tokens']:,} tokens), {tables['outputs']} outputs explained "
        f"({tables['cut']} cut, {len(tables['failed'])} failed); in the pool too: "
        f"{tables['duplicates']['conversations']} conversations, {tables['duplicates']['prompts']} prompts.",
    ]
    for estimator in dict.fromkeys(row["estimator"] for row in tables["ratio_of_means"]):
        lines += ["", f"**{estimator}**: relevance in dB, ratio of means, lowest at k = 10 first", ""]
        lines += [
            "| strategy | k=1 | k=5 | k=10 | k=25 | AUC | above 0 dB at 10 | mean of ratios at 10 | published at 10 |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        other = {(r["estimator"], r["strategy"]): r["db"] for r in tables["mean_of_ratios"]}
        for row in tables["ratio_of_means"]:
            if row["estimator"] != estimator:
                continue
            db = {int(k): value for k, value in row["db"].items()}
            above = {int(k): value for k, value in row["above"].items()}
            mean = {int(k): value for k, value in other[estimator, row["strategy"]].items()}[10]
            published = PUBLISHED.get((estimator.split(" ")[0], row["strategy"]))
            known = "" if published is None else f"{published:+.2f}"
            lines.append(
                f"| {row['strategy']} | " + " | ".join(f"{db[k]:+.2f}" for k in BUDGETS)
                + f" | {row['auc']:+.2f} | {above[10]:.0%} | {mean:+.2f} | {known} |"
            )  # fmt: skip
    lines += ["", "**Gain over the naive choice of the same ranking**, dB (per cent of ξ)", ""]
    lines += ["| estimator | strategy | k=1 | k=5 | k=10 | k=25 |", "|---|---|---|---|---|---|"]
    gains: dict[tuple[str, str], dict[int, str]] = {}
    for gain in tables["ratio_of_means_gain"]:
        cell = f"{gain['gain_db']:+.2f} ({gain['gain_percent']:+.0f} %)"
        gains.setdefault((gain["estimator"], gain["strategy"]), {})[int(gain["k"])] = cell
    lines += [f"| {e} | {s} | " + " | ".join(by_k[k] for k in BUDGETS) + " |" for (e, s), by_k in gains.items()]
    lines += ["", "**Coefficients** at k = 10 (Table 4)", ""]
    lines += ["| model | l1 | l2 | median l2 | non-zero | negative | dB |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {c['model']} | {c['l1']:.3g} | {c['l2']:.3g} | {c['l2_median']:.3g} | {c['nonzero']:.2f} "
        f"| {c['negative']:.2f} | {c['db']:+.2f} |"
        for c in tables["coefficients"]
    ]  # fmt: skip
    causes = tables["causes"]
    norms = f"of the pool {causes['pool_norm_median']:.3g}, of the outputs {causes['output_norm_median']:.3g}"
    lines += ["", f"**Causes** (k = 10): median gradient norm {norms}", ""]
    lines += ["| estimator | strategy | dB | chosen rows scaled to ‖g‖ | g without its end of turn | ‖chosen‖/‖g‖ |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {c['estimator']} | {c['strategy']} | {c['db']:+.2f} | {c['scaled']:+.2f} | {c['without_end']:+.2f} "
        f"| {c['norm_ratio']:.2f} |"
        for c in causes["strategies"]
    ]  # fmt: skip
    lines += [
        "",
        "**Best and worst selections of five**",
        "",
        "| estimator | | strategy | output | dB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['estimator']} | {p['which']} | {p['strategy']} | {p['output']} | {p['db']:+.2f} |"
        for p in tables["pages"]
    ]
    checked = tables["validation"]
    lines += ["", f"**Validation by one step**, {checked['outputs']} outputs", ""]
    lines += [f"- {name}: {value}" for name, value in checked["facts"].items()]
    sanity = checked["sanity"]
    shares = f"in support {sanity['support']:.1%}, in shift {sanity['shift']:.1%} of {sanity['pairs']} pairs"
    lines += [f"- the output itself beats a random example {shares}"]
    lines += ["", "| estimator | cells | ρ(ξ,ξ⁺) | above 0 dB | ρ(ξ,ξ^JSD) | above 0 dB |", "|---|---|---|---|---|---|"]
    for name, found in checked["by_estimator"].items():
        numbers = (found["support"], found["support_above"], found["shift"], found["shift_above"])
        lines.append(f"| {name} | {found['cells']} | " + " | ".join(_rho(number) for number in numbers) + " |")
    lines += ["", "| relevance | cells | ξ⁺ > 0 | 0 dB rule right |", "|---|---|---|---|"]
    for part in checked["agreement"]["bins"] if checked["agreement"] else []:
        low, high = part["low_db"], part["high_db"]
        name = f"{'−∞' if low is None else f'{low:+g}'} to {'∞' if high is None else f'{high:+g}'} dB"
        lines.append(
            f"| {name} | {part['supported']['count']} | {_share(part['supported'])} | {_share(part['correct'])} |"
        )
    lines += ["", "| estimator | λ | ρ naive | ρ re-ranked | change (95 % over outputs) |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['estimator']} | {r['trade_off']:g} | {r['naive']:+.2f} | {r['re-ranked']:+.2f} "
        f"| {r['change']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f}) |"
        for r in checked["reranking"]
    ]  # fmt: skip
    return "\n".join(lines)


def _rho(found: dict[str, Any]) -> str:
    return "" if found["rho"] is None else f"{found['rho']:+.2f} ({found['count']})"


def _share(found: dict[str, Any]) -> str:
    return "" if found["share"] is None else f"{found['share']:.0%} ({found['low']:.0%} to {found['high']:.0%})"


if __name__ == "__main__":
    main()
