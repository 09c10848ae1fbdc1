"""JI2S's toy experiment (Wei et al. 2025, appendix B.1): removing two groups together is not removing each.

    python benchmarks/joint_toy.py        half a minute on one core

As there: 1,000 instances of a balanced binary task, 800 to train on and 200 to test, two disjoint groups A and B of 50
training examples, 10 epochs in batches of 8, 10 seeds. Δ is the change of the test accuracy (or loss) by a removal, and
I = Δ(A∪B) − (ΔA + ΔB) the joint influence. In place of BERT on texts, which is not theirs to share, a network of one
hidden layer learns eight clusters, and in place of random groups alone there are three kinds:

    random   drawn from all of the training set, as in the paper
    alike    both from one cluster, which A∪B removes altogether
    apart    from two clusters

The second table is what JI2S makes of the groups from the gradients after one epoch, before anything is removed:
Σ_{a∈A, b∈B} Γ_aᵀHΓ_b with plain gradients and each H of the test loss. `fisher_projected` is the mean over ten random
projections to a quarter of the 432 parameters. Runs differ in weights of examples alone, so that all of them are
trained at once.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import binary_cross_entropy_with_logits

from gradsift import joint_influence

SEEDS, CLUSTERS, WIDTH, HIDDEN, GROUP, EPOCHS, BATCH, RATE = 10, 8, 16, 24, 50, 10, 8, 0.05
KINDS = ("random", "alike", "apart")
REMOVED = ("nothing", "A", "B", "A∪B")


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [1000 width], labels and clusters [1000]: points around eight centres, four of them positive."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.1 * torch.randn(CLUSTERS, WIDTH, generator=generator)
    cluster = torch.arange(1000) % CLUSTERS
    inputs = centres[cluster] + torch.randn(1000, WIDTH, generator=generator)
    order = torch.randperm(1000, generator=generator)
    return inputs[order], (cluster[order] % 2).float(), cluster[order]


def groups(kind: str, cluster: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of A and B among the training examples."""

    def members(number: int) -> Tensor:
        found = (cluster == number).nonzero()[:, 0]
        return found[torch.randperm(len(found), generator=generator)]

    if kind == "random":
        drawn = torch.randperm(len(cluster), generator=generator)
        return drawn[:GROUP], drawn[GROUP : 2 * GROUP]
    first, second = torch.randperm(CLUSTERS, generator=generator)[:2].tolist()
    if kind == "apart":
        return members(first)[:GROUP], members(second)[:GROUP]
    both = members(first)  # about 100: what is left over goes to A and B in equal parts
    return both[: len(both) // 2], both[len(both) // 2 :]


def logits(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """`[… row]` of inputs `[… row width]`, whatever axes parameters have before their own two."""
    hidden = torch.tanh(inputs @ parameters["in"] + parameters["bias"])
    return (hidden @ parameters["out"])[..., 0]


def nll(out: Tensor, labels: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(out, labels.expand_as(out), reduction="none")


def train(inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SGD of all runs at once: parameters [seed run …] after one epoch and after all.

    Inputs [seed example width], labels [seed example]; weights [seed run example] of 0 leave an example out. The runs
    of a seed share their first parameters and their batches.
    """
    generator = torch.Generator().manual_seed(100)
    seeds, runs, examples = weights.shape

    def first(*shape: int) -> Tensor:
        return (torch.randn(seeds, 1, *shape, generator=generator) / shape[0] ** 0.5).repeat(1, runs, 1, 1)

    parameters = {"in": first(WIDTH, HIDDEN), "bias": torch.zeros(seeds, runs, 1, HIDDEN), "out": first(HIDDEN, 1)}
    early: dict[str, Tensor] = {}
    row = torch.arange(seeds)[:, None]
    for _ in range(EPOCHS):
        order = torch.rand(seeds, examples, generator=generator).argsort(dim=1)
        for batch in order.split(BATCH, dim=1):
            leaves = {name: value.requires_grad_() for name, value in parameters.items()}
            out = logits(leaves, inputs[row, batch][:, None])
            kept = weights.gather(2, batch[:, None].expand(seeds, runs, -1))
            loss = (kept * nll(out, labels[row, batch][:, None])).sum() / BATCH
            found = torch.autograd.grad(loss, list(leaves.values()))
            steps = zip(leaves.items(), found, strict=True)
            parameters = {name: (value - RATE * step).detach() for (name, value), step in steps}
        early = early or parameters
    return early, parameters


def gradients(parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """Plain gradients [row dim] of the loss of each row at one run's parameters."""

    def loss(at: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nll(logits(at, x[None])[0], y)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
    return torch.cat([part.flatten(1) for part in found.values()], dim=1)


def pair_sums(
    parameters: dict[str, Tensor], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], A: Tensor, B: Tensor
) -> dict[str, float]:
    """Σ_{a∈A, b∈B} Γ_aᵀHΓ_b = s_AᵀHs_B at one run's parameters, for each H of the test loss."""
    G, V = gradients(parameters, *train), gradients(parameters, *test)
    first, second = G[A].sum(dim=0), G[B].sum(dim=0)

    def fisher(a: Tensor, b: Tensor, rows: Tensor, weights: Tensor | float = 1.0) -> float:
        return float((weights * (rows @ a) * (rows @ b)).mean())

    p, names = torch.sigmoid(logits(parameters, test[0])), list(parameters)
    # v = (p − y) ∂z/∂θ, and Gauss-Newton weighs (∂z/∂θ)(∂z/∂θ)ᵀ by p (1 − p).
    curvature = p * (1 - p) / (p - test[1]).square()
    parts = second.split([parameters[name].numel() for name in names])
    step = {name: part.view_as(parameters[name]) for name, part in zip(names, parts, strict=True)}
    slope = grad(lambda at: nll(logits(at, test[0]), test[1]).mean())
    _, along = jvp(slope, (parameters,), (step,))
    projected = []
    for seed in range(10):
        R = torch.randn(len(first), len(first) // 4, generator=torch.Generator().manual_seed(seed))
        R /= R.shape[1] ** 0.5
        projected.append(fisher(first @ R, second @ R, V @ R))
    return {
        "hvp": float(first @ torch.cat([along[name].flatten() for name in names])),
        "ggn": fisher(first, second, V, curvature),
        "fisher": fisher(first, second, V),
        "fisher_projected": statistics.mean(projected),
        "identity": float(first @ second),
    }


def measure() -> list[dict[str, dict[str, float]]]:
    """Per seed and kind of groups: Δ of accuracy and loss for each removal, I of both, and JI2S's pair sums."""
    inputs, labels, cluster = (torch.stack(parts) for parts in zip(*map(data, range(SEEDS)), strict=True))
    weights, chosen = torch.ones(SEEDS, len(KINDS) * len(REMOVED), 800), []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(200 + seed)
        chosen.append({kind: groups(kind, cluster[seed, :800], generator) for kind in KINDS})
        for number, (A, B) in enumerate(chosen[seed].values()):
            weights[seed, 4 * number + 1, A] = weights[seed, 4 * number + 2, B] = 0
            weights[seed, 4 * number + 3, torch.cat([A, B])] = 0
    early, final = train(inputs[:, :800], labels[:, :800], weights)
    with torch.no_grad():
        out, wanted = logits(final, inputs[:, None, 800:]), labels[:, None, 800:]
        accuracy, loss = 100 * ((out > 0) == (wanted > 0.5)).float().mean(dim=2), nll(out, wanted).mean(dim=2)
    tables: list[dict[str, dict[str, float]]] = []
    for seed in range(SEEDS):
        at = {name: value[seed, 0].detach() for name, value in early.items()}
        sides = [(inputs[seed, part], labels[seed, part]) for part in (slice(800), slice(800, None))]
        tables.append({})
        for number, (kind, (A, B)) in enumerate(chosen[seed].items()):
            row = {"M0": float(accuracy[seed, 4 * number])}
            for what, values in (("acc", accuracy), ("loss", loss)):
                full, a, b, ab = values[seed, 4 * number : 4 * number + 4].tolist()
                row |= {f"{what} A": a - full, f"{what} B": b - full, f"{what} AB": ab - full}
                after = {(): ab, ("A",): b, ("B",): a, ("A", "B"): full}
                row[f"{what} I"] = float(joint_influence(after.__getitem__, ("A", "B")))
            row |= pair_sums(at, sides[0], sides[1], A, B)
            tables[seed][kind] = row
    return tables


def main() -> None:
    results = measure()
    columns = ("M0", "acc A", "acc B", "acc AB", "acc I", "loss A", "loss B", "loss AB", "loss I")
    print(f"mean ± standard deviation over {SEEDS} seeds; accuracy in points, loss in nats")
    print("groups   " + "".join(f"{column:>17}" for column in columns))
    for kind in KINDS:
        cells = []
        for column in columns:
            values = [result[kind][column] for result in results]
            digits = 1 if column[:3] in ("M0", "acc") else 4
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        print(f"{kind:<9}" + "".join(f"{cell:>17}" for cell in cells))
    print(f"\nI of the loss over {SEEDS * len(KINDS)} pairs of groups against Σ Γ_aᵀHΓ_b: Spearman, Pearson")
    measured = [result[kind]["loss I"] for result in results for kind in KINDS]
    for name in ("hvp", "ggn", "fisher", "fisher_projected", "identity"):
        predicted = [result[kind][name] for result in results for kind in KINDS]
        ranks = torch.tensor([measured, predicted]).argsort(dim=1).argsort(dim=1).double()
        spearman = float(torch.corrcoef(ranks)[0, 1])
        pearson = float(torch.corrcoef(torch.tensor([measured, predicted], dtype=torch.float64))[0, 1])
        print(f"{name:<17}{spearman:>+7.2f}{pearson:>+7.2f}")


if __name__ == "__main__":
    main()
