"""A run's records: nothing overwritten, nothing half-written, counts that balance."""

import errno
import json
import math
import os
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kat_ray.cluster.scaling_policy import StageTimes, scaling_metrics, size_metrics
from kat_ray.config import RunConfig
from kat_ray.data.accounting import count_tokens, join_outcomes, kept_rows, traces_of
from kat_ray.errors import RewardError
from kat_ray.observability.metric_catalog import METRICS, check_names
from kat_ray.records.traces import SCHEMA, PolicyTrace, TraceRow, read_rows, read_traces, write_traces
from kat_ray.rewards.limits import Failures, Fault, GradingLimits, Reply
from kat_ray.rewards.scoring import RewardRules, RewardScorer
from kat_ray.rewards.task import Task
from kat_ray.run import directory as records
from kat_ray.run.directory import RunDirectory
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.lock import RecordError
from kat_ray.run.probes import (
    Graded,
    RolloutGrader,
    grading_metrics,
    is_active,
    probe_metrics,
    seen_to_the_end,
    together,
)
from kat_ray.run.step_metrics import (
    answer_metrics,
    rollout_metrics,
    score_metrics,
    teacher_metrics,
    transfer_metrics,
)
from kat_ray.run.summary import Totals, git_commit, package_versions
from kat_ray.termination.fixed_prefix import FixedPrefixSettings
from kat_ray.termination.kat_stages import KatStagesSettings
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import (
    ChunkRefs,
    Reward,
    RolloutOutcome,
    SampledRollout,
    ScoredGiven,
    StepStart,
    StopReason,
    array_bytes,
)
from tests.support.chunks import chunk, stream


def outcome(rollout_id, reason, scored, cut=None, confirmed=None, probe=False, would_cut=None, minimum=0.5):
    return RolloutOutcome(rollout_id, reason, scored, cut, confirmed, 0.25, minimum, probe, would_cut)


def sampled(rollout_id, tokens):
    return SampledRollout(rollout_id, np.arange(tokens, dtype=np.int32))


def trace(rollout_id=7, **changes):
    values = dict(
        rollout_id=rollout_id, prompt_id="p:1", step=3, policy_version=3, token_ids=np.array([5, 6, 7], np.int32),
        d=np.array([0.5, math.nan], np.float32), stop_reason=StopReason.TRAPPED, cut=1, confirmed=2, threshold=0.25,
        probe=False, minimum=None, would_cut=None,
        correct=None,
    )  # fmt: skip
    return TraceRow(**(values | changes))


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(RunConfig(dir=str(tmp_path), tensorboard=False), "run: {}\n") as run:
        yield run


def test_a_run_never_overwrites_another_and_latest_points_to_the_newest(tmp_path):
    settings = RunConfig(name="a", dir=str(tmp_path), tensorboard=False)
    paths = []
    for _ in range(3):
        with RunDirectory.create(settings, "x: 1\n") as run:
            paths.append(run.path.name)
        assert (tmp_path / "latest").resolve().name == run.path.name
        assert (tmp_path / "latest" / "config.yaml").read_text() == "x: 1\n"
    assert paths == ["a", "a-2", "a-3"]
    (tmp_path / "a" / "old").touch()
    with RunDirectory.create(settings.model_copy(update={"overwrite": True}), "x: 2\n") as run:
        assert run.path.name == "a" and not (run.path / "old").exists()


def test_an_early_end_goes_to_the_log_and_not_to_the_terminal(tmp_path, capfd):
    with (
        pytest.raises(RuntimeError),
        RunDirectory.create(RunConfig(dir=str(tmp_path), tensorboard=False), "") as run,
    ):
        raise RuntimeError("out of luck")
    assert "the run ended early" in (text := (run.path / "run.log").read_text())
    assert "Traceback" in text and "out of luck" in text
    assert "out of luck" not in "".join(capfd.readouterr())


