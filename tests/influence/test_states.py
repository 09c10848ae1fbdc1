"""RDS+ and Rep-Sim: cosines of the model's own states, row by row as the model gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.base.types import Sequence
from gradsift.context import Pool
from gradsift.influence import states as module
from gradsift.influence.states import RDSPlus, RepSim, token_weights
from gradsift.model.models import host
from tiny_world import World, target_rows


@pytest.fixture(scope="module")
def opened(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, gs.Target]:
    """A pool with two checkpoints, and its target."""
    pool = tiny.open_pool(tmp_path_factory.mktemp("states") / "run")
    return pool, gs.open_target(target_rows(3), pool)


def one_by_one(pool: Pool, data: Any, adapter: str | None, layer: int, weigh: Any) -> np.ndarray:
    """States of each row alone, without padding or batches."""
    model = host(pool.model, pool.dtype, pool.device).with_adapter(adapter)
    rows = []
    for sequence in data.sequences(0, len(data)):
        with torch.inference_mode():
            ids = torch.tensor(np.asarray(sequence.token_ids, dtype=np.int64))[None]
            found = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].double().numpy()
        row = weigh(sequence) @ found
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def by_position(sequence: Sequence) -> np.ndarray:
    places = np.arange(1, len(sequence.token_ids) + 1)
    return places / places.sum()


def before_answer(sequence: Sequence) -> np.ndarray:
    first = int(np.flatnonzero(sequence.weights)[0])
    return np.eye(len(sequence.token_ids))[first - 1]


def of_answer(sequence: Sequence) -> np.ndarray:
    return (sequence.weights > 0) / (sequence.weights > 0).sum()


@pytest.mark.parametrize(
    ("method", "adapted", "layer", "weigh"),
    [
        (RDSPlus(), False, -1, by_position),
        (RDSPlus(checkpoint="last"), True, -1, by_position),
        (RepSim(), True, -1, before_answer),
        (RepSim(tokens="answer", layer=1, checkpoint="base"), False, 1, of_answer),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_scores_are_cosines_of_single_rows(
    opened: tuple[Pool, gs.Target], method: Any, adapted: bool, layer: int, weigh: Any
) -> None:
    """Batches and padding change nothing, and float16 unit vectors keep cosines to 1e-3."""
    pool, target = opened
    found = gs.score(pool, target, method)
    adapter = pool.checkpoints()[-1].adapter if adapted else None
    rows, queries = (one_by_one(pool, data, adapter, layer, weigh) for data in (pool.data, target.data))
    np.testing.assert_allclose(found.per_target, rows @ queries.T, atol=1e-3)
    assert found.ids == pool.data.ids


def test_prompts_without_answers(opened: tuple[Pool, gs.Target]) -> None:
    """The last token of a prompt stands for it, and RDS+ takes all of its tokens."""
    pool, _ = opened
    prompts = gs.open_prompts([{"prompt": "what colour is the cat"}, {"prompt": "what says the owl"}], pool)
    for method in (RDSPlus(), RepSim()):
        assert np.isfinite(gs.score(pool, prompts, method).per_target).all()
    bare = Sequence(0, [1, 2, 3], np.zeros(3, dtype=np.float32))
    assert token_weights(bare, "last_prompt_token").tolist() == token_weights(bare, "answer_mean").tolist() == [0, 0, 1]


def test_kept_and_resumed(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: tuple[Pool, gs.Target]
) -> None:
    """States are kept by parts: what was done before an interruption is not done again, but for a part that was
    damaged since, and a second call is none."""
    monkeypatch.setattr(module, "_SHARE_ROWS", 7)
    pool = tiny.open_pool(tmp_path / "run")
    target = gs.open_target(target_rows(3), pool)
    calls: list[int] = []
    original = module.hidden_states

    def counted(model: Any, sequences: Any, count: int, *more: Any) -> Any:
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(model, sequences, count, *more)

    monkeypatch.setattr(module, "hidden_states", counted)
    with pytest.raises(KeyboardInterrupt):
        gs.score(pool, target, RDSPlus())
    part = next((tmp_path / "run").glob("states/*/rows-000000000.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    again = gs.score(pool, target, RDSPlus())
    assert calls == [7, 7, 7, 7, 7, 3, 3]
    assert gs.score(pool, target, RDSPlus()).fingerprint == again.fingerprint
    assert len(calls) == 7
    monkeypatch.undo()
    np.testing.assert_allclose(again.per_target, gs.score(*opened, RDSPlus()).per_target, atol=1e-3)


def test_no_such_layer(opened: tuple[Pool, gs.Target]) -> None:
    """A layer that the model has not is refused, with those that there are."""
    with pytest.raises(ConfigError, match="layer is 9: this model has 1 layers"):
        gs.score(*opened, RepSim(layer=9))


def test_explains(opened: tuple[Pool, gs.Target]) -> None:
    """Each output has a score of its own, so that explanations can rank by states."""
    found = gs.explain(opened[0], "what colour is the cow", estimator=RepSim(), k=2, max_new_tokens=4)
    assert len(found.entries[0].results[0].examples) == 2


def test_targets_of_rds_plus_take_turns(opened: tuple[Pool, gs.Target]) -> None:
    """Left out, the aggregation is the method's own; turns are no means of which it could be told how they vary."""
    found = gs.score(*opened, RDSPlus())
    assert found.aggregation == "round_robin"
    assert found.per_target is not None
    assert sorted(found.aggregate.tolist()) == pytest.approx([place / 24 for place in range(1, 25)])
    assert [found.ids[place] for place in np.argsort(found.ranks())[:3]] == taken(found.per_target, found.ids)[:3]
    assert found.strata is None
    assert gs.score(*opened, RepSim()).aggregation == "max_of_means"
    np.testing.assert_allclose(
        gs.score(*opened, RDSPlus(), aggregation="mean").aggregate, found.per_target.mean(axis=1), rtol=1e-5
    )


def taken(matrix: np.ndarray, ids: Any) -> list[str]:
    """Each column's best of what the ones before have left."""
    order: list[int] = []
    for column in matrix.T:
        order.append(next(row for row in np.argsort(-column, kind="stable").tolist() if row not in order))
    return [ids[row] for row in order]
