"""Rows of two answers to one prompt, of which one is preferred: preference pairs, as pools and as targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError, UnusableRowsError
from gradsift.base.lazy import torch
from gradsift.base.progress import Reporter
from gradsift.base.settings import Settings
from gradsift.base.types import Sequence, Skipped
from gradsift.data.account import Account
from gradsift.data.chat import ChatFormat
from gradsift.data.dataset import Dataset
from gradsift.data.formats import Answer, BadRowError, Columns, in_two_columns, read_conversation
from gradsift.data.prepare import joined, prepare
from gradsift.data.sources import read_rows
from gradsift.model.loss import DPO, label_weights
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run, revisions

ObjectiveName = Literal["dpo", "difference"]


class Preference(Settings):
    """What the loss of a preference pair is, with c the chosen and r the rejected answer.

    objective: `dpo`, −log σ(β[(log π(c) − log π₀(c)) − (log π(r) − log π₀(r))]) where π₀ is the base model (Rafailov et
        al. 2023), or `difference`, −(log π(c) − log π(r)), in nats over all labels of both.
    beta: β of DPO.
    """

    objective: ObjectiveName = "difference"
    beta: float = Field(default=0.1, gt=0)

    @property
    def loss(self) -> str:
        """What configurations call it."""
        return f"dpo {self.beta!r}" if self.objective == "dpo" else "contrast"


DIFFERENCE = Preference()


class _Known(NamedTuple):
    """Columns of pairs beside their tokens, float64 `[row]` each; None where they are not known or not needed.

    factors:   of the losses by DPO, where any is other than 1
    reference: contrasts at the base model
    contrasts: at the weights that gradients are taken at
    """

    factors: NDArray[np.float64] | None = None
    reference: NDArray[np.float64] | None = None
    contrasts: NDArray[np.float64] | None = None


_NOTHING = _Known()


@dataclass(frozen=True)
class _Origin:
    """What pairs were before they were turned round: which rows of which others."""

    pairs: Pairs
    places: NDArray[np.int64]


class Pairs(Dataset):
    """The chosen answers as a data set, beside which stand the rejected ones.

    A row's contrast is x = −(log p(chosen) − log p(rejected)), in nats over all labels of both: what lowers it makes
    the chosen answer likelier beside the rejected one. It is the row's loss, or DPO's is a function of it. Texts,
    hashes and labels are those of the chosen.

    rejected: the same rows in the same order.
    lengths: tokens of both answers.
    preference: what their loss is.
    """

    def __init__(
        self,
        chosen: Dataset,
        rejected: Dataset,
        preference: Preference = DIFFERENCE,
        known: _Known = _NOTHING,
        origin: _Origin | None = None,
    ) -> None:
        assert len(chosen) == len(rejected), (chosen, rejected)
        super().__init__(chosen.run, chosen.prefix, chosen._stored)
        self._with(chosen._beside)
        self.rejected, self.preference, self._known, self.origin = rejected, preference, known, origin
        loss = [preference.loss, *revisions("contrasts").values()] if self.by_dpo else []
        self.fingerprint = fingerprint(["pairs", chosen.fingerprint, rejected.fingerprint, *loss])
        self._chosen, self.lengths = chosen, chosen.lengths + rejected.lengths
        if origin is not None:
            self._ids = origin.pairs._ids.take(origin.places)

    @property
    def loss(self) -> str:
        """What the weights mean: the first answer's log-probability less the other's, or DPO's loss and its β."""
        return self.preference.loss

    @property
    def by_dpo(self) -> bool:
        """Whether the loss is DPO's."""
        return self.preference.objective == "dpo"

    @property
    def answered(self) -> Dataset:
        """The chosen answers alone."""
        return self._chosen

    def __reduce__(self) -> tuple[Any, ...]:
        return Pairs, (self._chosen, self.rejected, self.preference, self._known, self.origin)

    def subset(self, positions: SequenceABC[int] | NDArray[np.int64]) -> Pairs:
        """The rows at these positions, in this order."""
        places = np.asarray(positions, dtype=np.int64)
        known = _Known(*(None if column is None else column[places] for column in self._known))
        origin = None if self.origin is None else replace(self.origin, places=self.origin.places[places])
        return Pairs(self._chosen.subset(places), self.rejected.subset(places), self.preference, known, origin)

    def turned(self, positions: SequenceABC[int] | NDArray[np.int64]) -> Pairs:
        """These rows with the rejected answer preferred, under their own ids, and contrasts and margins of the other
        sign: a gradient g by DPO at the margin m becomes −e^m·g, one by difference −g.
        """
        places = np.asarray(positions, dtype=np.int64)
        own = self.subset(places)
        factors, *signed = own._known
        known = _Known(factors, *(None if column is None else -column for column in signed))
        return Pairs(own.rejected, own._chosen, self.preference, known, _Origin(self, places))

    def knowing(self, **columns: NDArray[np.float64]) -> Pairs:
        """With contrasts: at the base model (`reference`), or at the weights that gradients are of (`contrasts`)."""
        return Pairs(self._chosen, self.rejected, self.preference, self._known._replace(**columns), self.origin)

    def dpo(self, positions: SequenceABC[int] | NDArray[np.int64]) -> DPO | None:
        """What makes losses of the contrasts of some rows; None where those are the losses."""
        if not self.by_dpo:
            return None
        factors, reference, _ = self._known
        assert reference is not None, "the contrasts at the base model come first"
        return DPO(self.preference.beta, reference, factors).of(positions)

    def losses(self, start: int, stop: int) -> NDArray[np.float64] | None:
        """Of rows `[start, stop)` by DPO; None where they are the sums over sequences that a pass finds."""
        dpo, own = self._at(start, stop)
        return None if dpo is None else dpo.losses(own).numpy()

    @property
    def margins(self) -> NDArray[np.float64]:
        """By how much the chosen answers are preferred where gradients are taken: −x, or DPO's m, float64 `[row]`."""
        _, reference, contrasts = self._known
        assert contrasts is not None, "contrasts come first"
        if not self.by_dpo:
            return -contrasts
        assert reference is not None, "the contrasts at the base model come first"
        return self.preference.beta * (reference - contrasts)

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._chosen.longest(), self.rejected.longest())

    def sequences_at(self, positions: Iterable[int]) -> list[Sequence]:
        """Of each row's contrast, two sequences; the rejected answer's has weights below 0."""
        return [
            Sequence(
                row, one.token_ids, sign * (one.supervised if self.by_dpo else label_weights(one)).astype(np.float32)
            )
            for row, place in enumerate(positions)
            for sign, one in ((1, self[place]), (-1, self.rejected[place]))
        ]

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)`, two sequences each, which together have the gradient of the row's loss."""
        dpo, own = self._at(start, stop)
        return self._scaled(start, stop, None if dpo is None else dpo.slopes(own))

    def information(self, start: int, stop: int) -> list[Sequence] | None:
        """Rows `[start, stop)`, two sequences each, whose gradients' second moments are the curvature of DPO's loss.

        As p(c is preferred) = σ(m), it is the logistic loss of the margin m: its Gauss-Newton matrix is the Fisher
        matrix of a preference that is drawn by the model, ℓ″∇x∇xᵀ with ℓ″ = β²σ(m)σ(−m), and here is √ℓ″∇x. None by
        difference, where ℓ″ is 0.
        """
        dpo, own = self._at(start, stop)
        return None if dpo is None else self._scaled(start, stop, dpo.curvatures(own).sqrt())

    def _scaled(self, start: int, stop: int, factors: Any) -> list[Sequence]:
        """Rows `[start, stop)`, two sequences each, with the gradient of the contrast times a factor `[row]`."""
        found = self.sequences_at(range(start, stop))
        if factors is None:
            return found
        by_row = factors.float().numpy()
        return [replace(sequence, weights=sequence.weights * by_row[sequence.row]) for sequence in found]

    def _at(self, start: int, stop: int) -> tuple[DPO | None, Any]:
        """The loss of some rows, and their contrasts where gradients are taken."""
        if not self.by_dpo:
            return None, None
        if self._known.contrasts is None:
            raise ConfigError(
                f"{self.description}: the DPO loss of a pair is no sum over tokens, which this reads: rank with LESS, "
                "DataInf, ProjectedInverse, TRAK or MAGIC, or learn the chosen answers alone (--columns "
                "completion=chosen in place of --objective dpo)"
            )
        return self.dpo(range(start, stop)), torch.from_numpy(self._known.contrasts[start:stop])


def are_pairs(source: Any, columns: Columns | Mapping[str, str] | None) -> bool:
    """Whether the first row of a source holds a chosen and a rejected answer, also beside a conversation that has an
    answer unless it is the chosen one (ms-swift's form), and no columns say otherwise.
    """
    named = Columns.of(columns)
    if named.chosen is not None or named.rejected is not None:
        return True
    alone = Columns.of(named.model_dump(exclude_none=True, exclude={"prompt"}))
    row = next((one.value for one in read_rows(source, "target").rows if one.problem is None), None)
    if not isinstance(row, Mapping):
        return False
    if named.messages is None and in_two_columns(row, named) is not row:
        return True
    try:
        read_conversation(row, alone)
    except BadRowError:
        return all(row.get(answer) is not None for answer in get_args(Answer))
    return False


def prepare_pairs(
    run: Run,
    source: Any,
    chat: ChatFormat,
    *,
    what: str = "target",
    columns: Columns | Mapping[str, str] | None,
    preference: Preference = DIFFERENCE,
    keep_duplicates: bool = True,
    check: Callable[[str, Mapping[str, Any]], None] | None = None,
    reporter: Reporter,
) -> Pairs:
    """Load and tokenise both answers of each row; one of which an answer cannot be used is left out, and told.

    Exact duplicates, whose answers are both the same, are left out unless `keep_duplicates`. `check` is as `prepare`'s.
    DataError where no row can be used; ConfigError where columns name the one answer that is learned.
    """
    source = list(source) if isinstance(source, Iterator) else source  # it is read twice
    named = Columns.of(columns)
    if named.completion is not None or named.text is not None:
        raise ConfigError(
            f"{what}: a preference pair has two answers, and columns name a completion: leave it out, and name chosen "
            "and rejected where they have other names; or leave out the objective to learn one answer alone"
        )

    def read(answer: Answer) -> Dataset:
        said = f"{what}'s {answer} answers"
        first = check if answer == "chosen" else None
        return prepare(
            run, source, chat, what=said, columns=named, keep_duplicates=True, check=first, answer=answer,
            reporter=reporter,
        )  # fmt: skip

    chosen, rejected = read("chosen"), read("rejected")
    place = {rejected.raw(id_): number for number, id_ in enumerate(rejected.ids)}
    left_out: list[Skipped] = []
    used: list[tuple[int, int]] = []
    seen: dict[tuple[str, str], str] = {}
    factors: list[float] = []
    for number, id_ in enumerate(chosen.ids):
        other = place.get(chosen.raw(id_))
        if other is None:
            left_out.append(Skipped(id_, "rejected", "the rejected answer cannot be used"))
            continue
        kept = seen.setdefault((chosen.hashes[number], rejected.hashes[other]), id_)
        if kept != id_ and not keep_duplicates:
            left_out.append(Skipped(id_, "duplicate", f"same answers as {kept!r}, which is kept"))
            continue
        factor = _factor(chosen, number, rejected, other) if preference.objective == "dpo" else 1.0
        if factor is None:
            left_out.append(Skipped(id_, "weight", "turns of other weights than others: DPO weighs whole pairs"))
            continue
        used.append((number, other))
        factors.append(factor)
    if not used:
        why = f": {left_out[0].detail}" if left_out else ""
        raise UnusableRowsError(f"no row of {chosen.description} has two answers that can be used{why}")
    own, others = (list(places) for places in zip(*used, strict=True))
    of_rejected = {rejected.ids[other]: chosen.ids[number] for number, other in used}
    told = {(part.id, part.part) for part in chosen.account.parts}
    parts = (replace(part, id=of_rejected[part.id]) for part in rejected.account.parts if part.id in of_rejected)
    beside = Account(rows=tuple(left_out), parts=tuple(part for part in parts if (part.id, part.part) not in told))
    kept_rows = chosen.subset(own)._with(chosen._beside + beside)
    known = _Known(np.array(factors) if any(factor != 1 for factor in factors) else None)
    return Pairs(kept_rows, rejected.subset(others), preference, known)


def joined_like(first: Dataset, second: Dataset, before: str, reporter: Reporter) -> Dataset:
    """`joined`, of pairs both answers and what pairs weigh."""
    if not (isinstance(first, Pairs) and isinstance(second, Pairs)):
        return joined(first, second, before, reporter)
    chosen, rejected = (
        joined(own, other, before, reporter)
        for own, other in ((first.answered, second.answered), (first.rejected, second.rejected))
    )
    weigh = [np.ones(len(own)) if own._known.factors is None else own._known.factors for own in (first, second)]
    factors = np.concatenate(weigh)
    return Pairs(chosen, rejected, first.preference, _Known(factors if (factors != 1).any() else None))


def _factor(chosen: Dataset, place: int, rejected: Dataset, other: int) -> float | None:
    """What all labels of a pair weigh; None where some weigh more than others."""
    if not (chosen.weighted or rejected.weighted):
        return 1.0
    weights = {float(w) for one in (chosen[place], rejected[other]) for w in label_weights(one)[one.supervised]}
    return weights.pop() if len(weights) == 1 else None