def test_traces_come_back_as_they_were_written(run):
    run.write_traces(3, [trace(), trace(8, cut=None, confirmed=None, threshold=None, probe=True, would_cut=2)])
    run.write_traces(2, [trace(1, step=2, stop_reason=StopReason.EOS)])
    table = read_traces(run.path)
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    assert [r["rollout_id"] for r in rows] == [1, 7, 8]
    assert rows[1]["token_ids"] == [5, 6, 7] and rows[1]["stop_reason"] == "trapped"
    assert rows[1]["d"][0] == 0.5 and math.isnan(rows[1]["d"][1])
    assert (rows[2]["cut"], rows[2]["threshold"], rows[2]["probe"], rows[2]["would_cut"]) == (None, None, True, 2)
    assert not list((run.path / "traces").glob("*.partial"))


def test_rewards_come_back_as_they_were_written_and_are_null_where_none_are_learnt_from(run):
    logprobs = np.array([-0.1, -math.inf, -3.0], np.float32)
    policy = PolicyTrace(
        reward=0.1 + 0.2, rewards={"score": 0.3, "format": None}, reward_error="format: no text", advantage=1 / 3,
        reward_weight=1 / 0.15, policy_tokens=2, policy_weight=1e-9, probe_share=0.15, sampled_logprobs=logprobs,
    )  # fmt: skip
    ungraded = replace(policy, reward=None, rewards={}, reward_error=None, advantage=None, reward_weight=0.0)
    run.write_traces(3, [trace(policy=policy), trace(8, policy=ungraded), trace(9)])
    with_rewards, without, none = read_traces(run.path).to_pylist()
    for name in ("reward", "advantage", "reward_weight", "policy_tokens", "policy_weight", "probe_share"):
        assert with_rewards[name] == getattr(policy, name), "to the bit"
        assert without[name] == getattr(ungraded, name) and none[name] is None
    assert dict(with_rewards["rewards"]) == {"score": 0.3, "format": None} and without["rewards"] == []
    assert with_rewards["reward_error"] == "format: no text" and none["rewards"] is None
    assert with_rewards["sampled_logprobs"] == logprobs.tolist() and none["sampled_logprobs"] is None


def test_traces_of_before_rewards_are_read(run):
    path = write_traces(run.path / "traces", 3, [trace(), trace(8)])
    table = pq.read_table(path)
    pq.write_table(table.select(table.column_names[: table.column_names.index("reward")]), path)
    read = read_traces(run.path)
    assert read.schema == SCHEMA and read.column("rollout_id").to_pylist() == [7, 8]
    assert read.column("rewards").null_count == read.column("sampled_logprobs").null_count == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy_tokens": 4}, "policy_tokens lies outside of the rollout"),
        ({"sampled_logprobs": np.zeros(4, np.float32)}, "sampled_logprobs are of more tokens than were generated"),
        ({"learner_logprobs": np.zeros(4, np.float32)}, "learner_logprobs are of more tokens than were generated"),
        ({"probe_share": 1.5}, "probe_share is no share"),
        ({"probe_share": math.nan}, "probe_share is no share"),
    ],
)
def test_rewards_that_no_run_can_have_written(tmp_path, changes, said):
    policy = PolicyTrace(1.0, {}, None, 1.0, 0.5, 3, 0.1, 0.0, np.zeros(3, np.float32))
    read_rows(write_traces(tmp_path, 0, [trace(policy=policy)]))
    with pytest.raises(pa.ArrowInvalid, match=said):
        read_rows(write_traces(tmp_path, 0, [trace(policy=replace(policy, **changes))]))
    with pytest.raises(pa.ArrowInvalid, match="cut lies after confirmed"):
        read_rows(write_traces(tmp_path, 0, [trace(cut=2, confirmed=1)]))


def test_no_traces_is_an_empty_table(tmp_path):
    assert read_traces(tmp_path).num_rows == 0


