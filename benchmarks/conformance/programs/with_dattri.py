"""dattri's TracIn, DataInf and TRAK of a small classifier at two checkpoints; run where it is installed.

Its attributors always project; here the projection is replaced by none, so that what they do to gradients can be
compared to rounding. The gradients are its own, too.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from dattri.algorithm import influence_function, tracin, trak
from dattri.task import AttributionTask
from recording import record, rounded
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

POOL, TARGETS, INPUTS, HIDDEN, CLASSES = 20, 4, 3, 2, 3
RATES = [0.02, 0.005]


def unprojected(*_: Any, **__: Any) -> Any:
    return lambda gradients, ensemble_id: gradients


def margin(model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """log(p/(1−p)) of the label, as the package's documentation writes it."""
    log_p = -loss(model, parameters, data)
    return log_p - torch.log(1 - torch.exp(log_p))


def loss(model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    inputs, label = data  # of one example, with an axis of its own or without: attributors differ in that
    return nn.functional.cross_entropy(functional_call(model, parameters, inputs.reshape(1, -1)), label.reshape(1))


def main() -> None:
    torch.set_default_dtype(torch.float64)
    stream = np.random.RandomState(8)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    checkpoints = [
        {
            name: torch.from_numpy(stream.standard_normal(tuple(value.shape)))
            for name, value in model.state_dict().items()
        }
        for _ in RATES
    ]
    sets = [
        TensorDataset(
            torch.from_numpy(stream.standard_normal((count, INPUTS))),
            torch.from_numpy(stream.randint(0, CLASSES, count)),
        )
        for count in (POOL, TARGETS)
    ]
    pool, target = (DataLoader(part, batch_size=len(part), shuffle=False) for part in sets)
    task = AttributionTask(lambda parameters, data: loss(model, parameters, data), model, checkpoints)
    margins = AttributionTask(lambda parameters, data: margin(model, parameters, data), model, checkpoints)
    for module in (tracin, trak):
        module.random_project = unprojected

    gradients: dict[str, list[Any]] = {"pool": [], "target": []}
    losses: dict[str, list[Any]] = {"pool": [], "target": []}
    for checkpoint in range(len(checkpoints)):
        parameters, _ = task.get_param(ckpt_idx=checkpoint)
        for name, loader in (("pool", pool), ("target", target)):
            (batch,) = loader
            gradients[name].append(task.get_grad_loss_func(in_dims=(None, 0))(parameters, batch))
            each = torch.func.vmap(lambda data: loss(model, checkpoints[checkpoint], data))  # noqa: B023 - used at once
            losses[name].append(each(batch))

    found: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        for name, normalised in (("tracin", False), ("cosine", True)):
            attributor = tracin.TracInAttributor(task, torch.tensor(RATES), normalised)
            found[name] = attributor.attribute(pool, target)
        last = AttributionTask(lambda parameters, data: loss(model, parameters, data), model, checkpoints[-1])
        datainf = influence_function.IFAttributorDataInf(last, regularization=0.05)
        datainf.cache(pool)
        found["datainf"] = datainf.attribute(pool, target)
        for damping in (0.0, 0.002):
            probability = lambda parameters, data: torch.exp(-loss(model, parameters, data))  # noqa: E731
            attributor = trak.TRAKAttributor(margins, probability, regularization=damping)
            found[f"trak {damping}"] = attributor.attribute(target, pool)
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in (model[0], model[2])]
    record(
        {
            "rates": RATES,
            "layers": sizes,
            "gradients": rounded(gradients),
            "losses": rounded(losses),
            "scores": rounded(found),
        },
        packages=("dattri", "torch", "numpy"),
    )


if __name__ == "__main__":
    main()
