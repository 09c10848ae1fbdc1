"""Policy gradients: sampled responses weighted by their rewards, for the gradient engine (NICE, section 3.1).

The engine sums gradients of weighted losses, so a policy gradient is a choice of weights: for samples ŷ_m of a prompt

    ∇L_r = −(1/M) Σ_m w_m ∇log f(ŷ_m | x) = Σ_m c_m ∇NLL(ŷ_m),   c_m = w_m / M,

the gradient of minus the expected reward: like a labelled target's, it points where the model gets worse, and a pool
example whose gradient agrees with it raises the reward when it is trained on. Zero weights are not run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.checks import float_array, to_float64
from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Settings
from gradsift.base.types import Sequence as TokenSequence
from gradsift.base.types import TokenizedExample
from gradsift.generation.sampling import Response

Variant = Literal["plain", "discrete", "rejection", "weighted_rejection", "imitation", "ppo"]
Baseline = Literal["none", "mean", "leave_one_out"]

MOST_ROWS = 32  # that stand for a prompt's samples in `SampleRows`, for which more are taken together
_MEANS = ("rejection", "weighted_rejection", "imitation")

# Rewards that differ by less than this share of the largest are equal: what rounding leaves of a constant reward would
# otherwise be a direction of its own once rows are normalised.
_ROUNDING = 1e-12


class PolicyGradient(Settings):
    """How samples and rewards become a gradient; the defaults are the paper's.

    variant: `plain` weighs each sample by its reward; `discrete` by 1 where the reward is positive (NICE, App. I.3);
        `rejection` is the mean loss gradient of the samples with positive reward; `weighted_rejection`, which the
        authors' code calls rejection, the mean of reward times loss gradient over these; `imitation` the mean loss
        gradient of all samples, whatever they earn (an assistant's: LESS+GPT, App. I.2); `ppo` weighs by advantages,
        the rewards of a prompt's samples with their mean taken off and divided by their standard deviation (our reading
        of App. I.1: on-policy, the clipped surrogate's gradient is that).
    baseline: taken off the rewards of `plain` and `discrete`. `leave_one_out`, the mean of the prompt's other samples,
        leaves the expectation as it is; `mean`, over all of them, multiplies it by 1 − 1/M.
    logprob_reduction: of log f over a response's tokens; `mean` weighs tokens of long responses less.
    importance_weights: f/q for samples drawn from a warped distribution q, normalised within each prompt (for `ppo` per
        token, with clipping). What q never draws stays missing.
    fallback: what stands for a prompt in which no sample has any weight: `none`, a zero row, or the `label`, the row's
        own answer with weight 1 (the authors' `worst_case_protect`, where it is weighed by its own reward).
    clip: ε of `ppo`'s surrogate; acts with importance weights only, as the ratio is 1 without.
    """

    variant: Variant = "plain"
    baseline: Baseline = "none"
    logprob_reduction: Literal["sum", "mean"] = "sum"
    importance_weights: bool = False
    fallback: Literal["none", "label"] = "none"
    clip: float = Field(default=0.2, gt=0)

    def model_post_init(self, _context: object) -> None:
        """Refuse what does not go together."""
        _refuse_unfit(self.variant, self.baseline)
        if self.variant in _MEANS and self.importance_weights:
            raise ConfigError(
                f"importance_weights do not go with the variant {self.variant}: its mean is over what it accepts"
            )

    @property
    def label(self) -> str:
        """What departs from the paper's defaults, in words; empty where nothing does."""
        parts: list[str] = [self.variant.replace("_", " ")] * (self.variant != "plain")
        parts += [f"{self.baseline.replace('_', '-')} baseline"] * (self.baseline != "none")
        parts += ["token mean"] * (self.logprob_reduction == "mean") + ["f/q"] * self.importance_weights
        parts += ["or the label"] * (self.fallback == "label")
        return ", ".join(parts)


def policy_coefficients(rewards: Tensor, *, variant: Variant = "plain", baseline: Baseline = "none") -> Tensor:
    """c_m of one prompt's samples, so that Σ_m c_m ∇NLL(ŷ_m) is the gradient of minus the expected reward.

    With r the rewards (1[r > 0] for `discrete`) of M samples, [sample]:

        plain, discrete:  c = (r − b) / M     b: 0, mean(r), or for each sample the mean of the others
        rejection:        c = 1[r > 0] / #(r > 0); weighted_rejection: r·1[r > 0] / #(r > 0); imitation: 1 / M
        ppo:              c = (r − mean(r)) / std(r) / M     std with M − 1

    (NICE, section 3.1, App. I.1 and I.3.) Where nothing distinguishes the samples (a constant reward with a baseline,
    one sample with a baseline, no positive reward) all are 0. Float64 [sample], in the unit of the rewards (`discrete`,
    `rejection` and `ppo`: none).

    Raises:
        ShapeError: not [sample], or no sample.
        NonFiniteError: a reward is NaN or infinite.
        ConfigError: a baseline with a rejection or `ppo`.

    Example:
        >>> policy_coefficients(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
        [0.25, 0.0, 0.0, 0.0]
        >>> policy_coefficients(torch.tensor([1.0, 0.0]), baseline="leave_one_out").tolist()
        [0.5, -0.5]
    """
    _refuse_unfit(variant, baseline)
    r = to_float64(float_array("rewards", rewards, "sample"))
    samples = len(r)
    if variant in _MEANS:
        accepted = torch.ones_like(r) if variant == "imitation" else (r > 0).double()
        weights = r.clamp_min(0) if variant == "weighted_rejection" else accepted
        return weights / accepted.sum().clamp_min(1)
    if variant == "discrete":
        r = (r > 0).double()
    if variant == "plain" and baseline == "none":
        return r / samples
    centred = r - r.mean() if variant == "ppo" or baseline != "none" else r.clone()
    centred[centred.abs() <= _ROUNDING * r.abs().max()] = 0
    if variant == "ppo":
        spread = centred.std() if samples > 1 else centred.new_zeros(())
        return centred / spread / samples if float(spread) > 0 else torch.zeros_like(r)
    if baseline == "leave_one_out" and samples > 1:
        centred = centred * samples / (samples - 1)  # r_m − mean of the others
    return centred / samples


def importance_shares(log_ratios: Sequence[Tensor]) -> Tensor:
    """Self-normalised importance weights of one prompt's samples, with mean 1: `M·ρ_m / Σ_n ρ_n`, float64 [sample].

    ρ_m = Π_t f(ŷ^t)/q(ŷ^t), of log f − log q of each sample's tokens, [token]. The common factor of a prompt vanishes
    where rows are normalised, so nothing is lost against ρ itself, and it cannot overflow.

    Example:
        >>> importance_shares([torch.zeros(3), torch.zeros(5)]).tolist()
        [1.0, 1.0]
    """
    if not log_ratios:
        raise ShapeError("there is no sample to weigh: pass at least one")
    return _shares(torch.stack([to_float64(float_array("log_ratios", ratio, "token")).sum() for ratio in log_ratios]))


def _shares(totals: Tensor) -> Tensor:
    return torch.softmax(totals, dim=0) * len(totals)


def clipped_ratios(log_ratio: Tensor, advantage: float, clip: float) -> Tensor:
    """ρ_t where PPO's surrogate has a gradient, 0 where it is clipped; float64 [token].

    The gradient of `min(ρA, clamp(ρ, 1 − ε, 1 + ε)·A)` by log f is ρA, or 0 where ρ > 1 + ε with A > 0 or ρ < 1 − ε
    with A < 0 (Schulman et al. 2017, equation 7). `log_ratio` is log f − log q of a response's tokens, A its
    `advantage` and ε `clip`.

    Example:
        >>> clipped_ratios(torch.tensor([0.0, 1.0]), 1.0, 0.2).tolist()
        [1.0, 0.0]
    """
    ratio = to_float64(float_array("log_ratio", log_ratio, "token")).exp()
    clipped = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return ratio.masked_fill(clipped, 0.0)


def label_sequence(
    prompt_ids: NDArray[np.int32], label: TokenizedExample, reduction: Literal["sum", "mean"]
) -> TokenSequence:
    """A row's own answer as an accepted sample: weight 1 (1/T for the mean) on each of the T tokens of its last turn.

    `prompt_ids` are the row up to its answer, `label` is the whole row.
    """
    own = label.supervised.copy()
    own[: len(prompt_ids)] = False
    weights = own.astype(np.float32)
    if reduction == "mean":
        weights /= max(1, int(own.sum()))
    return TokenSequence(0, label.token_ids, weights)


def weighted_sequences(
    responses: Sequence[Response], rewards: Sequence[float | None], gradient: PolicyGradient
) -> tuple[TokenSequence, ...]:
    """One prompt's responses as weighted sequences of row 0, longest first; those of weight zero are left out.

    The prompt's tokens weigh nothing, a response's tokens c_m each (c_m/T_m for the mean over its T_m tokens), a
    sampled stop token included. A response with a reward of None is no sample.

    Raises:
        ConfigError: importance weights of responses that came without log-probabilities.
    """
    own, values = _rewarded(responses, rewards)
    if not own:
        return ()
    coefficients = policy_coefficients(values, variant=gradient.variant, baseline=gradient.baseline).tolist()
    factors = _clipped(own, values, gradient)
    if gradient.importance_weights and gradient.variant != "ppo":
        factors = importance_shares([_log_ratio(response) for response in own]).tolist()
    sequences = []
    for response, coefficient, factor in zip(own, coefficients, factors, strict=True):
        sequence = _as_sequence(response, coefficient * factor, gradient)
        if sequence.weights.any():
            sequences.append(sequence)
    # Batches are filled in this order, and neighbours of one length need no padding.
    return tuple(sorted(sequences, key=lambda sequence: -len(sequence.token_ids)))


def _rewarded(responses: Sequence[Response], rewards: Sequence[float | None]) -> tuple[list[Response], Tensor]:
    """Those that have a reward, and theirs, float64 [sample]."""
    known = [(response, reward) for response, reward in zip(responses, rewards, strict=True) if reward is not None]
    return [response for response, _ in known], torch.tensor([reward for _, reward in known], dtype=torch.float64)


def _clipped(responses: Sequence[Response], rewards: Tensor, gradient: PolicyGradient) -> Sequence[Tensor | float]:
    """Of each sample what its tokens weigh beside its coefficient: ratios for `ppo` with importance weights, else 1."""
    if not responses or not gradient.importance_weights or gradient.variant != "ppo":
        return [1.0] * len(responses)
    advantages = policy_coefficients(rewards, variant=gradient.variant, baseline=gradient.baseline).tolist()
    return [clipped_ratios(_log_ratio(r), a, gradient.clip) for r, a in zip(responses, advantages, strict=True)]


def _as_sequence(response: Response, weight: Tensor | float, gradient: PolicyGradient) -> TokenSequence:
    """A response whose tokens weigh so much, together or each, and its prompt's nothing."""
    own = np.broadcast_to(np.asarray(weight, dtype=np.float64), len(response.token_ids))
    if gradient.logprob_reduction == "mean":
        own = own / len(own)
    weights = np.concatenate([np.zeros(len(response.prompt_ids)), own]).astype(np.float32)
    return TokenSequence(0, np.concatenate([response.prompt_ids, response.token_ids]).astype(np.int32), weights)


@dataclass(frozen=True)
class SampleRows:
    """One prompt's samples as rows of their own, of which the policy gradient of any choice of them is a weighted sum.

    A row is one sample's ∇NLL; weights are what `policy_coefficients` gives for the choice, its baseline included, and
    so exact. Of more than `MOST_ROWS` samples a row is the sum over a group, each at its weight among all samples: a
    choice of groups then has the baseline of all. With importance weights, `ppo` clips as it does among all. A label
    that stands for samples without weight is the last row.
    """

    numbers: tuple[tuple[int, ...], ...]  # of the samples, by row
    sequences: tuple[tuple[TokenSequence, ...], ...]  # of each row; none where no choice could give it any weight
    gradient: PolicyGradient
    rewards: Tensor | None = None  # float64 [row], or None of groups
    ratios: Tensor | None = None  # log f/q of each sample, float64 [row], where the weights are shares by it
    label: TokenSequence | None = None

    @classmethod
    def of(
        cls,
        responses: Sequence[Response],
        rewards: Sequence[float | None],
        gradient: PolicyGradient,
        label: TokenSequence | None = None,
    ) -> SampleRows:
        """The rows of some responses to one prompt, those without a reward left out, and of what stands for none."""
        own, values = _rewarded(responses, rewards)
        shared = gradient.importance_weights and gradient.variant != "ppo"
        ratios = torch.stack([_log_ratio(response).sum() for response in own]) if shared and own else None
        units = _clipped(own, values, gradient)
        sequences = [_as_sequence(response, unit, gradient) for response, unit in zip(own, units, strict=True)]
        numbers = [(response.number,) for response in own]
        if len(own) <= MOST_ROWS:
            weighed = [_could_weigh(values, place, gradient) for place in range(len(own))]
            rows = tuple((sequence,) * weigh for sequence, weigh in zip(sequences, weighed, strict=True))
            return cls(tuple(numbers), rows, gradient, values, ratios, label)
        weights = _weights(values, ratios, torch.ones(1, len(own), dtype=torch.int64), gradient)[0].tolist()
        scaled = [replace(s, weights=s.weights * np.float32(w)) for s, w in zip(sequences, weights, strict=True)]
        groups = [range(start, len(own), MOST_ROWS) for start in range(MOST_ROWS)]
        return cls(
            tuple(tuple(number for place in group for number in numbers[place]) for group in groups),
            tuple(tuple(scaled[place] for place in group if weights[place]) for group in groups),
            gradient,
            label=label,
        )

    def rows(self) -> dict[str, tuple[TokenSequence, ...]]:
        """The sequences of each row, by a name that is its own within the prompt."""
        named = {str(own[0]): sequences for own, sequences in zip(self.numbers, self.sequences, strict=True)}
        return named if self.label is None else {**named, "label": (self.label,)}

    def weights(self, counts: Tensor) -> Tensor:
        """What each row weighs where it is drawn so often.

        Args:
            counts: whole numbers [draw row].

        Returns:
            [draw row], float64; the label's 1 where no other row of a draw weighs anything, else 0.
        """
        if self.rewards is None:
            found = counts.double() * (counts.shape[1] / counts.sum(dim=1, keepdim=True).clamp_min(1))
        else:
            found = _weights(self.rewards, self.ratios, counts, self.gradient)
        if self.label is None:
            return found
        silent = ~(found * torch.tensor([float(bool(own)) for own in self.sequences])).any(dim=1, keepdim=True)
        return torch.cat([found, silent.double()], dim=1)


def _weights(rewards: Tensor, ratios: Tensor | None, counts: Tensor, gradient: PolicyGradient) -> Tensor:
    found = torch.zeros(counts.shape, dtype=torch.float64)
    places = torch.arange(len(rewards))
    for draw, own in enumerate(counts):
        drawn = places.repeat_interleave(own)
        if len(drawn):
            weights = policy_coefficients(rewards[drawn], variant=gradient.variant, baseline=gradient.baseline)
            weights = weights if ratios is None else weights * _shares(ratios[drawn])
            found[draw].index_add_(0, drawn, weights)
    return found


def _could_weigh(rewards: Tensor, place: int, gradient: PolicyGradient) -> bool:
    """Whether a sample has any weight alone, or beside the sample that earned least or most."""
    for others in ([], [int(rewards.argmin())], [int(rewards.argmax())]):
        own = rewards[[place, *others]]
        if bool(policy_coefficients(own, variant=gradient.variant, baseline=gradient.baseline)[0]):
            return True
    return False


@dataclass(frozen=True)
class PolicySource:
    """Prompts as rows of policy gradients, for `collect`: each row is the weighted sum of its responses' losses.

    The prompt is run anew for each response: sharing it would need an attention mask of trees.
    """

    ids: list[str]  # of the prompts
    # Each prompt's weighted sequences; none where no response has any weight, and the gradient is zero.
    rows: tuple[tuple[TokenSequence, ...], ...] = field(repr=False)
    template: str  # fingerprint of the pool's chat template, with which the prompts were rendered
    loss: str = "policy"

    @classmethod
    def of(
        cls,
        responses: Mapping[str, Sequence[Response]],
        rewards: Mapping[tuple[str, int], float | None],
        gradient: PolicyGradient,
        *,
        template: str,
        labels: Mapping[str, TokenSequence] | None = None,
    ) -> PolicySource:
        """The rows of some prompts; one without any response is a row of zeros.

        Rewards are by `Response.key`, so that they stay with their response whatever was done first; a response without
        one, or of None, is left out. `labels` stand for prompts in which no response has any weight (`fallback`).
        """
        rows = tuple(
            weighted_sequences(own, [rewards.get(response.key) for response in own], gradient)
            or ((labels[id_],) if labels is not None and id_ in labels else ())
            for id_, own in responses.items()
        )
        return cls(list(responses), rows, template)

    @property
    def signal(self) -> list[bool]:
        """Whether any response of a prompt has a weight."""
        return [bool(row) for row in self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """Of ids, tokens and weights: samples, rewards and settings that give the same rows are the same."""
        digest = hashlib.sha256()
        for id_, row in zip(self.ids, self.rows, strict=True):
            digest.update(json.dumps([id_, [len(sequence.token_ids) for sequence in row]]).encode())
            for sequence in row:
                digest.update(sequence.token_ids.tobytes() + sequence.weights.tobytes())
        return digest.hexdigest()[:16]

    def token_counts(self) -> list[int]:
        """Tokens of each row, over its sequences."""
        return [sum(len(sequence.token_ids) for sequence in row) for row in self.rows]

    def longest(self) -> int:
        """Tokens of the longest sequence, 0 where there is none."""
        return max((len(sequence.token_ids) for row in self.rows for sequence in row), default=0)

    def sequences(self, start: int, stop: int) -> list[TokenSequence]:
        """The sequences of rows `[start, stop)`, whose `row` counts from `start`."""
        return [
            replace(sequence, row=position) for position, row in enumerate(self.rows[start:stop]) for sequence in row
        ]


def _refuse_unfit(variant: Variant, baseline: Baseline) -> None:
    if variant in (*_MEANS, "ppo") and baseline != "none":
        why = "its advantages have one already" if variant == "ppo" else "it accepts by the rewards as they are"
        raise ConfigError(f"baseline {baseline} does not go with the variant {variant}: {why}; leave it out")


def _log_ratio(response: Response) -> Tensor:
    if response.logprobs is None or response.sampler_logprobs is None:
        raise ConfigError(
            f"importance_weights need the log-probabilities of f and of the sampler, and response {response.number} to "
            f"prompt {response.prompt_id!r} came without: sample from the local model, or leave importance_weights out"
        )
    ratio = response.logprobs.astype(np.float64) - response.sampler_logprobs.astype(np.float64)
    return torch.from_numpy(ratio)