def test_a_full_disk_is_one_message_and_loses_nothing(run, monkeypatch):
    run.write_traces(1, [trace()])
    jsonl = JsonlTracker(run.path)
    jsonl.step(1, {"kl/mean": 0.5})
    jsonl.close()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kat_ray.records.traces.pq.write_table", full)
    with pytest.raises(RecordError, match=r"traces: cannot be written: No space left on device; earlier"):
        run.write_traces(2, [trace(9)])
    assert read_traces(run.path).num_rows == 1
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 1


def test_too_little_room_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(RecordError, match="MiB are free"):
        RunDirectory.create(RunConfig(dir=str(tmp_path), tensorboard=False), "")
    assert not list(tmp_path.iterdir())


def test_a_summary_replaces_the_last_one_whole(run):
    run.write_summary({"steps": 1})
    run.write_summary({"steps": 2})
    assert json.loads((run.path / "summary.json").read_text()) == {"steps": 2}


def test_where_the_tokens_of_a_rollout_went():
    # Cut at 3, confirmed at 8, 11 generated: 3 kept, 5 cut back, 3 overshoot.
    books = count_tokens(outcome(0, StopReason.TRAPPED, 8, cut=3, confirmed=8), 11)
    assert (books.kept, books.cut_back, books.overshoot) == (3, 5, 3)
    whole = count_tokens(outcome(0, StopReason.EOS, 11), 11)
    assert (whole.kept, whole.cut_back, whole.overshoot) == (11, 0, 0)
    failed = count_tokens(outcome(0, StopReason.FAILED, 4), 11)
    assert (failed.kept, failed.cut_back, failed.overshoot) == (0, 0, 11)
    with pytest.raises(AssertionError, match="generated 11 tokens, 10 were scored"):
        count_tokens(outcome(0, StopReason.EOS, 10), 11)


def test_every_rollout_is_counted_once():
    outcomes = [outcome(1, StopReason.EOS, 4), outcome(2, StopReason.MAX_TOKENS, 5)]
    rollouts = join_outcomes([sampled(2, 5), sampled(1, 4)], outcomes)
    assert [(r.rollout_id, len(r.token_ids), r.counts.kept) for r in rollouts] == [(1, 4, 4), (2, 5, 5)]
    with pytest.raises(AssertionError, match="generated twice"):
        join_outcomes([sampled(1, 4), sampled(1, 4)], outcomes)
    with pytest.raises(AssertionError, match="1 rollouts generated, 2 ended"):
        join_outcomes([sampled(1, 4)], outcomes)


def test_totals_balance_or_say_so():
    totals = Totals()
    books = [count_tokens(outcome(0, StopReason.TRAPPED, 8, cut=3, confirmed=8), 11)]
    totals.add_step(
        started=1, ended=[StopReason.TRAPPED], books=books, scored_tokens=9, prompt_tokens=4, learnt_tokens=8
    )
    totals.add_trained(3)
    summary = totals.as_dict()
    assert summary["rollouts_ended"] == {"eos": 0, "max_tokens": 0, "trapped": 1, "failed": 0}
    assert (summary["generated_tokens"], summary["cut_back_tokens"], summary["trained_tokens"]) == (11, 5, 3)
    assert summary["learnt_tokens"] == 8
    with pytest.raises(AssertionError, match="3 rollouts started, 2 ended"):
        totals.add_step(
            started=2, ended=[StopReason.EOS], books=[], scored_tokens=0, prompt_tokens=0, learnt_tokens=0
        )


