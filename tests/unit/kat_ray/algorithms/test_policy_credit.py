"""From finished rollouts and rewards to what the learner is given: two masks, weights, metrics."""

from collections import Counter
from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np
import pytest

from kat_ray.algorithms.base import EndedStep
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
        EndedStep(rollouts, specs, {i: Reward(r) for i, r in rewards.items()}, share)
    )


def test_the_policy_is_told_of_the_tokens_up_to_the_confirmation_and_the_teacher_of_those_before_the_cut():
    kept = {k.rollout_id: k for k in credit().kept}
    assert [kept[i].kept for i in range(4)] == [3, 4, 5, 2], "nothing of what came after the decision"
    assert kept[1].weights.tolist() == [1, 1, 0, 0] and kept[0].weights is None
    assert [kept[i].policy.tokens for i in range(4)] == [3, 4, 5, 2]
    assert sum(k.weight for k in kept.values()) == 3 + 2 + 5 + 2
    assert [kept[i].policy.advantage for i in range(4)] == [0.75, -0.25, -0.25, -0.25]
    assert {k.policy.weight for k in kept.values()} == {1 / 14}


def test_the_stop_token_is_in_both_masks_and_an_engine_s_word_for_it_counts():
    """Elsewhere it was masked, never learnt, and answers that ended on another stop id were called truncated."""
    ended = [rollout(0, 3), rollout(1, LONGEST), rollout(2, LONGEST, StopReason.MAX_TOKENS)]
    found = credit(ended, {0: 1.0, 1: 0.0, 2: 0.0}, truncated="exclude")
    kept = {k.rollout_id: k for k in found.kept}
    for i in (0, 1):  # the second stops with the last token that it may have
        generated = ended[i].counts.generated
        assert kept[i].kept == kept[i].policy.tokens == generated and kept[i].weights is None, "all have their KL"
        assert kept[i].policy.weight > 0 and kept[i].policy.advantage != 0
    assert kept[2].policy is None and found.metrics["reward/left_out_truncated"] == 1


def test_weighted_probes_stand_for_what_was_cut():
    found = credit(cut_reward="probe_weighted", aggregate="sequence_sum")
    kept = {k.rollout_id: k for k in found.kept}
    assert kept[1].kept == 2 and kept[1].policy is None, "it teaches by its KL alone"
    values = [kept[i].policy.advantage * kept[i].policy.weight for i in (0, 2, 3)]
    assert values == pytest.approx([0.75 / 4, -3.75 / 4, -0.068182 / 4], abs=1e-6), (
        "of four, the cut one among them"
    )
    assert found.metrics["reward/left_out_cut"] == 1


# A toy: choose `good` (right with chance 0.8, one token) or a trap; there leave it (0.5, two tokens) or loop, which
# the rule cuts unless it is a probe (0.2, five tokens to its end). Logits of the two choices: 0.3 and -0.2.
GOOD, LEAVE = 1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(0.2))
PATHS = {  # chance, tokens, and the score in both choices
    "good": (GOOD, 0.8, 1, np.array([1 - GOOD, 0.0])),
    "leave": ((1 - GOOD) * LEAVE, 0.5, 2, np.array([-GOOD, 1 - LEAVE])),
    "loop": ((1 - GOOD) * (1 - LEAVE), 0.2, 5, np.array([-GOOD, -LEAVE])),
}


def outcomes(share):
    """What can become of a rollout: (chance, path, reward or None of a cut one); share 1 runs all to their end."""
    for path, (chance, right, _, _) in PATHS.items():
        seen = share if path == "loop" else 1.0
        yield chance * seen * right, path, 1.0
        yield chance * seen * (1 - right), path, 0.0
        if seen < 1:
            yield chance * (1 - seen), path, None


