"""From finished rollouts and rewards to what the learner is given: two masks, weights, metrics."""

import numpy as np
import pytest

from kat_ray.algorithms.policy import PolicyOptimization
from kat_ray.config import PolicyObjective
from kat_ray.data.accounting import FinishedRollout, count_tokens
from kat_ray.types.records import Reward, RolloutOutcome, RolloutSpec, StopReason

LONGEST = 8


def rollout(number, generated, reason=StopReason.EOS, cut=None, confirmed=None, would_cut=None):
    outcome = RolloutOutcome(
        rollout_id=number, stop_reason=reason, scored=generated, cut=cut, confirmed=confirmed, threshold=None,
        minimum=None, probe=would_cut is not None, would_cut=would_cut,
    )  # fmt: skip
    return FinishedRollout(outcome, np.zeros(generated, np.int32), count_tokens(outcome, generated))


# A right answer, one that was cut at 2 (known at 4, 6 generated), a probe that would have been cut, a wrong answer.
GROUP = [
    rollout(0, 3),
    rollout(1, 6, StopReason.TRAPPED, cut=2, confirmed=4),
    rollout(2, 5, would_cut=1),
    rollout(3, 2),
]
REWARDS = {0: 1.0, 2: 0.0, 3: 0.0}
SPECS = [RolloutSpec(i, "p", (7, 8), 0, i == 2, LONGEST) for i in range(4)]


def credit(rollouts=GROUP, rewards=REWARDS, specs=SPECS, share=0.1, **changes):
    rl = PolicyObjective(weight=1.0, advantage="dr_grpo", **changes)
    return PolicyOptimization(rl, LONGEST).credit(
        rollouts, specs, {i: Reward(r) for i, r in rewards.items()}, share
    )


def test_the_policy_is_told_of_the_tokens_up_to_the_confirmation_and_the_teacher_of_those_before_the_cut():
    kept = {k.rollout_id: k for k in credit().kept}
    assert [kept[i].kept for i in range(4)] == [3, 4, 5, 2], "nothing of what came after the decision"
    assert kept[1].weights.tolist() == [1, 1, 0, 0] and kept[0].weights is None
    assert [kept[i].policy.tokens for i in range(4)] == [3, 4, 5, 2]
    assert sum(k.weight for k in kept.values()) == 3 + 2 + 5 + 2
    assert [kept[i].policy.advantage for i in range(4)] == [0.75, -0.25, -0.25, -0.25]
    assert {k.policy.weight for k in kept.values()} == {1 / 14}


def test_weighted_probes_stand_for_what_was_cut():
    found = credit(cut_reward="probe_weighted")
    kept = {k.rollout_id: k for k in found.kept}
    assert kept[1].kept == 2 and kept[1].policy is None, "it teaches by its KL alone"
    values = [kept[i].policy.advantage * kept[i].policy.weight for i in (0, 2, 3)]
    assert values == pytest.approx([0.916667 / 55, -0.833333 / 55, -0.083333 / 55], abs=1e-7)
    assert found.metrics["reward/left_out_cut"] == 1


def test_what_is_left_out_has_its_kl():
    found = credit(rewards={0: 1.0, 3: 0.0}, cut_reward="exclude")
    assert [k.policy is None for k in found.kept] == [False, True, True, False]
    assert found.advantages == {0: 0.5, 3: -0.5}
    assert found.metrics["reward/left_out_not_graded"] == 1 and found.metrics["group/size_min"] == 2


def test_without_a_teacher_no_token_has_a_kl_and_what_has_no_reward_is_not_handed_over():
    whole = [rollout(0, 3), rollout(1, 6), rollout(2, 5)]
    rl = PolicyObjective(weight=1.0, advantage="dr_grpo")
    rewards = {0: Reward(1.0), 2: Reward(0.0)}
    kept = PolicyOptimization(rl, LONGEST, distils=False).credit(whole, SPECS, rewards, 0.0).kept
    assert [(k.rollout_id, k.kept, k.policy.advantage) for k in kept] == [(0, 3, 0.5), (2, 5, -0.5)]
    assert all((k.weights == 0).all() and k.weight == 0 for k in kept)
    assert {k.policy.weight for k in kept} == {1 / 8}


def test_a_failed_rollout_has_nothing():
    failed = [*GROUP[:3], rollout(3, 2, StopReason.FAILED)]
    assert [k.rollout_id for k in credit(failed, {0: 1.0, 2: 0.0}).kept] == [0, 1, 2]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("token_mean", [1 / 14] * 4), ("sequence_sum", [1 / 4] * 4), ("constant", [1 / 32] * 4),
     ("sequence_mean", [1 / 12, 1 / 16, 1 / 20, 1 / 8])],
)  # fmt: skip
def test_each_aggregation_has_its_denominator(aggregate, expected):
    assert [k.policy.weight for k in credit(aggregate=aggregate).kept] == pytest.approx(expected)


def test_what_a_step_came_to():
    metrics = credit().metrics
    assert metrics["reward/mean"] == 0.25 and metrics["group/constant_share"] == 0.0
    assert metrics["advantage/max"] == 0.75 and metrics["advantage/zero_share"] == 0.0
    same = credit(rewards={0: 0.0, 2: 0.0, 3: 0.0}).metrics
    assert same["group/constant_share"] == same["group/all_wrong_share"] == same["advantage/zero_share"] == 1.0
    assert credit([], {}, []).metrics == {}
