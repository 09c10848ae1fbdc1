"""NICE through the model's curvature: EK-FAC with policy gradients as targets."""

from __future__ import annotations

from typing import Literal

from gradsift.base.lazy import Tensor
from gradsift.context import Pool, Target
from gradsift.gradients.collect import SequenceSource
from gradsift.influence.ekfac import EKFAC, Directions
from gradsift.influence.estimator import Passes, Targets
from gradsift.influence.nice import PolicyEstimator, PolicyTargets, policy_label
from gradsift.influence.prompts import PromptTarget
from gradsift.warmup.checkpoint import Checkpoint


class NICEEKFAC(EKFAC, PolicyEstimator):
    """NICE's policy gradient of a reward through EK-FAC's inverse; needs no labels.

    `S = −Σ_e w_e λ_e ⟨g, (H_e + λ_e I)⁻¹ Σ_m r_m/M ∇log f(ŷ_m | x; θ_e)⟩`, responses sampled and rewarded at each
    checkpoint: higher = training on the row earns more. Nothing is brought to one length, as NICE's rows are. Factors
    are those of EK-FAC. Beside the fields below it has those of EK-FAC.

    sampling, server, assistant, policy: as in `PolicyEstimator`.
    """

    kind: Literal["nice_ekfac"] = "nice_ekfac"  # type: ignore[assignment]

    @property
    def label(self) -> str:
        own = super().label.removeprefix("EK-FAC").strip(" ()")
        return policy_label("NICE-EK-FAC", self, [own] * bool(own))

    influence = PolicyEstimator.influence

    def sample_directions(self, pool: Pool, source: SequenceSource, checkpoint: Checkpoint, rows: Tensor) -> Tensor:
        """EK-FAC's, without conjugate gradients, of which every sample would cost as many as a target."""
        along, _ = self._of_samples(pool, source, checkpoint).find(pool)
        along[~rows.any(dim=1)] = 0
        return along

    def sample_passes(
        self, pool: Pool, source: SequenceSource | None, checkpoint: Checkpoint | None, rows: int, tokens: float
    ) -> list[Passes]:
        """One over the samples for each group of modules."""
        made = source is not None and checkpoint is not None and self._of_samples(pool, source, checkpoint).made(pool)
        groups = pool.gradients.module_groups
        return [Passes("EK-FAC's samples", groups * rows, groups * tokens, made, held={"factors": 1 / groups})]

    def _of_samples(self, pool: Pool, source: SequenceSource, checkpoint: Checkpoint) -> Directions:
        return self.model_copy(update={"conjugate_gradient": 0}).found(pool, source, checkpoint)

    def _asked(self, source: Targets, target: Target, checkpoint: Checkpoint | None) -> tuple[bool, int, float]:
        assert isinstance(source, PolicyTargets), source
        assert isinstance(target, PromptTarget), target
        if checkpoint is None or not source.there(checkpoint):
            return False, len(source.ids), self.tokens_of(target)
        return super()._asked(source.at(checkpoint), target, checkpoint)
