"""Which algorithm a configuration asks for: a run and its replay have one and the same."""

from __future__ import annotations

from kat_ray.algorithms.base import Algorithm
from kat_ray.algorithms.distillation import OnPolicyDistillation
from kat_ray.algorithms.policy import PolicyOptimization
from kat_ray.config import Config


def algorithm_of(config: Config) -> Algorithm:
    """With what is to be learnt from rewards, if anything is."""
    rl = config.objective.rl
    if not rl.weight:
        return OnPolicyDistillation()
    return PolicyOptimization(rl, config.rollout.max_tokens, distils=config.used_teacher is not None)