def test_traces_and_masks_follow_the_chunks():
    scored = [chunk([0, 1], [0, 0], [[1.0, 2.0], [9.0]]), chunk([0], [2], [[3.0, 4.0]], [1])]
    traces = traces_of(scored)
    assert traces[0].tolist() == [1, 2, 3, 4] and traces[1].tolist() == [9]
    masks = kept_rows(scored, {0: 3, 1: 0})
    assert [m.tolist() for m in masks] == [[True, True, False], [True, False]]
    figures = score_metrics(scored, {0: 3, 1: 0})
    assert figures["kl/mean"] == pytest.approx(19 / 5) and figures["kl/kept_mean"] == pytest.approx(2.0)
    assert figures["health/overlap"] == pytest.approx(2.0)
    assert "scorer/run_per_token" not in figures, "of chunks that do not say"
    ran = [replace(scored[0], asked_tokens=10, run_tokens=12), replace(scored[1], asked_tokens=30, run_tokens=48)]
    assert score_metrics(ran, {0: 3, 1: 0})["scorer/run_per_token"] == 60 / 40


def test_chunks_of_two_scorers_may_interleave():
    # Rollout 1 is far ahead in the first chunk and has ended in the second.
    scored = [
        chunk([1], [0], [[7.0] * 9]),
        chunk([0, 1], [0, 9], [[1.0] * 4, [8.0]], [0, 1]),
        chunk([0], [4], [[5.0]]),
    ]
    assert traces_of(scored)[0].tolist() == [1, 1, 1, 1, 5] and traces_of(scored)[1].tolist() == [7] * 9 + [8]
    with pytest.raises(AssertionError, match="starts at token 4, expected 0"):
        traces_of(scored[2:])


def test_metrics_of_a_step_by_hand():
    rollouts = join_outcomes(
        [sampled(0, 11), sampled(1, 4), sampled(2, 5)],
        [
            outcome(0, StopReason.TRAPPED, 8, cut=3, confirmed=8, minimum=0.2),
            outcome(1, StopReason.EOS, 4, probe=True, would_cut=2, minimum=0.4),
            outcome(2, StopReason.MAX_TOKENS, 5, minimum=None),
        ],
    )
    figures = rollout_metrics(rollouts, StepStart(0.25, 40))
    expected = {
        "rollout/generated_tokens": 20, "rollout/kept_tokens": 12, "rollout/overshoot_tokens": 3,
        "rollout/cut_back_tokens": 5, "rollout/mean_length": 20 / 3, "rollout/trapped_share": 1 / 3,
        "rollout/probes": 1, "kat/threshold": 0.25,
        "kat/window_min_mean": 0.3,
    }  # fmt: skip
    assert {k: figures[k] for k in expected} == pytest.approx(expected)
    assert "kat/threshold" not in rollout_metrics(rollouts, StepStart(None, None))
    assert set(figures) | set(score_metrics([chunk([0], [0], [[1.0]])], {0: 1})) <= set(METRICS)


def test_bytes_of_a_step_by_hand():
    """A rollout's first two tokens after a prompt of two, and the next two; k = 3 ids of 16 bits."""
    (first, second), _ = stream({7: ([5, 6], [9, 4, 2, 3])}, 2)
    # Rows: ids 8, start 4, offsets 2 x 4, tokens 2 x 4, ended 1. Then sampled 2 x 4, top k 2 x 3 x (2 + 2), tail
    # 2 x 4, context's offsets 2 x 4, inserted 1; the prompt's 2 x 4 the first chunk alone brings.
    rows = 8 + 4 + 8 + 8 + 1
    assert array_bytes(first) == rows + 8 + 24 + 8 + 8 + 1 + 8 and array_bytes(second) == array_bytes(first) - 8
    scores = [chunk([7], [0], [[0.5, 0.25]]), chunk([7], [2], [[0.5, 0.25]])]
    # d and the five features in float32 here, the teacher's top ids in int32: 2 x 7 x 4.
    assert [array_bytes(s) for s in scores] == [rows + 56] * 2
    scores = [replace(s, row_bytes=28, http_sent=100, http_received=60) for s in scores]
    refs = [ChunkRefs((7,), None, array_bytes(c)) for c in (first, second)]
    expected = {
        "transfer/chunk_bytes": 2 * 78 + 8, "transfer/score_bytes": 2 * 85, "transfer/row_bytes": 56,
        "transfer/http_sent_bytes": 200, "transfer/http_received_bytes": 120,
    }  # fmt: skip
    assert transfer_metrics(refs, scores, asks_servers=True) == expected
    local = {name: value for name, value in expected.items() if "http" not in name}
    assert transfer_metrics(refs, scores, asks_servers=False) == local
    assert transfer_metrics(refs, [], asks_servers=False) == {"transfer/chunk_bytes": 164}, "nobody scores"
    given = [ScoredGiven(0.5, row_bytes=30, http_sent=7, http_received=5)]
    more = {"transfer/row_bytes": 86, "transfer/http_sent_bytes": 207, "transfer/http_received_bytes": 125}
    assert transfer_metrics(refs, scores, True, given) == expected | more
    assert set(expected) <= set(METRICS)


