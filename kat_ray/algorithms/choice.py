"""Which algorithm a configuration asks for: a run and its replay have one and the same."""

from __future__ import annotations

from kat_ray.algorithms.base import Algorithm
from kat_ray.algorithms.distillation import OnPolicyDistillation
from kat_ray.algorithms.policy import PolicyOptimization
from kat_ray.config import Config


def algorithm_of(config: Config) -> Algorithm:
    """With what is to be learnt from rewards, if anything is."""
    rl, teachers = config.objective.rl, config.used_teachers
    weights = {name: teacher.weight for name, teacher in teachers.items() if teacher.weight != 1.0}
    if not rl.weight:
        return OnPolicyDistillation(weights)
    return PolicyOptimization(rl, config.rollout.max_tokens, bool(teachers), weights)
