"""The benchmark's arithmetic and stubs; scorers dealt along samplers; monitors that act as one."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.bench.capacity import Assumptions, Cost, Costs, fit, markdown, plan
from actors.bench.decision_path import _records, bytes_figure, chunks_of_a_step, decision_path_figure
from actors.bench.fleet import MAX_TOKENS
from actors.monitor.trap_monitor import TrapMonitor
from actors.sampler.student_sampler import scorer_of
from actors.testing.stub_engine import StubEngine
from actors.testing.stub_teacher import stub_kl
from kat_ray.data.accounting import finished
from kat_ray.termination import RunFacts
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import EngineEnd, SamplingSettings, ScoredChunk


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_scorers_share_rollouts_evenly_and_meet_few_samplers(samplers, scorers, rollouts):
    pairs = {(i, j): scorer_of(j, rollouts, i, samplers, scorers) for i in range(samplers) for j in range(rollouts)}
    load = Counter(pairs.values())
    assert set(load) <= set(range(scorers))
    if rollouts >= scorers:
        # A boundary between two scorers may fall within a rollout's part of the line.
        assert max(load.values()) - min(load.get(s, 0) for s in range(scorers)) <= 2
    met = {(i, scorer) for (i, _), scorer in pairs.items()}
    assert len(met) <= samplers + scorers - math.gcd(samplers, scorers)


def test_one_sampler_per_scorer_where_they_are_as_many():
    assert [scorer_of(j, 5, i, 3, 3) for i in range(3) for j in range(5)] == [0] * 5 + [1] * 5 + [2] * 5


def test_fit_finds_the_costs_and_none_below_zero():
    calls, tokens = [10, 100, 10, 1000], [1000, 1000, 50_000, 200_000]
    cost = fit(calls, tokens, [1e-3 * c + 2e-6 * t for c, t in zip(calls, tokens, strict=True)])
    assert cost.call == pytest.approx(1e-3) and cost.token == pytest.approx(2e-6)
    only_tokens = fit([1, 2, 3], [1000, 1900, 2800], [0.1, 0.19, 0.28])
    assert only_tokens.call >= 0 and only_tokens.token == pytest.approx(1e-4, rel=1e-3)


def test_a_plan_by_hand():
    # 8 GPUs: 4 samplers of 10,000 tokens/s, 2 scorers; a period is 256 x 16 tokens of a sampler: 2.44 a second, one
    # chunk for each of the 4 samplers. Monitor: 4 x 2.44 x 1 ms + 40,000 x 1 us = 0.0498 cores.
    costs = Costs(Cost(0, 0), Cost(0, 0), Cost(1e-3, 1e-6), Cost(1e-3, 0), 0.0, 400.0)
    small = plan(8, costs, Assumptions())
    assert (small.samplers, small.scorers, small.ranks, small.nodes) == (4, 2, 2, 1)
    assert small.monitor_cores == pytest.approx(4 * 10_000 / 256 / 16 * 1e-3 + 0.04)
    assert small.driver_cores == pytest.approx(40.0 * 1e-3), "40 rollouts of 1000 tokens end a second"
    assert (small.shards, small.broadcast_one, small.broadcast_tree) == (1, 0.0, 0.0)
    large = plan(512, costs, Assumptions())
    assert large.shards == math.ceil(large.monitor_cores / 0.5) > 1
    assert large.broadcast_one == pytest.approx(63 * 0.64) and large.broadcast_tree == pytest.approx(6 * 0.64)
    assert large.chunks_if_dealt_to_all / large.chunks_per_second == pytest.approx(128)
    assert markdown([small, large]).count("\n") == 17


def test_the_bytes_of_a_token_stay_below_the_goal():
    figure = bytes_figure(rollouts=8, length=256)
    assert figure.met and figure.detail["RolloutChunk.topk_ids_high"] == 16
    assert sum(v for k, v in figure.detail.items() if k != "vocabulary") == pytest.approx(figure.value, abs=0.2)
    assert bytes_figure(rollouts=8, length=256, vocabulary=2**16).value == pytest.approx(figure.value - 16)


def test_the_share_of_the_decision_path_is_read_from_a_run(tmp_path):
    row = '{{"time/step": 2.0, "time/monitor": {m}, "time/control": 0.02, "rollout/generated_tokens": 1000}}\n'
    (tmp_path / "metrics.jsonl").write_text(
        row.format(m=9) * 2 + '{"eval/avg_at_k": 0.5}\n' + row.format(m=0.01) * 3
    )
    figure = decision_path_figure(tmp_path)
    assert figure.value == pytest.approx(0.03 / 2) and figure.met and figure.detail["steps"] == 3
    with pytest.raises(ValueError, match="no steps after the first 5"):
        decision_path_figure(tmp_path, skip=5)


def test_the_stub_engine_gives_what_was_asked_and_obeys_aborts():
    engine = StubEngine(top_k=4, vocabulary=100)
    for name, tokens in (("1", 2), ("2", 3), ("3", 9)):
        engine.add(name, (5,), 0, SamplingSettings(tokens, 1.0, 1.0, 4, (1,)))
    first = engine.step()
    assert [r.request_id for r in first] == ["1", "2", "3"] and engine.running == 3
    assert all(r.topk_ids.shape == r.logprobs.shape == (1, 5) and len(r.token_ids) == 1 for r in first)
    assert all((np.diff(r.logprobs[0, 1:]) <= 0).all() and np.exp(r.logprobs[0, 1:]).sum() < 1 for r in first)
    assert [r.end for r in engine.step()] == [EngineEnd.MAX_TOKENS, EngineEnd.RUNNING, EngineEnd.RUNNING]
    engine.abort(["3", "1"])
    assert [r.request_id for r in engine.step()] == ["2"] and engine.running == 0


def test_the_real_scorer_sees_the_kl_that_the_stub_teacher_is_made_for():
    low = []
    for chunk, scored, rows in _records(rollouts=40, length=MAX_TOKENS, prompt=3, vocabulary=500):
        counts = np.diff(chunk.offsets)
        rollout = np.repeat(chunk.rollout_ids, counts)
        position = np.arange(chunk.tokens) - np.repeat(chunk.offsets[:-1] - chunk.start, counts)
        expected = stub_kl(rollout, position, MAX_TOKENS)
        np.testing.assert_allclose(scored.d, expected, atol=2e-3)
        assert rows.topk_logprobs.dtype == np.float16 and scored.overlap.dtype == np.float16
        low.append((expected < 0.15).mean())
    assert low[0] < 0.3 < low[-1], "agreement grows along a rollout"


def part_of(chunk, rows):
    """A ScoredChunk of some of a chunk's rollouts."""
    take = np.concatenate([np.arange(chunk.offsets[r], chunk.offsets[r + 1]) for r in rows])
    counts = np.diff(chunk.offsets)[rows]
    changed = {
        name: value[rows] if len(value) == len(chunk.rollout_ids) else value[take]
        for name, value in vars(chunk).items()
        if isinstance(value, np.ndarray) and name != "offsets"
    }
    return ScoredChunk(
        **{**vars(chunk), **changed, "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)}
    )


@pytest.mark.parametrize("source", ["probes", "all", "finished"])
def test_monitors_that_share_a_calibration_do_what_one_does(source):
    rule = KatSettings(
        window=8, exempt=4, consecutive=2, eta=0.5, buffer=40, min_samples=10, min_steps=0, calibrate_on=source
    )
    facts = RunFacts(0, 64)
    one, shards = TrapMonitor(rule, facts), [TrapMonitor(rule, facts) for _ in range(3)]
    probes = [i % 4 == 0 for i in range(30)]
    cut = 0
    for step in range(4):
        step_start = one.start_step(step, range(30), probes)
        for s, shard in enumerate(shards):
            assert shard.start_step(step, range(s, 30, 3), probes[s::3]) == step_start
        for chunk in chunks_of_a_step(30, 64, 16):
            chunk.d[:] *= (1.5 - 0.3 * step) * (1.1 + np.sin(np.arange(len(chunk.d))))
            one.observe(chunk)
            for s, shard in enumerate(shards):
                shard.observe(part_of(chunk, np.arange(s, 30, 3)))
        expected = one.end_step().outcomes
        outcomes = sorted((o for s in shards for o in s.close_step([0]).outcomes), key=lambda o: o.rollout_id)
        assert tuple(outcomes) == expected
        for shard in shards:
            shard.learn(step, [finished(o) for o in outcomes])
        cut += sum(o.cut is not None for o in expected)
    assert cut > 10 and step_start.threshold is not None
