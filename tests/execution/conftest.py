"""One Ray cluster and one pair of workers for all tests of this folder: starting them takes longer than most tests."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch

from gradsift.base import interruption
from gradsift.execution.actors import RayCluster
from gradsift.execution.ray import RayEngine
from reporters import Listening


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Eight cores, as far as Ray knows. What SIGTERM does is what it did before Ray, which would exit at once."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gradsift[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = signal.signal(signal.SIGTERM, interruption.stop)
        first = RayEngine(RayCluster(workers=8))
        assert first.workers == 8
        assert signal.signal(signal.SIGTERM, before) is interruption.stop
        yield
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for the processes that it ends
            first.close()
            gc.collect()


@pytest.fixture(scope="package")
def pair(cluster: None) -> Iterator[RayEngine]:
    engine = RayEngine(RayCluster(workers=2))
    yield engine
    engine.close()


@pytest.fixture
def engine(pair: RayEngine) -> RayEngine:
    """Two workers, whose losses this test hears of."""
    pair.reporter = Listening()
    return pair


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many as a worker has, so that results have the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
