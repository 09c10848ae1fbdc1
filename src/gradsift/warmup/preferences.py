"""How much likelier a model finds the rejected answers of preference pairs than the chosen: forward passes, kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ModelError
from gradsift.base.lazy import Tensor
from gradsift.base.progress import Advance, Reporter
from gradsift.data.pairs import Pairs
from gradsift.execution.engine import LOCAL, Engine
from gradsift.model.losses import row_losses
from gradsift.model.models import DtypeName, host, model_identity
from gradsift.store.run import Run
from gradsift.store.shares import kept_rows
from gradsift.warmup.checkpoint import Checkpoint

_SHARE_ROWS = 512  # pairs of a task, and of a file
BASE = Checkpoint(None)


def contrasts(
    run: Run,
    pairs: Pairs,
    checkpoint: Checkpoint,
    *,
    model: str,
    dtype: DtypeName,
    device: str,
    reporter: Reporter,
    engine: Engine = LOCAL,
) -> NDArray[np.float64]:
    """x = −(log p(chosen) − log p(rejected)) of each pair at a checkpoint, nats `[row]`: kept, or found now."""
    if pairs.origin is not None:
        whole = contrasts(
            run, pairs.origin.pairs, checkpoint, model=model, dtype=dtype, device=device, reporter=reporter,
            engine=engine,
        )  # fmt: skip
        return -whole[pairs.origin.places]
    config = {  # the loss that is made of contrasts is no part of it
        "model": model_identity(model),
        "model_dtype": dtype,
        "adapter": checkpoint.identity(),
        "chosen": pairs.answered.fingerprint,
        "rejected": pairs.rejected.fingerprint,
        "weights": pairs.by_dpo,
    }
    where = "the base model" if checkpoint.adapter is None else checkpoint.name.rstrip("/").rpartition("/")[2]
    found: NDArray[np.float64] = kept_rows(
        run,
        "contrasts",
        config,
        len(pairs),
        _SHARE_ROWS,
        partial(_some_contrasts, pairs, (model, dtype, device), checkpoint.adapter),
        stage=f"answers' probabilities at {where}",
        reporter=reporter,
        engine=engine,
    )
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ModelError(
            f"the log-probabilities of {len(bad)} of {len(pairs)} pairs are not finite, first "
            f"{pairs.ids[int(bad[0])]!r}: use dtype float32, or bfloat16 if the model is in float16"
        )
    return found


def referred(
    run: Run, pairs: Pairs, *, model: str, dtype: DtypeName, device: str, reporter: Reporter, engine: Engine = LOCAL
) -> Pairs:
    """The pairs with their contrasts at the reference, the base model, where their loss is DPO's."""
    if not pairs.by_dpo:
        return pairs
    given: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "reporter": reporter, "engine": engine}
    return pairs.knowing(reference=contrasts(run, pairs, BASE, **given))


def _some_contrasts(
    pairs: Pairs, base: tuple[str, DtypeName, str], adapter: str | None, start: int, stop: int, advance: Advance
) -> Tensor:
    sequences = pairs.sequences_at(range(start, stop))
    return row_losses(host(*base).with_adapter(adapter), sequences, stop - start, on_rows=advance)
