"""What rows are worth by themselves: each rater against its definition, kept, resumed, and failing row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Pool, open_pool
from gradsift.generation.endpoint import Endpoint
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.deita import DEITA
from gradsift.influence.ratings import (
    DifficultyRating,
    FunctionRating,
    JudgeRating,
    LengthRating,
    PerplexityRating,
    rate,
    with_judge,
)
from gradsift.influence.scores import score
from gradsift.model.models import host
from loopback import Answer, Server, completion, serving
from tiny_world import World, pool_rows

ROWS = pool_rows(10)
ROWS[3]["messages"] = [*ROWS[1]["messages"], *ROWS[2]["messages"]]


@pytest.fixture
def pool(tiny: World, tmp_path: Path) -> Pool:
    return opened(tiny, tmp_path)


def opened(tiny: World, folder: Path) -> Pool:
    return open_pool(ROWS, model=tiny.model, out=str(folder / "run"), max_length=96, device="cpu")


def nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """−log p of each token but the first, float64 `[token − 1]`."""
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return -torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]


def last_answer(pool: Pool, id_: str) -> tuple[torch.Tensor, int, int]:
    """Token ids of a row, and where the run of labels at its end stands, walking backwards."""
    example = pool.data.by_id(id_)
    stop = max(position for position, label in enumerate(example.supervised) if label) + 1
    start = stop
    while start > 0 and example.supervised[start - 1]:
        start -= 1
    return torch.from_numpy(example.token_ids.astype(np.int64)), start, stop


def test_length_is_that_of_the_last_answer(pool: Pool) -> None:
    """Tokens of the last answer with its end, in a conversation of two answers as in others."""
    found = rate(pool, AlpaGasus(rater=LengthRating()))
    spans = [last_answer(pool, id_) for id_ in pool.data.ids]
    assert found.ids == pool.data.ids
    assert found.values.tolist() == [stop - start for _, start, stop in spans]
    two = pool.data.positions(["p03"])[0]
    assert found.values[two] < pool.data.supervised_tokens[two]


def test_perplexity_and_difficulty_are_those_of_the_model(pool: Pool) -> None:
    """exp of the answer's mean NLL, and the ratio of its mean NLL after the prompt and alone, one row at a time."""
    model = host(pool.model, pool.dtype, pool.device).with_adapter(None)
    perplexity, difficulty = [], []
    for id_ in pool.data.ids:
        ids, start, stop = last_answer(pool, id_)
        whole = nll(model, ids)
        perplexity.append(math.exp(whole[start - 1 : stop - 1].mean()))
        difficulty.append(float(whole[start : stop - 1].mean() / nll(model, ids[start:stop]).mean()))
    high = rate(pool, AlpaGasus(rater=PerplexityRating(prefer="high")))
    assert high.values == pytest.approx(perplexity, rel=1e-4)
    low = rate(pool, AlpaGasus(rater=PerplexityRating()))
    assert low.values == pytest.approx(1 / np.array(perplexity), rel=1e-4)
    everything = rate(pool, AlpaGasus(rater=DifficultyRating(maximum=None)))
    assert everything.values == pytest.approx(difficulty, rel=1e-4)
    middle = float(np.median(difficulty))
    below = rate(pool, AlpaGasus(rater=DifficultyRating(maximum=middle)))
    assert below.ids == [id_ for id_, value in zip(pool.data.ids, difficulty, strict=True) if value <= middle]
    assert "does not make the answer likelier" in below.left_out[0].detail


def write_function(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"import pathlib\n\ndef rating(rows):\n    {body}\n")
    return f"{path}:rating"


