"""How many of a row's nearest neighbours are its neighbours on a map: `python benchmarks/maps.py`.

The rows are sentence embeddings of the demo's pool, compared by cosine; the map is `gradsift.report.maps.layout`,
beside two principal components alone. Needs the extra `embeddings` and its model.

"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gradsift.model import embeddings
from gradsift.report.maps import _principal_components, layout

POOL = Path(__file__).parents[1] / "src" / "gradsift" / "demo" / "data" / "pool.jsonl"
NEAREST = 10


def nearest(alike: np.ndarray) -> np.ndarray:
    """The ten largest of each row [row row], itself left out."""
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1)[:, :NEAREST]


def main() -> None:
    rows = [json.loads(line) for line in POOL.read_text(encoding="utf-8").splitlines()]
    texts = ["\n\n".join(message["content"] for message in row["messages"]) for row in rows]
    found = np.asarray(embeddings.embed(texts, embeddings.DEFAULT), dtype=np.float64)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    wanted = nearest(unit @ unit.T)
    for name, places in (("t-SNE", np.array(layout(found))), ("two components", _principal_components(found)[:, :2])):
        near = nearest(-np.linalg.norm(places[:, None] - places[None], axis=2))
        kept = [len(set(a) & set(b)) / NEAREST for a, b in zip(wanted, near, strict=True)]
        error = np.std(kept, ddof=1) / np.sqrt(len(kept))
        print(f"{name}: {np.mean(kept):.3f} ± {error:.3f} of the {NEAREST} nearest of {len(rows)} rows")


if __name__ == "__main__":
    main()
