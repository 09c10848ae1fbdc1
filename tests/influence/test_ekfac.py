"""EK-FAC from the pool's stored rows: targets through the factors' inverse, kept, taken up and told of."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsift as gs
from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Pool
from gradsift.gradients import kronecker
from gradsift.gradients.capture import find_modules
from gradsift.gradients.hessian import curvature_product
from gradsift.gradients.kronecker import (
    DampedInverse,
    Eigenbasis,
    Pass,
    corrected_eigenvalues,
    eigenvectors,
    kronecker_factors,
)
from gradsift.gradients.projection import Projection
from gradsift.influence import ekfac as module
from gradsift.influence.ekfac import EKFAC, dampings
from gradsift.model.models import host
from reporters import Listening
from tiny_world import World, target_rows

Opened = tuple[Pool, gs.Target]


@pytest.fixture(scope="module")
def opened(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A pool of rows that are not projected, with two checkpoints, and its target."""
    pool = tiny.open_pool(tmp_path_factory.mktemp("ekfac") / "run")
    return pool, gs.open_target(target_rows(3), pool)


def rows_at(opened: Opened, number: int) -> tuple[Any, Any, Tensor, Tensor]:
    """The model, its modules, and the unprojected rows of pool and target at a checkpoint."""
    pool, target = opened
    checkpoint = pool.checkpoints()[number]
    stores = (pool.collect(data, checkpoint, ["plain"], what="rows")["plain"] for data in (pool.data, target.data))
    G, V = (store.rows(0, len(store)).double() for store in stores)
    network = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    return network, find_modules(network).captured, G, V


def apart(rows: Tensor, modules: Any) -> dict[str, Tensor]:
    sizes = [one.out_features * one.in_features for one in modules]
    return {c.name: part.view(-1, *c.shape) for c, part in zip(modules, rows.split(sizes, dim=1), strict=True)}


@pytest.mark.parametrize(
    "method",
    [EKFAC(), EKFAC(labels="data", rows=9), EKFAC(damping="auto", checkpoints="last"), EKFAC(damping=0.3)],
    ids=lambda method: method.label,
)
def test_is_the_inverse_of_the_samples_factors(opened: Opened, method: EKFAC) -> None:
    """Σ_e w_e λ_e ⟨g, (H_e + λ_e)⁻¹ v⟩ of unprojected rows, H of the rows that are drawn, to the rows' precision."""
    pool, target = opened
    ids = module.drawn(pool.data.ids, method.rows)
    assert len(ids) == min(method.rows, 24)
    sample = pool.data.subset(pool.data.positions(ids)).sequences(0, len(ids))
    settings = Pass(1000, ids if method.labels == "model" else None)
    wanted = torch.zeros(24, 3, dtype=torch.float64)
    every = range(2) if method.checkpoints == "all" else [1]
    rates = [pool.checkpoints()[number].learning_rate or 0.0 for number in every]
    for number, rate in zip(every, rates, strict=True):
        network, modules, G, V = rows_at(opened, number)
        factors = kronecker_factors(network, modules, sample, settings)
        bases = {name: Eigenbasis(*(eigenvectors(one).double() for one in own)) for name, own in factors.items()}
        single = {n: Eigenbasis(b.out_vectors.float(), b.in_vectors.float()) for n, b in bases.items()}
        sums = corrected_eigenvalues(network, modules, sample, single, settings)
        eigenvalues = {name: total.double() / len(ids) for name, total in sums.items()}
        values = dampings(eigenvalues, method.damping)
        inverse = [
            DampedInverse(bases[name], eigenvalues[name], values[name])(part).flatten(1)
            for name, part in apart(V, modules).items()
        ]
        entries = [eigenvalues[one.name].numel() for one in modules]
        scale = np.average([values[one.name] for one in modules], weights=entries)
        wanted += rate / sum(rates) * scale * G @ torch.cat(inverse, dim=1).T
    found = gs.score(pool, target, method)
    assert found.per_target is not None
    np.testing.assert_allclose(found.per_target, wanted.numpy(), rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))
    assert found.found is not None
    assert not found.found.terms  # nothing is lost where nothing is projected


def test_a_row_helps_itself(opened: Opened) -> None:
    """The sign: as H is positive, each row's score for itself is above 0, and λ(H + λ)⁻¹ takes none above its norm."""
    pool, _ = opened
    target = gs.open_target([pool.data.row(id_) for id_ in pool.data.ids[:4]], pool, keep_overlap=True)
    matrix = gs.score(pool, target, EKFAC(checkpoints="last")).per_target
    plain = gs.score(pool, target, gs.LESS(optimizer="sgd", normalise=False, checkpoints="last")).per_target
    assert matrix is not None
    assert plain is not None
    own, squares = np.diag(matrix[:4]), np.diag(plain[:4])
    assert (own > 0).all()
    assert (own < squares).all()