def exact_update(share, size=4, **settings):
    """The mean over all groups of a size of what `credit` has the policy's loss go up by, in both choices."""
    rl = PolicyOptimization(PolicyObjective(weight=1.0, **settings), LONGEST, distils=False)
    specs = [RolloutSpec(i, "p", (7, 8), 0, False, LONGEST) for i in range(size)]
    total = np.zeros(2)
    for group in combinations_with_replacement(list(outcomes(share)), size):
        orders = factorial(size)
        for same in Counter(group).values():
            orders //= factorial(same)
        rollouts = []
        for i, (_, path, reward) in enumerate(group):
            length = PATHS[path][2]
            if reward is None:
                rollouts.append(rollout(i, length, StopReason.TRAPPED, cut=2, confirmed=3))
            else:
                rollouts.append(rollout(i, length, would_cut=2 if path == "loop" and share < 1 else None))
        rewards = {i: Reward(reward) for i, (_, _, reward) in enumerate(group) if reward is not None}
        kept = rl.credit(EndedStep(rollouts, specs, rewards, share)).kept
        update = sum(
            k.policy.advantage * k.policy.weight * PATHS[group[k.rollout_id][1]][3] for k in kept if k.policy
        )
        total += orders * prod(chance for chance, _, _ in group) * update
    return total


@pytest.mark.parametrize("aggregate", ["sequence_sum", "constant"])
@pytest.mark.parametrize(("advantage", "share_of_truth"), [("rloo", 1.0), ("dr_grpo", 3 / 4)])
def test_weighted_probes_give_on_average_what_rollouts_that_run_to_their_end_do(
    advantage, share_of_truth, aggregate
):
    """Through baseline, weights and denominators as a run has them; `exclude` teaches to stay in the trap."""
    settings = {"advantage": advantage, "aggregate": aggregate}
    whole = exact_update(1.0, **settings)
    if aggregate == "sequence_sum":
        assert whole == pytest.approx(share_of_truth * np.array([0.113661, 0.031600]), abs=1e-6)
    for share in (0.1, 0.5):
        weighted = exact_update(share, **settings, cut_reward="probe_weighted")
        assert weighted == pytest.approx(whole, abs=1e-12)
    assert exact_update(0.1, **settings, cut_reward="exclude")[1] < 0 < whole[1]


def test_one_right_answer_among_cut_ones_is_told():
    rows = [rollout(0, 3), *(rollout(i, 6, StopReason.TRAPPED, cut=2, confirmed=4) for i in (1, 2, 3))]
    found = credit(rows, {0: 1.0}, cut_reward="probe_weighted", aggregate="constant")
    assert found.advantages == {0: 0.75} and found.metrics["group/constant_share"] == 0 and found.groups == 1
    assert credit(rows, {0: 0.0}, cut_reward="probe_weighted", aggregate="constant").groups == 0


def imputed(before, **changes):
    rl = PolicyObjective(
        weight=1.0, advantage="dr_grpo", cut_reward="probe_mean", probe_min=4, probe_buffer=5, **changes
    )
    rewards = {i: Reward(r) for i, r in (REWARDS | {2: 1.0}).items()}
    return PolicyOptimization(rl, LONGEST).credit(EndedStep(GROUP, SPECS, rewards, 0.1, before))


def test_what_was_cut_is_given_the_mean_of_recent_probes_that_would_have_been():
    first = imputed(())
    assert "probe/q" not in first.metrics and first.advantages[1] == -0.5, "rewards 1, 0 (cut), 1, 0"
    assert first.probe_rewards == (1.0,), "for the next step, not for this one"
    later = imputed((0.0, 1.0, 0.0, 0.0))
    assert later.metrics["probe/q"] == 0.25 and later.metrics["reward/mean"] == 2.25 / 4
    assert later.advantages[1] == pytest.approx(0.25 - 2.25 / 4)
    assert later.probe_rewards == (0.0, 1.0, 0.0, 0.0, 1.0)
    assert imputed(later.probe_rewards).probe_rewards == (1.0, 0.0, 0.0, 1.0, 1.0), "the newest five"
    assert imputed((), overlong={"buffer": LONGEST}).probe_rewards == (1.0,), "what its answer was worth"
    assert credit().probe_rewards == () and "probe/q" not in credit().metrics


