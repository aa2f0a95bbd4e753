"""Guards of runs with rewards, by hand: the ratio, constant groups, entropy, held-out answers."""

from dataclasses import replace

import pytest

from kat_ray.config import GuardsConfig
from kat_ray.errors import UserError
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.collapse_guards import CollapseGuards
from kat_ray.run.guard_list import GUARDS
from kat_ray.run.held_out import HeldOutWatch, fall_beyond_chance
from kat_ray.run.state import RunState
from kat_ray.run.step_guards import StepGuards
from kat_ray.run.step_result import PolicyReport
from tests.support.configs import make_config
from tests.support.step_results import REPORT, a_step

POLICY = PolicyReport(
    loss=0.1, tokens=100, ratio_mean=1.0, ratio_max=1.0, effective_share=1.0, clip_low_share=0.0,
    clip_high_share=0.0, masked_share=0.0, log_ratio_max=0.0, entropy=1.0,
)  # fmt: skip


def test_each_guard_counts_for_itself():
    assert len({guard.key for guard in GUARDS}) == len(GUARDS)


def step(done, staleness=0, recorded=None, **policy):
    learner = replace(REPORT, tokens=0, policy=replace(POLICY, **policy))
    return a_step(done=done, staleness=staleness, learner=learner, recorded=recorded or {})


def watch(steps, dtypes=("float32", "float32"), **settings):
    guards = CollapseGuards(GuardsConfig(**{"patience": 3, "reference_steps": 2} | settings), dtypes)
    return [guards.observe(s) for s in steps]


@pytest.mark.parametrize(("dtypes", "bound"), [(("float32", "float32"), 1e-3), (("float32", "bfloat16"), 0.27)])
def test_a_ratio_that_rounding_does_not_explain_ends_the_run_at_once(dtypes, bound):
    """Log-probabilities at another temperature, or of a distribution that top-p has cut."""
    for ratio in (1 + 1.01 * bound, 1 - 1.01 * bound):
        (verdict,) = watch([step(1, ratio_mean=ratio)], dtypes)
        assert verdict.stop.startswith("guards.ratio = 1: |rl/ratio_mean - 1| is ") and verdict.fired == 1
        assert f"above {bound:.4g} for a sampler in {dtypes[0]}" in verdict.stop
        assert verdict.stop_fields == ("guards.ratio_action",) and "guards.ratio only" in verdict.stop
    (verdict,) = watch([step(1, ratio_mean=1 + 0.99 * bound)], dtypes)
    assert verdict.stop is None and not verdict.notes and not verdict.fired


def test_a_ratio_of_one_token_ends_the_run_where_it_stays():
    verdicts = watch([step(i, log_ratio_max=1.01e-2) for i in range(3)])
    assert [v.stop is not None for v in verdicts] == [False, False, True]
    assert "rl/log_ratio_max is 0.0101" in verdicts[-1].stop
    assert not any(v.fired for v in watch([step(i, log_ratio_max=0.99e-2) for i in range(5)]))


def test_a_ratio_of_older_weights_says_nothing_unless_it_is_huge():
    older = {"staleness": 1, "ratio_mean": 1.3, "log_ratio_max": 3.0}
    assert not any(v.notes or v.fired for v in watch([step(i, ratio_max=99.0, **older) for i in range(5)]))
    verdicts = watch([step(i, ratio_max=101.0, **older) for i in range(3)])
    assert verdicts[-1].fired == 1 and verdicts[-1].stop is None and "rl/ratio_max is 101" in verdicts[-1].notes[0]
    none = [step(i, ratio_mean=2.0, ratio_max=1e3, log_ratio_max=7.0, tokens=0) for i in range(5)]
    assert not any(v.fired for v in watch(none)), "no token was in the policy's loss"


def test_the_ratio_can_be_told_only_or_not_at_all():
    (told,) = watch([step(1, ratio_mean=2.0)], ratio_action="warn")
    assert told.stop is None and len(told.notes) == 1
    assert not watch([step(1, ratio_mean=2.0)], ratio=None)[0].fired


def test_prompts_that_teach_nothing_are_told():
    verdicts = watch([step(i, recorded={"group/constant_share": 0.91}) for i in range(3)])
    assert [len(v.notes) for v in verdicts] == [0, 1, 1] and verdicts[-1].fired == 1
    assert "guards.constant_groups = 0.9: group/constant_share is 0.91" in verdicts[1].notes[0]
    assert not any(v.notes for v in watch([step(i, recorded={"group/constant_share": 0.9}) for i in range(9)]))


