"""Every metric, as settings name them by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gradsift.evaluation.grading import Grading
from gradsift.evaluation.harness import LMEval
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mean_reward import MeanReward
from gradsift.evaluation.pairwise import Pairwise
from gradsift.evaluation.preferences import Preferences

_Any = HeldOutLoss | Preferences | MeanReward | LMEval | Pairwise | Grading
AnyMetric = Annotated[_Any, Field(discriminator="kind")]
