"""RDS: the embedding control. Pool texts that mean what the target's texts mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from gradsift.context import Pool, Target
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.estimator import Estimator, Influence, conversations, refuse_too_many
from gradsift.model.embeddings import DEFAULT, embed, place_of, require
from gradsift.model.models import resolve_device, whole_identity
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run, revisions


class RDS(Estimator):
    """Cosine of the sentence embeddings of each pool text and each target text (NICE, App. D): higher = closer.

    model: hub id or folder of a sentence-transformers model. Such models read the first few hundred tokens of a text
        (all-MiniLM-L6-v2: 256).
    """

    takes: ClassVar[Literal["labels", "texts", "reward"]] = "texts"

    kind: Literal["rds"] = "rds"
    model: str = DEFAULT

    @property
    def label(self) -> str:
        return "RDS" if self.model == DEFAULT else f"RDS ({self.model})"

    @property
    def text_model(self) -> str:  # type: ignore[override]
        return self.model

    def inputs(self, pool: Pool) -> dict[str, Any]:
        return {**super().inputs(pool), "embedding": embedding_identity(self.model)}

    def preflight(self, pool: Pool, target: Target | None) -> None:
        """Whether the text model is there, too."""
        super().preflight(pool, target)
        embedding_identity(self.model)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        assert target is not None, self
        refuse_too_many(len(pool.data), len(target.data.ids))
        rows, queries = (
            kept_embeddings(
                pool.run, [conversation_text(messages) for messages in conversations(data)], self.model, pool.device
            )
            for data in (pool.data, target.data)
        )
        return Influence(list(pool.data.ids), rds_scores(rows, queries), identity={"stores": []})


def rds_scores(pool: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of embeddings `[text dim]` of any length, float32 `[pool target]`; the cosine with a zero row is 0.

    Example:
        >>> rds_scores(np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[3.0, -27.0**0.5]])).round(4).tolist()
        [[0.5], [0.0]]
    """
    return np.clip(_unit(pool) @ _unit(target).T, -1.0, 1.0).astype(np.float32)


def embedding_identity(model: str) -> dict[str, Any]:
    """What decides the embedding of a text, the revision of our own part included.

    Raises:
        ConfigError, ModelError: the package or the model is not there.
    """
    require()
    return {"model": whole_identity(place_of(model)), **revisions("embeddings")}


def kept_embeddings(run: Run, texts: Sequence[str], model: str, device: str = "auto") -> NDArray[np.float32]:
    """Embeddings `[text dim]`, kept in the run folder under the texts and the model."""
    require()
    config = _config(texts, model)
    prefix = run.prefix("embeddings", config)
    key = f"{prefix}rows.safetensors"
    if run.intact(prefix) is None:
        rows = embed(texts, model, device=resolve_device(device))
        run.storage.publish(key, save({"rows": np.ascontiguousarray(rows)}))
        run.complete(prefix, "embeddings", config, files=["rows.safetensors"])
        return rows
    return load(run.storage.read(key))["rows"]


def missing_embeddings(run: Run, texts: Sequence[str], model: str) -> int:
    """How many texts `kept_embeddings` would embed: all or none."""
    return 0 if run.manifest(run.prefix("embeddings", _config(texts, model))) is not None else len(texts)


def _config(texts: Sequence[str], model: str) -> dict[str, Any]:
    return {**embedding_identity(model), "texts": fingerprint(list(texts))}


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
