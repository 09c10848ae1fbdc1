"""`score`: what is scored, in which order and with which sign; BM25 and chance against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import bm25s
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradsift.base.errors import ConfigError, DataError, ShapeError
from gradsift.context import Pool, Target, open_target
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence import blocks
from gradsift.influence.bm25 import BM25, bm25_scores, conversation_text, spoken_text
from gradsift.influence.datainf import DataInf, ProjectedInverse, datainf_scores, projected_inverse_scores
from gradsift.influence.dsir import DSIR
from gradsift.influence.estimator import Estimator, Influence, influence_of, rate_weights, target_view
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS, less_scores
from gradsift.influence.nice import NICEIF
from gradsift.influence.random import Random, random_scores
from gradsift.influence.scores import save_tables, score
from gradsift.influence.trak import TRAK, kernel_warnings, trak_scores
from gradsift.warmup.checkpoint import Checkpoint
from tiny_world import World, pool_rows, target_rows

NONE = Gradients(projection=Projection(kind="none"), dtype="float32")


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("scores") / "run")


@pytest.fixture(scope="module")
def target(tiny: World, pool: Pool) -> Target:
    return open_target(tiny.target, pool, subtask="task")


@pytest.mark.parametrize("method", [LESS(), LESS(optimizer="sgd"), LESS(optimizer="sgd", normalise=False)], ids=str)
def test_scores_are_less_of_the_stored_rows(pool: Pool, target: Target, method: LESS) -> None:
    """The streamed product over all checkpoints equals `less_scores` of the whole rows with the learning rates."""
    checkpoints = pool.checkpoints()
    view = "adam" if method.optimizer == "adam" else "plain"
    rows, queries = [], []
    for checkpoint in checkpoints:
        rows.append(pool.stores(checkpoint, [view])[view].rows_by_id(pool.data.ids).double())
        store = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
        queries.append(store.rows_by_id(target.data.ids).double())
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    assert all(rate for rate in rates)
    wanted = less_scores(rows, queries, [rate or 0.0 for rate in rates], normalise=method.normalise)
    found = score(pool, target, method)
    assert found.ids == pool.data.ids
    assert found.target_ids == target.data.ids
    assert found.per_target is not None
    assert np.allclose(found.per_target, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    means = [found.per_target[:, part].mean(axis=1) for part in ([0, 2], [1, 3])]
    assert np.allclose(found.aggregate, np.maximum(*means), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "method",
    [
        DataInf(),
        DataInf(damping=1e-3),
        ProjectedInverse(kernel="segments", damping="auto", checkpoints="last"),
        ProjectedInverse(kernel="segments", damping=1e-3, checkpoints="last"),
    ],
)
def test_inverses_are_those_of_the_stored_rows(pool: Pool, target: Target, method: DataInf | ProjectedInverse) -> None:
    """Plain rows of the last checkpoint, module by module, for every target on its own; then the usual aggregate."""
    checkpoint = pool.checkpoints()[-1]
    store = pool.stores(checkpoint, ["plain"])["plain"]
    queries = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
    sizes = [stop - start for start, stop in store.segments.values()]
    assert len(sizes) > 1
    rows, wanted_of = store.rows_by_id(pool.data.ids), queries.rows_by_id(target.data.ids)
    scores_of = datainf_scores if isinstance(method, DataInf) else projected_inverse_scores
    wanted = scores_of(rows.split(sizes, dim=1), wanted_of.split(sizes, dim=1), damping=method.damping)
    found = score(pool, target, method)
    assert found.ids == pool.data.ids
    assert found.per_target is not None
    assert np.allclose(found.per_target, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    means = [found.per_target[:, part].mean(axis=1) for part in ([0, 2], [1, 3])]
    assert np.allclose(found.aggregate, np.maximum(*means), rtol=1e-5)


def test_the_whole_inverse_adds_checkpoints_by_their_rates(pool: Pool, target: Target) -> None:
    """Each checkpoint's λ·⟨g, (H + λI)⁻¹v⟩ counts by its learning rate, on the plain rows over all modules."""
    method = ProjectedInverse()
    checkpoints, wanted = pool.checkpoints(), 0.0
    for checkpoint, weight in zip(checkpoints, rate_weights(checkpoints), strict=True):
        store = pool.stores(checkpoint, ["plain"])["plain"]
        V = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"].rows_by_id(target.data.ids)
        G = store.rows_by_id(pool.data.ids).double().numpy()
        moments = G.T @ G / len(G)
        value = 0.1 * np.linalg.eigvalsh(moments)[-1]
        solved = np.linalg.solve(moments + value * np.eye(len(moments)), V.double().T.numpy())
        wanted = wanted + weight * value * (G @ solved)
    found = score(pool, target, method)
    assert found.per_target is not None
    np.testing.assert_allclose(found.per_target, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert found.method.label == "projected inverse"


@pytest.mark.parametrize("method", [TRAK(damping="auto"), TRAK(damping=1e-2, checkpoints="last")])
def test_trak_is_that_of_the_stored_rows_and_losses(pool: Pool, target: Target, method: TRAK) -> None:
    """Plain rows and losses of the checkpoints, weighted equally whatever their learning rates."""
    stores, queries = [], []
    for checkpoint in pool.checkpoints()[-1 if method.checkpoints == "last" else 0 :]:
        stores.append(pool.stores(checkpoint, ["plain"])["plain"])
        queries.append(pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"])
    assert len(stores) == (1 if method.checkpoints == "last" else 2)
    wanted = trak_scores(
        [store.rows_by_id(pool.data.ids) for store in stores],
        [store.rows_by_id(target.data.ids) for store in queries],
        [store.losses[store.positions(pool.data.ids)] for store in stores],
        [store.losses[store.positions(target.data.ids)] for store in queries],
        damping=method.damping,
        segments=[stop - start for start, stop in stores[0].segments.values()],
    )
    found = score(pool, target, method).per_target
    assert found is not None
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_whole_kernel_of_trak_spans_modules(tiny: World, target: Target, tmp_path: Path) -> None:
    """One kernel over all stored dimensions, as published; with fewer rows than dimensions it is warned of."""
    small = tiny.open_pool(tmp_path / "run", gradients=Gradients(projection=Projection(dim=64)))
    there = open_target(tiny.target, small, subtask="task")
    store = small.stores(small.checkpoints()[-1], ["plain"])["plain"]
    queries = small.collect(there.data, small.checkpoints()[-1], ["plain"], what="target")["plain"]
    wanted = trak_scores([store.rows(0, len(store))], [queries.rows(0, len(queries))], [store.losses], [queries.losses])
    scores = score(small, there, TRAK(kernel="whole", damping="auto", checkpoints="last"))
    found = scores.per_target
    assert found is not None
    (warned,) = (text for text in scores.warnings if "TRAK" in text and "dimensions" in text)
    assert "64 dimensions that are estimated from 24 rows" in warned
    assert not any("dimensions" in text for text in score(small, there, TRAK(checkpoints="last")).warnings)
    assert kernel_warnings(TRAK(kernel="whole", damping="auto"), 64, 64) == []
    assert kernel_warnings(TRAK(kernel="whole"), 24, 64) == []
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_settings_tell_scores_apart(pool: Pool, target: Target) -> None:
    """The fingerprint, the kept file and the name in tables cover damping, kernel and tokens: no score is another's."""
    methods: list[Estimator] = [DataInf(), DataInf(damping=0.1), DataInf(damping=0.2), ProjectedInverse(damping=0.1)]
    methods += [ProjectedInverse(), ProjectedInverse(damping="auto"), ProjectedInverse(kernel="segments")]
    methods += [
        TRAK(),
        TRAK(kernel="whole"),
        TRAK(damping=0.1),
        TRAK(damping="auto"),
        BM25(),
        BM25(tokens="model"),
        BM25(reading="compact"),
    ]
    found = [score(pool, target, method) for method in methods]
    assert len({entry.fingerprint for entry in found}) == len(methods)
    assert len({entry.method.label for entry in found}) == len(methods)
    assert len({entry.aggregate.tobytes() for entry in found}) == len(methods)


def test_what_methods_read() -> None:
    """The view of the pool's rows and the checkpoints that a method takes them at."""
    assert [m.view for m in (LESS(), LESS(optimizer="sgd"), BM25(), Random())] == ["adam", "plain", None, None]
    assert {m.view for m in (TRAK(kernel="whole"), ProjectedInverse(), JI2S(optimizer="sgd"))} == {"plain"}
    by_module = (DataInf(), ProjectedInverse(kernel="segments"), TRAK(), NICEIF())
    assert {m.view for m in by_module} == {"segments"}
    assert [target_view(view) for view in ("plain", "adam", "segments")] == ["plain", "plain", "segments"]
    last = (LESS(checkpoints="last"), TRAK(checkpoints="last"), DataInf(), NICEIF())
    assert all(method.last_checkpoint for method in last)
    assert not any(method.last_checkpoint for method in (LESS(), TRAK(), ProjectedInverse(), BM25(), Random()))


def test_names_of_less_and_tracin() -> None:
    """TracIn is the raw product of plain gradients, LESS the cosine of Adam's: what departs from them is said."""
    assert LESS().label == "LESS"
    assert LESS(optimizer="sgd", normalise=False).label == "TracIn"
    assert LESS(normalise=False).label == "TracIn (Adam)"
    assert LESS(optimizer="sgd", checkpoints="last").label == "LESS (SGD, last checkpoint)"


@pytest.mark.parametrize(
    "method",
    [
        DataInf(),
        ProjectedInverse(),
        TRAK(),
        LESS(optimizer="sgd", normalise=False),
        BM25(tokens="model"),
    ],
    ids=lambda method: method.label,
)
def test_every_ranker_explains_outputs(pool: Pool, method: Estimator) -> None:
    """The pool row whose answer is explained ranks among the first for its own output, by each method that can rank."""
    from gradsift.explanation.explain import Question, explain

    row = pool_rows()[6]
    question = Question("q", tuple(row["messages"][:1]), row["messages"][1]["content"])
    assert not isinstance(method, Random)
    found = explain(pool, question, k=3, estimator=method).entries[0].results[0]
    assert found.estimator == method.label
    assert row["id"] in [example.id for example in found.examples]


def test_compact_form_of_less(pool: Pool, target: Target) -> None:
    """`LESS(optimizer="sgd", checkpoints="last")` is the cosine of plain rows at the last checkpoint (Compact)."""
    checkpoint = pool.checkpoints()[-1]
    rows = pool.stores(checkpoint, ["plain"])["plain"].rows_by_id(pool.data.ids).double()
    store = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
    queries = store.rows_by_id(target.data.ids).double()
    wanted = torch.nn.functional.cosine_similarity(rows[:, None], queries[None], dim=2)
    found = score(pool, target, LESS(optimizer="sgd", checkpoints="last")).per_target
    assert found is not None
    assert np.allclose(found, wanted, atol=1e-5)


def test_a_compressed_store_agrees_with_the_exact_one(tiny: World, target: Target, pool: Pool, tmp_path: Path) -> None:
    """float16 rows of all dimensions give the exact scores to a thousandth of their spread."""
    half = tiny.open_pool(tmp_path / "run", gradients=Gradients(projection=Projection(kind="none")))
    exact = score(pool, target).aggregate
    found = score(half, open_target(tiny.target, half, subtask="task")).aggregate
    assert np.abs(found - exact).max() < 1e-3 * exact.std()


def test_scores_do_not_depend_on_the_order_of_rows(tiny: World, pool: Pool, target: Target, tmp_path: Path) -> None:
    """A reversed pool gives every id its score, by each method."""
    other = tiny.open_pool(tmp_path / "run", pool_rows()[::-1])
    assert other.data.ids == pool.data.ids[::-1]
    there = open_target(target_rows()[::-1], other, subtask="task")
    for method in (LESS(), BM25(), Random(seed=3)):
        wanted, found = score(pool, target, method).by_id(), score(other, there, method).by_id()
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_overlap_is_left_out(tiny: World, pool: Pool) -> None:
    """A pool row whose normalised messages are in the target is neither scored nor ranked, unless asked for."""
    shared = pool_rows()[5]
    shared["messages"][1]["content"] = shared["messages"][1]["content"].upper() + " "
    rows = [*target_rows(), {"id": "t9", "messages": shared["messages"]}]
    target = open_target(rows, pool)
    assert [skip.id for skip in target.overlap] == ["p05"]
    for method in (LESS(), BM25(), Random()):
        found = score(pool, target, method)
        assert set(pool.data.ids) - set(found.ids) == {"p05"}
        assert sorted(found.ranks()) == list(range(1, 24))
    kept = open_target(rows, pool, keep_overlap=True)
    assert score(pool, kept, LESS()).ids == pool.data.ids
    with pytest.raises(ConfigError, match="every pool row is also in the target"):
        open_target(tiny.pool, pool)


@pytest.mark.parametrize(
    "method", [LESS(), DataInf(), ProjectedInverse(), TRAK(), JI2S(hessian="fisher_projected")], ids=lambda m: m.kind
)
def test_products_are_made_where_the_pool_says(
    pool: Pool, target: Target, method: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's device decides where every estimator multiplies, and nothing else does."""
    asked = []

    def resolve(device: str) -> str:
        asked.append(device)
        return "cpu"

    found = score(pool, target, method).aggregate
    monkeypatch.setattr(blocks, "resolve_device", resolve)
    assert np.array_equal(score(replace(pool, device="auto"), target, method).aggregate, found)
    assert set(asked) == {"auto"}


def test_last_checkpoint_alone(pool: Pool, target: Target) -> None:
    """`checkpoints="last"` is the score at the last one, with weight 1 whatever its learning rate."""
    found = influence_of(LESS(checkpoints="last"), pool, target)
    ids, matrix = found.ids, found.matrix
    checkpoint = pool.checkpoints()[-1]
    rows = pool.stores(checkpoint, ["adam"])["adam"].rows_by_id(ids)
    queries = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"].rows_by_id(target.data.ids)
    assert np.allclose(matrix, less_scores([rows], [queries]), atol=1e-5)
    assert len(found.identity["stores"]) == 2


def test_weights_are_shares_of_the_learning_rates() -> None:
    """w_e = η̄_e / Σ η̄; equal where none is known; a single checkpoint has weight 1; a part known is refused."""

    def weights(*rates: float | None) -> list[float]:
        return rate_weights([Checkpoint(f"c{number}", rate) for number, rate in enumerate(rates)])

    assert weights(3e-5, 1e-5) == pytest.approx([0.75, 0.25])
    assert weights(None, None) == [0.5, 0.5]
    assert weights(2e-5) == weights(None) == [1.0]
    with pytest.raises(DataError, match="the learning rate of c1 is unknown while others say theirs"):
        weights(1e-5, None)
    with pytest.raises(DataError, match="learning rates of all 2 checkpoints are 0"):
        weights(0.0, 0.0)


def test_a_warning_where_the_ranking_is_one_of_length(pool: Pool, target: Target) -> None:
    """The correlation is Spearman's with the supervised tokens; it is told where it is strong, and only there."""
    for method in (LESS(), BM25(), Random(seed=0)):
        found = score(pool, target, method)
        wanted = spearmanr(found.aggregate, pool.data.supervised_tokens).statistic
        assert found.length_correlation == pytest.approx(wanted, abs=1e-6)
        assert any("longer" in text or "shorter" in text for text in found.warnings) == (abs(wanted) > 0.5)


def test_the_table_holds_each_target_and_the_aggregate(pool: Pool, target: Target) -> None:
    """scores.parquet: one row per example, target and method; ranks count from the highest score."""
    entries = [score(pool, target, method) for method in (LESS(), Random(seed=1))]
    table = pq.read_table(save_tables(pool, entries)).to_pylist()
    assert len(table) == 24 * (1 + 4) + 24
    for entry in entries:
        for name in ("*", *target.data.ids):
            part = [row for row in table if row["method"] == entry.method.label and row["target"] == name]
            by_rank = sorted(part, key=lambda row: row["rank"])
            assert [row["rank"] for row in by_rank] == list(range(1, len(part) + 1))
            scores = [row["score"] for row in by_rank]
            assert scores == sorted(scores, reverse=True)


def test_standard_errors_are_those_of_means_over_draws(pool: Pool, target: Target) -> None:
    """Of each target's score, and of the subtask that the mean over draws has highest; other methods have none."""
    drawn = np.random.default_rng(0).normal(size=(5, len(pool.data), len(target.data))).astype(np.float32)

    class Drawn(Estimator):
        kind: Literal["drawn"] = "drawn"
        label: ClassVar[str] = "drawn"  # type: ignore[misc]
        draws: ClassVar[Any] = drawn

        def influence(self, pool: Pool, target: Target | None) -> Influence:
            return Influence(pool.data.ids, drawn.mean(axis=0), draws=self.draws)

    scores = score(pool, target, Drawn())
    root = np.sqrt(len(drawn))
    np.testing.assert_allclose(scores.target_errors, drawn.std(axis=0, ddof=1) / root, rtol=1e-5)
    tasks = np.array(target.subtasks)
    means = np.stack([drawn[:, :, tasks == task].mean(axis=2) for task in sorted(set(tasks))])  # [task draw row]
    best = means.mean(axis=1).argmax(axis=0)
    expected = [means[task, :, row].std(ddof=1) / root for row, task in enumerate(best)]
    np.testing.assert_allclose(scores.errors, expected, rtol=1e-5)
    whole = score(pool, target, Drawn(), aggregation="mean")
    np.testing.assert_allclose(whole.errors, drawn.mean(axis=2).std(axis=0, ddof=1) / root, rtol=1e-5)
    save_tables(pool, [score(pool, target, BM25()), scores])
    table = pq.read_table(pool.run.folder / "scores.parquet").to_pylist()
    assert {row["error"] is None for row in table if row["method"] == "BM25"} == {True}
    assert [
        row["error"] for row in table if row["method"] == "drawn" and row["target"] == "*"
    ] == scores.errors.tolist()
    Drawn.draws = drawn[:1]
    with pytest.raises(ShapeError, match="wanted at least 2 of shape"):
        score(pool, target, Drawn())


def test_random_scores_are_uniform_and_belong_to_ids() -> None:
    """A seed and an id fix a score in [0, 1); other seeds draw others; means and quarters are those of chance."""
    ids = [f"row{number}" for number in range(4000)]
    drawn = random_scores(ids, 0)
    assert np.array_equal(random_scores(ids[::-1], 0), drawn[::-1])
    assert abs(np.corrcoef(drawn, random_scores(ids, 1))[0, 1]) < 0.05
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.histogram(drawn, 4, (0, 1))[0] == pytest.approx([1000] * 4, abs=120)


def slow_bm25(pool: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """The formula, word by word."""
    mean = sum(map(len, pool)) / len(pool)
    scores = []
    for document in pool:
        total = 0.0
        for word in query:
            n = sum(word in other for other in pool)
            tf = document.count(word)
            idf = math.log(1 + (len(pool) - n + 0.5) / (n + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean)) if tf else 0.0
        scores.append(total)
    return scores


DOCUMENT = st.lists(st.sampled_from(["a", "b", "c", "1", "the"]), min_size=1, max_size=8)


@given(st.lists(DOCUMENT, min_size=2, max_size=6), st.lists(DOCUMENT, min_size=1, max_size=3))
def test_bm25_is_the_formula(pool: list[list[str]], queries: list[list[str]]) -> None:
    """Okapi's sum with Lucene's idf; words of one letter, digits, frequent words and repeated ones count."""
    found = bm25_scores(pool, queries, k1=1.5, b=0.75)
    wanted = np.array([slow_bm25(pool, query, 1.5, 0.75) for query in queries]).T
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=1, max_size=9),
    st.lists(st.lists(st.sampled_from("abz"), max_size=5), min_size=1, max_size=3),
)
def test_bm25_is_that_of_bm25s_to_the_last_bit(pool: list[list[str]], queries: list[list[str]]) -> None:
    """Scores that were made with the package bm25s stay what they are, of documents and queries without words, too."""
    index = bm25s.BM25(method="lucene", k1=1.3, b=0.6)
    index.index([document or [""] for document in pool], show_progress=False)
    found = bm25_scores(pool, queries, k1=1.3, b=0.6)
    for column, query in enumerate(queries):
        known = [word for word in query if word in index.vocab_dict]
        wanted = index.get_scores(known) if known else np.zeros(len(pool), np.float32)
        assert found[:, column].tobytes() == wanted.tobytes()


@given(st.lists(DOCUMENT, min_size=2, max_size=6), st.lists(DOCUMENT, min_size=1, max_size=3))
def test_the_reading_of_compacts_authors(pool: list[list[str]], queries: list[list[str]]) -> None:
    """Their formula, but for the constant factor k1 + 1: 1 more in the denominator, a word of the query counts once."""
    mean = sum(map(len, pool)) / len(pool)
    found = bm25_scores(pool, queries, k1=1.5, b=0.75, reading="compact")
    for column, query in enumerate(queries):
        for row, document in enumerate(pool):
            total = 0.0
            for word in set(query):
                n, tf = sum(word in other for other in pool), document.count(word)
                below = tf + 1.0 + 1.5 * (0.25 + 0.75 * len(document) / mean)
                total += math.log((len(pool) - n + 0.5) / (n + 0.5) + 1.0) * tf / below
            assert found[row, column] == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert BM25(tokens="model", reading="compact").label == "BM25 (model tokens, Compact's)"


def test_bm25_of_model_tokens_counts_token_ids(pool: Pool, target: Target) -> None:
    """Documents and queries are the sequences that the model sees, template included; texts play no part."""
    documents = [[str(id_) for id_ in pool.data.by_id(name).token_ids] for name in pool.data.ids]
    queries = [[str(id_) for id_ in target.data.by_id(name).token_ids] for name in target.data.ids]
    wanted = np.array([slow_bm25(documents, query, 1.5, 0.75) for query in queries]).T
    found = influence_of(BM25(tokens="model"), pool, target)
    assert found.ids == pool.data.ids
    assert found.identity["stores"] == []
    assert np.allclose(found.matrix, wanted, rtol=1e-4)


def test_bm25_of_nothing_in_common_is_zero() -> None:
    """Unknown words and empty texts score 0 and do no harm."""
    assert bm25_scores([["a"], ["b"]], [["z"], []], k1=1.5, b=0.75).tolist() == [[0, 0], [0, 0]]
    assert bm25_scores([[], ["b"]], [["b"]], k1=1.5, b=0.75)[:, 0].tolist()[0] == 0


def test_texts_of_conversations() -> None:
    """One exchange is a question and an answer without its system turn; a longer one has a line per role."""
    ask, say = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
    assert conversation_text([{"role": "system", "content": "s"}, ask, say]) == "Question:a?\n\nAnswer:b"
    assert conversation_text([ask, say, ask, say]).startswith("<|user|>\na?\n<|assistant|>\nb\n<|user|>")
    assert spoken_text([{"role": "system", "content": "s"}, ask, say]) == "a?\nb"
    assert spoken_text([{"role": "system", "content": "s"}, ask]) == "s\na?"


def test_lexical_scores_are_those_of_what_is_said(tiny: World, tmp_path: Path) -> None:
    """A Chinese question finds the row about it; the words of the form (`Question`, `Answer`, roles) bring no score: a
    target that shares no other word with the pool has none. Texts without words are told."""
    roles = ("user", "assistant") * 2
    rows = [
        {"id": "other", "prompt": "the cat is red", "completion": "an answer to a question"},
        {"id": "long", "messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]},
        {"id": "chinese", "prompt": "猫在睡觉", "completion": "是"},
        {"id": "about", "prompt": "中国首都", "completion": "北京"},
        {"id": "none", "prompt": "?!", "completion": "…"},
    ]
    asked = {"asked": ("首都", "何"), "alien": ("zzz", "yyy"), "silent": ("❤️", "!!"), "asks": ("one question", "zzz")}
    pool = tiny.open_pool(tmp_path / "run", rows)
    target = open_target([{"id": id_, "prompt": p, "completion": a} for id_, (p, a) in asked.items()], pool)
    found = score(pool, target, BM25())
    assert found.per_target is not None
    best = dict(zip(found.target_ids, found.per_target.T, strict=True))
    assert np.flatnonzero(best["asked"]).tolist() == [found.ids.index("about")]
    assert not best["alien"].any()
    assert not best["silent"].any()
    assert np.flatnonzero(best["asks"]).tolist() == [found.ids.index("other")]
    warned = "\n".join(found.warnings)
    assert "1 of 5 pool rows have no letter and no digit, first 'none': BM25" in warned
    assert "1 of 4 targets have no letter and no digit, first 'silent': BM25" in warned
    assert "no letter" in "".join(score(pool, target, DSIR()).warnings)
    assert "no letter" not in "".join(score(pool, target, BM25(tokens="model")).warnings)


def test_a_target_without_gradient_counts_as_zero(pool: Pool, target: Target) -> None:
    """Rows come in the order of the targets; one that the store left out is a row of zeros."""
    from gradsift.influence.estimator import target_rows as rows_of

    store = pool.collect(target.data, pool.checkpoints()[-1], ["plain"], what="target")["plain"]
    found = rows_of(store, ["t2", "absent", "t0"])
    assert torch.equal(found[[0, 2]], store.rows_by_id(["t2", "t0"]).float())
    assert not found[1].any()
