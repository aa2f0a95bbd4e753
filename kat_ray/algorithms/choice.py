"""Which algorithm a configuration asks for: a run and its replay have one and the same."""

from __future__ import annotations

from kat_ray.algorithms.base import Algorithm
from kat_ray.algorithms.distillation import OnPolicyDistillation
from kat_ray.algorithms.policy import PolicyOptimization
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.termination import RunFacts, make_rule


def algorithm_of(config: Config) -> Algorithm:
    """With what is to be learnt from rewards, if anything is."""
    rl, teachers = config.objective.rl, config.used_teachers
    weights = {name: teacher.weight for name, teacher in teachers.items() if teacher.weight != 1.0}
    if not rl.weight:
        return OnPolicyDistillation(weights)
    return PolicyOptimization(rl, config.rollout.max_tokens, bool(teachers), weights)


def check_rule(config: Config) -> None:
    """The termination rule can be made, and gives the probes that rewards ask for; UserError otherwise."""
    rule = make_rule(config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))
    cuts = config.objective.rl
    if cuts.weight and cuts.cut_reward.startswith("probe") and rule.budget is not None:
        raise UserError(
            f"objective.rl.cut_reward = {cuts.cut_reward!r}: termination.rule = {config.termination.rule!r} bounds "
            "lengths, and does not say which probes it would have ended; use 'failure' or 'exclude'"
        )
