"""What matches: the tokens of chosen examples that carry their influence on an output, and those they bear on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.base.lazy import Tensor, torch
from gradsift.base.memory import is_out_of_memory
from gradsift.base.types import Message, Sequence, TokenizedExample
from gradsift.context import Pool
from gradsift.explanation.outputs import OutputSource
from gradsift.explanation.tokens import TokenInfluence, token_influences
from gradsift.gradients.capture import UncapturedError
from gradsift.influence.estimator import Estimator
from gradsift.model.models import model_identity
from gradsift.store.tensors import publish_tensors, tensors_if_whole
from gradsift.warmup.checkpoint import Checkpoint

_JOINED = 8  # tokens that one character may be cut into, at most


@dataclass(frozen=True, slots=True)
class MatchedToken:
    """A token's part of a score; tokens that share one character are one.

    value:   above zero, it makes the output more likely
    learned: whether the loss is taken on it
    said:    whether it is of a message; else the chat template writes it
    """

    text: str
    value: float
    learned: bool
    said: bool


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """How a chosen example's influence on an output is spread over the tokens of both.

    A token stands for the position at which the model reads it: its part is of all predictions after it.

    id:       of the example
    by:       the estimator whose score, of unprojected gradients, is split: the ranking's own where that is a product
        or cosine of gradients, else the cosine of plain gradients at the last checkpoint
    score:    what the values of `row` add up to with `constant`, and those of `output` and `instead` without
    constant: the momentum's part of an Adam direction, which no token of the row carries; else 0
    pairs:    `[row token][output token]`, those of `instead` behind, which add up to both; None where there are many,
        or of an Adam direction
    instead:  of the other answer, where the output is explained in contrast to one
    """

    id: str
    by: str
    score: float
    constant: float
    row: tuple[MatchedToken, ...]
    output: tuple[MatchedToken, ...]
    pairs: tuple[tuple[float, ...], ...] | None = None
    instead: tuple[MatchedToken, ...] = ()


def token_matches(
    pool: Pool, source: OutputSource, estimator: Estimator, chosen: Mapping[str, SequenceABC[str]]
) -> dict[str, tuple[TokenMatch, ...]]:
    """The matches of outputs with their chosen examples; what the run folder has is neither computed nor needs a model.

    `chosen` are ids of examples by output. Those that cannot be had are left out, and the pool's reporter is told why.
    """
    assert estimator.splits, estimator
    work = _Work(pool, estimator, estimator.checkpoints_of(pool))
    outputs, rows, keys = work.files(source, chosen)
    places = {id_: pool.data.position(id_) for id_ in rows}
    kept = {pair: _kept(pool, key) for pair, key in keys.items()}
    missing: dict[str, list[str]] = {}
    for (output, row), influence in kept.items():
        if influence is None:
            missing.setdefault(output, []).append(row)
    if missing:
        asked = {output: [rows[row] for row in ids] for output, ids in missing.items()}
        for output, found in work.computed(asked, outputs).items():
            for row, influence in zip(missing[output], found, strict=True):
                _keep(pool, keys[output, row], influence)
                kept[output, row] = influence
    across = {
        id_: [_Side.of(pool, entry, source.messages(id_)[:-1]) for entry in source.both(number)]
        for number, id_ in enumerate(source.ids)
        if id_ in chosen
    }
    own = {
        id_: _Side.of(pool, pool.data[place], pool.data.messages(id_), pool.data.options(id_))
        for id_, place in places.items()
    }
    return {
        output: tuple(
            _match(row, estimator.label, influence, own[row], across[output])
            for row in ids
            if (influence := kept[output, row]) is not None
        )
        for output, ids in chosen.items()
    }


def missing_matches(
    pool: Pool, source: OutputSource, estimator: Estimator, chosen: Mapping[str, SequenceABC[str]]
) -> list[tuple[str, str]]:
    """The outputs, with a chosen example each, of which `token_matches` would not find the match in the run folder."""
    _, _, keys = _Work(pool, estimator, estimator.checkpoints_of(pool)).files(source, chosen)
    return [pair for pair, key in keys.items() if not pool.run.storage.exists(key)]


def token_texts(tokenizer: Any, ids: SequenceABC[int]) -> list[tuple[str, int]]:
    """What each token adds to the text of those before it, and of how many it is: some share a character."""

    def said(start: int, stop: int) -> str:
        text: str = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    texts: list[tuple[str, int]] = []
    before = start = 0  # the token before, for what a tokenizer writes between two of them
    for stop in range(1, len(ids) + 1):
        lead, whole = said(before, start), said(before, stop)
        if whole.endswith("\ufffd") and stop < len(ids) and stop - start < _JOINED:
            continue  # a character's first bytes
        text = whole[len(lead) :] if whole.startswith(lead) else said(start, stop)
        texts.append((text, stop - start))
        before, start = start, stop
    return texts


@dataclass(frozen=True)
class _Work:
    """A ranking's score, and where it is taken.

    checkpoints: that the estimator sums over
    """

    pool: Pool
    estimator: Estimator
    checkpoints: SequenceABC[Checkpoint]

    @property
    def _adam(self) -> bool:
        return self.estimator.view == "adam"

    def files(
        self, source: OutputSource, chosen: Mapping[str, SequenceABC[str]]
    ) -> tuple[dict[str, list[Sequence]], dict[str, Sequence], dict[tuple[str, str], str]]:
        """Outputs and rows by their ids, and where the match of each output with a row is kept."""
        data = self.pool.data
        outputs = {id_: source.sequences(place, place + 1) for place, id_ in enumerate(source.ids) if id_ in chosen}
        places = {id_: data.position(id_) for ids in chosen.values() for id_ in ids}
        rows = {id_: data.sequences(place, place + 1)[0] for id_, place in places.items()}
        keys = {
            (output, row): f"{self.prefix(outputs[output])}{_digest(rows[row])}.safetensors"
            for output, ids in chosen.items()
            for row in ids
        }
        return outputs, rows, keys

    def prefix(self, output: SequenceABC[Sequence]) -> str:
        """Where the run folder keeps an output's matches: under everything that they depend on but the row."""
        settings, checkpoints = self.pool.gradients, self.checkpoints
        config: dict[str, Any] = {
            "model": model_identity(self.pool.model),
            "model_dtype": self.pool.dtype,
            "checkpoints": [checkpoint.identity() for checkpoint in checkpoints],
            "weights": self.estimator.weights(checkpoints),
            "cosine": self.estimator.by_cosine,
            "modules": settings.modules,
            "autocast": settings.autocast,
            "output": [_digest(part) for part in output],
        }
        if self._adam:
            config["adam"] = settings.adam.model_dump(mode="json")
            config["optimizers"] = [checkpoint.optimizer_identity() for checkpoint in checkpoints]
        return self.pool.run.prefix("matches", config)

    def computed(
        self, rows: Mapping[str, SequenceABC[Sequence]], outputs: Mapping[str, SequenceABC[Sequence]]
    ) -> dict[str, list[TokenInfluence]]:
        """Output id → its rows' influence, summed over the checkpoints; without outputs that do not go."""
        pool, settings = self.pool, self.pool.gradients
        sums: dict[str, list[TokenInfluence]] = {}
        for output, own in rows.items():
            length = sum(len(one.token_ids) for one in outputs[output])
            sums[output] = [TokenInfluence.zeros(len(row.token_ids), length, adam=self._adam) for row in own]
        failed: dict[str, str] = {}
        total = sum(map(len, rows.values())) * len(self.checkpoints)
        with pool.reporter.stage("tokens of examples", total, "examples") as advance:
            for checkpoint, weight in zip(self.checkpoints, self.estimator.weights(self.checkpoints), strict=True):
                at = pool.at(checkpoint)
                network, modules, _ = at.opened()
                adam = at.adam(network, modules, *_place(network)) if self._adam else None
                for output, own in rows.items():
                    if output in failed:
                        continue
                    try:
                        found = token_influences(
                            network, modules, own, outputs[output], adam=adam, autocast=settings.autocast_type,
                            checkpointing=settings.gradient_checkpointing, module_groups=settings.module_groups,
                            on_row=advance,
                        )  # fmt: skip
                    except UncapturedError as error:
                        failed[output] = str(error)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        failed[output] = "they do not fit in memory: try --gradient-checkpointing or --module-groups 4"
                    else:
                        for into, one in zip(sums[output], found, strict=True):
                            into.add(one, weight=weight, cosine=self.estimator.by_cosine)
        for reason in sorted(set(failed.values())):
            pool.reporter.warn(f"which tokens match is not shown: {reason}")
        return {output: own for output, own in sums.items() if output not in failed}


