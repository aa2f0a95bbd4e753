"""What the driver asks of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kat_ray.data.accounting import FinishedRollout
from kat_ray.types.records import KeptRollout, Reward, RolloutSpec


@dataclass(frozen=True)
class EndedStep:
    """A step's rollouts, each at its end, and what is known of their worth."""

    rollouts: Sequence[FinishedRollout]
    specs: Sequence[RolloutSpec]  # that they were made from
    rewards: Mapping[int, Reward] = field(default_factory=dict)  # by rollout id, of those that were graded
    probe_share: float = 0.0  # chance with which a rollout was a probe
    # `Credit.probe_rewards` of the step before: of earlier probes that the rule would have cut, the newest last.
    probe_rewards: Sequence[float] = ()


class RolloutCredit(NamedTuple):
    """What a rollout has in the policy's loss."""

    reward_weight: float  # what it counts in its group: 1, 0, or 1 / probe_share
    advantage: float | None  # None where it counts nothing
    policy_tokens: int
    policy_weight: float  # of each of these tokens


@dataclass(frozen=True)
class Credit:
    """What the learner is to learn of a step's rollouts."""

    kept: list[KeptRollout]  # the learner's work list, in the order of rollout ids
    advantages: Mapping[int, float] = field(default_factory=dict)  # by rollout id, of those that have one
    metrics: Mapping[str, float] = field(default_factory=dict)
    reward_weights: Mapping[int, float] = field(default_factory=dict)  # by id, of all where there are rewards
    probe_rewards: tuple[float, ...] = ()  # what the next step's `credit` is given; part of a checkpoint
    groups: int | None = None  # whose rewards differ, so that something is learnt; None where that is not asked

    def by_rollout(self) -> dict[int, RolloutCredit]:
        """Of every rollout by its id; empty where nothing is learnt from rewards."""
        policies = {k.rollout_id: k.policy for k in self.kept if k.policy is not None}
        return {
            i: RolloutCredit(
                weight, self.advantages.get(i), policies[i].tokens if i in policies else 0,
                policies[i].weight if i in policies else 0.0,
            )
            for i, weight in self.reward_weights.items()
        }  # fmt: skip


class Algorithm(Protocol):
    """Gives the tokens of finished rollouts their credit, before a batch is handed over to the learner.

    Its counterpart at the learner is `kat_ray.losses.term.LossTerm`, which makes a loss of credit and targets.
    """

    def credit(self, ended: EndedStep) -> Credit:
        """Of whose first tokens the loss is made, and how much each weighs."""