def test_metrics_of_each_teacher_by_hand():
    """The second has no rollout that ended before its first window was full, and one without a finite KL."""
    ends = [
        outcome(0, StopReason.TRAPPED, 4, cut=2, confirmed=4, minimum=0.2),
        outcome(1, StopReason.EOS, 2, minimum=0.4),
        replace(outcome(2, StopReason.EOS, 2, minimum=None), teacher="code"),
    ]
    ends = [replace(o, teacher="math") if o.teacher == "default" else o for o in ends]
    rollouts = join_outcomes([sampled(0, 6), sampled(1, 2), sampled(2, 2)], ends)
    kl = {0: np.array([1, 2, 3, 4.0]), 1: np.array([5.0, math.nan]), 2: np.array([math.nan, math.nan])}
    start = StepStart(None, None, by_teacher={"math": StepStart(0.25, None), "code": StepStart(None, None)})
    figures = teacher_metrics(rollouts, kl, start)
    assert figures == pytest.approx({
        "teacher/rollouts/math": 2, "teacher/mean_length/math": 4, "teacher/kept_tokens/math": 4,
        "teacher/trapped_share/math": 0.5, "teacher/kl_mean/math": 3.0, "teacher/kl_kept_mean/math": 8 / 3,
        "teacher/threshold/math": 0.25, "teacher/window_min_mean/math": 0.3,
        "teacher/rollouts/code": 1, "teacher/mean_length/code": 2, "teacher/kept_tokens/code": 2,
        "teacher/trapped_share/code": 0,
    })  # fmt: skip
    check_names(figures)
    check_names(
        size_metrics({"scorer-math": 2})
        | scaling_metrics({"scorer-math": 0}, StageTimes(0, {"scorer-math": 0.5}), None)
    )


def test_the_teacher_of_a_rollout_comes_back_where_it_is_recorded(run):
    run.write_traces(3, [trace(teacher="math"), trace(8)])
    assert [row["teacher"] for row in read_traces(run.path).to_pylist()] == ["math", None]


def test_answers_and_whose_tokens_the_policy_has_by_hand():
    ends = [(0, StopReason.EOS, 4, {}), (1, StopReason.MAX_TOKENS, 8, {}), (2, StopReason.EOS, 6, {})]
    ends.append((3, StopReason.TRAPPED, 5, {"cut": 2, "confirmed": 4}))
    rollouts = join_outcomes([sampled(i, n) for i, _, n, _ in ends], [outcome(i, r, n, **c) for i, r, n, c in ends])
    figures = answer_metrics(rollouts, {0: True, 1: False, 2: False}, {0: 4, 1: 8, 2: 0, 3: 4})
    assert figures == {
        "rl/length_right": 4.0, "rl/length_wrong": 7.0, "rl/cut_share": 0.25, "rl/truncated_share": 0.5
    }  # fmt: skip
    check_names(figures)
    assert answer_metrics(rollouts, {}, {0: 0}) == {}, "no mean of nothing"