def test_conjugate_gradients_solve_with_the_gauss_newton_matrix(opened: Opened) -> None:
    """(GGN + λ) of what is found is λ·v, of the rows that the curvature is from; few steps are not there yet."""
    pool, target = opened
    v = rows_at(opened, 1)[3][0]
    sequences = pool.data.sequences(0, len(pool.data))
    checkpoint = pool.checkpoints()[1]
    for steps, most in ((2, np.inf), (30, 1e-3)):
        method = EKFAC(conjugate_gradient=steps)
        directions = method.found(pool, target.data, checkpoint)
        rows, _ = directions.find(pool)
        network, modules, _ = directions.factors.at.opened()
        damping = next(iter(directions.factors.dampings(pool.run, method.damping)[0].values()))
        one = {name: part[0] for name, part in apart(rows, modules).items()}
        curved = curvature_product("ggn", network, modules, sequences, one, token_budget=1000)
        left = torch.cat([(curved[c.name] + damping * one[c.name]).flatten() for c in modules]).double()
        error = float((left - damping * v).norm() / (damping * v).norm())
        assert error < most
        assert steps > 2 or error > 1e-2
    with pytest.raises(ConfigError, match="leave labels at model"):
        EKFAC(conjugate_gradient=2, labels="data")


def test_what_the_projection_does_is_told(tiny: World, tmp_path: Path) -> None:
    """The rank correlation of projected with whole scores of some rows, and a warning where it is below 0.95."""
    found = {}
    for dim in (4, 4096):
        pool = tiny.open_pool(
            tmp_path / str(dim), gradients=gs.Gradients(projection=Projection(dim=dim, sizes="whole"), dtype="float32")
        )
        scores = gs.score(pool, gs.open_target(target_rows(3), pool), EKFAC())
        assert scores.found is not None
        found[dim] = scores.found.terms[0], [one for one in scores.warnings if "rank correlation" in one]
    assert found[4096][0] > 0.99
    assert not found[4096][1]
    assert found[4][0] < 0.9
    assert f"rank correlation of {found[4][0]:.2f}" in found[4][1][0]