def test_what_is_left_out_has_its_kl():
    found = credit(rewards={0: 1.0, 3: 0.0}, cut_reward="exclude")
    assert [k.policy is None for k in found.kept] == [False, True, True, False]
    assert found.advantages == {0: 0.5, 3: -0.5}
    assert found.metrics["reward/left_out_not_graded"] == 1 and found.metrics["group/size_min"] == 2


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp", "max_rl"])
@pytest.mark.parametrize(
    ("left_out", "changes"),
    [
        (rollout(4, 8, StopReason.FAILED), {}),
        (rollout(4, 7), {}),  # not graded
        (rollout(4, 7, StopReason.TRAPPED, cut=3, confirmed=5), {"cut_reward": "exclude"}),
        (rollout(4, 8, StopReason.MAX_TOKENS), {"truncated": "exclude"}),
    ],
    ids=["failed", "not graded", "cut", "truncated"],
)
def test_what_is_left_out_moves_neither_baseline_nor_mask_nor_denominator(advantage, left_out, changes):
    """Elsewhere filtered rollouts had a mask of 0 and moved the baseline all the same."""
    rl = PolicyObjective(weight=1.0, advantage=advantage, **changes)
    alone = [rollout(0, 3), rollout(2, 5), rollout(3, 2)]
    rewards = {0: Reward(1.0), 2: Reward(0.5), 3: Reward(0.0)}
    graded = rewards | ({4: Reward(1.0)} if left_out.outcome.stop_reason is StopReason.MAX_TOKENS else {})
    specs = [RolloutSpec(i, "p", (7, 8), 0, False, LONGEST) for i in range(5)]
    algorithm = PolicyOptimization(rl, LONGEST)
    expected = algorithm.credit(EndedStep(alone, specs, rewards, 0.1))
    found = algorithm.credit(EndedStep([*alone, left_out], specs, graded, 0.1))
    assert [k.policy for k in found.kept if k.policy] == [k.policy for k in expected.kept]
    assert found.advantages == expected.advantages


def test_without_a_teacher_no_token_has_a_kl_and_what_has_no_reward_is_not_handed_over():
    whole = [rollout(0, 3), rollout(1, 6), rollout(2, 5)]
    rl = PolicyObjective(weight=1.0, advantage="dr_grpo")
    rewards = {0: Reward(1.0), 2: Reward(0.0)}
    kept = PolicyOptimization(rl, LONGEST, distils=False).credit(EndedStep(whole, SPECS, rewards, 0.0)).kept
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


def test_a_long_answer_loses_something_before_it_is_held_against_others():
    long = [rollout(0, 5), rollout(1, 7, StopReason.TRAPPED, cut=2, confirmed=4), rollout(2, 8), rollout(3, 7)]
    found = credit(long, {0: 1.0, 2: 1.0, 3: 0.0}, overlong={"buffer": 2})
    # Rewards 1, 1 - 1 and 0 - 0.5, and of the one that was cut as the worst of them; their mean is 0.
    assert [found.advantages[i] for i in range(4)] == pytest.approx([1.0, -0.5, 0.0, -0.5])
    assert found.metrics["reward/mean"] == 0.0 and found.metrics["reward/overlong"] == -2.0 / 4
    capped = [rollout(0, 5), rollout(1, 8, StopReason.MAX_TOKENS)]
    found = credit(capped, {0: 0.0, 1: 1.0}, overlong={"buffer": 2, "factor": 0.5}, truncated="zero")
    assert found.advantages == {0: 0.25, 1: -0.25}, "what has no reward for its answer has its penalty"