def _place(network: Any) -> tuple[torch.device, torch.dtype]:
    """Where moments are, and in which precision: that of gradients."""
    first = next(parameter for parameter in network.parameters() if parameter.is_floating_point())
    return first.device, torch.float64 if first.dtype == torch.float64 else torch.float32


def _digest(one: Sequence) -> str:
    """Of tokens and weights."""
    digest = hashlib.sha256(np.ascontiguousarray(one.token_ids, dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(one.weights, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def _keep(pool: Pool, key: str, found: TokenInfluence) -> None:
    tensors = {"row": found.row, "output": found.output, "constant": torch.tensor(found.constant, dtype=torch.float64)}
    publish_tensors(pool.run.storage, key, tensors if found.pairs is None else {**tensors, "pairs": found.pairs})


def _kept(pool: Pool, key: str) -> TokenInfluence | None:
    """What the run folder has; None where it has nothing, or that is damaged."""
    known = tensors_if_whole(pool.run.storage, key)
    if known is None:
        return None
    tensors, _ = known
    return TokenInfluence(tensors["row"], tensors["output"], tensors.get("pairs"), float(tensors["constant"]))


@dataclass(frozen=True, slots=True)
class _Side:
    """A text: its tokens' texts, as `token_texts`, and of each one whether it is learned, and said."""

    texts: SequenceABC[tuple[str, int]]
    flags: SequenceABC[tuple[bool, bool]]

    @classmethod
    def of(cls, pool: Pool, entry: TokenizedExample, messages: SequenceABC[Message], options: str = "") -> _Side:
        """Of a row, or of an output with the messages of its prompt."""
        texts, start, flags = token_texts(pool.tokenizer, entry.token_ids.tolist()), 0, []
        said = pool.chat.said(messages, options, entry)
        for _, count in texts:
            part = slice(start, start + count)
            flags.append((bool(entry.supervised[part].any()), bool(said[part].any())))
            start += count
        return cls(texts, flags)

    def matched(self, values: Tensor) -> tuple[MatchedToken, ...]:
        """The tokens with their values `[token]`."""
        own = zip(self.texts, self.joined(values).tolist(), self.flags, strict=True)
        return tuple(MatchedToken(text, value, *flags) for (text, _), value, flags in own)

    def joined(self, values: Tensor) -> Tensor:
        """`[text …]` from `[token …]`."""
        return torch.stack([part.sum(0) for part in values.split([count for _, count in self.texts])])


def _match(id_: str, by: str, found: TokenInfluence, row: _Side, outputs: SequenceABC[_Side]) -> TokenMatch:
    pairs, lengths = None, [sum(count for _, count in one.texts) for one in outputs]
    if found.pairs is not None:
        joined = row.joined(found.pairs)
        parts = [one.joined(part.T).T for one, part in zip(outputs, joined.split(lengths, dim=1), strict=True)]
        pairs = tuple(map(tuple, torch.cat(parts, 1).tolist()))
    across = [one.matched(part) for one, part in zip(outputs, found.output.split(lengths), strict=True)]
    own = row.matched(found.row)
    return TokenMatch(id_, by, found.total, found.constant, own, across[0], pairs, *across[1:])
