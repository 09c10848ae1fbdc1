"""NICE through a whole training: MAGIC on the policy-gradient surrogate at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError
from gradsift.context import Pool, Target
from gradsift.influence.estimator import Influence, Targets
from gradsift.influence.magic import MAGIC
from gradsift.influence.nice import PolicyEstimator, PolicyTargets, policy_label
from gradsift.influence.replay import Replay
from gradsift.influence.smooth import Ending
from gradsift.warmup.checkpoint import Checkpoint


class NICEMAGIC(MAGIC, PolicyEstimator):
    """How a reward after a whole fine-tuning changes with a row's weight: NICE's policy gradient, MAGIC's way back.

    Responses are sampled at the end of MAGIC's training, θ_T, and rewarded. With both held, the training is gone back
    through for the mean over prompts of F = −(1/M) Σ_m r_m log f(ŷ_m | x; θ_T), whose gradient is NICE's. Scores are
    −∂F/∂w: higher = training on the row earns more. Prompts' gradients are not brought to one length, as NICE's are.
    Beside the fields below it has those of MAGIC.

    sampling, assistant, policy: as in `PolicyEstimator`; no server has the end of this training.
    """

    kind: Literal["nice_magic"] = "nice_magic"  # type: ignore[assignment]

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        if self.server is not None:
            raise ConfigError(
                "nice_magic samples at the end of a training of its own, which no server has: leave the server out, or "
                "use nice"
            )

    @property
    def label(self) -> str:
        own = super().label.removeprefix("MAGIC").strip(" ()")
        return policy_label("NICE-MAGIC", self, [own] * bool(own))

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        assert target is not None, self
        targets = self.targets(pool, target)
        found = targets.told(self.gone_back(pool, target, targets))
        identity = {"targets": [targets.at(one).fingerprint for one in targets.checkpoints]}
        return replace(found, identity=found.identity | identity)

    def ends(self, pool: Pool, target: Target) -> list[Checkpoint | None]:
        """Those of its trainings."""
        overlap = {skip.id for skip in target.overlap}
        return [self._replay(pool, overlap, pool.seed + number)[0].published for number in range(self.seeds)]

    def _ending(
        self, source: Targets, replay: Replay, groups: NDArray[np.int64], *, there: bool = False
    ) -> Ending | None:
        assert isinstance(source, PolicyTargets), source
        if there and (replay.published is None or not source.there(replay.published)):
            return None
        own = source.at(replay.checkpoint())
        if not there:
            source.check()
        return Ending(own, groups)
