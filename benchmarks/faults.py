"""What happens to runs that are killed, interrupted, starved of disk, altered, crowded or cut off from their server.

    python benchmarks/faults.py --out runs/faults                         all of it (some 20 minutes on two cores)
    python benchmarks/faults.py --out runs/faults --only kill,altered     some of it; the rest of the table is kept

Two jobs on a tiny model of random weights: `gradsift select --estimator nice` with a reward function (tokenising,
warm-up, responses, rewards, gradients, scores, choice, page) and `gradsift compare` (fine-tuning and evaluation, too).
Each runs once undisturbed. A fault is then done to another run of it, and the same command typed again. Recorded is

- whether what had been complete is there afterwards, byte for byte in the same file (same inode): `kept`,
- whether everything that the run holds in the end is what the undisturbed one holds: `equal` (times, versions and the
  pages aside),
- what the command said.

A command runs in a process of its own, forked from one that has the libraries imported, else most moments would fall
into their imports. Writes faults.json and faults.md into OUT. Faults of the disk need root (they mount a
tmpfs) and are left out without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from loopback import completion, serving
from tiny_world import COLOURS, World, forking, pool_rows, run_in_process, target_rows, write_rows

REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""
# As `World` gives them, in the words of a recipe.
WARMUP = {"fraction": 0.5, "epochs": 2, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 4, "dropout": 0}
TRAINING = {"epochs": 2, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}
GRADIENTS = {"projection": {"dim": 256}, "shard_rows": 8, "token_budget": 256}
ROWS, PROMPTS, SAMPLES = 64, 6, 4
# What differs between two runs that nothing happened to.
VOLATILE = {"created", "versions", "seconds", "_digest", "bytes", "command", "times", "stage_seconds", "lost"}
UNCOMPARED = re.compile(r"(^|/)(lock|times/.*|.*\.html|report\.json|comparison\.page\.json|summary\.json|\.tmp-.*)$")
# Results that are merged or written again by every command.
REWRITTEN = re.compile(r"(^[^/]+$)|(manifest\.json$)|(/reward-[^/]*$)|(^scores/)|(^times/)")


@dataclass
class Outcome:
    """A row of the table. equal: the final result is the undisturbed one's. kept: whether nothing complete was lost."""

    group: str
    fault: str
    happened: str
    equal: bool | None = None
    kept: bool | None = None
    files_kept: int = 0

    @property
    def bad(self) -> bool:
        return self.equal is False or self.kept is False or "should not have" in self.happened


