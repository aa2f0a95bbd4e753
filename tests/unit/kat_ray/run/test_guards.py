"""Collapse guards and skipped steps: hand-made series, and one like a run's metrics file."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kat_ray.config import GuardsConfig
from kat_ray.data.batch import collect_samples
from kat_ray.errors import UserError
from kat_ray.models.tolerance import logprob_tolerance
from kat_ray.observability.metric_catalog import METRICS
from kat_ray.run.batch_dump import StepBatch, dump_batch
from kat_ray.run.collapse_guards import CollapseGuards
from kat_ray.run.skipped_steps import SkipGuard
from kat_ray.run.step_guards import StepGuards
from kat_ray.types.records import KeptRollout, PolicyCredit
from tests.support.chunks import chunk as scored_chunk
from tests.support.chunks import stream
from tests.support.configs import make_config
from tests.support.step_results import REPORT, a_step

HEALTHY = {
    "learner/stop_mass": 0.01,
    "learner/entropy": 0.2,
    "rollout/max_tokens_share": 0.1,
    "kl/mean": 0.4,
    "learner/tokens": 100,
    "learner/skipped": False,
}


def step(done, metrics):
    """A step of which no more is known than these metrics."""
    report = replace(
        REPORT,
        **{n.removeprefix("learner/"): v for n, v in metrics.items() if n.startswith("learner/")},
    )
    recorded = {n: v for n, v in metrics.items() if not n.startswith("learner/")}
    return a_step(done=done, learner=report, recorded=recorded)


def watch(series, guards=None, start=4, **settings):
    """Verdicts for a start of `start` healthy steps and then `series`, metrics that change from them."""
    config = GuardsConfig(**{"patience": 4, "reference_steps": start} | settings)
    guards = guards or CollapseGuards(config)
    return [guards.observe(step(i, HEALTHY | m)) for i, m in enumerate([{}] * start + list(series), 1)]


# Just beyond and just within each limit, by hand: the reference is the healthy value.
LIMITS = [
    ("stop_mass_fall", "learner/stop_mass", 0.00099, 0.00101),  # 0.1 x 0.01
    ("stop_mass_rise", "learner/stop_mass", 0.506, 0.504),  # 0.01 + 0.5 x 0.99 = 0.505
    ("entropy_fall", "learner/entropy", 0.0199, 0.0201),
    ("max_tokens_share", "rollout/max_tokens_share", 0.91, 0.89),
    ("kl_rise", "kl/mean", 1.21, 1.19),
    ("kl_fall", "kl/mean", 0.0079, 0.0081),
]


@pytest.mark.parametrize(("field", "metric", "beyond", "within"), LIMITS)
def test_each_guard_by_hand(field, metric, beyond, within):
    assert metric in METRICS
    verdicts = watch([{metric: beyond}] * 9)
    lines = {i: v.notes for i, v in enumerate(verdicts, 1) if v.notes}
    assert sorted(lines) == [6, 8], "after half of four steps, and after four; not every step"
    for number, (line,) in lines.items():
        assert line.startswith(f"guards.{field} = ") and f"{metric} is {beyond:.4g} at step {number}, " in line
        assert f"for {number - 4} steps in a row; " in line
    assert [v.fired for v in verdicts] == [0] * 7 + [1] * 6
    assert all(not v.notes and not v.fired for v in watch([{metric: within}] * 9))
    assert all(not v.notes and not v.fired for v in watch([{metric: beyond}] * 9, **{field: None}))


@pytest.mark.parametrize(("field", "metric", "beyond", "within"), LIMITS)
def test_stop_ends_the_run_when_the_guard_fires_and_not_before(field, metric, beyond, within):
    series = [{metric: beyond}] * 3 + [{metric: within}] + [{metric: beyond}] * 4
    verdicts = watch(series, action="stop")
    assert [v.stop is not None for v in verdicts] == [False] * 11 + [True]
    words = verdicts[-1].stop
    for part in (f"guards.{field}", metric, f"{beyond:.4g} at step 12", "for 4 steps in a row"):
        assert part in words
    assert words not in verdicts[-1].notes, "the error says it"
    assert all(v.stop is None for v in watch(series, action="warn"))


def test_the_limit_and_its_origin_are_told():
    (line,) = watch([{"learner/entropy": 0.015}] * 2)[-1].notes
    assert "below 0.02, set by a mean of 0.2 over the first 4 steps" in line and "lower learner.lr" in line
    (line,) = watch([{"rollout/max_tokens_share": 1.0}] * 2)[-1].notes
    assert "above 0.9, for 2 steps" in line and "rollout.max_tokens" in line


def test_a_guard_speaks_again_only_after_calm():
    low, fine = {"kl/mean": 0.0}, {}
    notes = [len(v.notes) for v in watch([low] * 2 + [fine] * 3 + [low] * 2 + [fine] * 4 + [low] * 2)]
    assert notes[4:] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_what_is_missing_neither_fires_nor_calms():
    low = {"kl/mean": 0.0}
    for nothing in ({"kl/mean": math.nan}, {"kl/mean": math.inf}):
        assert [v.fired for v in watch([low, low, nothing, low, low])][4:] == [0, 0, 0, 0, 1]
    zero = {"learner/entropy": 0.0, "learner/stop_mass": 0.0}
    empty = zero | {"learner/tokens": 0}  # as the learner reports a batch that was cut to nothing
    assert not any(v.notes for v in watch([empty] * 9))
    assert watch([zero] * 9)[-1].fired == 2
    assert not any(v.notes for v in watch([{"rollout/max_tokens_share": 1.0, "rollout/budget": 60.0}] * 9))


def test_relative_limits_wait_for_their_reference_and_need_one():
    config = GuardsConfig(reference_steps=3, patience=1)
    guards = CollapseGuards(config)
    assert [guards.observe(step(i, HEALTHY | {"kl/mean": k})).fired for i, k in enumerate((0.4, 9, 0.2, 9))] == [
        0
    ] * 4
    assert guards.observe(step(5, HEALTHY | {"kl/mean": 9.7})).fired == 1, "3 x (0.4 + 9 + 0.2) / 3 = 9.6"
    same = CollapseGuards(config)  # teacher and student are one model: noise has no scale
    assert not any(same.observe(step(i, HEALTHY | {"kl/mean": 1e-7 * (-1) ** i})).fired for i in range(20))


def diffs(values, metric="logprob_diff_mean", staleness=0, dtypes=("float32", "float32"), **settings):
    """Verdicts for steps whose learner and sampler differ by these."""
    guards = CollapseGuards(GuardsConfig(**{"patience": 3} | settings), dtypes)
    made = (replace(step(i, HEALTHY | {f"learner/{metric}": v}), staleness=staleness) for i, v in enumerate(values))
    return [guards.observe(s) for s in made]


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")]
)
def test_engines_that_differ_by_more_than_rounding_end_the_run(dtypes):
    bound = logprob_tolerance(*dtypes)
    within, beyond = diffs([0.99 * bound.mean], dtypes=dtypes), diffs([1.01 * bound.mean], dtypes=dtypes)
    assert within[0].stop is None and not within[0].notes and not within[0].fired
    words = beyond[0].stop
    assert words.startswith("guards.logprob_diff = 1: learner/logprob_diff_mean is ") and beyond[0].fired == 1
    assert f"for a sampler in {dtypes[0]} and a learner in {dtypes[1]}, for 1 step in a row" in words
    assert beyond[0].stop_fields == ("guards.logprob_diff_action",) and not beyond[0].notes
    largest = diffs([1.01 * bound.max] * 3, "logprob_diff_max", dtypes=dtypes)
    assert [v.stop is not None for v in largest] == [False, False, True], "one token in a batch may be far out"
    assert len(largest[1].notes) == 1 and not largest[0].notes


def test_a_difference_that_older_weights_explain_says_nothing():
    assert not any(v.notes or v.fired or v.stop for v in diffs([9.0] * 9, staleness=1))
    assert diffs([9.0])[0].stop, "the first step of such a run is sampled from the learner's own weights"


def test_the_difference_can_be_told_only_or_not_at_all():
    told = diffs([9.0, 9.0], logprob_diff_action="warn")
    assert [len(v.notes) for v in told] == [1, 0] and [v.fired for v in told] == [1, 1] and not told[0].stop
    assert not any(v.notes or v.fired for v in diffs([9.0] * 9, logprob_diff=None))
    assert not diffs([9.0], logprob_diff=1e6)[0].fired
    assert diffs([9.0], action="warn")[0].stop, "it has an action of its own"


def test_a_tail_that_hides_much_is_told_and_ends_no_run_unless_asked_to():
    series = [{"learner/tail_mass": 0.27}] * 4
    told = watch(series, action="stop")
    assert [len(v.notes) for v in told[4:]] == [0, 1, 0, 1] and told[-1].fired == 1 and told[-1].stop is None
    assert "guards.tail_mass = 0.1: learner/tail_mass is 0.27 at step 8, above 0.1" in told[-1].notes[0]
    assert "rollout.top_k_logprobs" in told[-1].notes[0]
    ended = watch(series, tail_mass_action="stop")[-1]
    assert ended.stop_fields == ("guards.tail_mass_action",)
    assert not watch([{"learner/tail_mass": 0.099}] * 9)[-1].fired


def test_two_guards_that_fire_at_once_are_each_treated_by_their_own_action():
    guards = CollapseGuards(GuardsConfig(patience=1))
    both = step(1, HEALTHY | {"learner/tail_mass": 0.5, "learner/logprob_diff_mean": 1.0})
    verdict = guards.observe(replace(both, staleness=0))
    assert len(verdict.notes) == 1 and "tail_mass" in verdict.notes[0] and "logprob_diff_mean" in verdict.stop
    assert verdict.fired == 2


@given(
    st.lists(st.sampled_from([0.0, 0.4, 2.0, math.nan]), max_size=40),
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_a_resumed_run_says_what_an_unbroken_one_says(values, at, patience, reference):
    config = GuardsConfig(patience=patience, reference_steps=reference)
    metrics = [HEALTHY | {"kl/mean": v} for v in values]
    whole = CollapseGuards(config)
    expected = [whole.observe(step(i, m)) for i, m in enumerate(metrics)]
    first, second = CollapseGuards(config), CollapseGuards(config)
    got = [first.observe(step(i, m)) for i, m in enumerate(metrics[:at])]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    got += [second.observe(step(i, m)) for i, m in enumerate(metrics[at:], min(at, len(metrics)))]
    assert got == expected and second.state() == whole.state()


def test_a_state_that_was_taken_stays_as_it_was():
    guards = CollapseGuards(GuardsConfig(reference_steps=5))
    guards.observe(step(1, HEALTHY))
    state = guards.state()
    before = json.dumps(state)
    guards.observe(step(2, HEALTHY | {"kl/mean": 9.0}))
    assert json.dumps(state) == before != json.dumps(guards.state())


def like_a_run(steps=150):
    """Metrics with the course and the scatter of the embedded task under KAT, seed 1."""
    rng = np.random.default_rng(1)
    for i in range(steps):
        falls = 0.24 + 0.76 * math.exp(-i / 25)
        scatter = lambda: float(rng.lognormal(0, 0.15))  # noqa: E731
        start = i < 2  # the rule is not active yet: long rollouts, which loop
        yield {
            "learner/stop_mass": (0.0040 if start else 0.0135 * scatter()),
            "learner/entropy": (0.105 if start else (0.1 + 0.15 * math.exp(-i / 30)) * scatter()),
            "rollout/max_tokens_share": (0.48 if start else float(rng.binomial(48, 0.02)) / 48),
            "kl/mean": (0.22 if start else 0.5 * falls * scatter()),
            "learner/tokens": 2200,
        }


def test_a_run_like_those_recorded_is_left_alone():
    for config in (GuardsConfig(), GuardsConfig(patience=1)):
        guards = CollapseGuards(config)
        assert not any((v := guards.observe(step(i, m))).notes or v.fired for i, m in enumerate(like_a_run(), 1))


def test_stop_ids_that_are_unlearnt_are_noticed_before_all_rollouts_run_to_the_cap():
    # Stop mass halves every 5 steps from step 40 on, and the share of rollouts at the cap follows 10 steps later.
    guards, lines = CollapseGuards(GuardsConfig()), {}
    for i, m in enumerate(like_a_run(), 1):
        m["learner/stop_mass"] *= 0.5 ** (max(0, i - 40) / 5)
        m["rollout/max_tokens_share"] = min(1.0, max(0, i - 50) / 40)
        for line in guards.observe(step(i, m)).notes:
            lines.setdefault(line.split(" ")[0], i)
    assert list(lines) == ["guards.stop_mass_fall", "guards.max_tokens_share"]
    assert 55 < lines["guards.stop_mass_fall"] < 65 < lines["guards.max_tokens_share"]


def test_skipped_steps_in_a_row_by_hand():
    guard = SkipGuard(3)
    #           bad    bad   good    bad    bad   empty  bad
    steps = [(1, 9), (1, 0), (0, 9), (1, 0), (1, 9), (0, 0), (1, 9)]
    assert [guard.observe(bool(s), t) for s, t in steps] == [False] * 6 + [True]
    assert (guard.in_a_row, guard.total) == (3, 5)
    other = SkipGuard(3)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and not other.observe(False, 5) and other.in_a_row == 0


def a_batch(bad=math.nan):
    rollouts = {3: ([5, 6], [9, 4, 2]), 8: ([7], [11, 12])}
    chunks, teacher = stream(rollouts, 2)
    teacher[0].topk_logprobs[0, 1] = bad
    teacher[0].stop_logprobs[:] = -math.inf  # no stop id outside the top k: nothing odd
    kept = [KeptRollout(3, 2, 2, np.array([1.0, math.inf], np.float32)), KeptRollout(8, 1, 2)]
    scored = [
        scored_chunk(c.rollout_ids, c.start, [c.new_tokens(i) / 8 for i in range(len(c.start))]) for c in chunks
    ]
    return StepBatch(chunks, teacher, scored, kept, {3: "p:3", 8: "p:8"})


def test_a_dump_holds_what_the_learner_was_given(tmp_path):
    batch = a_batch()
    path = dump_batch(tmp_path / "dumps", 17, batch, {"learner/loss": math.nan, "learner/tokens": 4.0})
    assert path == tmp_path / "dumps" / "step-17.safetensors"
    t, words = load_file(path), json.loads(path.with_suffix(".json").read_text())
    assert words["report"] == {"learner/loss": None, "learner/tokens": 4.0} and words["step"] == 17
    assert (words["non_finite"], words["prompt_ids"]) == (["learner/loss"], ["p:3", "p:8"])
    odd = {n: c for n, c in words["tensors_with_non_finite_values"].items() if c}
    assert odd == {"weights": 1, "teacher_topk_logprobs": 1}
    assert (t["rollout_ids"].tolist(), t["kept"].tolist(), t["offsets"].tolist()) == ([3, 8], [2, 2], [0, 2, 4])
    assert (t["prompt_token_ids"].tolist(), t["prompt_offsets"].tolist()) == ([5, 6, 7], [0, 2, 3])
    assert t["token_ids"].tolist() == [9, 4, 11, 12] and t["weights"].tolist() == [1, math.inf, 1, 1]
    assert t["d"].tolist() == [9 / 8, 4 / 8, 11 / 8, 12 / 8]
    for row, at in zip(collect_samples(batch.chunks, batch.teacher, batch.kept), (0, 2), strict=True):
        rows = slice(at, at + 2)
        np.testing.assert_array_equal(t["teacher_topk_logprobs"][rows], row.teacher_topk)
        np.testing.assert_array_equal(t["teacher_tail_logprobs"][rows], row.teacher_tail)
        np.testing.assert_array_equal(t["teacher_stop_logprobs"][rows], row.teacher_stop)
        np.testing.assert_array_equal(t["topk_ids"][rows], row.topk_ids)
        np.testing.assert_array_equal(t["sampled_logprobs"][rows], row.sampled_logprobs)
    # The student's row of token n holds -n/10, -(n+1)/10, ... (as `stream` makes them), the sampled one first.
    np.testing.assert_allclose(t["student_topk_logprobs"][:, 0], [-1.0, -0.5, -1.2, -1.3], rtol=1e-3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-17.json", "step-17.safetensors"]


def test_a_dump_of_a_step_with_rewards_holds_the_advantages(tmp_path):
    batch = a_batch()
    kept = [replace(batch.kept[0], policy=PolicyCredit(-0.25, 2, 1e-3)), batch.kept[1]]
    tensors = load_file(dump_batch(tmp_path, 1, replace(batch, kept=kept), {}))
    assert (tensors["advantages"].tolist(), tensors["policy_tokens"].tolist()) == ([-0.25, 0.0], [2, 0])
    assert tensors["policy_weights"].tolist() == [1e-3, 0.0], "of the others nothing"
    assert "advantages" not in load_file(dump_batch(tmp_path, 2, batch, {}))


def test_a_dump_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "dumps").write_text("in the way")
    with pytest.raises(UserError, match=r"dumps/step-3.safetensors: the batch of step 3.*cannot be written"):
        dump_batch(tmp_path / "dumps", 3, a_batch(), {})


def test_the_watch_says_the_first_skip_and_ends_the_run_with_a_dump(tmp_path):
    lines, saved = [], []
    watched = StepGuards(make_config("s", "t", learner={"max_skipped_steps": 3}), tmp_path, lines.append)
    bad = HEALTHY | {"learner/skipped": True, "learner/loss": math.nan}
    for number in (1, 2):
        assert watched.check(step(number, bad)) == {"guards/fired": 0.0}
        watched.end_if_due(a_batch, functools.partial(saved.append, number))
    assert lines == ["step 1 was skipped: its loss or gradient was not finite"] and not saved
    resumed = StepGuards(make_config("s", "t", learner={"max_skipped_steps": 3}), tmp_path, lines.append)
    resumed.load_state(json.loads(json.dumps(watched.state(), allow_nan=False)))
    resumed.check(step(3, bad))
    with pytest.raises(UserError) as error:
        resumed.end_if_due(a_batch, lambda: saved.append(3))
    words, file = str(error.value), tmp_path / "dumps" / "step-3.safetensors"
    assert words.startswith("learner.max_skipped_steps = 3: step 3 is the last of 3 in a row")
    assert str(file) in words and file.is_file() and saved == [3] and len(lines) == 1
    assert resumed.skipped_steps == 3


def test_a_batch_that_is_lost_does_not_hide_why_the_run_ends(tmp_path):
    watched = StepGuards(make_config("s", "t", learner={"max_skipped_steps": 1}), tmp_path, print)
    watched.check(step(1, HEALTHY | {"learner/skipped": True, "learner/loss": math.nan}))
    with pytest.raises(UserError, match=r"max_skipped_steps = 1: step 1 .*Its batch was lost with the node"):
        watched.end_if_due(lambda: None, lambda: None)
    assert not (tmp_path / "dumps").exists()


def test_the_watch_ends_the_run_for_a_guard_after_a_checkpoint(tmp_path):
    saved, lines = [], []
    guards = {"action": "stop", "patience": 2, "max_tokens_share": 0.5}
    watched = StepGuards(make_config("s", "t", guards=guards), tmp_path, lines.append)
    full = HEALTHY | {"rollout/max_tokens_share": 0.75}
    assert watched.check(step(1, full)) == {"guards/fired": 0.0} and len(lines) == 2, "the tail's line, a guard's"
    watched.end_if_due(a_batch, lambda: saved.append(1))
    assert watched.check(step(2, full)) == {"guards/fired": 1.0} and len(lines) == 2
    with pytest.raises(
        UserError, match=r"max_tokens_share is 0.75 at step 2, above 0.5, for 2 steps.*after a checkpoin"
    ):
        watched.end_if_due(a_batch, lambda: saved.append(2))
    assert saved == [2] and not (tmp_path / "dumps").exists()


def test_the_watch_knows_the_data_types_and_names_the_action_that_ended_the_run(tmp_path):
    lines = []
    for dtype, ends in (("float32", True), ("bfloat16", False)):
        watched = StepGuards(make_config("s", "t", learner={"dtype": dtype}), tmp_path, lines.append)
        watched.check(replace(step(1, HEALTHY | {"learner/logprob_diff_mean": 0.04}), staleness=0))
        if ends:
            with pytest.raises(UserError, match=r"for guards.logprob_diff_action = stop, after a checkpoint"):
                watched.end_if_due(a_batch, lambda: None)
        else:
            watched.end_if_due(a_batch, lambda: None)
