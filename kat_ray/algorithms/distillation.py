"""On-policy distillation: every token before the cut counts, by the rule's weight where it weighs tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kat_ray.algorithms.base import Credit
from kat_ray.data.accounting import FinishedRollout, kept_rollouts
from kat_ray.types.records import Reward, RolloutSpec


class OnPolicyDistillation:
    """The credit of a token depends on nothing but its rollout; the teacher's signal comes with the rows."""

    def credit(
        self,
        rollouts: Sequence[FinishedRollout],
        specs: Sequence[RolloutSpec],
        rewards: Mapping[int, Reward],
        probe_share: float,
        probe_rewards: Sequence[float] = (),
    ) -> Credit:
        """Every rollout of which a token is kept."""
        return Credit(kept_rollouts(rollouts, specs))
