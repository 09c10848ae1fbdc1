"""What a projection does to cosines, rankings, explanations and estimators, against rows that are not projected.

    python benchmarks/projection.py --out runs/projection                    all of it; goes on where it was stopped
    python benchmarks/projection.py --out runs/projection --parts cosines    one part

- cosines: the demo model with LoRA (rank 8 on q, k, v and o), 48 rows of ../shared/data/pool.jsonl and 16 targets of at
  most 128 tokens, at an adapter of 8 steps and at one of 120. Root mean square errors of cosines times √k, over pairs
  and draws of the projection; Spearman's correlation of LESS's scores with those of unprojected rows; and how many
  choices of three examples are above 0 dB, as they are reported and with unprojected rows.
- estimators: the small world of datamodel.py (160 rows, 32 targets, 10,240 gradient entries): Spearman's correlation of
  each estimator's scores with those from unprojected rows, by numbers of dimensions.

`whole`: all modules in the same columns. `proportional`: columns of its own for each module, by its size. `energy`: the
same, by its mean share of the squared norm in 8 of the pool's rows of that view, with 5 % by its size. `equal`: the
same for all.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datamodel import DATA, make_world
from numpy.typing import NDArray
from torch import Tensor

from gradsift import Gradients, Pool, Projection, Reporter, Training, open_pool, open_target, train_on
from gradsift.base.ranks import spearman
from gradsift.demo.model import demo_model
from gradsift.explanation.explain import ALL_STRATEGIES
from gradsift.explanation.relevance import selection_relevance
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.projection import Projector, Segment, plan_segments
from gradsift.influence.datainf import datainf_scores, projected_inverse_scores
from gradsift.influence.less import less_scores
from gradsift.influence.trak import trak_scores
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import choose_all
from gradsift.store.gradient_store import GradientStore
from gradsift.warmup.checkpoint import Checkpoint

Array = NDArray[np.float64]
Shapes = dict[str, tuple[int, int]]

LONGEST = 128  # tokens
ROWS, TARGETS, TRAINED = 48, 16, 320
FEW = Training(epochs=1, rank=8, alpha=16, learning_rate=2e-5, batch_size=4)
MANY = Training(epochs=3, rank=8, alpha=16, learning_rate=5e-4, batch_size=8)
PROFILED, FLOOR = 8, 0.05
BUDGET = 3  # examples of an explanation
DIMS = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/projection")
    parser.add_argument("--parts", nargs="*", default=["cosines", "estimators"])
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=8, help="draws of the projection")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)
    parts: dict[str, Callable[[], tuple[Any, str]]] = {
        "cosines": partial(cosines, out, args.dim, args.seeds),
        "estimators": partial(estimators, out, args.seeds),
    }
    for part in args.parts:
        found, text = parts[part]()
        print(f"\n{text}", flush=True)
        (out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class Unprojected:
    """Rows of a pool and of targets, float64 `[row entry]`, whose entries lie in modules of these shapes."""

    shapes: Shapes
    plain: Tensor
    adam: Tensor
    target: Tensor
    losses: Tensor
    target_losses: Tensor

    def by_module(self, rows: Tensor) -> dict[str, Tensor]:
        """`[row out in]` of each module."""
        parts = rows.split([out * inp for out, inp in self.shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def shares(self, rows: Tensor) -> Array:
        """Mean over rows of each module's share of the squared norm."""
        squares = torch.stack([part.flatten(1).square().sum(1) for part in self.by_module(rows).values()], dim=1)
        return np.asarray((squares / squares.sum(1, keepdim=True)).mean(0))


def unprojected(pool: Pool, checkpoint: Checkpoint, targets: SequenceSource) -> Unprojected:
    """What the run folder holds, or what is collected now."""
    pool = replace(pool, gradients=Gradients(projection=Projection(kind="none"), dtype="float32"))
    stores = pool.stores(checkpoint, ["plain", "adam"])
    of_targets = pool.collect(targets, checkpoint, ["plain"], what="target")["plain"]
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in of_targets.config["segments"]}

    def rows(store: GradientStore) -> Tensor:
        return store.rows(0, len(store)).double()

    return Unprojected(
        shapes, rows(stores["plain"]), rows(stores["adam"]), rows(of_targets), stores["plain"].losses, of_targets.losses
    )


# --- projections --------------------------------------------------------------------------------------------------


