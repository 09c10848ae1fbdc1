"""A cluster that loses a node, and a driver that is killed: the next command ends where an undisturbed one ends."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import python, said, wait_until
from tiny_world import World, pool_rows, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROWS, SHARD_ROWS = 120, 2
ON_NODES = """
import sys
from gradsift.execution.actors import RayCluster
from gradsift.execution.ray import RayEngine
from gradsift.base.progress import Reporter, untold
from ray_tasks import Square, Wait

engine = RayEngine(RayCluster(workers=2, address=sys.argv[1]), Reporter())
found = dict(engine.map([Wait(sys.argv[2]), Square(3), Square(4)], untold, "shard"))
print(found[0], found[1][0], found[2][0])
"""


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head without cores and two nodes of one."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gradsift[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "180")
        small = {"include_dashboard": False, "object_store_memory": 100 << 20}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        for _ in range(2):
            found.add_node(num_cpus=1, object_store_memory=100 << 20)
        found.wait_for_nodes()
        yield found
        found.shutdown()


def test_a_lost_node_costs_its_tasks_a_second_try(nodes: Any, tmp_path: Path) -> None:
    """The node with a task under way goes away: the task is done on the one that is left."""
    mark, errors = tmp_path / "mark", tmp_path / "errors"
    driver = python("-c", ON_NODES, nodes.address, mark, errors=errors)
    wait_until(mark.exists, driver, errors)
    lost = mark.read_text()
    (node,) = (node for node in nodes.worker_nodes if node.unique_id == lost or node.node_id == lost)
    nodes.remove_node(node, allow_graceful=False)
    survivor, *squares = said(driver, errors).split()
    assert squares == ["9", "16"]
    assert survivor != lost
    assert "a worker was lost at shard 0: it is tried again" in errors.read_text()


def test_a_killed_driver_goes_on_where_it_was(tiny: World, tmp_path: Path) -> None:
    """SIGKILL of a driver with two workers: no shard is lost, and the same command ends with the bytes of a run in one
    process that nobody disturbed."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gradsift[ray]'")
    pool = write_rows(tmp_path / "pool.jsonl", pool_rows(ROWS))
    options = ("--adapter", tiny.adapters[-1], "--shard-rows", SHARD_ROWS, "--token-budget", "64")
    there, whole, errors = tmp_path / "there", tmp_path / "whole", tmp_path / "errors"

    def command(out: Path, *more: object) -> subprocess.Popen[str]:
        arguments = tiny.arguments("collect", out, *options, *more, pool=pool)
        return python("-m", "gradsift", *(a for a in arguments if a != "--quiet"), errors=errors)

    def shards(out: Path) -> dict[str, bytes]:
        return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("gradients/*/shard-*"))}

    said(command(whole), errors)
    wanted = shards(whole)
    ray = ("--engine", "ray", "--workers", "2")
    killed = command(there, *ray)
    wait_until(lambda: len(list(there.glob("gradients/*/shard-*.safetensors"))) > 4, killed, errors)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not list(there.glob("gradients/*/manifest.json"))
    said(command(there, *ray), errors)
    assert "120 pool rows are there already" in errors.read_text()
    assert shards(there) == wanted
