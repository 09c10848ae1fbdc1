"""A run is a folder. This module alone knows the names in it.

::

    run/
      run.json                  the model and pool this folder belongs to
      lock                      held by the process that works here; dies with it
      data/<fingerprint>/       tokenised pool or target, original rows, skipped rows
      checkpoints/<fingerprint>/epoch-N/   PEFT adapter, Adam moments, learning rate
      checks/<fingerprint>/     that hooks see the gradients of a model with an adapter of some form
      gradients/<fingerprint>/  gradient stores
      samples/<fingerprint>/    sampled responses and their rewards, a folder a prompt
      scores/<fingerprint>/     scores of one pool for one target and method
      ratings/<fingerprint>/    what a judge, a function or losses say of single rows
      embeddings/<fingerprint>/ sentence embeddings of texts
      maps/<fingerprint>.json   where rows lie on a page's map
      states/<fingerprint>/     hidden states of rows, one vector each
      candidates/<fingerprint>/  which rows a first method gives a second one to rank
      curvature/<fingerprint>/  the Hessian of a target's loss, times the sum of a pool
      kronecker/<fingerprint>/  a model's curvature in Kronecker factors, and targets through its inverse
      replays/<fingerprint>/    a training step by step, to go back through, and what was found on the way
      contrasts/<fingerprint>/  how much likelier a model finds the rejected answers of preference pairs
      outputs/<fingerprint>/    what the model answered to prompts that were to be explained
      products/<fingerprint>/   inner products of an output's whole gradient and its candidates'
      explanations/<fingerprint>/   explanations, one file an output
      matches/<fingerprint>/    which tokens of chosen examples match an output's, one file an example
      validation/<fingerprint>/ effects of training steps on selections
      evaluations/<fingerprint>/    figures of one metric for one model, and verdicts that were paid for
      times/<fingerprint>.json  what the stages of comparisons took
      scores.parquet selected.jsonl skipped.jsonl explanations.jsonl explanations.parquet relevance.json validation.json
      dropped.jsonl suggestions.jsonl responses.jsonl rewards.json diagnostics.json training.json evaluation.json
      mixture.json
      comparison.json comparison.parquet comparison.html   (comparison.page.json: what the page is made from)
      report.html explanation.html summary.json   the latest results

Artifacts are addressed by the fingerprint of everything they depend on, the revision of their computation included, so
equal requests find them again and different requests never meet.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gradsift.base.errors import CorruptError, MismatchError, StorageError
from gradsift.base.progress import Reporter
from gradsift.store.manifest import (
    Manifest,
    Record,
    differences,
    fingerprint,
    manifest,
    publish_json,
    read_if_whole,
    read_json,
)
from gradsift.store.remote import RemoteStorage, is_url, storage_at
from gradsift.store.storage import LocalStorage, Storage, checksum_file, publish_parquet

REVISIONS = {
    "labels": 2,  # a chat template's token ids and labels, in its fingerprint
    "data": 1,
    "checkpoints": 1,
    "checks": 1,
    "gradients": 2,
    "samples": 2,
    "rewards": 2,  # of responses, kept beside them
    "scores": 2,
    "ratings": 1,
    "embeddings": 1,
    "states": 1,
    "candidates": 1,
    "curvature": 2,
    "kronecker": 2,
    "replays": 1,
    "contrasts": 1,
    "descents": 3,  # the second choice is of the training on all rows
    "outputs": 2,
    "matches": 1,
    "explanations": 3,  # what supports an output leads towards it, and what is against it away
    "products": 1,
    "validation": 2,
    "evaluations": 2,
    "times": 1,
    "merge": 2,  # an adapter merged into its base, in a folder of the user's
}
"""Revision of each kind's computation: raise it when the same inputs come to give other results.

It is part of the kind's fingerprint, and so of all that is made from it; at 1 it is left out."""