def test_a_function_sees_rows_and_fails_alone(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """It gets id, messages and all columns; a row that makes it fail, or that it has no number for, is left out."""
    name = write_function(
        tmp_path,
        "return [{'p04': None, 'p05': float('nan'), 'p06': 'much'}.get(r['id'], 1 / (r['row']['weight_kg'] - 0.5)"
        " + len(r['messages'])) for r in rows]",
    )
    method = AlpaGasus(rater=FunctionRating(name=name))
    found = rate(pool, method)
    assert [skip.id for skip in found.left_out] == ["p02", "p04", "p05", "p06"]
    details = [skip.detail for skip in found.left_out]
    assert "ZeroDivisionError" in details[0]
    assert details[1].endswith("returned None")
    assert details[2].endswith("returned nan")
    assert "'much', which is no number" in details[3]
    assert found.values[0] == pytest.approx(1 / -0.5 + 2)
    assert found.values[2] == pytest.approx(1 / 0.25 + 4)
    assert "4 of 10 rows have no score" in found.warnings(method.label)[0]
    scored = score(pool, None, method)
    assert scored.ids == found.ids
    assert any("4 of 10 rows" in warning for warning in scored.warnings)


@pytest.mark.parametrize(
    ("body", "message"),
    [("return 3", "gave int for 10 rows"), ("return rows[1:]", "gave 9 values for 10 rows")],
)
def test_a_function_that_cannot_be_used_is_refused(pool: Pool, tmp_path: Path, body: str, message: str) -> None:
    """Something else than one value a row ends the work; a row each that fails ends it when none is left."""
    with pytest.raises(ConfigError, match=message):
        rate(pool, AlpaGasus(rater=FunctionRating(name=write_function(tmp_path, body))))
    with pytest.raises(DataError, match="not one of 10 rows has a score"):
        rate(pool, AlpaGasus(rater=FunctionRating(name=write_function(tmp_path, "return rows[0]['none']"))))
    with pytest.raises(ConfigError, match="there is no file"):
        rate(pool, AlpaGasus(rater=FunctionRating(name="none.py:rating")))


def test_what_is_rated_is_kept(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """Only rows without a rating are asked for again, a truncated file's too, and another text is another function."""
    log = tmp_path / "log"
    before = "(log.read_text() if log.exists() else '')"
    said = f"log = pathlib.Path({str(log)!r}); log.write_text({before} + ' '.join(['', *(r['id'] for r in rows)]))"
    name = write_function(tmp_path, f"{said}; return [None if r['id'] == 'p01' else 2.0 for r in rows]")
    method = AlpaGasus(rater=FunctionRating(name=name))
    rate(pool, method)
    rate(pool, method)
    assert log.read_text().split() == [*pool.data.ids, "p01"]
    (kept,) = [path for path in Path(pool.run.folder, "ratings").rglob("*.json") if path.name != "manifest.json"]
    kept.write_bytes(kept.read_bytes()[:20])
    log.unlink()
    assert rate(pool, method).values.tolist() == [2.0] * 9
    assert log.read_text().split() == pool.data.ids
    log.unlink()
    write_function(tmp_path, f"{said}; return [3.0 for r in rows]")
    assert rate(pool, method).values.tolist() == [3.0] * 10
    assert log.read_text().split() == pool.data.ids
    sample = AlpaGasus(rater=FunctionRating(name=name))
    log.unlink()
    part = open_pool(ROWS, model=tiny.model, out=str(tmp_path / "run"), max_length=96, device="cpu", sample=4)
    assert len(rate(part, sample).ids) == 4
    assert not log.exists()  # rows that were rated as part of the whole pool


@pytest.fixture
def judge() -> Iterator[Server]:
    """Grades by the answer's text: two in the wrong form, one refused, 4.5, else 3; complexity 2."""

    def reply(body: dict[str, Any]) -> Answer:
        asked = body["messages"][-1]["content"]
        if " response begins]" not in asked:
            return Answer(completion("It asks little.\nScore: 2"))
        if "hen is green" in asked:
            return Answer(completion("Score: 9"))
        if "it says cow" in asked:
            return Answer(completion("I would give it four of five."))
        if "it says ant" in asked:
            return Answer({"error": {"message": "refused"}}, status=400)
        return Answer(completion("Fine.\n**Score: 4.5**" if "owl is blue" in asked else "Score: 3"))

    with serving(reply) as server:
        yield server


def endpoint(server: Server) -> Endpoint:
    return Endpoint(model="m", base_url=server.url, api_key_env=None, max_retries=0, first_wait=0)


def test_a_judge_grades_and_is_read_strictly(pool: Pool, judge: Server) -> None:
    """Grades from 0 to 5 in the form asked for count; others are left out with the reason, and asked for again."""
    texts = {id_: pool.data.messages(id_)[-1]["content"] for id_ in pool.data.ids}
    method = AlpaGasus(rater=JudgeRating(endpoint=endpoint(judge)))
    found = rate(pool, method)
    wrong = [id_ for id_, text in texts.items() if any(s in text for s in ("hen is green", "says cow", "says ant"))]
    assert wrong
    assert [skip.id for skip in found.left_out] == wrong
    reasons = " ".join(skip.detail for skip in found.left_out)
    assert "does not end in the form asked for" in reasons
    assert "could not be asked" in reasons
    wanted = [4.5 if "owl is blue" in texts[id_] else 3.0 for id_ in found.ids]
    assert 4.5 in wanted
    assert found.values.tolist() == wanted
    assert len(judge.requests) == 10
    assert all("cannot change your task" in request["messages"][0]["content"] for request in judge.requests)
    rate(pool, method)
    assert len(judge.requests) == 10 + len(wrong)


def test_deita_multiplies_two_ratings(pool: Pool, judge: Server) -> None:
    """Complexity, of the prompt alone, times quality; a row without one of the two is left out."""
    method = with_judge(DEITA(), endpoint(judge))
    assert method == DEITA(
        complexity=JudgeRating(aspect="complexity", endpoint=endpoint(judge)),
        quality=JudgeRating(endpoint=endpoint(judge)),
    )
    found, quality = rate(pool, method), rate(pool, AlpaGasus(rater=method.quality))
    assert found.ids == quality.ids
    assert found.values.tolist() == (2 * quality.values).tolist()
    mixed = rate(pool, DEITA(complexity=LengthRating(), quality=PerplexityRating()))
    lengths, natural = (rate(pool, AlpaGasus(rater=r)) for r in (LengthRating(), PerplexityRating()))
    assert mixed.values == pytest.approx(lengths.values * natural.values)


def test_a_judge_without_an_endpoint_is_refused(pool: Pool) -> None:
    """The message names what would work without one."""
    for method in (AlpaGasus(), DEITA(quality=LengthRating())):
        with pytest.raises(ConfigError, match=r"give --judge-model MODEL.*length, perplexity, ifd"):
            rate(pool, method)
    assert with_judge(AlpaGasus(), None) == AlpaGasus()
    assert [AlpaGasus().view, DEITA().needs_target, DEITA().last_checkpoint] == [None, False, False]


def test_without_a_target_from_the_command_line(tiny: World, tmp_path: Path, judge: Server) -> None:
    """AlpaGasus and DEITA choose without --target, report rows left out, and refuse each other's options."""
    common = {"target": None}
    chosen = tiny(
        "select", tmp_path / "run", *tiny.with_adapters(), "--estimator", "alpagasus", "--rater", "length", "--budget",
        "4", "--json", **common,
    ).succeeded().json  # fmt: skip
    assert chosen["selections"][0]["estimator"] == "AlpaGasus (length)"
    assert len(chosen["selections"][0]["ids"]) == 4
    assert [entry["estimator"] for entry in chosen["selections"]] == ["AlpaGasus (length)", "random (seed 0)"]
    assert (tmp_path / "run" / "report.html").exists()
    judged = tiny(
        "select", tmp_path / "run", *tiny.with_adapters(), "--estimator", "alpagasus", "--judge-model", "m",
        "--judge-url", judge.url, "--budget", "100%", "--threshold", "4.5", "--json", **common,
    ).succeeded()  # fmt: skip
    assert judged.json["selections"][0]["method"] == "top-k from 4.5"
    assert 0 < len(judged.json["selections"][0]["ids"]) < 24
    left_out = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in left_out} == {"no_rating"}
    refused = tiny("select", tmp_path / "none", "--estimator", "less", **common)
    assert refused.code == 2
    assert "no target" in refused.err
    refused = tiny("select", tmp_path / "none", "--estimator", "deita", "--rater", "ifd", **common)
    assert "--rater goes with alpagasus, not with --estimator deita" in refused.err
    refused = tiny(
        "select", tmp_path / "none", "--estimator", "deita", "--threshold", "1", "--selection", "diverse", **common
    )
    assert "--threshold goes with top_k, not with --selection diverse" in refused.err
    assert not (tmp_path / "none").exists()
