"""Do the hooks see the gradients? Two short rows, every module against autograd, before any long work.

Capturing takes for granted that a module's gradient is all in what goes into it and comes back to its output, that it
runs on the tokens of each sequence apart, and that folding LoRA into W changes nothing. An architecture can break each
of these without an error: by using a weight directly, by mixing the sequences of a batch, by using W elsewhere, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradsift.base.errors import ModelError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.memory import is_out_of_memory
from gradsift.base.types import Sequence
from gradsift.gradients.capture import LORA, Capture, UncapturedError
from gradsift.gradients.folding import Captured, find_folds
from gradsift.model.adapters import nothing_trained, own_randomness
from gradsift.model.loss import head_at, pad
from gradsift.model.models import input_device, model_identity
from gradsift.store.manifest import Manifest, versions
from gradsift.store.run import Run

_TOKENS = 16  # of each row
_BOUND, _FOLDED, _COARSE = 1e-4, 1e-3, 0.03  # of the relative error: in these, with folded LoRA, and in other types
_FLOOR = 1e-2  # of the modules' root-mean-square norm: a smaller gradient is all but cancelled, down to rounding
_GROUP_BYTES = 1 << 29  # of the weights whose gradients autograd holds at once
_SMALL = 1e-2  # spread of the numbers that stand in for a B of zeros


@dataclass(frozen=True)
class SelfCheck:
    """What was found."""

    modules: int  # how many were compared
    error: float  # the largest relative difference to autograd, Frobenius norm, over modules and rows
    worst: str  # the module that it is of
    bound: float  # what was allowed
    idle: tuple[str, ...]  # modules that took no part in the loss of either row, as experts that no token was sent to

    @property
    def words(self) -> str:
        """For a person."""
        if not self.modules:
            return "gradients could not be compared with autograd's: they are not finite, out of memory, or offloaded"
        idle = f"; {len(self.idle)} took no part" if self.idle else ""
        return (
            f"gradients of {self.modules} modules agree with autograd's (largest difference {self.error:.1e}, "
            f"{self.bound:.0e} allowed{idle})"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def self_check(
    network: nn.Module,
    modules: SequenceABC[Captured],
    rows: SequenceABC[Sequence],
    *,
    pattern: str = LORA,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
) -> SelfCheck:
    """Compare what `Capture` hands over for a batch of two rows with autograd's gradients of either row's loss.

    In single and double precision the shorter row's loss must also be the same in the batch as alone. Where gradients
    are not finite, or memory does not suffice even for this, nothing is compared, and the work itself will tell. LoRA B
    matrices that are zero hold small random numbers meanwhile.

    Args:
        rows: at least two sequences with a supervised token each; two of them are used, cut to 16 tokens.
        pattern: by which the modules were found, for the message.

    Raises:
        ModelError: the two differ by more than 1e-4 of the gradient (1e-3 where LoRA is folded into W, whose rounding
            grows from layer to layer, 0.03 in half precision), modules run in a way that tells no sequences apart, or a
            row depends on its company. The message names the modules and a pattern that leaves them out.
    """
    pair = _short(rows)
    modules = [c for c in modules if not c.weight.is_meta]  # what is offloaded comes and goes with each use
    types = {p.dtype for p in network.parameters() if p.is_floating_point()}
    exactly = (
        autocast is None and types <= {torch.float64, torch.float32} and not getattr(network, "is_quantized", False)
    )
    bound = (_FOLDED if find_folds(network, modules) else _BOUND) if exactly else _COARSE
    try:
        with _nothing_zero(modules):
            captured, refused = _captured(network, modules, pair, autocast, checkpointing)
            with nothing_trained(network):
                if exactly:
                    _refuse_company(network, pair)
                exact = _exact(network, [c for c in modules if c.name in captured], pair, autocast)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck(0, 0.0, "", bound, ())
    norms = {name: torch.stack([gradient.norm() for gradient in per_row]) for name, per_row in exact.items()}
    floor = _FLOOR * float(torch.stack(list(norms.values())).square().mean().sqrt()) if norms else 0.0
    if not math.isfinite(floor):
        return SelfCheck(0, 0.0, "", bound, ())
    errors: dict[str, float] = {}
    for name, per_row in exact.items():
        found = captured[name]
        if found.shape[1:] != per_row[0].shape:
            refused[name] = f"{name}, which multiplies with parts of its weight apart"
            continue
        away = torch.stack([(f - e).norm() for f, e in zip(found, per_row, strict=True)])
        errors[name] = float((away / norms[name].clamp_min(max(floor, 1e-30))).nan_to_num(math.inf).max())
        if errors[name] > bound:
            seen = "see nothing of it" if not bool(found.any()) else f"are off by {errors[name]:.2g} of it"
            refused[name] = f"{name}, whose gradient autograd finds and hooks {seen}"
    if refused:
        raise ModelError(_refusal(network, refused, pattern))
    worst = max(errors, key=errors.__getitem__, default="")
    idle = tuple(name for name, norm in norms.items() if not bool(norm.any()))
    return SelfCheck(len(errors), errors.get(worst, 0.0), worst, bound, idle)


class _Kept(Manifest):
    found: SelfCheck


def kept_check(
    run: Run,
    network: nn.Module,
    modules: SequenceABC[Captured],
    rows: SequenceABC[Sequence],
    *,
    model: str,
    pattern: str,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
) -> SelfCheck:
    """`self_check`, once in a run for a model, an adapter's form, and the versions of what runs them."""
    config = {
        "model": model_identity(model),
        "dtypes": sorted({str(parameter.dtype) for parameter in network.parameters()}),
        "device": input_device(network).type,
        "adapter": _form(network),
        "modules": [captured.name for captured in modules],
        "autocast": str(autocast),
        "checkpointing": checkpointing,
        "versions": versions(),
    }
    prefix = run.prefix("checks", config)
    kept = run.manifest(prefix, _Kept)
    if kept is not None:
        return SelfCheck(**(kept["found"] | {"idle": tuple(kept["found"]["idle"])}))
    found = self_check(network, modules, rows, pattern=pattern, autocast=autocast, checkpointing=checkpointing)
    if found.modules:
        run.complete(prefix, "checks", config, found=found.as_dict())
    return found