def test_probes_say_what_cuts_would_have_cost():
    outcomes = [
        outcome(0, StopReason.EOS, 6, probe=True, would_cut=2),
        outcome(1, StopReason.EOS, 4, probe=True),
        outcome(2, StopReason.MAX_TOKENS, 5, probe=True, would_cut=4),
        outcome(3, StopReason.EOS, 5),
    ]
    traces = {
        0: np.array([1, 1, 0.5, 0.5, 0.5, math.nan]),
        1: np.ones(4),
        2: np.array([1, 1, 1, 1, 0.0]),
        3: np.ones(5),
    }
    figures = probe_metrics(outcomes, traces, {0: True, 1: True, 2: False}, active=True)
    expected = {
        "probe/would_cut_share": 2 / 3, "probe/false_cut_share": 1 / 3, "probe/right_share": 2 / 3,
        "probe/tokens_after_cut": 2.5, "probe/kl_after_cut": 1.5 / 4,
        "probe/kl_lost_share": (1.5 / 3.5 + 0 + 0) / 3,  # the second is not cut, the third loses a token without KL
    }  # fmt: skip
    assert figures == pytest.approx(expected)
    assert set(figures) <= set(METRICS)
    assert probe_metrics(outcomes[3:], traces, {}, active=True) == {}, "no probes"


def test_a_step_without_a_would_be_cut_counts_unless_the_rule_waits():
    probe = replace(outcome(1, StopReason.EOS, 4, probe=True), threshold=None)
    trace_of = {1: np.ones(4)}
    waiting, no_threshold = KatSettings(), FixedPrefixSettings()
    assert probe_metrics([probe], trace_of, {1: True}, is_active(waiting, None)) == {}
    expected = {"probe/would_cut_share": 0, "probe/right_share": 1, "probe/false_cut_share": 0}
    expected["probe/kl_lost_share"] = 0
    assert probe_metrics([probe], trace_of, {1: True}, is_active(no_threshold, None)) == expected
    assert probe_metrics([probe], trace_of, {1: True}, is_active(waiting, 0.5)) == expected
    assert not is_active(KatStagesSettings(), None)


def test_only_rollouts_that_no_rule_touched_are_graded():
    rollouts = join_outcomes(
        [sampled(0, 4), sampled(1, 4), sampled(2, 4)],
        [
            outcome(0, StopReason.EOS, 4, probe=True),
            outcome(1, StopReason.EOS, 4),
            outcome(2, StopReason.FAILED, 4),
        ],
    )
    assert [r.rollout_id for r in seen_to_the_end(rollouts, cuts=True)] == [0]
    assert [r.rollout_id for r in seen_to_the_end(rollouts, cuts=False)] == [0, 1]
    grader = RolloutGrader({"a": "42"}, lambda ids: f"answer {ids[0]}", "integer")
    graded = grader.grade({0: ("a", [42]), 1: ("a", [41]), 2: ("b", [42])})
    assert graded.correct == {0: True, 1: False}
    figures = grading_metrics(graded)
    assert figures["probe/ran_out"] == 0 and set(figures) <= set(METRICS)
    assert grading_metrics(grader.grade({2: ("b", [42])})) == {}


def test_rollouts_whose_grading_runs_out_are_not_wrong_but_left_out_and_counted(caplog):
    limits = GradingLimits(seconds=0.5, total_seconds=120.0)
    with closing(RolloutGrader({"a": "4"}, lambda ids: ["$4$", "$9^{9^{9^9}}$"][ids[0]], "math", limits)) as grader:
        graded = grader.grade({0: ("a", [0]), 1: ("a", [1])})
        grader.check_failures(graded)
    assert graded.correct == {0: True} and graded.ran_out == 1 and graded.ungraded == {1}
    figures = grading_metrics(graded)
    assert (figures["probe/ran_out"], figures["probe/errors"]) == (1, 0) and "reward/errors" not in figures
    assert "1 of 2 answers of a step could not be graded or rewarded; the first error" in caplog.text
    assert "took longer than evaluation.grading_seconds = 0.5" in caplog.text


