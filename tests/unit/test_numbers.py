"""Numbers and inputs at the edge, through scorer, monitor and token counts; the learner's part: tests/cluster."""

import numpy as np
import pytest
import torch

from actors.monitor.trap_monitor import TrapMonitor
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.data.accounting import ScoredTokens, join_outcomes, kept_rollouts
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.errors import UserError
from kat_ray.observability.trackers import Trackers
from kat_ray.records.traces import TraceRow, read_traces
from kat_ray.run.directory import RunDirectory
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.probes import probe_metrics
from kat_ray.run.step_metrics import rollout_metrics, score_metrics
from kat_ray.termination import RunFacts
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import EngineEnd, RolloutSpec, SampledRollout, StopReason
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config

RULE = KatSettings(window=4, consecutive=1, exempt=0, min_samples=1, min_steps=0, eta=0.5, calibrate_on="all")


class Line:
    """A scorer and a monitor as a run connects them, without a cluster."""

    def __init__(self, models, teacher="teacher"):
        config = make_config(models["student"][0], models[teacher][0])
        self.scorer = TeacherScorer("scorer:0", ScorerSettings.from_config(config, models[teacher][0], (1,), 64))
        self.monitor = TrapMonitor(RULE, RunFacts(0, 64))
        self.steps = 0

    def step(self, chunk, rollouts, probes=()):
        """One chunk that holds all of a step; returns the scored chunk, the teacher's rows, finished rollouts."""
        self.step_start = self.monitor.start_step(self.steps, list(rollouts), [i in probes for i in rollouts])
        self.steps += 1
        scored, rows = self.scorer.score(chunk)
        self.monitor.observe(scored)
        sampled = [SampledRollout(i, np.array(t, np.int32)) for i, (_, t) in rollouts.items()]
        return scored, rows, join_outcomes(sampled, self.monitor.end_step().outcomes)


def whole(models, rollouts, end=EngineEnd.MAX_TOKENS):
    return chunk_of(models["student"][1], rollouts, ended=dict.fromkeys(rollouts, end))


def specs_of(rollouts):
    return [RolloutSpec(i, f"p:{i}", tuple(p), 0, False, 64) for i, (p, _) in rollouts.items()]


def break_teacher(line, rows):
    genuine = line.scorer._teacher.logprobs

    def broken(hidden):
        values = genuine(hidden).clone()
        values[rows] = torch.nan
        return values

    line.scorer._teacher.logprobs = broken


def figures_of(line, scored, rollouts):
    kept = {r.rollout_id: r.counts.kept for r in rollouts}
    return rollout_metrics(rollouts, line.step_start) | score_metrics([scored], kept)


def test_rows_without_a_teacher_leave_windows_means_and_calibration(models):
    rollouts = {0: ([5, 6], list(range(20, 32))), 1: ([7], list(range(40, 52)))}
    line = Line(models)
    whole_d = line.step(whole(models, rollouts), rollouts)[0].d.astype(np.float64)
    line = Line(models)
    break_teacher(line, [3, 4])
    scored, rows, finished = line.step(whole(models, rollouts), rollouts)
    assert np.isnan(scored.d).nonzero()[0].tolist() == [3, 4], "two tokens of rollout 0, no others"
    assert np.isnan(rows.topk_logprobs[3:5]).all() and np.isfinite(rows.topk_logprobs[5:]).all()
    # Windows of 4 tokens of rollout 0 that hold neither token 3 nor 4: those that end at 9 to 12.
    clean = min(whole_d[e - 4 : e].mean() for e in range(9, 13))
    assert finished[0].outcome.minimum == pytest.approx(clean, rel=1e-5)
    figures = figures_of(line, scored, finished)
    assert figures["kl/mean"] == pytest.approx(np.delete(whole_d, [3, 4]).mean(), rel=1e-5)
    assert figures["rollout/kept_tokens"] == 24, "they are kept; the loss drops and counts them"
    assert np.isfinite(list(figures.values())).all()


def test_a_teacher_without_a_finite_value_cuts_nothing_and_teaches_the_rule_nothing(models, tmp_path):
    rollouts = random_rollouts(3)
    line = Line(models)
    line.step(whole(models, rollouts), rollouts)
    samples, threshold = line.monitor.stats()["calibration_samples"], None
    break_teacher(line, slice(None))
    for _ in range(2):
        scored, rows, finished = line.step(whole(models, rollouts), rollouts, probes=(1,))
        assert np.isnan(scored.d).all() and np.isnan(rows.tail_logprobs).all()
        assert [(r.outcome.minimum, r.outcome.cut) for r in finished] == [(None, None)] * 3
        threshold = threshold or line.step_start.threshold
        assert line.step_start.threshold == threshold is not None
        assert line.monitor.stats()["calibration_samples"] == samples
    figures = figures_of(line, scored, finished)
    figures |= probe_metrics([r.outcome for r in finished], ScoredTokens([scored]).column("d"), {}, True)
    assert "kl/mean" not in figures and "health/overlap" in figures
    assert [k.kept for k in kept_rollouts(finished, specs_of(rollouts))] == [len(t) for _, t in rollouts.values()]