def revised(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an artifact with the revision of its kind."""
    assert kind in REVISIONS, f"{kind} is no kind of artifact: it needs a revision in REVISIONS"
    return dict(config) if REVISIONS[kind] == 1 else {**config, "revision": REVISIONS[kind]}


def revisions(*kinds: str) -> dict[str, Any]:
    """The revisions of kinds that something is made from, for a configuration that names them in no other way."""
    raised = {kind: REVISIONS[kind] for kind in kinds if REVISIONS[kind] > 1}
    return {"revisions": raised} if raised else {}


def _pool_differences(kept: Mapping[str, Any] | None, made: Mapping[str, Any] | None) -> list[str]:
    """What two pools' manifests say that they differ in: how they were read, and what was read."""
    if kept is None or made is None:
        return ["its pool is another one"]
    settings, before, now = made["settings"], kept["config"], made["config"]
    found = differences(kept.get("settings", settings), settings)
    if not found and before.get("template") != now["template"]:
        found = ["its pool was written by another chat template, or read with another max_length or supervise"]
    if before.get("content") != now["content"] or before.get("skipped") != now["skipped"]:
        found.append(f"its pool is {kept.get('description')}, wanted {made['description']}, whose rows are others")
    return found or ["its pool was read by another version of gradsift"]


class Run:
    """The folder of one model and one pool; any number of targets and methods.

    Args:
        folder: created when first written to; or a URL such as `s3://bucket/runs/math`.

    Attributes:
        place: the folder or URL, as it was given.
        folder: the folder; for a URL, that of its copies on this machine.
    """

    def __init__(self, folder: str | Path) -> None:
        self.storage: Storage
        if is_url(folder):
            self.storage = storage_at(str(folder))
            self.place, self.folder = self.storage.url, self.storage.copies
            return
        self.place, self.folder = str(folder), Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(f"{self.folder} is a file: --out needs a folder")
        self.storage = LocalStorage(self.folder)

    def __repr__(self) -> str:
        return f"Run({self.place!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return run_at, (self.address, self.storage.claim)

    @property
    def address(self) -> str:
        """The place, for another process, which may work in another folder."""
        return self.place if is_url(self.place) else str(self.folder.absolute())

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process; it is free again when the process ends, however it ends.

        Raises:
            LockedError: another process works here.
            StorageError: the folder cannot be made or written.
        """
        return self.storage.lock()

    def bind(self, identity: Mapping[str, Any]) -> None:
        """Tie the folder to a model and a pool, or refuse others (`MismatchError`, which names what differs)."""
        self.refuse_other(identity)
        if not self.storage.exists("run.json"):
            publish_json(self.storage, "run.json", manifest("run", identity), sealed=True)

    def refuse_other(self, identity: Mapping[str, Any], made: Mapping[str, Any] | None = None) -> None:
        """Refuse a folder that is tied to another model and pool than it is wanted for, before anything is written to
        it.

        `made` is what the manifest of that pool says, so that settings and rows are told apart.

        Raises:
            MismatchError: the message names what differs.
        """
        if not self.storage.exists("run.json"):
            return
        own = self.identity()
        changed = differences({**own, "pool": None}, {**identity, "pool": None})
        spared = not changed and self.artifacts("checkpoints")
        if own.get("pool") != identity.get("pool"):
            changed += _pool_differences(self.data_of(own.get("pool")), made)
        if changed:
            then = (
                f" (with --adapter {self.place}/checkpoints/… for each of its checkpoints, no warm-up is needed there)"
            )
            raise MismatchError(
                f"{self.place} belongs to another run: {'; '.join(changed)}. Give the same, or another --out"
                + then * bool(spared)
            )

    def data_of(self, made: Any) -> dict[str, Any] | None:
        """The manifest of a data set of this run, by its fingerprint."""
        keys = [key for key in self.storage.list("data/") if key.endswith("/manifest.json")]
        found = (read_if_whole(self.storage, key, Manifest) for key in keys)
        return next((one for one in found if one is not None and one.get("fingerprint") == made), None)

    def identity(self) -> dict[str, Any]:
        """What `bind` recorded."""
        if not self.storage.exists("run.json"):
            raise StorageError(f"{self.place} is not a run folder (no run.json): give the --out of an earlier command")
        try:
            config: dict[str, Any] = read_json(self.storage, "run.json", Manifest)["config"]
        except CorruptError as error:
            raise CorruptError(
                f"{self.name('run.json')} is damaged: delete it, this one file, and run the same command again, which "
                "writes it anew and finds everything else"
            ) from error
        return config

    def prefix(self, kind: str, config: Mapping[str, Any]) -> str:
        """Where the artifact of this kind and configuration lives: `gradients/3f2ab1c09d8e7f65/`."""
        return f"{kind}/{fingerprint({'kind': kind, **revised(kind, config)})}/"

    def manifest(self, prefix: str, shape: type[Record] = Manifest) -> dict[str, Any] | None:
        """The manifest of a complete artifact, or None where it is not complete.

        A damaged manifest, or one without what its kind has, counts as none: the artifact is completed again, from
        whatever of it is there.
        """
        return read_if_whole(self.storage, f"{prefix}manifest.json", shape)

    def intact(
        self, prefix: str, reporter: Reporter | None = None, shape: type[Record] = Manifest
    ) -> dict[str, Any] | None:
        """As `manifest`, and None where a file is missing or altered whose checksum it has; the reporter is told.

        Manifests have the checksums of the files that `complete` was told of. What is altered is deleted, so that who
        makes the artifact again need only look at which files are there.
        """
        content = self.manifest(prefix, shape)
        if content is None:
            if reporter is not None and self.storage.exists(f"{prefix}manifest.json"):
                reporter.warn(
                    f"{self.name(f'{prefix}manifest.json')} is truncated or altered: making what it describes again"
                )
            return None
        altered = [n for n, digest in content.get("files", {}).items() if not self.unaltered(f"{prefix}{n}", digest)]
        for name in altered:
            if reporter is not None:
                reporter.warn(f"{self.name(f'{prefix}{name}')} is missing, truncated or altered: making it again")
            self.storage.delete(f"{prefix}{name}")
        return None if altered else content

    def complete(
        self, prefix: str, kind: str, config: Mapping[str, Any], *, files: Iterable[str] = (), **content: Any
    ) -> None:
        """Write an artifact's manifest, with checksums of the files named: the last thing that is written of it."""
        if files:
            content["files"] = self.checksums(prefix, files)
        described = manifest(kind, revised(kind, config), **content)
        publish_json(self.storage, f"{prefix}manifest.json", described, sealed=True)

    def checksums(self, prefix: str, names: Iterable[str]) -> dict[str, str]:
        """Checksums of files, by their names below the prefix."""
        return {name: checksum_file(self.path(f"{prefix}{name}")) for name in names}

    def unaltered(self, key: str, digest: str) -> bool:
        """Whether a file is there with this checksum."""
        return self.storage.exists(key) and checksum_file(self.path(key)) == digest

    def artifacts(self, kind: str) -> list[str]:
        """Prefixes of the complete artifacts of a kind."""
        keys = self.storage.list(f"{kind}/")
        return [key.removesuffix("manifest.json") for key in keys if key.endswith("/manifest.json")]

    def path(self, key: str) -> Path:
        """A file of the run on this machine, a copy of it where the run lies elsewhere."""
        return self.storage.local(key)

    def name(self, key: str) -> str:
        """The path or URL of a file or folder of the run."""
        return self.storage.name(key)

    def publish_text(self, key: str, text: str) -> Path:
        """Publish a text file and return its path."""
        self.storage.publish(key, text.encode())
        return self.storage.local(key)

    def publish_parquet(self, key: str, tables: Iterable[Any]) -> Path:
        """Publish pyarrow tables, one below the other, as a parquet file and return its path."""
        publish_parquet(self.storage, key, tables)
        return self.storage.local(key)

    def publish_json(self, key: str, value: Mapping[str, Any], *, sealed: bool = False) -> Path:
        """Publish a JSON file and return its path; a sealed one is for `read_json`, which finds it altered."""
        publish_json(self.storage, key, value, sealed=sealed)
        return self.storage.local(key)


def run_at(address: str, claim: str | None = None) -> Run:
    """The run of another process, which is somewhere already; `claim` is by what that one holds it."""
    if not is_url(address) and not Path(address).is_dir():
        raise StorageError(
            f"{address} is not on {socket.gethostname()}, where a worker runs: give an --out that all nodes see, on a "
            "shared file system or in a bucket (s3://…)"
        )
    run = Run(address)
    if isinstance(run.storage, RemoteStorage):
        run.storage = RemoteStorage(address, claim=claim)
    return run
