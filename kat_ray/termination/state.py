"""What rules save of themselves in a checkpoint, and check when they are given it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kat_ray.errors import UserError


class RuleState(BaseModel):
    """Base of all rules' states; of a rule that remembers nothing, the state itself."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class CalibrationState(RuleState):
    """Of rules that calibrate a threshold."""

    buffer: list[float]  # minima m(y), oldest first, nats
    threshold: float | None  # of the step that was last started, nats


class StairsState(RuleState):
    """Of one rollout; see staircase.py."""

    value: list[float]  # nats, falling
    share: list[float]  # of its KL that the cut would remove, falling


class BudgetCalibrationState(RuleState):
    """Of rules whose threshold follows from what cuts would remove."""

    stairs: list[StairsState]  # oldest first
    rollouts: int = Field(0, ge=0)  # that ended in the last step
    threshold: float | None  # of the step that was last started, nats


class BudgetState(RuleState):
    """Of rules that bound the length of rollouts by how many were full."""

    budget: int | None = Field(ge=1)  # tokens
    misses: int = Field(ge=0)  # steps in a row in which too few were


S = TypeVar("S", bound=RuleState)


def read_state(kind: type[S], state: Mapping[str, Any]) -> S:
    """The state as what the rule saves; `UserError` where it is another rule's, or damaged."""
    try:
        return kind.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"the termination rule cannot go on from the state that was saved: {where}: {first['msg']}; resume "
            "with the termination.rule that the run was started with"
        ) from error
