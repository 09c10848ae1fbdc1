"""The pages of explanations: what was chosen for one output and why, and how well strategies do over a target file."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from gradsift.base.errors import CorruptError, GradsiftError
from gradsift.base.lazy import torch
from gradsift.base.ranks import descending_ranks
from gradsift.context import Pool
from gradsift.explanation.explain import Explanation, Explanations, StrategyResult
from gradsift.explanation.relevance import AGGREGATIONS, to_db
from gradsift.explanation.table import RelevanceTable
from gradsift.model import embeddings
from gradsift.report.comparison_page import ComparisonPage, render_comparison
from gradsift.report.explanation_page import (
    Candidate,
    ExplanationPage,
    Pick,
    PickList,
    StrategyView,
    explanation_file,
    render_explanation,
)
from gradsift.report.maps import layout
from gradsift.report.relevance_page import (
    EstimatorTable,
    OutputRow,
    RelevancePage,
    StrategyRow,
    render_relevance,
)
from gradsift.report.relevance_page import Validated as ValidatedPoint
from gradsift.report.text import column_texts
from gradsift.selection.candidates import Candidates, Order, naive_key
from gradsift.selection.facility_location import cost_from_scores, similarity_from_cosines
from gradsift.selection.selector import Selector
from gradsift.store.manifest import versions
from gradsift.store.run import Run
from gradsift.validation.validate import Validation

Page = ExplanationPage | RelevancePage | ComparisonPage
PAGES = 10  # outputs of a target file that get a page of their own, unless told otherwise


def write_pages(
    explanations: Explanations,
    table: RelevanceTable | None = None,
    validation: Validation | None = None,
    *,
    pages: int = PAGES,
    embedding: str | None = embeddings.DEFAULT,
    facts: Mapping[str, str] | None = None,
) -> list[str]:
    """Write the pages into the run folder and return their keys, the first to be opened first.

    One output: `explanation.html`. Several: `relevance.html` with the aggregate table, and `explanations/<id>.html`
    for the first `pages` outputs. Beside each lies the JSON that it was made from.

    Args:
        explanations: from `explain`.
        table: from `relevance_table`; needed for several outputs.
        validation: effects of training on the selections, for the scatter.
        pages: outputs that get a page of their own.
        embedding: the sentence-transformers model of the map of meanings; None leaves that map out, and so does the
            default where the extra or the model is not there.
        facts: more facts for the pages.
    """
    pool = explanations.pool
    several = len(explanations.entries) > 1
    written: list[str] = []
    if several:
        assert table is not None
        page = relevance_page(explanations, table, validation, pages=pages, facts=facts or {})
        written.append(publish_page(pool.run, "relevance.html", page, render_relevance(page)))
    wanted = explanations.entries[:pages] if several else explanations.entries
    missing: set[str] = set()
    with pool.reporter.stage("drawing pages", len(wanted), "outputs") as advance:
        for entry in wanted:
            name = f"explanations/{explanation_file(entry.id)}" if several else "explanation.html"
            one = explanation_page(explanations, entry, embedding=embedding, facts=facts or {})
            written.append(publish_page(pool.run, name, one, render_explanation(one)))
            missing.update(one.warnings)
            advance(1)
    for warning in sorted(missing):
        pool.reporter.warn(warning)
    return written


def rewrite_pages(run: Run) -> list[Path]:
    """Write every page of a comparison or an explanation again from the JSON beside it, and return their paths.

    Raises:
        CorruptError: such a JSON file is damaged.
    """
    written = []
    top = ("comparison.page.json", "relevance.page.json", "explanation.page.json")
    keys = [key for key in top if run.storage.exists(key)]
    keys += [key for key in run.storage.list("explanations/") if key.endswith(".page.json")]
    for key in keys:
        content = run.storage.read(key)
        try:
            if key == "comparison.page.json":
                html = render_comparison(TypeAdapter(ComparisonPage).validate_json(content))
            elif key == "relevance.page.json":
                html = render_relevance(TypeAdapter(RelevancePage).validate_json(content))
            else:
                html = render_explanation(TypeAdapter(ExplanationPage).validate_json(content))
        except ValidationError as error:
            again = "compare" if key == "comparison.page.json" else "explain"
            raise CorruptError(f"{run.name(key)} is damaged: delete it, or {again} again, it is quick") from error
        written.append(run.publish_text(f"{key.removesuffix('.page.json')}.html", html))
    return written


def publish_page(run: Run, key: str, page: Page, html: str) -> str:
    """Write a page, and beside it the JSON that it can be written again from. Returns the key."""
    run.storage.publish(f"{key.removesuffix('.html')}.page.json", TypeAdapter(type(page)).dump_json(page))
    run.publish_text(key, html)
    return key


def explanation_page(
    explanations: Explanations,
    entry: Explanation,
    *,
    embedding: str | None = embeddings.DEFAULT,
    facts: Mapping[str, str] | None = None,
) -> ExplanationPage:
    """Everything that the page of one output shows, by the first estimator.

    The candidates are those of every strategy's own ranking, on one map of their gradients and one of their meanings.
    """
    estimator = explanations.estimators[0]
    competing = explanations.candidates_of(entry.id, estimator)
    results = [result for result in entry.results if result.estimator == estimator.label]
    shown = _Shown(explanations.pool, competing, results, _main_order(explanations.strategies))
    warnings: list[str] = []
    map_rows = _embedded(shown.texts, embedding, warnings)
    gradient_xy = layout(competing.rows(shown.places))
    embedding_xy = layout(map_rows) if map_rows is not None else None
    candidates = tuple(
        shown.candidate(number, gradient_xy[number], embedding_xy[number] if embedding_xy else None)
        for number in range(len(shown.places))
    )
    by_label = {strategy.strategy: strategy for strategy in explanations.strategies}
    names = list(dict.fromkeys(result.strategy for result in results))
    strategies = tuple(
        _strategy_view(by_label[name], entry, [r for r in results if r.strategy == name], shown) for name in names
    )
    return ExplanationPage(
        title="Why these examples explain this output",
        prompt=_prompt(entry),
        output=entry.output,
        generated=entry.generated,
        finished=entry.finished,
        tokens=entry.tokens,
        loss=entry.loss,
        estimator=estimator.label,
        coefficient_model=entry.coefficients,
        candidates=candidates,
        strategies=strategies,
        budget=5 if 5 in explanations.budgets else explanations.budgets[0],
        facts={"output": entry.id, **_facts(explanations), **(facts or {}), **versions()},
        warnings=tuple(warnings),
    )


def relevance_page(
    explanations: Explanations,
    table: RelevanceTable,
    validation: Validation | None = None,
    *,
    pages: int = PAGES,
    facts: Mapping[str, str] | None = None,
) -> RelevancePage:
    """Everything that the page of a target file shows."""
    entries = explanations.entries
    values: dict[tuple[str, str, int], list[float]] = {}
    for entry in entries:
        for result in entry.results:
            own = values.setdefault((result.estimator, result.strategy, result.k), [])
            own.append(entry.relevance_of(result, table.how).db)
    place = {entry.id: number for number, entry in enumerate(entries)}
    points: list[ValidatedPoint] = []
    validation_facts: dict[str, str] = {}
    if validation is not None:
        points = [
            ValidatedPoint(
                cell.cell.key.estimator, cell.cell.key.strategy, place[cell.cell.output], cell.cell.key.k,
                to_db(cell.cell.relevance), cell.support, cell.shift,
            )
            for cell in validation.cells
            if cell.cell.output in place
        ]  # fmt: skip
        validation_facts = validation.facts()
    warnings = [f"{len(explanations.failed)} outputs could not be explained"] if explanations.failed else []
    capped = sum(summary.capped for row in table.rows for summary in row.by_budget.values())
    if capped:
        warnings.append(
            f"{capped} selections reconstruct their output exactly: the output itself is in the pool, and one such "
            "value outweighs all others in a mean of ratios"
        )
    return RelevancePage(
        title="Selection relevance over a target",
        aggregation=AGGREGATIONS[table.how],
        estimators=tuple(
            EstimatorTable(
                estimator,
                tuple(
                    StrategyRow(
                        row.strategy,
                        {k: summary.db for k, summary in row.by_budget.items()},
                        row.auc_db,
                        {k: tuple(values[estimator, row.strategy, k]) for k in row.by_budget},
                        dict(row.above),
                    )
                    for row in table.of(estimator)
                ),
            )
            for estimator in table.estimators
        ),
        outputs=tuple(
            OutputRow(entry.id, _prompt(entry), entry.output, entry.tokens, entry.loss, entry.finished, number < pages)
            for number, entry in enumerate(entries)
        ),
        validated=tuple(points),
        bins=validation.agreement.bins if validation is not None and validation.agreement is not None else (),
        budget=table.sorted_at,
        facts={**_facts(explanations), **(facts or {}), **versions()},
        validation_facts=validation_facts,
        warnings=tuple(warnings),
    )


def _facts(explanations: Explanations) -> dict[str, str]:
    """What every page of explanations says of where they come from."""
    pool, error = explanations.pool, explanations.store.measured_error
    measured = {} if error is None else {"measured on gradients": str(error)}
    return {"model": pool.model, "pool": pool.data.description, **measured}


def _main_order(strategies: SequenceABC[Selector]) -> Order:
    """The ranking of the first strategy that has one."""
    orders = (strategy.ranking for strategy in strategies)
    return next((order for order in orders if order is not None and order != "any"), "most_helpful")


class _Shown:
    """The candidates of a page: the first of the main ranking, and whatever else was chosen."""

    def __init__(
        self,
        pool: Pool,
        competing: Candidates,
        results: SequenceABC[StrategyResult],
        order: Order,
    ) -> None:
        self.pool, self.competing, self.ids = pool, competing, competing.ids
        ids = self.ids
        place_of = {id_: place for place, id_ in enumerate(ids)}
        chosen = [place_of[e.id] for result in results for e in result.examples]
        self.order = order
        self.places = list(dict.fromkeys([*competing.first(order, competing.count), *chosen]))
        self.number = {ids[place]: number for number, place in enumerate(self.places)}
        self.conversations = [pool.data.messages(ids[place]) for place in self.places]
        self.texts = ["\n\n".join(m["content"] for m in messages) for messages in self.conversations]
        rows = competing.rows(self.places)
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        unit = rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        self.cosine = (unit @ unit.T).clamp(-1, 1)
        self.costs = self._costs(order)
        self.ranks = descending_ranks(competing.scores.numpy())

    def _costs(self, order: Order) -> list[float]:
        """Costs of the candidates shown on the scale of the ranking's own: 1 for its first, m for its last."""
        own = self.competing.first(order, self.competing.count)
        others = [place for place in self.places if place not in set(own)]
        cost_of = dict(zip(own, cost_from_scores(naive_key(self.competing.scores[own], order)).tolist(), strict=True))
        cost_of |= dict.fromkeys(others, float(len(own)))
        return [cost_of[place] for place in self.places]

    def view_of(self, order: Order) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Which of the candidates shown are of another ranking's first, and their costs in it."""
        if order == self.order:
            return (), ()
        own = set(self.competing.first(order, self.competing.count))
        numbers = tuple(number for number, place in enumerate(self.places) if place in own)
        costs = self._costs(order)
        return numbers, tuple(costs[number] for number in numbers)

    def candidate(
        self, number: int, gradient_xy: tuple[float, float], embedding_xy: tuple[float, float] | None
    ) -> Candidate:
        place, messages = self.places[number], self.conversations[number]
        answer = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
        prompt = "\n\n".join(m["content"] for m in (messages[:-1] if answer else messages))
        row: dict[str, Any] = self.pool.data.row(self.ids[place])
        known = {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "id"}
        return Candidate(
            id=self.ids[place],
            prompt=prompt,
            answer=answer,
            score=float(self.competing.scores[place]),
            rank=int(self.ranks[place]),
            cost=self.costs[number],
            gradient_xy=gradient_xy,
            embedding_xy=embedding_xy,
            columns=column_texts(row, known),
        )


