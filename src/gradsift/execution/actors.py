"""The workers of a Ray cluster: actors, each a process that keeps its model between tasks. The only module that imports
ray.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Settings
from gradsift.execution.engine import Task

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told of a run unless its user says so
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves workers on a machine that others use as well
    "RAY_raylet_start_wait_time_s": "180",  # a busy machine needs more than Ray's own 30
}
_SESSION = "/tmp/ray/session_latest"  # Ray's own choice, unless it is told another
_OBJECT_STORE = 128 << 20  # bytes: rows never go through it


class RayCluster(Settings):
    """Workers on Ray.

    workers: actors, each with a model of its own; None takes one per GPU, or per `threads` cores where there is none.
    threads: of each worker's arithmetic; results of other numbers differ by rounding.
    gpus: per worker; None takes one where the cluster has any.
    memory_gib: per worker, which Ray sets aside; None leaves it to chance.
    address: of a cluster that runs, or `auto`; None starts one on this machine, for as long as it is needed.
    """

    kind: Literal["ray"] = "ray"
    workers: int | None = Field(default=None, ge=1)
    threads: int = Field(default=1, ge=1)
    gpus: float | None = Field(default=None, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)
    address: str | None = None


class Worker:
    """Runs one task at a time, and tells meanwhile how far it is: in the folder where the command was given, which
    paths in recipes are relative to, with the paths of modules of the user's own, and so many threads for arithmetic.
    """

    def __init__(self, folder: str, paths: Sequence[str], threads: int) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # for libraries that are not imported yet
            os.environ[name] = str(threads)
        sys.path += [path for path in paths if path not in sys.path]
        if Path(folder).is_dir():
            os.chdir(folder)
        self._threads = threads
        self._done = 0.0
        self._lock = threading.Lock()

    def run(self, task: Task) -> tuple[Any, float]:
        """What the task returns, and how many units it told of."""
        if "torch" in sys.modules:  # OpenMP counts for each thread that calls it, and Ray calls us from any
            sys.modules["torch"].set_num_threads(self._threads)
        self._done = 0.0
        return task.work(self._advance), self._done

    def done(self) -> float:
        """Units of the task under way."""
        return self._done

    def _advance(self, units: float = 1) -> None:
        with self._lock:
            self._done += units


class Actors:
    """Workers on a cluster, `count` of which may work at once, started as they are needed; connects when it is made.

    `logs` is where Ray keeps them, on each node. A ConfigError where Ray is not installed, no cluster is there, or the
    workers do not fit it.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._own, session = _connect(cluster)
        self.logs = f"{session}/logs"
        import ray

        self.ray: Any = ray
        gpus, self.count = _fitted(cluster, ray.cluster_resources())
        memory = {} if cluster.memory_gib is None else {"memory": int(cluster.memory_gib * 2**30)}
        # Two calls at once: a task, and the question how far it is. Who tries again is our business: see `Mapping`.
        actor = ray.remote(Worker).options(
            num_cpus=cluster.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=2, **memory
        )
        folder, paths = str(Path.cwd()), list(sys.path)
        self._make: Callable[[], Any] = lambda: actor.remote(folder, paths, cluster.threads)
        self._idle: list[Any] = []

    def take(self) -> Any:
        """A worker that has nothing to do."""
        return self._idle.pop() if self._idle else self._make()

    def give_back(self, worker: Any) -> None:
        """It has finished its task and keeps its model for the next."""
        self._idle.append(worker)

    def end(self, worker: Any) -> None:
        """End a worker in the middle of its task."""
        self.ray.kill(worker)

    def close(self) -> None:
        """End the workers, and the cluster if it is ours."""
        while self._idle:
            self.end(self._idle.pop())
        if self._own:
            self.ray.shutdown()


def _connect(cluster: RayCluster) -> tuple[bool, str]:
    """Join the cluster, or start one here; whether that was our doing, and Ray's folder on every node."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the ray engine needs Ray: pip install 'gradsift[ray]'") from error
    if ray.is_initialized():
        return False, _SESSION
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "address": address or "local"}
    if not address:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        if cluster.workers is not None:
            options["num_cpus"] = max(cluster.workers * cluster.threads, os.cpu_count() or 1)
    stop = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}. Start one with "
            "`ray start --head`, or leave --address out"
        ) from error
    # Ray has SIGTERM exit at once; who has it end the command in order, as gradsift's commands do, keeps that.
    if stop not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    # Ray writes of each dead worker to standard output, which is for results; we tell of them ourselves.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return True, str(context.address_info.get("session_dir", _SESSION))


def _fitted(cluster: RayCluster, found: dict[str, float]) -> tuple[float, int]:
    """GPUs of each worker, and how many workers."""
    cores, all_gpus = found.get("CPU", 0.0), found.get("GPU", 0.0)
    gpus = cluster.gpus if cluster.gpus is not None else min(1.0, all_gpus)
    most = int(min(cores / cluster.threads, all_gpus / gpus if gpus else cores))
    count = cluster.workers or max(1, most)
    if count > most:
        raise ConfigError(
            f"{count} workers of {cluster.threads} cores and {gpus:g} GPUs each do not fit the cluster: "
            f"it has {cores:g} cores and {all_gpus:g} GPUs: at most {most}. Give fewer --workers, --worker-threads or "
            "--worker-gpus, or add nodes"
        )
    return gpus, count
