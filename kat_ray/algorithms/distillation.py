"""On-policy distillation: every token before the cut counts, by the rule's weight where it weighs tokens."""

from __future__ import annotations

from kat_ray.algorithms.base import Credit, EndedStep
from kat_ray.data.accounting import kept_rollouts


class OnPolicyDistillation:
    """The credit of a token depends on nothing but its rollout; the teacher's signal comes with the rows."""

    def credit(self, ended: EndedStep) -> Credit:
        """Every rollout of which a token is kept."""
        return Credit(kept_rollouts(ended.rollouts, ended.specs))