def test_each_checkpoint_is_planned(opened: Opened) -> None:
    """Two passes over the sample at each, one over the targets and the rows that are checked, and the products."""
    pool, target = opened
    method = EKFAC(rows=11, conjugate_gradient=2)

    def planned(stage: str) -> list[tuple[int, bool]]:
        passes = method.passes(pool, target, pool.checkpoints)
        return [(one.rows, one.done) for one in passes if one.stage == f"EK-FAC's {stage}"]

    assert planned("factors") == [(2 * 11, False)] * 2
    assert planned("targets") == [(3 + 11, False)] * 2
    assert planned("conjugate gradients") == [(2 * 3 * 11, False)] * 2
    ids = module.drawn(pool.data.ids, 11)
    tokens = 2 * pool.data.lengths[pool.data.positions(ids)].sum()
    assert [one.tokens for one in method.passes(pool, target, pool.checkpoints)[::3]] == [tokens] * 2
    gs.score(pool, target, EKFAC(rows=11, checkpoints="last"))
    assert [done for _, done in planned("factors")] == [False, True]
    gs.score(pool, target, EKFAC(rows=11))
    assert [done for _, done in planned("factors") + planned("targets")] == [True, True, False, False]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many sequences each pass was given; one that is told to ends as an interrupt does."""
    calls: dict[str, list[int]] = {}

    def watched(name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)
        calls[name] = []

        def call(model: Any, modules: Any, sequences: Sequence[Any], *more: Any) -> Any:
            calls[name].append(len(sequences))
            if len(calls[name]) == 2 and not calls["interrupted"]:
                calls["interrupted"].append(1)
                raise KeyboardInterrupt
            return original(model, modules, sequences, *more)

        monkeypatch.setattr(module, name, call)

    calls["interrupted"] = []
    for name in ("kronecker_factors", "corrected_eigenvalues", "each_gradient"):
        watched(name)
    monkeypatch.setattr(module, "_PART_ROWS", 10)
    return calls


ONE = EKFAC(checkpoints="last")


def test_kept_and_taken_up(tiny: World, tmp_path: Path, counted: dict[str, list[int]], opened: Opened) -> None:
    """Parts of an interrupted pass are not done again; a second target takes the factors, a second scoring nothing."""
    pool = tiny.open_pool(tmp_path / "run")
    target = gs.open_target(target_rows(3), pool)
    with pytest.raises(KeyboardInterrupt):
        gs.score(pool, target, ONE)
    scores = gs.score(pool, target, ONE)
    assert counted["kronecker_factors"] == [10, 10, 10, 4]
    assert counted["corrected_eigenvalues"] == [10, 10, 4]
    assert counted["each_gradient"] == [3, 24]
    again = gs.score(pool, target, ONE)
    gs.score(pool, gs.open_target(target_rows(4), pool), ONE)
    gs.score(pool, target, EKFAC(checkpoints="last", damping=1.0))
    assert len(counted["kronecker_factors"]) == 4
    assert counted["each_gradient"] == [3, 24, 4, 24, 3, 24]
    assert again.fingerprint == scores.fingerprint
    assert scores.per_target is not None
    np.testing.assert_allclose(scores.per_target, gs.score(*opened, ONE).per_target, rtol=1e-3, atol=1e-5)
    assert not [key for key in pool.run.storage.list("kronecker/") if "factors-" in key or "eigenvalues-" in key]


class Elsewhere:
    """An engine whose tasks come from a pickle, last first, as workers take them."""

    workers = 2

    def map(self, tasks: Sequence[Any], advance: Any, _what: str) -> Iterator[tuple[int, Any]]:
        for position in reversed(range(len(tasks))):
            yield position, pickle.loads(pickle.dumps(tasks[position])).work(advance)  # noqa: S301


def test_other_workers_find_the_same(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    """Tasks say all that they need, in whatever order they are done."""
    monkeypatch.setattr(module, "_PART_ROWS", 10)
    monkeypatch.setattr(module, "_PART_TARGETS", 2)
    pool = tiny.open_pool(tmp_path / "run", engine=Elsewhere())
    found = gs.score(pool, gs.open_target(target_rows(3), pool), EKFAC(rows=20)).per_target
    wanted = gs.score(*opened, EKFAC(rows=20)).per_target
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_groups_of_modules_give_the_same_numbers(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    """Each pass is over a group's modules alone; what is kept serves whoever asks, by any number of groups."""
    sizes: list[int] = []
    for name in ("kronecker_factors", "corrected_eigenvalues", "each_gradient"):
        original: Callable[..., Any] = getattr(module, name)

        def call(model: Any, modules: Any, *more: Any, original: Callable[..., Any] = original) -> Any:
            sizes.append(len(modules))
            return original(model, modules, *more)

        monkeypatch.setattr(module, name, call)

    def asked(groups: int) -> Pool:
        gradients = gs.Gradients(projection=Projection(kind="none"), dtype="float32", module_groups=groups)
        return tiny.open_pool(tmp_path / "run", gradients=gradients)

    pool = asked(3)
    found = gs.score(pool, gs.open_target(target_rows(3), pool), ONE)
    wanted = gs.score(*opened, ONE)
    assert found.per_target is not None
    assert wanted.per_target is not None
    np.testing.assert_allclose(found.per_target, wanted.per_target, rtol=1e-3, atol=1e-5)
    products = [
        ONE.found(own, opened[1].data, own.checkpoints()[-1]).find(own)[1] for own in (pool, opened[0])
    ]  # of the rows that are checked
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-6)
    count = len(rows_at(opened, 1)[1])
    assert max(sizes[:12]) == -(-count // 3)
    sizes.clear()
    pool = asked(1)
    target = gs.open_target(target_rows(4), pool)
    np.testing.assert_allclose(gs.score(pool, target, ONE).per_target[:, :3], found.per_target, rtol=1e-3, atol=1e-5)
    assert sizes == [count, count]  # of four targets and of the rows that are checked
    pool = tiny.open_pool(tmp_path / "other", gradients=asked(count + 1).gradients)  # more than there are modules
    many = gs.score(pool, gs.open_target(target_rows(3), pool), ONE).per_target
    np.testing.assert_allclose(many, found.per_target, rtol=1e-3, atol=1e-5)


def test_rows_that_do_not_fit_are_told_of(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row or target for which memory does not suffice even alone does not count, now and when it is found again;
    where none fits, it says so, and what helps, and keeps nothing of that.
    """
    reporter = Listening()
    pool = tiny.open_pool(tmp_path / "run", reporter=reporter)
    target = gs.open_target([{"id": "short", "prompt": "the cat", "completion": "red"}, *target_rows(1)], pool)
    gs.score(pool, target, gs.LESS(optimizer="sgd", checkpoints="last"))  # stores, for which there is memory
    room = 0

    class Small(kronecker.Capture):
        def run(self, sequences: Any, *more: Any, **named: Any) -> Tensor:
            if len(sequences) * max(len(one.token_ids) for one in sequences) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().run(sequences, *more, **named)

    monkeypatch.setattr(kronecker, "Capture", Small)
    monkeypatch.setattr(host(pool.model, pool.dtype, pool.device), "token_limit", None)
    with pytest.raises(DataError, match=r"none of the 24 rows .* fits in memory.*--module-groups"):
        gs.score(pool, target, ONE)
    lengths = pool.data.lengths.tolist()
    room = max(lengths) - 1
    assert target.data.lengths[0] <= room < target.data.lengths[1]
    matrix = gs.score(pool, target, ONE).per_target
    assert matrix is not None
    assert matrix[:, 0].all()
    assert not matrix[:, 1].any()
    gs.score(pool, target, EKFAC(checkpoints="last", damping=2.0))
    assert [one.partition(",")[0] for one in reporter.warned if "EK-FAC" in one] == 2 * [
        f"{lengths.count(room + 1)} of 24 rows of EK-FAC's sample do not count",
        "1 of 2 targets count as zero for EK-FAC",
    ]
