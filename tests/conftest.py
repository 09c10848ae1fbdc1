"""What every test shares: an environment without a model hub, and the demo's model."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tiny_world import World

if TYPE_CHECKING:
    import torch

# Set before anything imports torch or transformers, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models run slower on many threads, and the suite's time should not depend on the machine's size.
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which got the line above from the first
    os.environ["OMP_NUM_THREADS"] = "1"
os.fsync = lambda _fd: None  # no test lives through a power failure, and the wait for the disk is long
# A shell starts what runs in its background with interrupts ignored, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A run of the tests draws the same examples each time; `GRADSIFT_FUZZ=10000` draws new ones, in the fuzz tests as many.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)  # machines are shared
if "GRADSIFT_FUZZ" not in os.environ:
    hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the demo's model, so that `-m "not model"` runs without it; the files of long tests come first, so
    that no process is left with one of them at the end."""
    here = Path(__file__).parent
    long = [here, *(here / name for name in ("end_to_end", "execution", "influence", "model", "plan", "warmup"))]
    items.sort(key=lambda item: item.path.parent not in long)
    for item in items:
        if "demo_model_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_stays() -> None:
    """Leave what was imported, for this file or one before, out of garbage collections, which every training and every
    model that is let go asks for: they take half of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _maps_take_few_steps() -> None:
    """As few as t-SNE allows: pages are drawn by the hundred."""
    from gradsift.report import maps

    maps._STEPS = 250


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model with a pool and a target."""
    return World.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def in_float64() -> Iterator[None]:
    """Llama's norm, which computes in float32 whatever its input, in float64: finite differences need it."""
    from transformers.models.llama import modeling_llama

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The folder of the demo's model, in the user's own cache; GRADSIFT_TEST_MODEL names another folder."""
    named = os.environ.get("GRADSIFT_TEST_MODEL")
    if named:
        return Path(named)
    from gradsift.demo.model import demo_model

    return demo_model()