def _form(network: Any) -> Any:
    """An adapter's configuration, without what says where it comes from and what it is used for."""
    config = getattr(network, "peft_config", {}).get(getattr(network, "active_adapter", None))
    if config is None:
        return None
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    for key in ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping"):
        told.pop(key, None)
    return json.loads(json.dumps(told, sort_keys=True, default=str))


def _short(rows: SequenceABC[Sequence]) -> list[Sequence]:
    """Two rows of different lengths, each with its loss on the second half of what is kept of it."""
    assert len(rows) > 0, "nothing to check with"
    ordered = sorted(rows, key=lambda row: len(row.token_ids))
    pair: list[Sequence] = []
    for number, row in enumerate((ordered[0], ordered[-1])):
        # Where all are of one length, or long, the second is still longer than the first.
        count = min(len(row.token_ids), _TOKENS - 5 * (1 - number))
        if number and count == len(pair[0].token_ids) and count > 2:
            pair[0] = _first_tokens(pair[0], count - 1)
        pair.append(replace(_first_tokens(row, count), row=number))
    return pair


def _first_tokens(row: Sequence, count: int) -> Sequence:
    weights = torch.zeros(count)
    weights[max(1, count // 2) :] = 1.0
    return replace(row, token_ids=row.token_ids[:count], weights=(weights / weights.sum().clamp_min(1)).numpy())


@contextmanager
def _nothing_zero(modules: SequenceABC[Captured]) -> Iterator[None]:
    """While open, a LoRA B that is all zero holds small random numbers: the gradient of A vanishes otherwise."""
    b = [c.weight for c in modules if ".lora_B." in c.name]
    zeros = [weight for weight in b if not bool(weight.any())]
    kept = [weight.detach().clone() for weight in zeros]
    try:
        with own_randomness(), torch.no_grad():
            torch.manual_seed(0)
            for weight in zeros:
                weight.normal_(0, _SMALL)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(zeros, kept, strict=True):
                weight.copy_(value)


def _captured(
    network: nn.Module,
    modules: SequenceABC[Captured],
    pair: SequenceABC[Sequence],
    autocast: torch.dtype | None,
    checkpointing: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gradients `[row out in]` by module, and why there are none of others."""
    refused: dict[str, str] = {}
    left = list(modules)
    while left:
        found: dict[str, Tensor] = {}

        def keep(captured: Captured, gradients: Tensor, found: dict[str, Tensor] = found) -> None:
            found[captured.name] = gradients.clone()

        try:
            with Capture(network, left, autocast=autocast, checkpointing=checkpointing).open() as capture:
                capture.run(pair, keep)
            return found, refused
        except UncapturedError as error:
            # Its like in the other layers runs in the same way: a pass for each would take as long as the work.
            kind = _kind(error.module)
            refused |= {c.name: f"{c.name}, which {error.does}" for c in left if _kind(c.name) == kind}
            left = [c for c in left if _kind(c.name) != kind]
    return {}, refused


def _refuse_company(network: nn.Module, pair: SequenceABC[Sequence]) -> None:
    """Refuse a model in which a row's loss depends on the row beside it (`ModelError`, saying by how much)."""
    place = input_device(network)
    with torch.no_grad(), head_at(network) as head:
        together = pad(pair, place)
        beside = float(head.nll(together)[together.owner.cpu() == 0].sum())
        alone = float(head.nll(pad(pair[:1], place)).sum())
    if abs(beside - alone) > 1e-3 * max(abs(alone), 1e-3):
        raise ModelError(
            f"{type(network).__name__}: the loss of a row is {alone:.6g} alone and {beside:.6g} beside another one, so "
            "that gradients would depend on how rows are put together. A model that reads each row by itself is needed"
        )


def _exact(
    network: nn.Module, modules: SequenceABC[Captured], pair: SequenceABC[Sequence], autocast: torch.dtype | None
) -> dict[str, list[Tensor]]:
    """Autograd's gradient of each row's loss, `[out in]` by module; zero where a module has no part in it."""
    exact: dict[str, list[Tensor]] = {c.name: [] for c in modules}
    place = input_device(network)
    batch = pad(pair, place)
    for group in _groups(modules):
        weights = [c.weight.requires_grad_(True) for c in group]
        with torch.enable_grad(), head_at(network) as head:
            with torch.autocast(place.type, autocast, enabled=autocast is not None):
                nll = head.nll(batch)
            for row in range(len(pair)):
                loss = nll[batch.owner.to(nll.device) == row].sum()
                gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
                for c, gradient in zip(group, gradients, strict=True):
                    exact[c.name].append(c.matrix(gradient).detach().float())
        for weight in weights:
            weight.requires_grad_(False)
    return exact


def _groups(modules: SequenceABC[Captured]) -> Iterator[list[Captured]]:
    group: list[Captured] = []
    size = 0
    for c in modules:
        if group and size + c.weight.nbytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(c)
        size += c.weight.nbytes
    if group:
        yield group


def _kind(name: str) -> str:
    """A module's name without the numbers of layers and experts."""
    return re.sub(r"\d+", "#", name)


def _refusal(network: nn.Module, refused: dict[str, str], pattern: str) -> str:
    first = next(iter(refused.values()))
    layers = (re.split(r"\.(?:lora_|modules_to_save|token_adapter)|\.weight$", name)[0] for name in refused)
    names = sorted({layer.rpartition(".")[2] for layer in layers})
    what = f"{type(network).__name__}: gradients of {len(refused)} modules cannot be relied on, first {first}"
    if pattern == LORA:
        return f"{what}. Adapt other modules than {', '.join(names)}: --lora-modules, or train your adapter without"
    kept = "" if pattern == "." else f".*(?:{pattern})"
    return f"{what}. Leave them out: --modules '^(?!.*(?:{'|'.join(names)})$){kept}'"