def _strategy_view(
    strategy: Selector, entry: Explanation, results: SequenceABC[StrategyResult], shown: _Shown
) -> StrategyView:
    similarity = similarity_from_cosines(shown.cosine, strategy.coverage)
    by_budget = {}
    for result in results:
        picks = [(shown.number[example.id], example) for example in result.examples]
        numbers = [number for number, _ in picks]
        by_budget[result.k] = PickList(
            picks=tuple(Pick(number, example.coefficient) for number, example in picks),
            db=result.relevance_db,
            near_zero=result.near_zero,
            capped=result.capped,
            redundancy=tuple(tuple(row) for row in shown.cosine[numbers][:, numbers].tolist()),
            coverage=tuple(similarity[:, numbers].amax(dim=1).clamp(0, 1).tolist()),
        )
    over = entry.over_draws(results[0]) if strategy.by_chance else ""
    order = strategy.ranking
    candidates, costs = shown.view_of(shown.order if order is None or order == "any" else order)
    return StrategyView(strategy.strategy, by_budget, over, candidates, costs)


def _embedded(texts: SequenceABC[str], model: str | None, warnings: list[str]) -> NDArray[np.float32] | None:
    """Embeddings for the map, or None with the reason among the warnings where the default cannot be had."""
    if model is None:
        return None
    try:
        return embeddings.embed(texts, model)
    except GradsiftError as error:
        if model != embeddings.DEFAULT:
            raise
        warnings.append(f"no map of meanings: {error}")
        return None


def _prompt(entry: Explanation) -> str:
    return "\n\n".join(message["content"] for message in entry.messages)