def projector(known: Unprojected, sizes: str, dim: int, seed: int, of: Tensor, kind: str = "sparse") -> Projector:
    """Of the sizes that the projection knows, or by shares; `of` are the pool's rows that `energy` is measured on."""
    if sizes in ("whole", "proportional"):
        projection = Projection(kind=kind, dim=dim, sizes=sizes, seed=seed)  # type: ignore[arg-type]
        dtype = torch.float32 if kind == "rademacher" else torch.float64
        return Projector(plan_segments(known.shapes, projection), projection, dtype=dtype)
    full = np.array([out * inp for out, inp in known.shapes.values()])
    shares = {
        "equal": np.ones(len(full)) / len(full),
        "energy": (1 - FLOOR) * known.shares(of[:PROFILED]) + FLOOR * full / full.sum(),
    }[sizes]
    segments, start = [], 0
    for (name, (out, inp)), size in zip(known.shapes.items(), divided(shares, full, dim), strict=True):
        segments.append(Segment(name, start, start + size, out, inp))
        start += size
    return Projector(tuple(segments), Projection(dim=start, seed=seed), dtype=torch.float64)


def divided(shares: Array, full: NDArray[np.int64], dim: int) -> list[int]:
    """`dim` by shares, no module getting more than it has; what it would is shared among the others."""
    sizes, left = np.zeros(len(full)), np.ones(len(full), dtype=bool)
    while True:
        sizes[left] = (dim - full[~left].sum()) * shares[left] / shares[left].sum()
        above = left & (sizes >= full)
        if not above.any():
            return [max(1, round(size)) for size in sizes]
        sizes[above], left = full[above], left & ~above


def projected(known: Unprojected, one: Projector, *rows: Tensor) -> SequenceABC[Tensor]:
    """All at once: a dense matrix takes longer to draw than to multiply by."""
    return one.apply(known.by_module(torch.cat(rows))).double().split([len(part) for part in rows])


# --- cosines ------------------------------------------------------------------------------------------------------


def cosines(out: Path, dim: int, seeds: int) -> tuple[dict[str, Any], str]:
    """Errors, rankings and explanations at both adapters."""
    pool, targets = demo_rows(out)
    trainings = {
        "8 steps": (pool.data.ids[:32], FEW),
        "120 steps": (pool.data.ids[ROWS : ROWS + TRAINED], MANY),
    }
    measured = replace(pool, data=pool.data.subset(list(range(ROWS))))
    tables: dict[str, Any] = {}
    lines: list[str] = []
    for name, (ids, training) in trainings.items():
        checkpoint = train_on(pool, ids, training).checkpoint
        known = unprojected(measured, checkpoint, targets)
        found = tables[name] = at_adapter(known, dim, seeds)
        lines += [*cosine_markdown(name, known, found), ""]
    return tables, "\n".join(lines)


def demo_rows(out: Path) -> tuple[Pool, SequenceSource]:
    """Rows to measure first, then rows to train on; and targets of every kind."""

    def short(files: Iterable[Path], count: int, seed: int) -> list[dict[str, Any]]:
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        random.Random(seed).shuffle(rows)
        return [row for row in rows if 40 < sum(len(message["content"]) for message in row["messages"]) < 420][:count]

    pool = open_pool(
        short([DATA], 400, seed=0),
        model=str(demo_model()),
        out=str(out / "demo"),
        max_length=LONGEST,
        device="cpu",
        reporter=Reporter(quiet=False),
    )
    kinds = ("math", "code", "instruction", "sentiment")
    files = [DATA.parent / f"target_{kind}_validation.jsonl" for kind in kinds]
    return pool, open_target(short(files, TARGETS, seed=1), pool).data


PAIRS = ("plain · plain", "Adam · Adam", "plain · target", "Adam · target")


def at_adapter(known: Unprojected, dim: int, seeds: int) -> dict[str, Any]:
    """Every form's errors, correlations and shares, each a list over draws."""
    found: dict[str, Any] = {
        form: gathered(measures(known, form, dim, seed) for seed in range(seeds))
        for form in ("whole", "proportional", "energy")
    }
    found["rademacher"] = gathered([measures(known, "whole", dim, 0, kind="rademacher")])
    for sizes in ("whole", "proportional"):
        found[f"kronecker, {sizes}"] = gathered(plain_alone(known, sizes, dim, seed) for seed in range(seeds))
    # Of rounding alone: what unprojected rows lose.
    found["rounding"] = {
        name: errors(known.plain, known.target, known.plain.to(dtype).double(), known.target.to(dtype).double())
        for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
    }
    return found


