"""Advantages, who counts in a group, and what a token weighs: values derived by hand, and laws.

The example: one prompt, rewards (1, 0, 0, 0), answers of 2, 1, 3 and 2 tokens.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.algorithms.advantages import advantages, constant_groups, deviations
from kat_ray.algorithms.aggregation import token_weights
from kat_ray.algorithms.groups import Ending, Graded, Treatment, members

TOKENS = np.array([2, 1, 3, 2])
RIGHT = (1.0, 0.0, 0.0, 0.0)
KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl")


def group(rewards, prompt="p", first=0):
    return [Graded(first + i, prompt, Ending.ANSWERED, reward) for i, reward in enumerate(rewards)]


def of(kind, rewards, tokens=None, min_std=0.0):
    found = members(group(rewards), Treatment())
    return advantages(kind, found, np.ones(len(rewards), int) if tokens is None else tokens, min_std)


@pytest.mark.parametrize(
    ("kind", "min_std", "right", "wrong"),
    [
        ("grpo", 0.0, 1.5, -0.5),
        ("grpo", 1e-6, 1.499997, -0.499999),
        ("grpo", 1e-4, 1.4997, -0.4999),
        ("dr_grpo", 0.0, 0.75, -0.25),
        ("rloo", 0.0, 1.0, -1 / 3),
        ("max_rl", 0.0, 3.0, -1.0),
        ("reinforce_pp", 0.0, 1.732051, -0.577350),
        ("reinforce_pp_baseline", 0.0, 1.732051, -0.577350),
    ],
)
def test_values_of_the_example(kind, min_std, right, wrong):
    assert of(kind, RIGHT, TOKENS, min_std) == pytest.approx([right, wrong, wrong, wrong], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("reinforce_pp_baseline", [1.459601, -1.876630, -0.208514, -0.208514]),
        ("reinforce_pp", [0.377964, -2.645751, 0.377964, 0.377964]),
    ],
)
def test_whitening_is_over_the_tokens_of_the_whole_batch(kind, expected):
    found = members(group((1, 0), "p") + group((1, 1), "q", 2), Treatment())
    assert advantages(kind, found, TOKENS) == pytest.approx(expected, abs=1e-6)
    # With the sample variance, as others have it: smaller by sqrt((N - 1) / N) over N = 8 tokens.
    of_samples = {
        "reinforce_pp_baseline": [1.365332, -1.755426, -0.195047, -0.195047],
        "reinforce_pp": [0.353553, -2.474874, 0.353553, 0.353553],
    }[kind]
    assert advantages(kind, found, TOKENS) * np.sqrt(7 / 8) == pytest.approx(of_samples, abs=1e-6)
    one = of(kind, RIGHT, TOKENS) * np.sqrt(7 / 8)
    assert one == pytest.approx([1.620185, -0.540062, -0.540062, -0.540062], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(reward=st.sampled_from((0.1, 0.2, 0.35, 0.7, 1 / 3)), n=st.integers(2, 16))
def test_equal_rewards_tell_nothing(kind, reward, n):
    """In float32 the mean of eight times 0.35 is off, and the standard deviation of the rest is that residue."""
    assert of(kind, [reward] * n, min_std=1e-9).tolist() == [0.0] * n


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_alone_tells_nothing(kind):
    assert of(kind, [1.0]).tolist() == [0.0]
    assert of(kind, [1.0, None, None]).tolist() == [0.0] * 3


def test_what_was_not_graded_is_no_zero():
    assert of("grpo", (1.0, None, 0.0, 0.0)) == pytest.approx([1.1547005, 0.0, -0.5773503, -0.5773503])
    assert of("grpo", (1.0, float("nan"), 0.0, 0.0)) == pytest.approx([1.1547005, 0.0, -0.5773503, -0.5773503])
    assert of("grpo", (1.0, 0.0, 0.0, 0.0)) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert members(group((1.0, None)), Treatment()).left_out == {"not graded": 1}


@pytest.mark.parametrize("kind", KINDS[:3] + KINDS[5:])
@settings(deadline=None)
@given(rewards=st.lists(st.floats(0, 1), min_size=2, max_size=8), others=st.lists(st.floats(0, 1), max_size=5))
def test_a_group_depends_on_no_other(kind, rewards, others):
    """Groups are found by their prompts: of whatever size, in whatever order, whoever has left one."""
    alone = of(kind, rewards, min_std=1e-6)
    rows = group(rewards, "p") + group(others, "q", 100)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    found = members([rows[i] for i in order], Treatment())
    both = advantages(kind, found, np.ones(len(rows), int), 1e-6)
    mixed = dict(zip(found.rollout_ids, both, strict=True))
    assert [mixed[i] for i in range(len(rewards))] == pytest.approx(list(alone), abs=1e-9)


@settings(deadline=None)
@given(rewards=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_baseline_moves_nothing_on_average(rewards):
    for kind in ("grpo", "dr_grpo", "rloo", "max_rl"):
        assert of(kind, rewards, min_std=1e-6).sum() == pytest.approx(0.0, abs=1e-6)


def test_constant_groups_are_told():
    rows = group((1, 1), "all right") + group((0, 0), "all wrong", 2) + group((1, 0), "both", 4)
    assert constant_groups(members([*rows, *group((None, 1), "one left", 6)], Treatment())).tolist() == [
        True, True, False, True,
    ]  # fmt: skip


# --- rollouts without an answer --------------------------------------------------------------------------------

CUT_GROUP = [
    Graded(0, "p", Ending.ANSWERED, 1.0),
    Graded(1, "p", Ending.CUT, None),
    Graded(2, "p", Ending.ANSWERED, 0.0, would_cut=True),
    Graded(3, "p", Ending.ANSWERED, 0.0),
]


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        (Treatment("failure"), [0.75, -0.25, -0.25, -0.25]),
        (Treatment("probe_mean", probe_mean=0.2), [0.7, -0.1, -0.3, -0.3]),
        # Of four, against the others: (1 - 0/11, 10 (0 - 1/2), 0 - 1/11), each 3/4 times.
        (Treatment("probe_weighted", probe_share=0.1), [0.75, 0.0, -3.75, -0.068182]),
        (Treatment("exclude"), [2 / 3, 0.0, -1 / 3, -1 / 3]),
    ],
    ids=lambda value: value.cut if isinstance(value, Treatment) else "",
)
def test_four_treatments_of_a_cut(treatment, expected):
    found = members(CUT_GROUP, treatment)
    credit = found.weight * advantages("dr_grpo", found, np.ones(4, int))
    assert credit == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("truncated", "reward", "weight"),
    [("grade", [1.0, 1.0], [1.0, 1.0]), ("zero", [1.0, 0.0], [1.0, 1.0]), ("exclude", [1.0, 0.0], [1.0, 0.0])],
)
def test_three_treatments_of_an_answer_that_was_too_long(truncated, reward, weight):
    rows = [Graded(0, "p", Ending.ANSWERED, 1.0), Graded(1, "p", Ending.TRUNCATED, 1.0)]
    found = members(rows, Treatment(truncated=truncated))
    assert (found.reward.tolist(), found.weight.tolist()) == (reward, weight)


def test_a_failed_rollout_leaves_its_group():
    rows = [*group((1.0, 0.0)), Graded(2, "p", Ending.FAILED, None)]
    found = members(rows, Treatment())
    assert found.left_out == {"failed": 1}
    assert advantages("dr_grpo", found, np.ones(3, int)).tolist() == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_weights_of_probes_need_their_share(share):
    with pytest.raises(ValueError, match=rf"probe_share = {share}"):
        Treatment("probe_weighted", probe_share=share)


# A toy. First `good` (right with chance 0.8) or a trap; in the trap leave it (right with chance 0.5) or loop, which
# the rule cuts (right with chance 0.2 all the same). Logits of the two choices: 0.3 and -0.2.
CHOICES = np.array([0.3, -0.2])
RIGHTS = {"good": 0.8, "leave": 0.5, "loop": 0.2}


def exact_gradient(credit, probe_share=0.1, looped=True):
    """Expectation over rollouts of credit(path, right, probe) times the score, in (choose good, leave the trap).

    See `exact_moments`.
    """
    return exact_moments(credit, probe_share, looped)[0]


def exact_moments(credit, probe_share=0.1, looped=True):
    """That expectation, and the variance of one rollout's estimate, summed over both choices.

    Scores are those of logits with gradient 1 - p and -p. The baseline has a fixed value here, and is part of
    the credit. Without `looped` the choice to loop is outside the policy's mask, which then ends at the cut.
    """
    p_good, p_leave = 1 / (1 + np.exp(-CHOICES))
    paths = {
        "good": (p_good, np.array([1 - p_good, 0.0])),
        "leave": ((1 - p_good) * p_leave, np.array([-p_good, 1 - p_leave])),
        "loop": ((1 - p_good) * (1 - p_leave), np.array([-p_good, -p_leave * looped])),
    }
    total, squared = np.zeros(2), 0.0
    for path, (chance, score) in paths.items():
        for right in (1.0, 0.0):
            for probe, share in ((True, probe_share), (False, 1 - probe_share)):
                p = chance * share * (RIGHTS[path] if right else 1 - RIGHTS[path])
                estimate = credit(path, right, probe) * score
                total += p * estimate
                squared += p * estimate @ estimate
    return total, squared - total @ total


def treated(treatment):
    """The credit that a treatment gives, against a baseline that is any constant."""

    def credit(path, right, probe):
        cut = path == "loop" and not probe
        row = Graded(
            0, "p", Ending.CUT if cut else Ending.ANSWERED, None if cut else right, path == "loop" and probe
        )
        found = members([row], treatment)
        return float(found.weight[0] * (found.reward[0] - baseline))

    p_good, p_leave = 1 / (1 + np.exp(-CHOICES))
    loops = (1 - p_good) * (1 - p_leave) * 0.9
    uncut = (p_good * 0.8 + (1 - p_good) * p_leave * 0.5) / (p_good + (1 - p_good) * p_leave)
    baseline = uncut if treatment.cut == "exclude" else 0.0
    assert 0 < loops < 1
    return credit


def test_weighted_probes_are_an_unbiased_estimate_and_what_is_left_out_is_not():
    truth = exact_gradient(lambda path, right, probe: right)
    assert truth == pytest.approx([0.113661, 0.031600], abs=1e-6)
    found = exact_gradient(treated(Treatment("probe_weighted", probe_share=0.1)))
    assert found == pytest.approx(truth, abs=1e-12)
    # Where cut rollouts are left out, leaving a trap is punished; where they are failures, it is rewarded too much.
    left_out = exact_gradient(treated(Treatment("exclude")))
    assert left_out[1] < 0 < truth[1] < exact_gradient(treated(Treatment("failure")))[1]


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        (Treatment("exclude"), [0.043098, -0.023697]),
        (Treatment("failure"), [0.140543, 0.052666]),
        (Treatment("probe_mean", probe_mean=0.2), [0.113661, 0.031600]),
    ],
    ids=lambda value: value.cut if isinstance(value, Treatment) else "",
)
def test_what_each_treatment_is_an_estimate_of(treatment, expected):
    assert exact_gradient(treated(treatment), probe_share=0.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("treatment", "share", "expected"),
    [
        (Treatment("probe_weighted", probe_share=1.0), 1.0, 0.0784),  # all run to their end
        (Treatment("probe_weighted", probe_share=0.1), 0.1, 0.4393),
        (Treatment("failure"), 0.0, 0.0694),
        (Treatment("probe_mean", probe_mean=0.2), 0.0, 0.0585),
        (Treatment("exclude"), 0.0, 0.0512),
    ],
)
def test_what_each_treatment_costs_in_variance(treatment, share, expected):
    """Of one rollout, against the mean reward that the treatment gives."""
    p_good, p_leave = 1 / (1 + np.exp(-CHOICES))
    loop = (1 - p_good) * (1 - p_leave)
    answered = 0.8 * p_good + 0.5 * (1 - p_good) * p_leave
    mean = {"failure": answered, "exclude": 0.0}.get(treatment.cut, answered + 0.2 * loop)
    given = treated(treatment)

    def credit(path, right, probe):
        row = Graded(0, "p", Ending.ANSWERED, right, path == "loop" and probe)
        weight = 0.0 if path == "loop" and not probe else members([row], treatment).weight[0]
        counts = weight if treatment.cut == "probe_weighted" else 1.0
        return given(path, right, probe) - mean * counts

    assert exact_moments(credit, share)[1] == pytest.approx(expected, abs=5e-5)


def test_imputed_rewards_up_to_the_cut_alone_would_teach_to_stay_too():
    mean = treated(Treatment("probe_mean", probe_mean=0.2))
    p_good, p_leave = 1 / (1 + np.exp(-CHOICES))
    average = 0.8 * p_good + (1 - p_good) * (0.5 * p_leave + 0.2 * (1 - p_leave))
    found = exact_gradient(lambda *rollout: mean(*rollout) - average, probe_share=0.0, looped=False)
    assert found == pytest.approx([0.113661, -0.010758], abs=1e-6)


def test_a_policy_whose_mask_ended_at_the_cut_would_be_taught_to_stay_in_the_trap():
    p_good, p_leave = 1 / (1 + np.exp(-CHOICES))
    mean = 0.8 * p_good + 0.5 * (1 - p_good) * p_leave
    failure = treated(Treatment("failure"))
    found = exact_gradient(lambda *rollout: failure(*rollout) - mean, probe_share=0.0, looped=False)
    assert found == pytest.approx([0.140543, -0.005829], abs=1e-6)


# --- what a token weighs -----------------------------------------------------------------------------------------

PPO = np.array([-1.8, -1.35, 0.4, 0.55, 0.5, 0.4, 0.625, 1.0])  # the example's clipped losses, token by token


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("token_mean", 0.040625), ("sequence_mean", 0.030208333), ("sequence_sum", 0.08125), ("constant", 0.0203125)],
)
def test_aggregations_of_the_example(kind, expected):
    weights = token_weights(kind, TOKENS, np.ones(4), length=4)
    assert (np.repeat(weights, TOKENS) * PPO).sum() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_who_counts_nothing_is_in_no_count(kind):
    weights = token_weights(kind, np.array([2, 1, 3, 2, 9, 0]), np.array([1, 1, 1, 1, 0, 1.0]), length=4)
    assert weights.tolist() == [*token_weights(kind, TOKENS, np.ones(4), length=4).tolist(), 0.0, 0.0]
    assert token_weights(kind, np.zeros(2, int), np.ones(2), length=4).tolist() == [0.0, 0.0]


def test_those_that_others_stand_for_are_in_the_number_of_rollouts():
    """Two that count, one of them for ten, and one that was cut: thirds, whatever the weights sum up to."""
    tokens, weight, cut = np.array([2, 4, 3, 0]), np.array([1.0, 10.0, 0.0, 1.0]), np.array([0, 0, 1, 0], bool)
    assert token_weights("sequence_sum", tokens, weight, stood_for=cut) == pytest.approx([1 / 3, 10 / 3, 0, 0])
    assert token_weights("constant", tokens, weight, 4, cut) == pytest.approx([1 / 12, 10 / 12, 0, 0])
    for kind in ("token_mean", "sequence_mean"):
        with pytest.raises(ValueError, match=f"{kind}: divides by lengths"):
            token_weights(kind, tokens, weight, stood_for=cut)


@pytest.mark.parametrize("kind", ["grpo", "reinforce_pp", "reinforce_pp_baseline", "max_rl"])
def test_what_is_no_sum_of_rewards_has_no_weighted_probes(kind):
    with pytest.raises(ValueError, match=f"{kind}: is no sum of rewards"):
        advantages(kind, members(CUT_GROUP, Treatment("probe_weighted", probe_share=0.1)), np.ones(4, int))


def test_a_constant_length_must_be_given():
    with pytest.raises(ValueError, match="constant: needs the length"):
        token_weights("constant", TOKENS, np.ones(4))


def test_the_spread_of_groups_by_hand():
    """1, 0, 0, 0: 0.5. Of equal ones, and of one alone, none. 1 with weight 10 and 0 with 1: m = 10/11."""
    found = members(group(RIGHT) + group((0.7, 0.7), "q", 4) + group((1,), "r", 6), Treatment())
    assert deviations(found) == pytest.approx([0.5, 0, 0])
    cut = Graded(0, "p", Ending.ANSWERED, 1.0, would_cut=True)
    weighted = members([cut, Graded(1, "p", Ending.ANSWERED, 0.0)], Treatment("probe_weighted", probe_share=0.1))
    assert deviations(weighted) == pytest.approx([0.406558], abs=1e-6)
    nobody = members([Graded(0, "p", Ending.FAILED, None)], Treatment())
    assert deviations(nobody).tolist() == [0.0]
