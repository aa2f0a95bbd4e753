"""Who counts in a group of rollouts of one prompt, with which reward and which weight.

A rollout that its rule cut has no answer, and whether it was cut depends on what it says: it is not missing at
random. Left out of its group, nothing pushes against drifting into a trap, and the gradient of leaving one can even
turn round. docs/rl.md has the derivation of what each treatment is an estimate of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CutReward = Literal["failure", "probe_mean", "probe_weighted", "exclude"]
Truncated = Literal["grade", "zero", "exclude"]
Floats = NDArray[np.float64]


class Ending(StrEnum):
    """How a rollout ended, as far as its reward is concerned."""

    ANSWERED = "answered"
    TRUNCATED = "truncated"  # at the longest that a rollout may be
    CUT = "cut"  # by the rule
    FAILED = "failed"  # by an engine or the run


@dataclass(frozen=True)
class Graded:
    """A rollout that has ended. `reward` is None where it was not graded, whatever the reason."""

    rollout_id: int
    group: Hashable  # its prompt, in its step
    ending: Ending
    reward: float | None
    would_cut: bool = False  # a probe that the rule would have cut
    penalty: float = 0.0  # <= 0, added to the reward of an answer


@dataclass(frozen=True)
class Treatment:
    """What becomes of rollouts without an answer.

    `failure`: a cut rollout is worth what the worst answer of its step is, penalty included, and no more than 0.
    `probe_mean`: it has the mean
    reward of probes that would have been cut, and is a failure where that is not known.
    `probe_weighted`: it counts nothing, and a probe that would have been cut counts 1 / `probe_share` times, since
    probes are drawn without a look at what they say (Horvitz and Thompson, 1952). Sums are then right on average,
    divided by what does not depend on the draw (`Members.stood_for`). `exclude`: it leaves its group, to compare.
    """

    cut: CutReward = "failure"
    truncated: Truncated = "grade"
    probe_share: float = 0.0
    probe_mean: float | None = None  # reward of recent probes that would have been cut

    def __post_init__(self) -> None:
        if self.cut == "probe_weighted" and not 0.0 < self.probe_share <= 1.0:
            raise ValueError(f"probe_weighted: probe_share = {self.probe_share}: must lie in (0, 1]")

    @property
    def cuts_fail(self) -> bool:
        """Whether a rollout that was cut counts as a failure."""
        return self.cut == "failure" or (self.cut == "probe_mean" and self.probe_mean is None)


@dataclass(frozen=True)
class Members:
    """Rollouts of a step by row: N rewards, their weights, and the number of their group.

    A weight of 0 leaves baseline, loss and denominator alike; its reward is then 0 and means nothing. The
    `penalty` is within `reward`, and is no part of whether a group's answers are all alike; that of a failure is
    what the worst answer lost by its length.
    """

    rollout_ids: tuple[int, ...]
    reward: Floats  # [N]
    weight: Floats  # [N]
    group: NDArray[np.int64]  # [N], 0 .. G - 1 in the order of appearance
    penalty: Floats  # [N], <= 0, of the reward
    stood_for: NDArray[np.bool_] | None = None  # [N], cut ones that weighted probes stand for; None without those
    left_out: Mapping[str, int] = field(default_factory=dict)  # how many, by the reason

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1 if len(self.group) else 0


def members(rollouts: Sequence[Graded], treatment: Treatment) -> Members:
    """Rewards and weights by the treatment; groups are by prompt, never by position."""
    numbers: dict[Hashable, int] = {}
    # Where rewards lie below 0, 0 would be the best that a rollout could come to: it would learn to be cut.
    worst = min([0.0, *(r.reward for r in rollouts if r.reward is not None and math.isfinite(r.reward))])
    rows = [_reward_and_weight(rollout, treatment, worst) for rollout in rollouts]
    left_out = Counter(reason for _, weight, reason in rows if not weight)
    weight = np.array([weight for _, weight, _ in rows], dtype=np.float64)
    answered = weight * [r.ending in (Ending.ANSWERED, Ending.TRUNCATED) for r in rollouts] > 0
    penalty = np.where(answered, [r.penalty for r in rollouts], 0.0)
    reward = np.array([reward for reward, _, _ in rows], dtype=np.float64)
    if treatment.cuts_fail:
        # Of what answers come to, or a penalty on long ones would make being cut the best of a group again.
        lowest = (reward + penalty)[answered].min(initial=worst)
        penalty = np.where([r.ending is Ending.CUT for r in rollouts], lowest - worst, penalty)
    weighted = treatment.cut == "probe_weighted"
    return Members(
        rollout_ids=tuple(r.rollout_id for r in rollouts),
        reward=reward + penalty,
        weight=weight,
        group=np.array([numbers.setdefault(r.group, len(numbers)) for r in rollouts], dtype=np.int64),
        penalty=penalty,
        stood_for=np.array([r.ending is Ending.CUT for r in rollouts], dtype=bool) if weighted else None,
        left_out=dict(left_out),
    )


def _reward_and_weight(rollout: Graded, treatment: Treatment, worst: float) -> tuple[float, float, str]:
    """`worst` is the reward of a failure. The third is why, where the weight is 0."""
    if rollout.ending is Ending.FAILED:
        return 0.0, 0.0, "failed"
    if rollout.ending is Ending.CUT:
        match treatment.cut:
            case "failure":
                return worst, 1.0, ""
            case "probe_mean":
                return worst if treatment.probe_mean is None else treatment.probe_mean, 1.0, ""
            case _:
                return 0.0, 0.0, "cut"
    if rollout.ending is Ending.TRUNCATED and treatment.truncated == "exclude":
        return 0.0, 0.0, "truncated"
    weighs = treatment.cut == "probe_weighted" and rollout.would_cut
    weight = 1.0 / treatment.probe_share if weighs else 1.0
    if rollout.ending is Ending.TRUNCATED and treatment.truncated == "zero":
        return worst, weight, ""
    if rollout.reward is None or not math.isfinite(rollout.reward):
        return 0.0, 0.0, "not graded"
    return rollout.reward, weight, ""
