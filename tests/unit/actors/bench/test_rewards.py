"""The arithmetic of the comparison on rewards; nothing is timed here."""

import math

import pytest

from actors.bench import rewards
from actors.bench.peer import trl_train
from actors.bench.sides import Step
from actors.learner import schedule
from kat_ray.config import LearnerConfig


def run(seconds, *values):
    return [Step(seconds, 100, reward=v) for v in values]


RUNS = {
    "kat-ray": [run(1, *[0.0] * 5, *[0.4] * 10), run(1, *[0.0] * 5, *[0.6] * 10)],
    "TRL": [run(2, *[0.1] * 5, *[0.5] * 10), run(2, *[0.1] * 5, *[0.3] * 10)],
    "TRL with vLLM": [run(4, *[0.1] * 15)] * 2,
}


def test_speed_is_of_all_seeds_and_rewards_are_compared_where_they_end():
    slow, slower, reward = rewards.figures(RUNS, {}, rewards.SIZE)
    assert (slow.value, slower.value) == (2.0, 4.0)
    assert slow.met and slower.met and "TRL with vLLM" in slower.name
    assert reward.value == pytest.approx(0.5 - 0.4)
    # Each pair lies 0.1 from its mean: a variance of 4 x 0.01 / 2, and twice the root of 0.02 (1/2 + 1/2).
    assert reward.goal == pytest.approx(2 * 0.02**0.5) and reward.met
    assert reward.detail["TRL_rewards_1"][4:6] == [0.1, 0.3]


def test_a_side_that_failed_leaves_its_figures_empty_and_says_why():
    left = {name: RUNS[name] for name in ("kat-ray", "TRL")}
    slow, slower, reward = rewards.figures(left, {"TRL with vLLM": "no engine"}, rewards.SIZE)
    assert slow.met and slower.value is None and slower.note == "no engine" and reward.met
    figures = rewards.figures({}, {"kat-ray": "no disk"}, rewards.SIZE)
    assert [(f.value, f.note) for f in figures] == [(None, "no disk")] * 3


@pytest.mark.parametrize("steps", [1, 51, 200])
def test_both_sides_have_the_same_learning_rate_in_every_step(steps):
    ratio, least = LearnerConfig().warmup_ratio, LearnerConfig().min_lr_ratio
    warm_up = math.ceil(ratio * steps)  # what the peer is told
    ours = [schedule.lr_factor(step, steps, ratio, least) for step in range(steps)]
    assert [trl_train.lr_factor(step, steps, warm_up) for step in range(steps)] == pytest.approx(ours)
    assert ours[0] > 0
