"""The base of every method and stage configuration: an immutable, validated value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen value whose fields are the whole configuration; unknown fields are refused.

    The same class is what Python code constructs, what a recipe holds and what the command line fills.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