@dataclass
class Ended:
    """How a command ended, and what it said on standard error."""

    code: int
    text: str

    @property
    def said(self) -> str:
        """The error that it ended with."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]

    def checked(self) -> Ended:
        assert self.code == 0, f"exit {self.code}: {self.text}"
        return self

    @property
    def clean(self) -> bool:
        return "Traceback" not in self.text and "should not have happened" not in self.text


@dataclass
class Job:
    """A command, and what its run folder holds when nothing happens to it."""

    name: str
    arguments: Callable[[Path], list[str]]
    wanted: dict[str, str] = field(default_factory=dict)
    whole: Path = Path()

    @property
    def files(self) -> int:
        return count(self.whole)


class Bench:
    """A tiny world in OUT, the two jobs, and processes that run commands."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.absolute(), seed
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        self.path = self.folder / "faults.json"
        self.before = [Outcome(**row) for row in json.loads(self.path.read_text())] if self.path.exists() else []
        self.work = self.folder / "work"
        self.work.mkdir(parents=True)
        # A shell starts what runs in its background with interrupts ignored, and so would the commands started here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads no fork has
        self.context = forking()
        self.world = World.make(self.work, layers=2)
        self.pool = write_rows(self.work / "pool.jsonl", pool_rows(ROWS))
        prompts = [{k: v for k, v in row.items() if k != "completion"} for row in target_rows(PROMPTS)]
        self.prompts = write_rows(self.work / "prompts.jsonl", prompts)
        self.test = write_rows(self.work / "test.jsonl", target_rows(10)[PROMPTS:])
        (self.work / "rewards.py").write_text(REWARD)
        self.outcomes: list[Outcome] = []

    # --- jobs -----------------------------------------------------------------------------------------------------

    def select(self, out: Path, *more: str, pool: str | None = None) -> list[str]:
        options = [
            "--estimator", "nice", "--reward", f"{self.work / 'rewards.py'}:vowels", "--samples", str(SAMPLES),
            "--max-new-tokens", "8", "--budget", "6", "--shard-rows", "8", "--token-budget", "256",
        ]  # fmt: skip
        arguments = self.world.arguments("select", out, *options, *more, pool=pool or self.pool, target=self.prompts)
        return [argument for argument in arguments if argument != "--quiet"]

    def compare(self, out: Path) -> list[str]:
        content = {
            "model": self.world.model, "pool": self.pool, "target": self.world.target, "out": str(out),
            "max_length": 64, "device": "cpu", "warmup": WARMUP, "gradients": GRADIENTS,
            "compare": {
                "test": self.test, "training": TRAINING, "seeds": [0], "budgets": [8],
                "arms": [{"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}],
            },
        }  # fmt: skip
        path = self.work / f"compare-{zlib.crc32(str(out).encode()):08x}.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["compare", str(path)]

    def jobs(self, *names: str) -> list[Job]:
        """The jobs of these names, or both, each run once with nothing done to it."""
        jobs = [Job("select", self.select), Job("compare", self.compare)]
        jobs = [job for job in jobs if not names or job.name in names]
        for job in jobs:
            job.whole = self.work / f"undisturbed-{job.name}"
            self.run(job.arguments(job.whole), job.whole).checked()
            job.wanted = content_of(job.whole)
        return jobs

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self, arguments: list[str], out: Path, target: Callable[..., None] = run_in_process) -> Any:
        """A command in a process of its own; what it says goes to a file beside the run folder."""
        errors = self.errors(out)
        errors.unlink(missing_ok=True)
        process = self.context.Process(target=target, args=(arguments, str(errors)))
        process.start()
        return process

    def errors(self, out: Path) -> Path:
        return self.work / f"{out.name}-{zlib.crc32(str(out).encode()):08x}.err"

    def ended(self, process: Any, out: Path, seconds: float = 3600) -> Ended:
        process.join(seconds)
        assert process.exitcode is not None, f"still at work after {seconds} s: {self.errors(out).read_text()}"
        return Ended(process.exitcode, self.errors(out).read_text() if self.errors(out).exists() else "")

    def run(self, arguments: list[str], out: Path, target: Callable[..., None] = run_in_process) -> Ended:
        return self.ended(self.start(arguments, out, target), out)

    def until(self, process: Any, out: Path, files: int, delay: float = 0.0) -> bool:
        """Wait until the run folder has so many files; False where the command ended before."""
        while count(out) < files:
            if not process.is_alive():
                return False
            time.sleep(0.002)
        time.sleep(delay)
        return process.is_alive()

    # --- outcomes -------------------------------------------------------------------------------------------------

    def again(self, job: Job, out: Path, before: Mapping[str, tuple[int, int]] | None = None) -> tuple[str, bool, bool]:
        """The same command typed again: what it said if it failed, whether the result is equal, and what was kept."""
        ended = self.run(job.arguments(out), out)
        if ended.code != 0:
            return f"exit {ended.code}: {ended.said}", False, True
        again = [] if before is None else lost(before, out)
        wrong = differing(job.wanted, content_of(out))
        notes = [f"{what}: {', '.join(keys[:4])}" for what, keys in (("differs", wrong), ("made again", again)) if keys]
        return "; ".join(notes), not wrong, not again

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        groups = {row.group for row in self.outcomes}
        rows = [row for row in self.before if row.group not in groups] + self.outcomes
        rows.sort(key=lambda row: list(FAULTS).index(row.group))
        self.path.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
        self.path.with_suffix(".md").write_text(table(rows))
        mark = "BAD " if outcome.bad else "    "
        print(f"{mark}{outcome.group} | {outcome.fault} | {outcome.happened}", flush=True)


def count(out: Path) -> int:
    """Published files of a run folder."""
    found = 0
    for _folder, _folders, files in os.walk(out):
        found += sum(not name.startswith(".tmp-") for name in files)
    return found


def content_of(out: Path) -> dict[str, str]:
    """A hash of everything a run holds, by file; of JSON without what differs between two runs in peace.

    Responses to a prompt count together, and without the last digits of their log-probabilities: they may lie in two
    files instead of one, and have been drawn in a batch of another size.
    """
    found = {}
    responses: dict[str, list[Any]] = {}
    # Its own folder; a copy names the folder that it was made from.
    here = re.compile(rf'/[^"\s]*/(?:{re.escape(out.name)}|undisturbed-\w+)(?![\w.-])')
    for path in sorted(out.rglob("*")):
        key = path.relative_to(out).as_posix()
        if not path.is_file() or UNCOMPARED.search(key):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            with suppress(ValueError):  # altered, and left so
                data = here.sub("OUT", json.dumps(steady(json.loads(data)), sort_keys=True)).encode()
        elif re.fullmatch(r"samples/\w+/\w+/\d+\.parquet", key):
            with suppress(OSError, pa.ArrowException):
                rows = pq.read_table(path).drop_columns(["logprobs", "sampler_logprobs"]).to_pylist()
                responses.setdefault(str(Path(key).parent), []).extend(rows)
                continue
        found[key] = hashlib.sha256(data).hexdigest()[:16]
    for key, rows in responses.items():
        text = repr(sorted(rows, key=lambda row: row["number"]))
        found[f"{key}/000000.parquet"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: steady(part) for key, part in value.items() if key not in VOLATILE}
    return [steady(part) for part in value] if isinstance(value, list) else value


def differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))


