"""Runs that learn from rewards alone: neither scorers nor monitors, and the same recovery without them."""

import signal

import pytest

from actors.cluster.signals import Preempted
from tests.support.scenarios import ALONE, LAYOUTS, Run, check, finish

CHANGES = LAYOUTS[ALONE]
WAITS = [
    ("sampler", "ready"), ("learner", "start"), ("sampler", "connect"), ("sampler", "generate"),
    ("learner", "collect"), ("learner", "learn"), ("learner", "weights"), ("sampler", "load_weights"),
    ("learner", "snapshot"), ("learner", "written"),
]  # fmt: skip


def test_no_scorer_and_no_monitor_is_ever_made_and_nothing_is_said_of_them():
    result = finish(Run(0, CHANGES))
    assert {a.name.partition(":")[0] for a in result.cluster.actors} == {"sampler", "learner"}
    assert result.run.summary["scored_tokens"] == 0 < result.run.summary["trained_tokens"]
    for _, metrics in result.run.metrics:
        named = {
            n for n in metrics if any(word in n for word in ("scor", "monitor", "kl/", "decision", "tail_mass"))
        }
        assert not named, named
        assert metrics["time/control"] >= 0 and metrics["learner/tokens"] > 0


def test_rollouts_have_the_ends_that_their_engines_gave_them():
    """The stub's answers have 6 + seed % 16 tokens, at most 16."""
    result = finish(Run(0, CHANGES))
    rows = [row for rows in result.run.traces.values() for row in rows]
    assert {str(row.stop_reason) for row in rows} == {"eos", "max_tokens"}
    for row in rows:
        assert (row.stop_reason == "max_tokens") == (len(row.token_ids) == 16)
        assert (row.cut, row.confirmed, row.threshold, row.minimum, row.probe) == (None, None, None, None, False)
        assert len(row.d) == 0 and row.features is None and row.weights is None


def test_a_rollout_is_sent_once_when_it_has_ended_with_nothing_but_its_tokens_log_probabilities():
    run = Run(0, CHANGES)
    taken = []
    run.world.on_collect = lambda chunks, teacher: taken.append((chunks, teacher))
    finish(run)
    for chunks, teacher in taken:
        assert not teacher
        for chunk in chunks:
            assert (chunk.start == 0).all() and (chunk.ended > 0).all() and chunk.whole_past.all()
            assert chunk.topk_logprobs.shape == (chunk.tokens, 0) and len(chunk.sampled_logprobs) == chunk.tokens
    ids = [i for chunks, _ in taken for chunk in chunks for i in chunk.rollout_ids.tolist()]
    assert {*ids} == set(range(24))


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("sampler:0", "ready"), ("sampler:0", "connect"), ("sampler:0", "generate"), ("sampler:0", "load_weights"),
        ("learner:0", "start"), ("learner:0", "collect"), ("learner:0", "learn"), ("learner:0", "weights"),
        ("learner:1", "snapshot"),
    ],
)  # fmt: skip
def test_a_death_in_each_method(role, method, at):
    run = Run(0, CHANGES)
    run.cluster.when(role, method, lambda: run.cluster.kill(role), at=at)
    finish(run, f"kill:{role}")


def test_a_sampler_is_lost_with_its_node_and_with_the_records_of_its_rollouts():
    run = Run(0, CHANGES)
    run.cluster.when("learner:0", "collect", lambda: run.cluster.lose("sampler:1"), nth=2)
    finish(run, "lose:sampler:1")


@pytest.mark.parametrize(("actor", "method"), WAITS)
def test_sigterm_in_each_wait_and_the_run_gone_on_with(actor, method):
    run = Run(0, CHANGES)
    run.cluster.when(actor, method, run.cluster.terminate)
    result = run.go()
    check(result)
    if result.error is not None:
        assert isinstance(result.error, Preempted) and run.stop.signal == signal.SIGTERM
        finish(Run(0, CHANGES, start_from=result))


def test_samplers_alone_are_elastic():
    elastic = {
        **CHANGES, "run": {"steps": 8}, "sampler": {"replicas": 2, "max_replicas": 3},
        "pools": {"grow_after": 1, "waiting_share": 0.02},
    }  # fmt: skip
    result = finish(Run(0, elastic))
    assert {metrics["pools/sampler_replicas"] for _, metrics in result.run.metrics} == {2.0, 3.0}
    assert not any("scorer" in name for _, metrics in result.run.metrics for name in metrics)
