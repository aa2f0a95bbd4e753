"""On-policy distillation: every token before the cut counts, by the rule's weight where it weighs tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kat_ray.algorithms.base import Credit, EndedStep
from kat_ray.data.accounting import kept_rollouts


@dataclass(frozen=True)
class OnPolicyDistillation:
    """The credit of a token depends on nothing but its rollout; the teacher's signal comes with the rows.

    `teacher_weights` are those of teachers by name, of those that have another than 1.
    """

    teacher_weights: Mapping[str, float] = field(default_factory=dict)

    def credit(self, ended: EndedStep) -> Credit:
        """Every rollout of which a token is kept."""
        return Credit(kept_rollouts(ended.rollouts, ended.specs, self.teacher_weights))
