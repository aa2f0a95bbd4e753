"""The real actors around stub engines: outcomes do not depend on the number of samplers, scorers and monitors."""

import pytest
import ray

from actors.bench.fleet import Fleet, Setting, bench_config, fleet_actors
from actors.bench.scaling import costs_of, flood, report
from actors.driver.steps import Steps
from kat_ray.data.prompt_order import PromptOrder

pytestmark = pytest.mark.nightly  # in virtual time: the layouts of test_control_plane


@pytest.fixture(scope="module")
def fleet(ray_local):
    fleet = Fleet(samplers=3, scorers=2, shards=[2])
    yield fleet
    for actor in (*fleet.samplers, *fleet.scorers, *(m for shards in fleet.monitors.values() for m in shards)):
        ray.kill(actor)


def outcomes_of(fleet, samplers, scorers, shards, steps=3):
    """What every rollout of a few steps came to."""
    used = {
        "sampler": fleet.samplers[:samplers],
        "scorer": fleet.scorers[:scorers],
        "monitor": fleet.monitors[shards],
    }
    actors = fleet_actors(bench_config(40), used)
    actors.wire()
    verbs = Steps(bench_config(40), actors, PromptOrder(fleet._prompts, 0, shuffle=False))
    sampled = [verbs.sample(step) for step in range(steps)]
    for s in sampled:
        for counts in (r.counts for r in s.rollouts):
            assert counts.generated == counts.kept + counts.cut_back + counts.overshoot
        assert all(len(r.decision_seconds) == len(r.chunks) for batch in s.reports for r in batch)
        assert all(len(r.chunks) and r.control_seconds > 0 for batch in s.reports for r in batch)
    outcomes = [r.outcome for s in sampled for r in s.rollouts]
    return [(o.rollout_id, o.cut, o.confirmed, o.threshold, o.minimum) for o in outcomes]


def test_two_monitors_do_what_one_does_and_the_benchmark_reports(fleet):
    one = outcomes_of(fleet, samplers=1, scorers=1, shards=1)
    assert one == outcomes_of(fleet, samplers=3, scorers=2, shards=2)
    assert sum(cut is not None for _, cut, *_ in one) > 10 and one[-1][3] is not None
    assert {ray.get(s.stats.remote())["states"] for s in fleet.scorers} == {0}, "what was cut was released"
    measured = [fleet.measure(Setting(3, 48, 2, shards=n), tokens=1) for n in (1, 2)]
    floods = [flood(fleet.monitors[1][0], 100 + rollouts, rollouts, calls=3) for rollouts in (4, 32)]
    for m in measured:
        assert m.tokens > 0 and m.chunks == m.puts and m.remote_calls > 2 * m.chunks
        assert all(m.cpu[role] > 0 for role in ("sampler", "scorer", "monitor", "driver"))
        assert 400 < m.bytes_put / m.tokens < 480
    text = report(measured, floods, costs_of(measured, floods))
    assert "512 GPUs" in text and text.count("| 3 x 48 (2, ") == 2