def complete(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file of what is complete: with its manifest, its shard's side file …"""
    found = {}
    for path in out.rglob("*"):
        key = path.relative_to(out).as_posix()
        if not path.is_file() or path.name.startswith(".tmp-") or REWRITTEN.search(key) or path.name == "lock":
            continue
        shard = re.fullmatch(r"((?:shard|sum)-\d+)\.safetensors", path.name)
        epoch = path.parent.name.startswith("epoch-")
        if shard and not path.with_name(path.name.replace("sum-", "shard-")).with_suffix(".json").exists():
            continue
        if epoch and not (path.parent / "checkpoint.json").exists():
            continue
        whole = key.startswith(("data/", "embeddings/")) or path.name == "evaluation.json"
        if whole and not (path.parent / "manifest.json").exists():
            continue
        if path.name in ("rows.parquet", "partial.safetensors") or path.name.startswith("part-"):
            continue
        status = path.stat()
        found[key] = (status.st_ino, status.st_mtime_ns)
    return found


def lost(before: Mapping[str, tuple[int, int]], out: Path) -> list[str]:
    """What was complete and is there no longer as it was."""
    now = complete(out)
    return [key for key, mark in before.items() if now.get(key) != mark]


def stage_of(out: Path) -> str:
    """What the run was at: the folder of the newest file."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "lock"]
    if not files:
        return "start"
    newest = max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(out).as_posix()
    return newest.split("/")[0] if "/" in newest else newest


# --- faults -------------------------------------------------------------------------------------------------------


def kill(bench: Bench, jobs: list[Job], kills: int) -> None:
    """SIGKILL at moments spread over all of both jobs, one for each run."""
    generator = random.Random(bench.seed)
    for number in range(kills):
        job = jobs[number % len(jobs)]
        out = bench.work / f"kill-{number}"
        share = (number // len(jobs) + generator.random()) / -(-kills // len(jobs))
        process = bench.start(job.arguments(out), out)
        alive = bench.until(process, out, int(share * job.files), generator.random() * 0.05)
        process.kill()
        process.join()
        at, had = stage_of(out), complete(out)
        note, equal, kept = bench.again(job, out, had)
        happened = f"killed with {count(out)} of {job.files} files" if note else f"{len(had)} complete files kept"
        ended = "" if alive else " (had just ended)"
        fault = f"SIGKILL of {job.name} at {share:.0%} of its files, after writing {at}{ended}"
        bench.record(Outcome("kill", fault, note or happened, equal, kept, len(had)))
        shutil.rmtree(out)


def killed_often(bench: Bench, jobs: list[Job], kills: int) -> None:
    """One run, killed again and again until it is through."""
    generator = random.Random(bench.seed + 1)
    for job in jobs:
        out, times = bench.work / f"often-{job.name}", 0
        kept = True
        while True:
            before = complete(out) if out.exists() else {}
            process = bench.start(job.arguments(out), out)
            if not bench.until(process, out, count(out) + generator.randrange(2, 14), generator.random() * 0.02):
                ended = bench.ended(process, out)
                break
            process.kill()
            process.join()
            kept &= lost(before, out) == []
            times += 1
            assert times < 100, "it does not get through"
        wrong = differing(job.wanted, content_of(out))
        happened = f"ended with exit {ended.code}" + (f", differs: {', '.join(wrong[:4])}" if wrong else "")
        bench.record(Outcome("kill", f"{job.name} killed {times} times in a row", happened, not wrong, kept))
        shutil.rmtree(out)


def interrupt(bench: Bench, jobs: list[Job], kills: int) -> None:
    """SIGINT: a sentence, exit 130, and the same command goes on."""
    generator = random.Random(bench.seed + 2)
    for number in range(8):
        job, out = jobs[number % len(jobs)], bench.work / f"interrupt-{number}"
        share = (number // 2 + generator.random()) / 4
        process = bench.start(job.arguments(out), out)
        alive = bench.until(process, out, int(share * job.files), generator.random() * 0.05)
        if alive:
            os.kill(process.pid, signal.SIGINT)
        begin = time.monotonic()
        ended = bench.ended(process, out)
        seconds = time.monotonic() - begin
        at, had = stage_of(out), complete(out)
        note, equal, kept = bench.again(job, out, had)
        right = not alive or (ended.code == 130 and ended.clean and ended.said.startswith("interrupted: "))
        happened = note or f"exit {ended.code} after {seconds:.1f} s, {ended.said!r}"
        fault = f"SIGINT to {job.name} at {share:.0%} of its files, after writing {at}"
        bench.record(Outcome("interrupt", fault, happened, equal and right, kept, len(had)))
        shutil.rmtree(out)


def _saving_often(arguments: list[str], errors: str) -> None:
    """Saves what is finished of a shard every fifth of a second, as runs that take longer do every 20 seconds."""
    from gradsift.gradients import collect

    collect._SAVE_SECONDS = 0.2
    run_in_process(arguments, errors)


def within(bench: Bench, jobs: list[Job], kills: int) -> None:
    """Signals in the middle of a pool that is smaller than a shard: what is finished is kept, told and used."""
    pool = write_rows(bench.work / "small.jsonl", pool_rows(240))
    options = ("--shard-rows", "1000", "--token-budget", "64", "--adapter", bench.world.adapters[-1])

    def arguments(out: Path) -> list[str]:
        given = bench.world.arguments("collect", out, *options, pool=pool)
        return [argument for argument in given if argument != "--quiet"]

    job = Job("collect", arguments, whole=bench.work / "undisturbed-within")
    bench.run(arguments(job.whole), job.whole).checked()
    job.wanted = content_of(job.whole)
    generator = random.Random(bench.seed + 6)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"):
        out = bench.work / f"within-{name}"
        process = bench.start(arguments(out), out, _saving_often)
        while not list(out.glob("gradients/*/part-*")):
            assert process.is_alive(), bench.errors(out).read_text()
            time.sleep(0.002)
        time.sleep(generator.random() * 0.5)
        os.kill(process.pid, getattr(signal, name))
        ended = bench.ended(process, out)
        shards = len(list(out.glob("gradients/*/shard-*")))
        after = bench.run(arguments(out), out)
        used = re.search(r"(\d+) of 240 pool rows are there already", after.text)
        kept = used is not None and 0 < int(used[1]) < 240
        wrong = differing(job.wanted, content_of(out))
        right = name == "SIGKILL" or (
            ended.code == 130
            and used is not None
            and ended.said == f"interrupted: {used[1]} of 240 pool rows kept; the same command goes on from there"
        )
        said = "" if name == "SIGKILL" else f"exit {ended.code}, {ended.said!r}; "
        happened = f"{said}{used[1] if used else 0} of 240 rows are used, {shards} shards were finished"
        fault = f"{name} within a pool of 240 rows, smaller than a shard"
        bench.record(Outcome("within", fault, happened, not wrong and after.code == 0 and right, kept))
        shutil.rmtree(out)


def _short_lease(arguments: list[str], errors: str) -> None:
    """With a claim that lives for three seconds instead of ninety."""
    from gradsift.store import remote

    os.environ.update(json.loads(Path(errors).with_name("bucket.json").read_text()))
    remote._LEASE_SECONDS = 3.0
    run_in_process(arguments, errors)


@contextmanager
def bucket(folder: Path) -> Iterator[str | None]:
    """A bucket on a server of this process, on this machine alone; None where the packages are missing."""
    try:
        import s3fs  # noqa: F401
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield None
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    (folder / "bucket.json").write_text(json.dumps(names))  # for processes whose server was started before
    os.environ.update(names)
    from gradsift.store.remote import RemoteStorage

    RemoteStorage("s3://faults")._fs.mkdir("faults")
    yield "s3://faults"
    server.stop()


def buckets(bench: Bench, jobs: list[Job], kills: int) -> None:
    """Two writers of one run in a bucket, the first stopped beyond its lease, or killed."""
    from gradsift.store.remote import RemoteStorage

    job, generator = jobs[0], random.Random(bench.seed + 7)
    with bucket(bench.work) as place:
        if place is None:
            print("without s3fs and moto there are no buckets: pip install 'gradsift[s3]' 'moto[s3,server]'")
            return
        for number, ends in enumerate(("stopped", "killed", "killed")):
            out = bench.work / f"bucket-{number}"
            url = f"{place}/{out.name}"
            arguments = [url if part == str(out) else part for part in job.arguments(out)]
            storage = RemoteStorage(url)
            first = bench.start(arguments, out, _short_lease)
            wanted = int(job.files * generator.uniform(0.2, 0.7))
            while len(storage.list("")) < wanted:
                assert first.is_alive(), bench.errors(out).read_text()
                time.sleep(0.05)
            os.kill(first.pid, signal.SIGSTOP if ends == "stopped" else signal.SIGKILL)
            if ends == "stopped":
                time.sleep(1.2)
            else:
                first.join()
            second = bench.run(arguments, bench.work / f"{out.name}-second", _short_lease)
            note = ""
            if ends == "stopped":
                os.kill(first.pid, signal.SIGCONT)
                ended = bench.ended(first, out)
                note = f"; the first then: exit {ended.code}, {ended.said}"
                right = ended.code == 1 and ended.clean and "taken the run over" in ended.said
            else:
                right = True
            found = RemoteStorage(url, copies=bench.work / f"{out.name}-found")
            for key in found.list(""):
                found.local(key)
            wrong = differing(job.wanted, content_of(found.copies.rename(out))) + ["lock"] * storage.exists("lock")
            differs = f", DIFFERS: {wrong[:4]}" if wrong else ""
            happened = f"the second: exit {second.code}{tidy(note, bench)}{differs}"
            fault = f"in a bucket, {job.name} {ends} after {wanted} of {job.files} objects, and typed again"
            bench.record(Outcome("buckets", fault, happened, not wrong and second.code == 0 and right))


def interrupt_at_start(bench: Bench, jobs: list[Job], kills: int) -> None:
    """SIGINT to `python -m gradsift` while it imports its libraries."""
    out = bench.work / "early"
    for seconds in (0.05, 0.15, 0.3, 1.0, 3.0):
        command = [sys.executable, "-m", "gradsift", *jobs[0].arguments(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=120)[1]
        ended = Ended(process.returncode, text)
        # Before the interpreter runs any of our code, it is Python's own to say something.
        right = (ended.code == 130 and ended.clean) or (ended.code != 0 and "/gradsift/" not in text)
        bench.record(
            Outcome("interrupt", f"SIGINT {seconds} s after the start", f"exit {ended.code}, {ended.said!r}", right)
        )


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def disk_full(bench: Bench, jobs: list[Job], kills: int) -> None:
    """A file system that fills up; with more room, the same command goes on."""
    for job in jobs if os.geteuid() == 0 else []:
        pages = sum(-(-path.stat().st_size // 4096) for path in job.whole.rglob("*") if path.is_file())
        for share in (0.02, 0.2, 0.4, 0.6, 0.8) if job is jobs[0] else (0.5, 0.9):
            disk = bench.work / "disk"
            with small_disk(disk, f"{max(1, int(share * pages)) * 4}k"):
                out = disk / "run"
                ended = bench.run(job.arguments(out), out)
                at, had = stage_of(out) if out.exists() else "start", complete(out) if out.exists() else {}
                left = [path.name for path in disk.rglob(".tmp-*")]
                remount(disk, "size=64m")
                note, equal, kept = bench.again(job, out, had)
            right = ended.code == 1 and ended.clean and "the disk is full" in ended.said and not left
            happened = note or f"exit {ended.code}, {tidy(ended.said, bench)}" + (f", left {left}" if left else "")
            fault = f"disk full under {job.name} at {share:.0%} of its size, after writing {at}"
            bench.record(Outcome("disk", fault, happened, equal and right, kept, len(had)))


def read_only(bench: Bench, jobs: list[Job], kills: int) -> None:
    """A run folder on a file system that is read-only, before the run and after it."""
    job, disk = jobs[0], bench.work / "disk"
    for name in ("an empty folder", "a finished run") if os.geteuid() == 0 else ():
        with small_disk(disk, "64m"):
            out = disk / "run"
            if name == "a finished run":
                shutil.copytree(job.whole, out)
                before = content_of(out)
            else:
                before = {}
            remount(disk, "ro")
            ended = bench.run(job.arguments(out), out)
            equal = (content_of(out) if out.exists() else {}) == before
        right = ended.code == 1 and ended.clean and "read-only" in ended.said.lower()
        bench.record(
            Outcome("disk", f"read-only: {name}", f"exit {ended.code}, {tidy(ended.said, bench)}", equal and right)
        )


def tidy(text: str, bench: Bench) -> str:
    return re.sub(r"\b[0-9a-f]{16}\b", "…", text.replace(str(bench.work), "OUT"))


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    """One bit, in the midst of it; an empty file gets a line break."""
    if not data:
        return b"\n"
    place = len(data) * 2 // 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _reshape(data: bytes) -> bytes:
    """A well-formed record whose fields are of other types."""
    content = json.loads(data)
    return json.dumps(dict.fromkeys([key for key in content if key != "_digest"], 5)).encode()


DAMAGES = {_truncate: "cut in half", _flip: "one bit flipped", _reshape: "with every field a 5"}


def kinds_of(job: Job) -> dict[str, list[str]]:
    """The files of a run by what they are; of each kind one is altered."""
    kinds: dict[str, list[str]] = {}
    for key in job.wanted:
        kind = re.sub(r"\b[0-9a-f]{16}\b", "…", key)
        kind = re.sub(r"\d{5,}", "N", kind)
        kind = re.sub(r"epoch-\d", "epoch-N", kind)
        if re.match(r"(evaluations|explanations|ratings)/…/[0-9a-f]{16,}", kind):
            kind = kind.rsplit("/", 1)[0] + "/…"
        kinds.setdefault(kind, []).append(key)
    return kinds


def altered(bench: Bench, jobs: list[Job], kills: int) -> None:
    """Every kind of file of a finished run cut in half, or with one bit flipped; then the same command."""
    generator = random.Random(bench.seed + 3)
    seen: set[str] = set()
    for job in jobs:
        for kind, keys in kinds_of(job).items():
            if kind in seen:
                continue
            seen.add(kind)
            for damage, name in DAMAGES.items():
                key = generator.choice(keys)
                if damage is _reshape and not key.endswith(".json"):
                    continue
                out = bench.work / "altered"
                shutil.copytree(job.whole, out)
                data = damage((out / key).read_bytes())
                (out / key).write_bytes(data)
                ended = bench.run(job.arguments(out), out)
                happened, equal = mended(bench, job, out, key, ended)
                bench.record(Outcome("altered", f"{kind} {name}", tidy(happened, bench), equal))
                shutil.rmtree(out)


def altered_together(bench: Bench, jobs: list[Job], kills: int) -> None:
    """One file of every kind at once; run.json and rewards, which end with a message and a remedy, are left out."""
    generator = random.Random(bench.seed + 4)
    for job in jobs:
        kinds = {kind: keys for kind, keys in kinds_of(job).items() if kind != "run.json" and "/reward-" not in kind}
        for damage, name in ((_truncate, "cut in half"), (_flip, "one bit flipped")):
            out = bench.work / "together"
            shutil.copytree(job.whole, out)
            for keys in kinds.values():
                path = out / generator.choice(keys)
                path.write_bytes(damage(path.read_bytes()))
            ended = bench.run(job.arguments(out), out)
            wrong = differing(job.wanted, content_of(out))
            unread = [key for key in wrong if re.fullmatch(r"gradients/.*\.json", key)]  # of complete stores
            told = sum("altered" in line or "damaged" in line for line in ended.text.splitlines())
            wrong = [key for key in wrong if key not in unread]
            happened = f"exit {ended.code}, told in {told} lines" + (f", DIFFERS: {wrong[:4]}" if wrong else ", mended")
            happened += "" if ended.code == 0 else f" {ended.said}"
            fault = f"{job.name}: a file of each of {len(kinds)} kinds {name}, all at once"
            bench.record(Outcome("altered", fault, tidy(happened, bench), not wrong and ended.code == 0))
            shutil.rmtree(out)


def mended(bench: Bench, job: Job, out: Path, key: str, ended: Ended) -> tuple[str, bool]:
    """What came of an altered file; where the message says to delete something, that is done first."""
    if not ended.clean:
        return f"exit {ended.code}, {ended.said}", False
    if ended.code == 0:
        wrong = differing(job.wanted, content_of(out))
        if wrong == [key] and re.fullmatch(r"(gradients|checks)/.*\.json", key):
            return "not read, as the store is complete", True
        said = [line for line in ended.text.splitlines() if Path(key).stem.split(".")[0] in line or "damaged" in line]
        told = "mended, and said so" if said or "truncated or altered" in ended.text else "mended"
        return (f"DIFFERS silently: {', '.join(wrong[:5])}", False) if wrong else (told, True)
    happened = f"exit 1, {ended.said}"
    if str(out / key) not in ended.said and str((out / key).parent) not in ended.said:
        return happened + " (the file is not named)", False
    if "delete its folder" in ended.said or "delete that folder" in ended.said:
        shutil.rmtree((out / key).parent)
    elif "delete it" in ended.said:
        (out / key).unlink()
    else:
        return happened + " (no remedy)", False
    again = bench.run(job.arguments(out), out)
    if again.code != 0:
        return f"{happened}; then exit {again.code}, {again.said}", False
    wrong = differing(job.wanted, content_of(out))
    return f"{happened}; then {'DIFFERS ' + str(wrong[:3]) if wrong else 'equal'}", not wrong


def _clock_at(offset: float, arguments: list[str], errors: str) -> None:
    real = time.time
    time.time = lambda: real() + offset  # type: ignore[assignment]
    gmtime = time.gmtime
    time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)  # type: ignore[assignment]
    run_in_process(arguments, errors)


def _clock_ahead(arguments: list[str], errors: str) -> None:
    _clock_at(86_400 * 365, arguments, errors)


def _clock_behind(arguments: list[str], errors: str) -> None:
    _clock_at(-86_400 * 365 * 40, arguments, errors)


def clock(bench: Bench, jobs: list[Job], kills: int) -> None:
    """A run that begins a year ahead, is killed, and goes on forty years back; files dated in the future, too."""
    for job in jobs:
        out = bench.work / "clock"
        process = bench.start(job.arguments(out), out, _clock_ahead)
        bench.until(process, out, job.files // 2)
        process.kill()
        process.join()
        ahead = time.time() + 86_400 * 365
        for path in out.rglob("*"):
            os.utime(path, (ahead, ahead))
        had = complete(out)
        ended = bench.run(job.arguments(out), out, _clock_behind)
        wrong = differing(job.wanted, content_of(out))
        happened = f"exit {ended.code}" + (f", differs: {wrong[:3]}" if wrong else f", {len(had)} complete files kept")
        bench.record(
            Outcome("clock", f"{job.name}: the clock goes back 41 years", happened, not wrong, not lost(had, out))
        )
        shutil.rmtree(out)


def crowded(bench: Bench, jobs: list[Job], kills: int) -> None:
    """A second process on a run that another works on, alive, stopped and dead."""
    job, out = jobs[0], bench.work / "crowded"
    process = bench.start(job.arguments(out), out)
    bench.until(process, out, job.files // 3)
    os.kill(process.pid, signal.SIGSTOP)
    beside = bench.work / "second.err"
    second = bench.context.Process(target=run_in_process, args=(job.arguments(out), str(beside)))
    second.start()
    second.join(120)
    text = beside.read_text().strip()
    right = second.exitcode == 1 and "another process works on" in text and "Traceback" not in text
    bench.record(
        Outcome(
            "two processes",
            "a second command while the first is at work",
            f"exit {second.exitcode}, {tidy(text, bench)}",
            right,
        )
    )
    process.kill()
    process.join()
    had = complete(out)
    note, equal, kept = bench.again(job, out, had)
    bench.record(
        Outcome(
            "two processes",
            "the first is killed, the lock file stays",
            note or "the next command goes on",
            equal,
            kept,
            len(had),
        )
    )
    shutil.rmtree(out)


def swapped(bench: Bench, jobs: list[Job], kills: int) -> None:
    """Inputs that are replaced under a run: the pool between and during commands, an adapter during one."""
    job, out = jobs[0], bench.work / "swapped"
    own, other = bench.work / "own.parquet", bench.work / "other.parquet"
    rows = pool_rows(ROWS)
    pq.write_table(pa.Table.from_pylist(rows), own)
    changed = [{**row, "messages": [row["messages"][0], {"role": "assistant", "content": "no"}]} for row in rows]
    pq.write_table(pa.Table.from_pylist(changed), other)
    at = bench.work / "pool.parquet"
    shutil.copy(own, at)
    whole = bench.work / "swapped-whole"
    bench.run(bench.select(whole, pool=str(at)), whole).checked()
    parquet = Job("select", lambda folder: bench.select(folder, pool=str(at)), content_of(whole), whole)

    process = bench.start(parquet.arguments(out), out)
    bench.until(process, out, job.files // 2)
    process.kill()
    process.join()
    had = complete(out)
    shutil.copy(other, at)
    ended = bench.run(parquet.arguments(out), out)
    shutil.copy(own, at)
    note, equal, kept = bench.again(parquet, out, had)
    right = ended.code == 1 and "belongs to another run: its pool is" in ended.said
    happened = note or f"exit {ended.code}, {tidy(ended.said, bench)}; with the old pool: equal"
    bench.record(Outcome("swapped", "another pool.parquet before going on", happened, equal and right, kept))
    shutil.rmtree(out)

    process = bench.start(parquet.arguments(out), out)
    bench.until(process, out, job.files // 3)
    shutil.copy(other, at)
    ended = bench.ended(process, out)
    shutil.copy(own, at)
    wrong = differing(parquet.wanted, content_of(out))
    happened = f"exit {ended.code}" + (f", differs: {wrong[:3]}" if wrong else ", the rows read at first are used")
    bench.record(Outcome("swapped", "another pool.parquet while it runs", happened, not wrong and ended.code == 0))
    shutil.rmtree(out)

    process = bench.start(parquet.arguments(out), out)
    bench.until(process, out, 3)
    process.kill()
    process.join()
    at.write_bytes(at.read_bytes()[:-400])
    ended = bench.run(parquet.arguments(out), out)
    shutil.copy(own, at)
    note, equal, kept = bench.again(parquet, out)
    right = ended.code == 1 and ended.clean and "pool.parquet" in ended.said
    happened = note or f"exit {ended.code}, {tidy(ended.said, bench)}; with the whole file: equal"
    bench.record(Outcome("swapped", "pool.parquet truncated before going on", happened, equal and right, kept))
    shutil.rmtree(out)

    first, second = (Path(adapter) for adapter in bench.world.adapters)
    adapter = bench.work / "adapter"
    shutil.copytree(first, adapter)
    given = Job("select", lambda folder: bench.select(folder, "--adapter", str(adapter)))
    whole = bench.work / "adapter-whole"
    bench.run(given.arguments(whole), whole).checked()
    given.wanted, given.whole = content_of(whole), whole
    process = bench.start(given.arguments(out), out)
    while not list(out.glob("gradients/*/shard-*.json")) and process.is_alive():
        time.sleep(0.002)
    for file in second.iterdir():
        shutil.copy(file, adapter / file.name)
    ended = bench.ended(process, out)
    had = complete(out)
    shutil.rmtree(adapter)
    shutil.copytree(first, adapter)
    note, equal, kept = bench.again(given, out, had)
    right = ended.clean and (ended.code == 1 or differing(given.wanted, content_of(out)) == [])
    happened = note or f"exit {ended.code}, {tidy(ended.said, bench)[:300]}; with the old adapter: equal"
    bench.record(
        Outcome(
            "swapped", "another adapter in its folder while gradients are collected", happened, equal and right, kept
        )
    )
    shutil.rmtree(out)

    for job in jobs:
        shutil.copytree(job.whole, out)
        folder = sorted(out.glob("checkpoints/*/epoch-1"))[0]
        other_epoch = folder.with_name("epoch-2")
        shutil.copy(other_epoch / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        ended = bench.run(job.arguments(out), out)
        key = (folder / "adapter_model.safetensors").relative_to(out).as_posix()
        happened, equal = mended(bench, job, out, key, ended)
        bench.record(
            Outcome(
                "swapped", f"{job.name}: the warm-up's adapter replaced by another one", tidy(happened, bench), equal
            )
        )
        shutil.rmtree(out)


def endpoint(bench: Bench, jobs: list[Job], kills: int) -> None:
    """An assistant on a server that is lost in the middle and comes back."""

    def write(body: dict[str, Any]) -> dict[str, Any]:
        number = zlib.crc32(json.dumps([body["messages"], body.get("seed")]).encode())
        return completion(f"it is {COLOURS[number % 8]}")

    def arguments(out: Path, url: str) -> list[str]:
        content = {
            "model": bench.world.model, "pool": bench.pool, "target": bench.prompts, "out": str(out), "max_length": 64,
            "device": "cpu", "warmup": WARMUP, "gradients": GRADIENTS, "budget": 6, "controls": [],
            "reward": {"kind": "regex", "pattern": "[rg]"},
            "estimator": {"kind": "nice", "assistant": {
                "model": {"kind": "endpoint", "model": "m", "base_url": url, "first_wait": 0.01, "longest_wait": 0.1,
                          "max_retries": 2, "timeout": 20, "concurrency": 1},
                "sampling": {"preset": "assisted", "samples": SAMPLES, "max_new_tokens": 16}}},
        }  # fmt: skip
        path = bench.work / "endpoint.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["run", str(path)]

    with serving(write) as server:
        port = server.port
        whole = bench.work / "endpoint-whole"
        bench.run(arguments(whole, server.url), whole).checked()
        asked = len(server.requests)
    url = f"http://127.0.0.1:{port}/v1"
    out = bench.work / "endpoint"
    with serving(*[write] * 9, lambda body: server.die() or completion("never heard"), port=port) as server:
        ended = bench.run(arguments(out, url), out)
    had = complete(out)
    with serving(write, port=port) as server:
        then = bench.run(arguments(out, url), out)
        missing = len(server.requests)
    wrong = differing(content_of(whole), content_of(out))
    right = ended.code == 1 and ended.clean and then.code == 0 and missing == asked - 9
    happened = f"exit {ended.code}, {tidy(ended.said, bench)}; then {missing} of {asked} requests" + (
        f", differs: {wrong[:3]}" if wrong else ", equal"
    )
    bench.record(
        Outcome("endpoint", "the server is lost after 9 answers", happened, not wrong and right, not lost(had, out))
    )


FAULTS: dict[str, list[Callable[[Bench, list[Job], int], None]]] = {
    "kill": [kill, killed_often],
    "interrupt": [interrupt, interrupt_at_start],
    "within": [within],
    "buckets": [buckets],
    "disk": [disk_full, read_only],
    "altered": [altered_together, altered],
    "clock": [clock],
    "two processes": [crowded],
    "swapped": [swapped],
    "endpoint": [endpoint],
}


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as markdown."""
    words = {True: "yes", False: "**no**", None: ""}
    lines = ["| fault | what happened | nothing complete lost | same result |", "|---|---|---|---|"]
    for outcome in outcomes:
        happened = outcome.happened.replace("|", "\\|")
        lines.append(f"| {outcome.fault} | {happened} | {words[outcome.kept]} | {words[outcome.equal]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    groups = given.only.split(",") if given.only else list(FAULTS)
    if unknown := set(groups) - set(FAULTS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    bench = Bench(given.out, given.seed)
    jobs = bench.jobs()
    for name in groups:
        for fault in FAULTS[name]:
            fault(bench, jobs, given.kills)
    bad = [row for row in bench.outcomes if row.bad]
    print(f"{len(bench.outcomes)} faults, {len(bad)} with a wrong end; {bench.path.with_suffix('.md')}")
    shutil.rmtree(bench.work)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