@pytest.mark.parametrize(
    ("prompt", "token", "message"),
    [
        ([5, 200], 9, "rollout 3: its context holds the token id 200, but teacher.path = .* vocabulary of 200 ids"),
        ([5, 6], 231, "rollout 3: its answer holds the token id 231"),
        ([5, 6], -1, "rollout 3: its answer holds the token id -1"),
    ],
)
def test_an_id_beyond_the_teachers_vocabulary_is_named_before_it_is_run(models, prompt, token, message):
    line = Line(models)
    pending = [PendingRollout(i, tuple(p), scorer=0) for i, p in ((2, [4, 5]), (3, prompt))]
    for rollout, t in zip(pending, (8, token), strict=True):
        rollout.add([t], np.array([[t, 6, 7]], np.int32), np.full((1, 3), -2.0, np.float32))
    chunk = build_chunk(pending, [], attempt=0, top_k=2, vocabulary=500)
    with pytest.raises(UserError, match=message):
        line.scorer.score(chunk)
    assert line.scorer.stats()["states"] == 0


def test_a_top_k_id_beyond_the_teachers_vocabulary_is_named(models):
    pending = PendingRollout(3, (4,), scorer=0)
    pending.add([5], np.array([[5, 6, 300]], np.int32), np.full((1, 3), -2.0, np.float32))
    chunk = build_chunk([pending], [], attempt=0, top_k=2, vocabulary=500)
    with pytest.raises(UserError, match="rollout 3: its top k holds the token id 300"):
        Line(models).scorer.score(chunk)


@pytest.mark.parametrize("prompt", [(4,), (4, 5, 6)])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("end", [EngineEnd.EOS, EngineEnd.FAILED])
def test_a_rollout_without_a_token_ends_and_is_counted_and_in_no_batch(models, tmp_path, prompt, alone, end):
    rollouts = {4: (list(prompt), [])} | ({} if alone else {5: ([7, 8], list(range(30, 42)))})
    line = Line(models)
    pending = [PendingRollout(i, tuple(p), scorer=0) for i, (p, _) in rollouts.items()]
    pending[0].end = end
    for rollout in pending[1:]:
        genuine = whole(models, {5: rollouts[5]})
        ids = np.concatenate([genuine.token_ids[:, None], genuine.topk_ids()], axis=1)
        rollout.add(rollouts[5][1], ids, np.full(ids.shape, -5.0, np.float32))
        rollout.end = EngineEnd.EOS
    chunk = build_chunk(pending, [], attempt=0, top_k=64, vocabulary=200)
    scored, _, finished = line.step(chunk, rollouts, probes=(4,))
    assert line.scorer.stats()["states"] == 0
    outcome, counts = finished[0].outcome, finished[0].counts
    assert outcome.stop_reason == (StopReason.EOS if end is EngineEnd.EOS else StopReason.FAILED)
    assert (counts.generated, counts.kept, outcome.minimum) == (0, 0, None)
    figures = figures_of(line, scored, finished)
    assert figures["rollout/mean_length"] == (0 if alone else 6) and ("kl/mean" in figures) is not alone
    d = ScoredTokens([scored]).column("d")
    assert d[4].shape == (0,) and not any(probe_metrics([outcome], d, {}, True).values())
    assert [k.rollout_id for k in kept_rollouts(finished, specs_of(rollouts))] == list(rollouts)[1:]
    tail = (
        None,
        None,
        None,
        True,
        None,
        None,
        None,
    )  # cut, confirmed, threshold, probe, minimum, would_cut, correct
    row = TraceRow(4, "p", 0, 0, np.zeros(0, np.int32), d[4], outcome.stop_reason, *tail)
    (tmp_path / "traces").mkdir()
    with RunDirectory(tmp_path) as run, Trackers([JsonlTracker(tmp_path)]) as trackers:
        run.write_traces(0, [row])
        trackers.step(1, figures)
    assert read_traces(tmp_path).to_pylist()[0]["token_ids"] == []


def test_a_batch_that_is_cut_to_nothing_balances_and_gives_the_learner_no_work(models):
    rollouts = random_rollouts(4, tokens=(8, 12))
    line = Line(models)
    line.step(whole(models, rollouts), rollouts)  # calibrates: the teacher disagrees
    same = Line(models, teacher="student")  # agrees: every window is below the threshold
    same.monitor = line.monitor
    same.steps = 1
    scored, _, finished = same.step(whole(models, rollouts), rollouts)
    assert same.step_start.threshold > 0.05 and np.abs(scored.d).max() < 1e-4
    assert [(r.outcome.cut, r.outcome.confirmed) for r in finished] == [(0, 4)] * 4
    assert kept_rollouts(finished, specs_of(rollouts)) == []
    figures = figures_of(same, scored, finished)
    assert figures["rollout/kept_tokens"] == 0 and figures["rollout/trapped_share"] == 1
    generated, rest = figures["rollout/generated_tokens"], ("overshoot", "cut_back")
    assert generated == sum(figures[f"rollout/{name}_tokens"] for name in rest) > 0
    assert "kl/mean" in figures and "kl/kept_mean" not in figures
