"""What a checkpoint holds of a run beside the learner: `training/state.json`.

Whatever an earlier version did not write has a default here, which is its value before the first step.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.carried import Carried
from kat_ray.run.checkpoint import Loaded
from kat_ray.run.curriculum import Standing
from kat_ray.types.records import StopReason

Count = Annotated[int, Field(strict=True, ge=0)]
Seconds = Annotated[float, Field(strict=True, ge=0)]


class _Saved(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")


class TotalsState(_Saved):
    """`kat_ray.run.summary.Totals`."""

    steps: Count = 0
    started: Count = 0
    ended: dict[StopReason, Count] = {}
    tokens: dict[str, Count] = {}
    teacher_tokens: dict[str, Count] = {}


class GuardsState(_Saved):
    """`CollapseGuards`: values of the first steps by metric, and three counts by guard."""

    first: dict[str, list[float]] = {}
    beyond: dict[str, Count] = {}
    within: dict[str, Count] = {}
    said: dict[str, Count] = {}


class SkipsState(_Saved):
    """`SkipGuard`."""

    in_a_row: Count = 0
    total: Count = 0


class TailState(_Saved):
    """`TailReport`."""

    said: float | None = None


class HeldOutState(_Saved):
    """`HeldOutWatch`."""

    total: float = 0.0
    steps: Count = 0
    reward: float | None = None
    shares: list[float] = []
    fall: float | None = None


class WatchState(_Saved):
    """`StepGuards`."""

    guards: GuardsState = GuardsState()
    skips: SkipsState = SkipsState()
    tail: TailState = TailState()
    held_out: HeldOutState = HeldOutState()
    leak: HeldOutState = HeldOutState()


class RunState(_Saved):
    """A run between two steps.

    A checkpoint of an earlier version has no `version`; one that is not listed here is refused.
    """

    version: Literal[1] = 1
    done: Count = 0  # optimiser steps
    rule: dict[str, Any] | None = None  # the termination rule's calibration; None: an empty one
    probe_rewards: list[float] = []  # `Credit.probe_rewards` of the last step
    curriculum: dict[str, tuple[Count, Count, Count]] = {}  # `Standing` by family
    prompts_taken: Count | None = None  # from their order; an earlier version took as many in every step
    totals: TotalsState = TotalsState()
    evaluations: dict[str, EvalResult] = {}  # "before", "after", and of teachers
    evaluated: Count | None = None  # steps done at the last evaluation
    positions: dict[str, Count] = {}  # bytes of the records that grow, by file name
    watch: WatchState = WatchState()
    seconds: Seconds = 0.0  # that the run has taken, all its processes together
    prompts: dict[str, str] = {}  # digests, by the section of the configuration that names the file
    reward_files: dict[str, str] = {}  # digests of the files of reward functions, by path

    @classmethod
    def of(cls, loaded: Loaded | None) -> RunState:
        """As a checkpoint holds it, or as before the first step; `CheckpointError` names file and key."""
        return cls() if loaded is None else loaded.state_as(cls)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> RunState:
        """What `to_json` gave; pydantic's `ValidationError` where it is something else."""
        return cls.model_validate(state)

    def carried(self, prompts_per_step: int) -> Carried:
        """What the steps that are done leave to the next."""
        taken = self.done * prompts_per_step if self.prompts_taken is None else self.prompts_taken
        standings = {family: Standing(*counts) for family, counts in self.curriculum.items()}
        return Carried(taken, tuple(self.probe_rewards), standings)

    def to_json(self) -> dict[str, Any]:
        """A copy of everything, which does not change when the run goes on."""
        # The rule's part as it is: what JSON would change of it is its author's fault, and is refused by `commit`.
        return self.model_dump(mode="json") | {"rule": copy.deepcopy(self.rule)}