def test_a_verifier_that_gives_most_answers_no_reward_ends_a_run_that_learns_from_it():
    def graded(share):
        limits = GradingLimits(total_seconds=0.0)  # no time for anything; no child is started
        grader = RolloutGrader({"a": "4"}, lambda ids: "$4$", "math", limits, max_error_share=share)
        found = grader.grade({0: ("a", [0]), 1: ("a", [1]), 2: ("b", [2])})
        grader.check_failures(found)
        return found

    assert graded(None).ran_out == graded(1.0).ran_out == 2
    assert graded(1.0).reward_metrics == {"reward/errors": 0, "reward/timeouts": 2}
    said = (
        r"2 of 2 answers .* reward.max_error_share = 0.05 allows; the first error, of evaluation.verifier = math: "
        r"grading not reached: not reached within evaluation.grading_step_seconds = 0$"
    )
    with pytest.raises(RewardError, match=said):
        graded(0.05)


class Raising:
    """In place of the children that grade: an exception for each answer of `numbers`."""

    def __init__(self, numbers):
        self.numbers = numbers

    def ask(self, calls, within=None, check=None):
        raised = Reply(fault=Fault.RAISED, error="Traceback (most recent call last):\nValueError: bad scorer")
        return [raised if i in self.numbers else Reply(1.0) for i, _ in enumerate(calls)]

    def close(self):
        pass


@pytest.mark.parametrize("functions", [False, True])
def test_an_exception_of_a_verifier_is_told_as_what_it_is(functions, monkeypatch):
    """It was called too much time or memory, and counted nowhere."""
    monkeypatch.setattr("kat_ray.run.probes.pool_of", lambda *_: Raising({0, 2}))
    scorer = RewardScorer(RewardRules({"environment": 1.0}), {"a": Task("p", "p")}) if functions else None
    grader = RolloutGrader({"a": "{}"}, str, "environment", scorer=scorer, max_error_share=0.5)
    with closing(grader):
        graded = grader.grade({i: ("a", [i]) for i in range(4)})
        grader.check_failures(graded)
        assert graded.correct == {1: True, 3: True} and graded.ungraded == {0, 2}
        figures = grading_metrics(graded)
        assert (figures["reward/errors"], figures["reward/timeouts"]) == (2, 0)
        assert (figures["probe/errors"], figures["probe/ran_out"]) == (2, 0)
        assert [graded.rewards[i].value for i in range(4)] == [None, 1.0, None, 1.0]
        assert graded.rewards[0].error.endswith("ValueError: bad scorer")
        two = {4: ("a", [4])}  # a batch of its own, whose only answer fails as well
        whole = together([graded, grader.grade(two)])
        with pytest.raises(
            RewardError, match=r"(?s)3 of 5 answers .* the first error, of .*: Traceback .*bad scorer$"
        ):
            grader.check_failures(whole)


def test_errors_are_judged_over_all_batches_of_a_step():
    """Two of a step's many answers end no run, whichever batch they are of."""
    grader = RolloutGrader({}, str, "integer", max_error_share=0.05)

    def batch(first, count, failed):
        failures = Failures(count, 0, failed, "the first error, of f: late" if failed else "")
        return Graded({}, 0, 1.0, {first + i: Reward(0.0) for i in range(count)}, {}, failures=failures)

    first, second = batch(0, 256, 0), batch(256, 8, 2)
    grader.check_failures(together([first, second]))
    grader.check_failures(together([batch(0, 256, 2), batch(256, 8, 0)]))
    with pytest.raises(RewardError, match=r"^2 of 8 answers of a step"):
        grader.check_failures(second)
    with pytest.raises(RewardError, match=r"^14 of 264 answers of a step"):
        grader.check_failures(together([batch(0, 256, 12), second]))


def test_what_a_run_ran_on():
    assert {"ray", "torch", "transformers", "deepspeed"} <= set(package_versions())
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