def test_the_policys_entropy_is_held_against_its_start():
    verdicts = watch([step(i, entropy=1.0) for i in range(2)] + [step(i, entropy=0.09) for i in range(3)])
    assert verdicts[-1].fired == 1 and "rl/entropy is 0.09" in verdicts[-1].notes[0]
    assert not any("learner/entropy" in text for v in verdicts for text in v.notes), "one of the two speaks"
    within = watch([step(i, entropy=1.0) for i in range(2)] + [step(i, entropy=0.11) for i in range(9)])
    assert not any(v.fired for v in within)


# Mean rewards of the steps before each evaluation, and the share of right answers to each of its problems; what the
# evaluation says of the one before.
@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([([], 0.5)], None),
        ([([], 0.5), ([0.2, 0.4], 0.3)], None),  # no rewards to compare with
        ([([], 0.5), ([0.2, 0.4], 0.5), ([0.4, 0.4], 0.375)], 0.125),
        ([([], 0.5), ([0.2, 0.4], 0.5), ([0.4, 0.4], 0.6)], 0.0),
        ([([], 0.5), ([0.2, 0.4], 0.5), ([0.1, None], 0.25)], 0.0),  # both fell
    ],
)
def test_rewards_up_and_held_out_answers_down(history, expected):
    watched = HeldOutWatch()
    for rewards, share in history:
        for reward in rewards:
            watched.observe(reward)
        watched.evaluated([share] * 3)
    resumed = HeldOutWatch()
    resumed.load_state(RunState(watch={"held_out": watched.state()}).watch.held_out.model_dump())
    assert resumed.state() == watched.state()
    for each in (watched, resumed):
        assert each.take() == (None if expected is None else pytest.approx(expected)) and each.take() is None


@pytest.mark.parametrize(
    ("before", "after", "fall"),
    [
        # Falls of 1, 0, 0, 0: a mean of 1/4, a standard deviation of 1/2, an error of 1/4: 1/4 - 2/4 is nothing.
        ((1, 1, 0, 0), (0, 1, 0, 0), 0.0),
        # Falls of 1, 1, 1, 0: 3/4, 1/2, 1/4, so 1/4 is left.
        ((1, 1, 1, 0), (0, 0, 0, 0), 0.25),
        # The same fall over four times as many problems: sqrt(0.2) / 4 is the error.
        ((1, 1, 1, 0) * 4, (0,) * 16, 0.75 - 2 * 0.2**0.5 / 4),
        # Every problem falls by as much: no chance is in it.
        ((1.0, 0.75, 0.5), (0.75, 0.5, 0.25), 0.25),
        ((0, 0), (1, 1), 0.0),
        ((1,), (0,), 0.0),  # of one problem nothing is known
    ],
)
def test_what_chance_explains_of_a_fall_does_not_count(before, after, fall):
    assert fall_beyond_chance(before, after) == pytest.approx(fall)


def test_a_checkpoint_of_before_has_nothing_to_compare_problem_by_problem():
    watched, old = HeldOutWatch(), {"total": 0.5, "steps": 1, "reward": 0.2, "accuracy": 0.9, "fall": None}
    watched.load_state(RunState(watch={"held_out": old}).watch.held_out.model_dump())
    watched.evaluated([0.0, 0.0])
    assert watched.take() is None


def evaluation(share, problems=4):
    right = (round(share * 10),) * problems
    return EvalResult(share, 1.0, 10, problems, 8.0, 0.0, right)


def test_a_run_whose_rewards_are_hacked_is_told_once_and_can_end(tmp_path):
    for action in ("warn", "stop"):
        lines = []
        config = make_config("s", "t", guards={"action": action})
        watched = StepGuards(config, tmp_path, lines.append)
        for done, (reward, accuracy) in enumerate([(0.2, 0.5), (0.4, 0.5), (0.6, 0.4), (0.6, 0.4)], 1):
            fired = watched.check(step(done, recorded={"reward/mean": reward}))["guards/fired"]
            if action == "stop" and fired:
                with pytest.raises(UserError, match=r"held_out_fall = 0.05: fall of avg@k beyond chance is 0.1"):
                    watched.end_if_due(lambda: None, lambda: None)
                break
            watched.end_if_due(lambda: None, lambda: None)
            watched.evaluated(evaluation(accuracy))
        assert done == 4 and fired == 1.0
        if action == "warn":
            assert sum("held_out_fall" in line for line in lines) == 1


