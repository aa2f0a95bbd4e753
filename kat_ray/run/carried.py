"""What a step leaves to the next one, beside the learner's state and the rule's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kat_ray.run.curriculum import Standing


@dataclass(frozen=True)
class Carried:
    """As a checkpoint holds it, and the same where the next step was sampled ahead."""

    prompts: int = 0  # taken from their order so far
    probe_rewards: tuple[float, ...] = ()  # `Credit.probe_rewards`
    curriculum: Mapping[str, Standing] = field(default_factory=dict)  # by family

    @property
    def levels(self) -> dict[str, int]:
        """Of a curriculum's families."""
        return {family: standing.level for family, standing in self.curriculum.items()}
