"""The weight of a teacher: in the loss of its rollouts' tokens, and in no denominator."""

import numpy as np
import pytest

from kat_ray.algorithms.base import EndedStep
from kat_ray.algorithms.choice import algorithm_of
from kat_ray.config import Config
from kat_ray.data.accounting import FinishedRollout, TokenCounts
from kat_ray.data.batch import collect_samples
from kat_ray.types.records import KeptRollout, Reward, RolloutOutcome, RolloutSpec, StopReason
from tests.support.chunks import stream

TREE = {
    "student": {"path": "a"},
    "teachers": {"math": {"path": "m"}, "code": {"path": "c", "weight": 0.25}},
    "data": {"path": "p.jsonl", "teacher_column": "subject"},
}


def ended(weights=None):
    """Two rollouts of 4 and 2 tokens, one of each teacher."""
    rollouts = [
        FinishedRollout(
            RolloutOutcome(i, StopReason.EOS, n, None, None, None, None, False, None, weights, teacher=name),
            np.arange(n), TokenCounts(n, n, 0, 0), np.zeros(n, np.float32),
        )
        for i, (name, n) in enumerate([("math", 4), ("code", 2)])
    ]  # fmt: skip
    specs = [RolloutSpec(i, "p", (1, 2), 0, False, 9, name) for i, name in enumerate(("math", "code"))]
    return EndedStep(rollouts, specs, {0: Reward(1.0), 1: Reward(0.0)})


@pytest.mark.parametrize("rewards", [False, True])
def test_it_is_that_of_the_rollouts_teacher(rewards):
    more = {"objective": {"rl": {"weight": 1.0}}, "rollout": {"rollouts_per_prompt": 2, "top_p": 1.0}}
    algorithm = algorithm_of(Config.model_validate(TREE | (more if rewards else {})))
    math, code = algorithm.credit(ended()).kept
    assert (math.scale, code.scale) == (1.0, 0.25)
    assert (math.weight, code.weight) == (4.0, 2.0), "the denominator is the kept tokens of both"


def test_it_multiplies_the_weights_of_the_rule():
    chunks, teacher = stream({0: (np.array([1, 2]), np.array([3, 4, 5])), 1: (np.array([1]), np.array([6, 7]))}, 2)
    own = np.array([1.0, 0.5, 0.0], np.float32)
    kept = [KeptRollout(0, 2, 3, own, scale=0.5), KeptRollout(1, 1, 2, scale=2.0), KeptRollout(1, 1, 2)]
    first, second, third = collect_samples(chunks, teacher, kept)
    assert first.weights.tolist() == [0.5, 0.25, 0.0] and second.weights.tolist() == [2.0, 2.0]
    assert third.weights.tolist() == [1.0, 1.0] and first.weights.dtype == second.weights.dtype == np.float32