@pytest.mark.parametrize(("advantage", "said"), [("max_rl", 1), ("grpo", 0)])
def test_rewards_below_zero_are_told_once_to_what_divides_by_their_mean(tmp_path, advantage, said):
    lines, rl = [], {"weight": 1.0, "advantage": advantage}
    rollout = {"rollouts_per_prompt": 2, "top_p": 1.0}
    watched = StepGuards(make_config("s", "t", objective={"rl": rl}, rollout=rollout), tmp_path, lines.append)
    nothing = {"reward/mean": 0.5, "reward/overlong": 0.0}
    for done, own in enumerate([{}, {"reward/min": 0.0}, {"reward/min": -0.5}, {"reward/min": -0.5}], 1):
        watched.check(step(done, recorded=nothing | own))
    assert (
        sum("step 3: rewards go down to -0.5, and objective.rl.advantage = max_rl" in line for line in lines)
        == said
    )
    assert sum("max_rl" in line for line in lines) == said
    lines.clear()
    again = StepGuards(make_config("s", "t", objective={"rl": rl}, rollout=rollout), tmp_path, lines.append)
    again.check(step(1, recorded={"reward/mean": 0.5, "reward/min": 0.0, "reward/overlong": -0.25}))
    assert sum("max_rl" in line for line in lines) == said, "a penalty makes a reward negative, too"


@pytest.mark.parametrize(("last", "said"), [(0.4, 1), (0.5, 0)])
def test_the_evaluation_after_the_last_step_is_judged_too(tmp_path, last, said):
    lines = []
    watched = StepGuards(make_config("s", "t", guards={"action": "stop"}), tmp_path, lines.append)
    for done, (reward, accuracy) in enumerate([(0.2, 0.5), (0.4, 0.5), (0.6, last)], 1):
        watched.check(step(done, recorded={"reward/mean": reward}))
        watched.evaluated(evaluation(accuracy))
    watched.last_evaluation(3)
    assert sum("fall of avg@k beyond chance is 0.1 at step 3, above 0.05" in line for line in lines) == said
    watched.last_evaluation(3)
    assert len(lines) == said


@pytest.mark.parametrize(("opd", "notes"), [(1.0, 1), (0.0, 0)])
def test_a_student_that_learns_from_rewards_alone_may_leave_the_teacher(tmp_path, opd, notes):
    config = make_config(
        "s", "t", objective={"opd": {"weight": opd}, "rl": {"weight": 1.0}},
        rollout={"rollouts_per_prompt": 2, "top_p": 1.0}, guards={"reference_steps": 1, "patience": 1},
    )  # fmt: skip
    said = []
    guards = StepGuards(config, tmp_path, said.append)
    for number, kl in enumerate((0.1, 1.0)):
        guards.check(step(number, recorded={"kl/mean": kl}))
    assert len([text for text in said if "kl/mean" in text]) == notes


@pytest.mark.parametrize(("context", "said"), [("{solution}{prompt}", 1), (None, 0)])
def test_a_student_that_acts_as_if_it_had_been_told_is_told_once(tmp_path, context, said):
    """The KL falls and held-out answers get worse; it rises before the third evaluation, which says nothing."""
    lines = []
    config = make_config("s", "t", guards={"kl_fall": None})
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"context": context})})
    watched = StepGuards(config, tmp_path, lines.append)
    for done, (kl, accuracy) in enumerate([(0.5, 0.6), (0.6, 0.5), (0.4, 0.4), (0.3, 0.4)], 1):
        fired = watched.check(step(done, recorded={"kl/mean": kl}))["guards/fired"]
        watched.evaluated(evaluation(accuracy))
        if done == 2:
            watched.load_state(RunState(watch=watched.state()).watch.model_dump())
    assert fired == float(said)
    found = [line for line in lines if "context_leak" in line]
    assert len(found) == said and all("while the KL fell is 0.1" in line and "told" in line for line in found)
