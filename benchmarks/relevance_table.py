"""Compact's tables in miniature: all estimators × strategies × budgets on the demo model, with validation by training.

    python benchmarks/relevance_table.py --out runs/relevance          # goes on where it was stopped
    python benchmarks/relevance_table.py --out runs/exact --exactness  # candidates against the whole pool

The demo model is fine-tuned for one epoch with Compact's settings on rows of ../shared/data/pool.jsonl; its own answers
to held-out prompts are explained. Prints the tables as Markdown; the run folder has the pages of the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from gradsift import BM25, LESS, TRAK, DataInf, Gradients, Pool, ProjectedInverse, Projection, Reporter, open_pool
from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.data.overlap import normalised_hash
from gradsift.demo.model import demo_model
from gradsift.explanation import explain as explain_module
from gradsift.explanation.exact import ExactRows
from gradsift.explanation.explain import ALL_STRATEGIES, DEFAULT_ESTIMATOR, DEFAULT_STRATEGIES, Explanations, explain
from gradsift.explanation.outputs import OutputSource, Question, questions_of
from gradsift.explanation.relevance import to_db
from gradsift.explanation.result import StrategyResult
from gradsift.explanation.table import (
    RelevanceTable,
    coefficient_blocks,
    coefficient_statistics,
    extreme_blocks,
    gain_blocks,
    relevance_blocks,
    relevance_table,
)
from gradsift.influence.estimator import Estimator
from gradsift.jobs.explanation_pages import bins_table, estimators_table, reranking_table, write_pages
from gradsift.model.models import load_tokenizer
from gradsift.report.blocks import Block, Column, Entry, Row, Table, Text
from gradsift.selection.pursuit import RelevancePursuit
from gradsift.validation.statistics import share_over
from gradsift.validation.validate import Validation, share_text, validate_explanations
from gradsift.warmup.train import PRESETS

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TARGETS = ("math", "code", "instruction", "sentiment")
BUDGETS = (1, 5, 10, 25)
ESTIMATORS: tuple[Estimator, ...] = (
    DataInf(),
    LESS(optimizer="sgd", checkpoints="last"),
    BM25(tokens="model"),
    LESS(optimizer="sgd", checkpoints="last", normalise=False),
    ProjectedInverse(kernel="segments", damping="auto", checkpoints="last"),
    TRAK(kernel="whole", damping="auto", checkpoints="last"),
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
    parser.add_argument("--estimators", type=int, default=len(ESTIMATORS), help="the first so many")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--validated-outputs", type=int, default=12, help="0 leaves the validation out")
    parser.add_argument("--validated-estimators", type=int, default=3, help="the first so many")
    parser.add_argument("--validated-k", type=int, nargs="*", default=[10])
    parser.add_argument("--warmup-share", type=float, default=1.0, help="of the rows, that the model is fine-tuned on")
    parser.add_argument("--exactness", action="store_true", help="compare with candidates that are the whole pool")
    args = parser.parse_args()
    reporter = Reporter()
    model = args.model or str(demo_model(reporter))
    pool = open_pool(
        rows_of(model, args.rows, args.row_tokens),
        model=model,
        out=args.out,
        warmup=PRESETS["compact"].model_copy(
            update={"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "fraction": args.warmup_share}
        ),
        max_length=args.row_tokens,
        seed=42,
        reporter=reporter,
    )
    with pool.run.lock():
        print(markdown(exactness(pool, args) if args.exactness else measure(pool, args)))


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


def measure(pool: Pool, args: argparse.Namespace) -> list[Block]:
    """Everything that is printed."""
    found = explain(
        pool,
        questions(pool, args.outputs),
        k=BUDGETS,
        estimator=ESTIMATORS[: args.estimators],
        strategies=(*ALL_STRATEGIES, RelevancePursuit(order="any")),
        candidates=args.candidates,
        max_new_tokens=args.max_new_tokens,
        matches=0,
    )
    table = relevance_table(found)
    table = replace(table, coefficients=coefficient_statistics(found, table.sorted_at))
    validation = validated(pool, found, args) if args.validated_outputs else None
    write_pages(found, table, validation, pages=0, embedding=None)
    twice = duplicates(pool, found)
    cut = sum(not entry.finished for entry in found.entries)
    blocks: list[Block] = [
        Text(
            f"{len(pool.data)} pool rows ({int(pool.data.lengths.sum()):,} tokens), {len(found.entries)} outputs "
            f"explained ({cut} cut, {len(found.failed)} failed); in the pool too: {twice['conversations']} "
            f"conversations, {twice['prompts']} prompts."
        ),
        *relevance_blocks(table),
        published(table, relevance_table(found, how="mean_of_ratios")),
        *gain_blocks(table),
        *coefficient_blocks(table),
        causes_table(causes(pool, found)),
        *extreme_blocks(table),
    ]
    if validation is not None and validation.agreement is not None:
        blocks += [Text("\n".join(f"- {line}" for line in validation.lines()))]
        tables = (estimators_table(validation), bins_table(validation.agreement.bins), reranking_table(validation))
        blocks += [one for one in tables if one is not None]
    return blocks


def validated(pool: Pool, found: Explanations, args: argparse.Namespace) -> Validation:
    """Support and shift by one training step from unprojected gradients, of some outputs' choices."""
    unprojected = replace(pool, gradients=Gradients(projection=Projection(kind="none"), dtype="float16"))
    step = max(1, len(found.entries) // args.validated_outputs)
    labels = {estimator.label for estimator in found.estimators[: args.validated_estimators]}
    entries = [
        replace(entry, results=tuple(r for r in entry.results if r.k in args.validated_k and r.estimator in labels))
        for entry in found.entries[::step]
    ]
    some = replace(found, entries=tuple(entries))
    return validate_explanations(unprojected, some, route="stored", sanity=True)


def exactness(pool: Pool, args: argparse.Namespace) -> list[Block]:
    """Choices and signs of relevance from candidates, beside those from unprojected rows of the whole pool."""
    how: dict[str, Any] = {
        "k": (5, 10), "estimator": DEFAULT_ESTIMATOR, "strategies": DEFAULT_STRATEGIES, "matches": 0,
        "max_new_tokens": args.max_new_tokens,
    }  # fmt: skip
    asked = questions(pool, args.outputs)
    whole = explain(pool, asked, candidates=len(pool.data), **how)
    for entry in whole.entries:
        whole.candidates_of(entry.id, DEFAULT_ESTIMATOR)  # reads what an earlier call has kept
    every = {entry.id: whole._exact[entry.id] for entry in whole.entries}

    def known(_pool: Pool, _at: Any, wanted: Any, *, adam: bool) -> list[ExactRows]:
        """Products of the whole pool hold those of any of its rows: the model need not be asked again."""
        return [of_rows(every[source.ids[0]], ids) for source, ids in wanted]

    with patch.object(explain_module, "exact_rows", known):
        few = explain(pool, asked, candidates=args.candidates, **how)
    truth = {(e.id, r.strategy, r.k): r for e in whole.entries for r in e.results}
    rows = []
    for strategy, k in dict.fromkeys((r.strategy, r.k) for r in few.entries[0].results):
        pairs = [
            (entry.id, found, truth[entry.id, strategy, k])
            for entry in few.entries
            for found in entry.results
            if (found.strategy, found.k) == (strategy, k)
        ]
        ids = [id_ for id_, _, _ in pairs]
        choice = share_over([{e.id for e in a.examples} == {e.id for e in b.examples} for _, a, b in pairs], ids)
        weighed = share_over([weighty(a) == weighty(b) for _, a, b in pairs], ids)
        sign = share_over([(a.ratio > 1) == (b.ratio > 1) for _, a, b in pairs], ids)
        gaps = [abs(a.relevance_db - b.relevance_db) for _, a, b in pairs]
        lost = sum(len({e.id for e in b.examples} - {e.id for e in a.examples}) for _, a, b in pairs)
        expected = sum(entry.verdict(found).missed or 0.0 for entry in few.entries for found in entry.results
                       if (found.strategy, found.k) == (strategy, k))  # fmt: skip
        shares = map(share_text, (choice, weighed, sign))
        apart = f"{np.median(gaps):.2f} ({max(gaps):.2f})"
        rows.append(Row((strategy, str(k), *shares, apart, f"{lost} of {k * len(pairs)}", f"{expected:.1f}")))
    heads = ("strategy", "k", "same choice", "same rows of weight", "same sign", "median (largest) dB apart",
             "other rows", "by estimate")  # fmt: skip
    title = f"{args.candidates} candidates of {len(pool.data)} rows, {len(few.entries)} outputs"
    return [Table(tuple(map(Column, heads)), tuple(rows), title)]


def weighty(found: StrategyResult) -> set[str]:
    """Rows that the reconstruction uses: once it fits, others are chosen that get no weight."""
    return {example.id for example in found.examples if example.coefficient > 0.01}


def of_rows(known: ExactRows, ids: SequenceABC[str]) -> ExactRows:
    """The products of some rows, and the output."""
    places = torch.tensor([*(known.places[id_] for id_ in ids), len(known.ids)])
    return ExactRows(tuple(ids), {sides: one[places][:, places] for sides, one in known.products.items()})


def published(table: RelevanceTable, means: RelevanceTable) -> Table:
    """Compact's Table 1 beside the mean of ratios, which it holds."""
    rows = []
    for row in means.rows:
        name = {"TracIn": "LESS", "LESS": ""}.get(row.estimator.split(" ")[0], row.estimator.split(" ")[0])
        known = PUBLISHED.get((name, row.strategy))
        if known is not None:
            ours = f"{row.by_budget[table.sorted_at].db:+.2f}"
            rows.append(Row((f"{row.estimator}, {row.strategy}", ours, f"{known:+.2f}")))
    return Table(tuple(map(Column, ("choice", "mean of ratios here", "published"))), tuple(rows), "Beside Table 1")


def duplicates(pool: Pool, found: Explanations) -> dict[str, int]:
    """Outputs whose conversation, or whose prompt alone, is also in the pool (normalised)."""
    whole = set(pool.data.hashes)
    prompts = {normalised_hash(pool.data.messages(id_)[:-1]) for id_ in pool.data.ids}
    said = [[*entry.messages, {"role": "assistant", "content": entry.output}] for entry in found.entries]
    return {
        "conversations": sum(normalised_hash(messages) in whole for messages in said),  # type: ignore[arg-type]
        "prompts": sum(normalised_hash(entry.messages) in prompts for entry in found.entries),
    }


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


def causes_table(found: dict[str, Any]) -> Table:
    """What `causes` measured."""
    rows = tuple(
        Row((c["estimator"], c["strategy"], *(f"{c[name]:+.2f}" for name in ("db", "scaled", "without_end")),
             f"{c['norm_ratio']:.2f}"))
        for c in found["strategies"]
    )  # fmt: skip
    heads = ("estimator", "strategy", "dB", "rows scaled to ‖g‖", "g without its end of turn", "‖chosen‖/‖g‖")
    norms = f"of the pool {found['pool_norm_median']:.3g}, of the outputs {found['output_norm_median']:.3g}"
    return Table(tuple(map(Column, heads)), rows, f"Causes (k = 10): median gradient norm {norms}")


def one(g: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """‖g‖² and ‖g − At‖²."""
    from gradsift import selection_relevance

    found = selection_relevance(g, rows)
    return found.squared_norm, found.squared_error


def mean_db(pairs: SequenceABC[tuple[float, float]]) -> float:
    """Ratio of means in dB."""
    a = np.array(pairs)
    return to_db(a[:, 0].sum() / max(a[:, 1].sum(), 1e-12 * a[:, 0].sum()))


def markdown(blocks: Iterable[Block]) -> str:
    """Texts and tables."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Text):
            lines += ["", block.text]
        elif isinstance(block, Table):
            lines += ["", f"**{block.title}**", ""] if block.title else [""]
            heads = [" ".join(filter(None, (column.name, column.note))) for column in block.columns]
            rows = [[_said(cell) for cell in row.cells] for row in block.rows]
            lines += [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


def _said(cell: Entry) -> str:
    return cell if isinstance(cell, str) else " ".join(filter(None, (cell.text, f"({cell.note})" * bool(cell.note))))


if __name__ == "__main__":
    main()