TWO_GROUPS = [rollout(0, 3), rollout(1, 2), rollout(2, 5), rollout(3, 8)]
OF_TWO = [RolloutSpec(i, "pq"[i // 2], (7, 8), 0, False, LONGEST) for i in range(4)]


def test_a_group_of_one_reward_can_leave_the_denominator_and_keeps_its_kl():
    rewards = {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}
    plain = credit(TWO_GROUPS, rewards, OF_TWO)
    assert [k.policy.weight for k in plain.kept] == [1 / 18] * 4
    found = credit(TWO_GROUPS, rewards, OF_TWO, filter_constant_groups=True)
    assert [k.policy and k.policy.weight for k in found.kept] == [1 / 5, 1 / 5, None, None]
    assert [k.kept for k in found.kept] == [3, 2, 5, 8] and found.advantages == {0: 0.5, 1: -0.5}
    assert found.metrics["reward/left_out_constant_group"] == 2 and found.metrics["reward/mean"] == 0.75
    assert found.metrics["group/constant_share"] == 0.5 and found.metrics["advantage/zero_share"] == 0


def test_penalties_do_not_make_a_group_of_right_answers_two_kinds():
    shaped = {"overlong": {"buffer": 2}, "filter_constant_groups": True}
    found = credit(TWO_GROUPS, {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}, OF_TWO, **shaped)
    assert [k.policy is None for k in found.kept] == [False, False, True, True]
    nothing = credit(TWO_GROUPS, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, OF_TWO, **shaped)
    assert all(k.policy is None for k in nothing.kept) and nothing.metrics["group/constant_share"] == 1.0
    assert "advantage/max" not in nothing.metrics and nothing.metrics["reward/left_out_constant_group"] == 4


def test_an_advantage_can_be_held():
    assert credit(advantage_clip=0.5).advantages == {0: 0.5, 1: -0.25, 2: -0.25, 3: -0.25}


def test_what_a_step_came_to():
    metrics = credit().metrics
    assert metrics["reward/mean"] == 0.25 and metrics["group/constant_share"] == 0.0
    assert metrics["advantage/max"] == 0.75 and metrics["advantage/zero_share"] == 0.0
    same = credit(rewards={0: 0.0, 2: 0.0, 3: 0.0}).metrics
    assert same["group/constant_share"] == same["group/all_wrong_share"] == same["advantage/zero_share"] == 1.0
    assert credit([], {}, []).metrics == {}


def test_where_rewards_lie_below_zero_a_cut_is_as_the_worst_answer_of_its_step():
    """With 0 it would be the best of all, and a policy would learn to be cut."""
    rewards = {0: -0.5, 2: -1.5, 3: -1.0}
    assert credit(rewards=rewards).advantages[1] == min(credit(rewards=rewards).advantages.values()) < 0
    assert credit(rewards=rewards).metrics["reward/mean"] == (-0.5 - 1.5 - 1.5 - 1.0) / 4
    imputed = credit(rewards=rewards, cut_reward="probe_mean", probe_min=9)
    assert imputed.advantages[1] == min(imputed.advantages.values()) and "probe/q" not in imputed.metrics
    long = [*GROUP[:3], rollout(3, LONGEST, StopReason.MAX_TOKENS)]
    assert credit(long, rewards, truncated="zero").metrics["reward/mean"] == (-0.5 - 1.5 - 1.5 - 1.5) / 4


@pytest.mark.parametrize("changes", [{}, {"truncated": "zero"}, {"cut_reward": "probe_mean", "probe_min": 20}])
def test_being_cut_is_no_way_round_the_penalty_for_length(changes):
    """All answers are wrong: the worst of them has its penalty, and none is worse than being cut."""
    capped = [
        rollout(0, 8, StopReason.MAX_TOKENS),
        rollout(1, 8, StopReason.MAX_TOKENS),
        rollout(2, 7),
        rollout(3, 5, StopReason.TRAPPED, cut=2, confirmed=5),
    ]
    found = credit(capped, {0: 0.0, 1: 0.0, 2: 0.0}, overlong={"buffer": 2}, **changes)
    assert found.advantages == {0: -0.125, 1: -0.125, 2: 0.375, 3: -0.125}, (
        "rewards -1, -1, -0.5, and -1 for the cut"
    )
    constant = credit(
        capped, {0: 0.0, 1: 0.0, 2: 0.0}, overlong={"buffer": 2}, filter_constant_groups=True, **changes
    )
    assert constant.metrics["group/constant_share"] == 1, "penalties aside all are one answer"


def test_an_answer_that_counts_nothing_lends_its_penalty_to_nobody():
    capped = [rollout(0, 8, StopReason.MAX_TOKENS), *GROUP[1:]]
    found = credit(capped, {0: 0.0, 2: 1.0, 3: 0.0}, overlong={"buffer": 2}, truncated="exclude")
    assert found.advantages == pytest.approx({1: -1 / 3, 2: 2 / 3, 3: -1 / 3})


def test_a_group_in_which_nobody_counts_is_neither_constant_nor_wrong():
    specs = [RolloutSpec(i, "p" if i < 2 else "q", (7, 8), 0, False, LONGEST) for i in range(4)]
    whole = [rollout(i, 3) for i in range(4)]
    metrics = credit(whole, {0: 1.0, 1: 0.0}, specs).metrics
    assert metrics["group/constant_share"] == metrics["group/all_wrong_share"] == 0.0
    assert metrics["group/size_min"] == 2
