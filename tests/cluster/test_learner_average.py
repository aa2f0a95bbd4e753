"""The average of the student's weights, and the weights of teachers, in a learner with the real DeepSpeed."""

from dataclasses import replace

import numpy as np
import pytest

from kat_ray.run.checkpoint import CheckpointError
from tests.cluster.ranks import Group, step_of
from tests.support.chunks import random_rollouts

DECAY = 0.75


@pytest.fixture
def group(models):
    """Makes groups of learner ranks that keep an average, and ends them."""
    made = []

    def make(world_size=1, **learner):
        made.append(Group(models, world_size, told={"average_decay": DECAY}, **learner))
        return made[-1]

    yield make
    for one in made:
        one.close()


def average(group):
    update, version = group.all("average", 7)[0]
    assert update.policy_version == version == 7
    return dict(zip(update.names, update.arrays, strict=True))


CASES = [
    pytest.param(1, 1, marks=pytest.mark.integration),
    pytest.param(2, 3, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("world_size", "stage"), CASES)
def test_the_average_is_that_of_the_weights_after_each_step_and_is_resumed(
    group, models, tmp_path, world_size, stage
):
    first = group(world_size, zero_stage=stage)
    expected = first.weights()
    assert all((average(first)[name] == expected[name]).all() for name in expected), "at first the student as given"
    for seed in range(4):
        first.steps(models, [seed])
        if seed == 1:
            first.save(tmp_path / "step-2", models["student"][0])
        new = first.weights()
        expected = {n: np.float32(DECAY) * expected[n] + np.float32(1 - DECAY) * new[n] for n in expected}
    found = average(first)
    assert found.keys() == first.weights().keys() and "lm_head.weight" in found
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert not np.array_equal(array, first.weights()[name])
    first.close()

    resumed = group(world_size, zero_stage=stage)
    resumed.restore(tmp_path / "step-2")
    resumed.steps(models, [2, 3])
    for name, array in average(resumed).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_skipped_step_is_not_in_the_average_and_a_damaged_one_is_named(group, models, tmp_path):
    one = group()
    one.steps(models, [0])
    before = average(one)
    chunk, teacher, kept = step_of(models, random_rollouts(7, seed=1))
    nothing = replace(teacher, topk_logprobs=np.full_like(teacher.topk_logprobs, np.nan))
    assert one.step(chunk, nothing, kept).skipped
    assert all((before[name] == array).all() for name, array in average(one).items())
    one.save(tmp_path / "step-1", models["student"][0])
    (tmp_path / "step-1" / "training" / "average.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the average of the student's weights cannot be read"):
        one.restore(tmp_path / "step-1")


def test_a_teachers_weight_scales_the_gradient_and_not_the_mean(group, models):
    """All rollouts at half the weight have half the gradient."""
    chunk, teacher, kept = step_of(models, random_rollouts(7, seed=3))
    scaled = [replace(k, scale=0.5) for k in kept]
    whole, half = group().step(chunk, teacher, kept), group().step(chunk, teacher, scaled)
    assert half.grad_norm == pytest.approx(whole.grad_norm / 2, rel=1e-4)
    assert half.loss == pytest.approx(whole.loss, rel=1e-5), "the weighted mean of the KL"
    assert half.tokens == whole.tokens