def gathered(draws: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for draw in draws:
        for name, value in draw.items():
            found[name].append(value)
    return dict(found)


def measures(known: Unprojected, sizes: str, dim: int, seed: int, kind: str = "sparse") -> dict[str, float]:
    """Of one draw: errors times √k of each kind of pair, Spearman's correlations, shares above 0 dB."""
    of_plain = projector(known, sizes, dim, seed, known.plain, kind)
    of_adam = projector(known, sizes, dim, seed, known.adam, kind) if sizes == "energy" else of_plain
    plain, target, adam = projected(known, of_plain, known.plain, known.target, known.adam)
    beside = target
    if of_adam is not of_plain:
        adam, beside = projected(known, of_adam, known.adam, known.target)
    own = errors(known.plain, known.target, plain, target)
    adams = errors(known.adam, known.target, adam, beside)
    values = [own["itself"], adams["itself"], own["target"], adams["target"]]
    found = {pair: value * dim**0.5 for pair, value in zip(PAIRS, values, strict=True)}
    found["LESS"] = agreement(less_scores([adam], [beside]), less_scores([known.adam], [known.target]))
    found["LESS (SGD)"] = agreement(less_scores([plain], [target]), less_scores([known.plain], [known.target]))
    return found | signs(known, plain, target)


def plain_alone(known: Unprojected, sizes: str, dim: int, seed: int) -> dict[str, float]:
    """As `measures`, for a projection that takes no Adam rows."""
    one = projector(known, sizes, dim, seed, known.plain, "kronecker")
    found = errors(known.plain, known.target, *projected(known, one, known.plain, known.target))
    return {"plain · plain": found["itself"] * dim**0.5, "plain · target": found["target"] * dim**0.5}


def errors(rows: Tensor, targets: Tensor, stored: Tensor, stored_targets: Tensor) -> dict[str, float]:
    """Root mean square error of cosines, of different rows and of rows with targets."""

    def unit(parts: Tensor) -> Tensor:
        return parts / parts.norm(dim=1, keepdim=True)

    itself = unit(stored) @ unit(stored).T - unit(rows) @ unit(rows).T
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    target = unit(stored) @ unit(stored_targets).T - unit(rows) @ unit(targets).T
    return {"itself": float(itself[apart].square().mean().sqrt()), "target": float(target.square().mean().sqrt())}


def agreement(found: Tensor, wanted: Tensor) -> float:
    """Spearman's correlation over the pool, mean over targets."""
    return float(np.mean([spearman(found[:, n].numpy(), wanted[:, n].numpy()) for n in range(wanted.shape[1])]))


def signs(known: Unprojected, plain: Tensor, target: Tensor) -> dict[str, float]:
    """Choices of three by every strategy for every target: shares above 0 dB, and how often both agree on which."""
    reported, true = [], []
    scores = less_scores([plain], [target])
    for number in range(len(target)):
        competing = Candidates(
            scores[:, number], lambda places: plain[places], target[number], count=len(plain), test_id=str(number)
        )
        for by_budget in choose_all(ALL_STRATEGIES, competing, (BUDGET,)):
            chosen = by_budget[BUDGET][0]
            reported.append(selection_relevance(target[number], plain[chosen]).db > 0)
            true.append(selection_relevance(known.target[number], known.plain[chosen]).db > 0)
    both = sum(r and t for r, t in zip(reported, true, strict=True))
    return {
        "above 0 dB, reported": sum(reported) / len(reported),
        "above 0 dB, true": sum(true) / len(true),
        "true of those reported": both / max(1, sum(reported)),
    }


def cosine_markdown(name: str, known: Unprojected, found: Mapping[str, Any]) -> list[str]:
    """A table of errors and one of what follows from them."""
    of_a = [part for part in known.shapes if ".lora_A." in part]
    places = [list(known.shapes).index(part) for part in of_a]
    shares = [known.shares(rows)[places].sum() for rows in (known.plain, known.adam, known.target)]
    entries = sum(out * inp for out, inp in known.shapes.values())
    lines = [
        f"Adapter of {name}; {entries:,} entries; LoRA-A has "
        f"{sum(known.shapes[part][0] * known.shapes[part][1] for part in of_a) / entries:.0%} of them and "
        f"{shares[0]:.1%} of plain rows' squared norm, {shares[1]:.1%} of Adam rows', {shares[2]:.1%} of targets'.",
        "",
        "| error of cosines · √k | " + " | ".join(PAIRS) + " |",
        "|---|" + "---|" * len(PAIRS),
    ]
    forms = [form for form in found if form != "rounding"]
    lines += [f"| {form} | " + " | ".join(shown(found[form].get(pair)) for pair in PAIRS) + " |" for form in forms]
    columns = ("LESS", "LESS (SGD)", "above 0 dB, reported", "above 0 dB, true", "true of those reported")
    lines += ["", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    forms = [form for form in forms if "LESS" in found[form]]
    lines += [
        f"| {form} | " + " | ".join(shown(found[form].get(column)) for column in columns) + " |" for form in forms
    ]
    rounding = (
        f"{dtype} {error['itself']:.1e} and {error['target']:.1e}" for dtype, error in found["rounding"].items()
    )
    return [*lines, "", f"Rounding alone, plain · plain and plain · target: {'; '.join(rounding)}."]


def shown(values: SequenceABC[float] | None) -> str:
    """Mean over draws ± its standard error."""
    if values is None:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f} (one draw)"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


# --- estimators ---------------------------------------------------------------------------------------------------


def estimators(out: Path, seeds: int) -> tuple[dict[str, Any], str]:
    """Correlations with the scores of unprojected rows, by estimator, sizes and dimensions."""
    world = make_world(out / "world")
    known = unprojected(world.pool, world.pool.checkpoints()[-1], world.target.data)
    sides = {"adam": known.adam, "plain": known.plain}
    exact = {name: method(known, parts_of(known, sides[side]), parts_of(known, known.target), whole=True)
             for name, (side, method, _) in METHODS.items()}  # fmt: skip
    tables: dict[str, Any] = {}
    for sizes in ("whole", "proportional", "equal", "energy"):
        for dim in DIMS:
            draws: dict[str, list[float]] = defaultdict(list)
            for seed in range(seeds):
                for name, (side, method, blockwise) in METHODS.items():
                    if blockwise and sizes == "whole":
                        continue
                    one = projector(known, sizes, dim, seed, sides[side])
                    rows, queries = (segments_of(known, one, part) for part in (sides[side], known.target))
                    draws[name].append(agreement(method(known, rows, queries, whole=sizes == "whole"), exact[name]))
            tables[f"{sizes}, {dim}"] = dict(draws)
    lines = ["| Spearman with unprojected | sizes | " + " | ".join(f"k = {dim}" for dim in DIMS) + " |"]
    lines += ["|---|---|" + "---|" * len(DIMS)]
    for name in METHODS:
        for sizes in ("whole", "proportional", "equal", "energy"):
            if name in tables[f"{sizes}, {DIMS[0]}"]:
                cells = (shown(tables[f"{sizes}, {dim}"][name]) for dim in DIMS)
                lines.append(f"| {name} | {sizes} | " + " | ".join(cells) + " |")
    return tables, "\n".join(lines)


def parts_of(known: Unprojected, rows: Tensor) -> list[Tensor]:
    """Unprojected rows module by module `[row entry]`."""
    return [part.flatten(1) for part in known.by_module(rows).values()]


def segments_of(known: Unprojected, one: Projector, rows: Tensor) -> list[Tensor]:
    """Projected rows by the columns of each module; all at once where modules share them."""
    (found,) = projected(known, one, rows)
    spans = dict.fromkeys((segment.start, segment.stop) for segment in one.segments)
    return [found[:, start:stop] for start, stop in spans]


def less(
    known: Unprojected, rows: list[Tensor], queries: list[Tensor], *, whole: bool, normalise: bool = True
) -> Tensor:
    return less_scores([torch.cat(rows, 1)], [torch.cat(queries, 1)], normalise=normalise)


def datainf(known: Unprojected, rows: list[Tensor], queries: list[Tensor], *, whole: bool) -> Tensor:
    return datainf_scores(rows, queries)


def inverse(known: Unprojected, rows: list[Tensor], queries: list[Tensor], *, whole: bool) -> Tensor:
    return projected_inverse_scores(rows, queries)


def trak(known: Unprojected, rows: list[Tensor], queries: list[Tensor], *, whole: bool, by_segment: bool) -> Tensor:
    sizes = [part.shape[1] for part in rows] if by_segment else None
    found = torch.cat(rows, 1), torch.cat(queries, 1)
    return trak_scores([found[0]], [found[1]], [known.losses], [known.target_losses], segments=sizes)


# name → (the pool's side, scores, whether modules must lie apart)
METHODS: dict[str, tuple[str, Callable[..., Tensor], bool]] = {
    "LESS": ("adam", less, False),
    "LESS (SGD)": ("plain", less, False),
    "TracIn": ("plain", partial(less, normalise=False), False),
    "TRAK": ("plain", partial(trak, by_segment=False), False),
    "DataInf": ("plain", datainf, True),
    "projected inverse": ("plain", inverse, True),
    "TRAK (by segment)": ("plain", partial(trak, by_segment=True), True),
}


if __name__ == "__main__":
    main()
