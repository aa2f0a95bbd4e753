"""What feeds the calibration decides whether the threshold holds when the KL scale moves (docs/termination.md)."""

import numpy as np
import pytest

from kat_ray.termination.simulation import SHORT_BUFFER, example, halved_at, simulate

pytestmark = pytest.mark.integration  # 1,800 simulated steps


@pytest.fixture(scope="module")
def runs():
    """300 simulated steps under each source; the KL scale halves at step 100."""
    return {
        source: simulate(example(source), halved_at(100), steps=300, rollouts=64, tokens=96, seed=1)
        for source in ("probes", "all", "finished")
    }


def late(values):
    """Means before the scale halves, and long after."""
    return np.array([values[60:100].mean(), values[220:300].mean()])


@pytest.mark.parametrize("source", ["probes", "all"])
def test_probes_and_all_keep_the_rate_near_the_uncensored_one(runs, source):
    run = runs[source]
    assert np.abs(late(run.cut_share) - late(run.uncensored_share)).max() < 0.04
    ratio = late(run.threshold) / late(run.uncensored_threshold)
    assert np.abs(ratio - 1).max() < 0.1


def test_finished_rollouts_only_make_the_threshold_run_away(runs):
    run = runs["finished"]
    assert (late(run.cut_share) > late(run.uncensored_share) + 0.15).all()
    assert (late(run.threshold) > 1.25 * late(run.uncensored_threshold)).all()
    assert run.cut_share[80:100].mean() > run.cut_share[3:10].mean() + 0.05, "with a scale that does not even move"


def test_the_threshold_follows_the_scale_and_probes_follow_later(runs):
    for run in runs.values():
        before, after = late(run.threshold)
        assert after == pytest.approx(before / 2, rel=0.15)
    # 15 % of 64 rollouts refill a buffer of 512 within 53 steps, all of them within 8: until then too much is cut.
    lag = {source: (run.cut_share[100:150] > 0.75).sum() for source, run in runs.items()}
    assert lag["all"] < lag["probes"] < 50


def test_probes_of_the_last_ten_steps_keep_the_rate_near_the_uncensored_one_when_the_scale_moves():
    """docs/termination.md: let `buffer` be the probes of the steps that the threshold may lag."""
    rule = example("probes", buffer=SHORT_BUFFER)
    runs = [simulate(rule, halved_at(100), steps=150, rollouts=64, tokens=96, seed=seed) for seed in range(1, 4)]
    share, uncensored = (np.mean([getattr(r, n) for r in runs], axis=0) for n in ("cut_share", "uncensored_share"))
    gap = share - uncensored
    assert abs(gap[60:100].mean()) < 0.05 and abs(gap[112:150].mean()) < 0.05, gap
    wide = [
        simulate(example("probes"), halved_at(100), steps=150, rollouts=64, tokens=96, seed=s) for s in range(1, 4)
    ]
    lagging = np.mean([r.cut_share - r.uncensored_share for r in wide], axis=0)
    assert lagging[112:150].mean() > 0.15, "with a buffer of 53 steps of probes it does not"


def test_the_uncensored_rule_does_not_depend_on_what_feeds_the_other(runs):
    first, *others = (run.uncensored_threshold for run in runs.values())
    for other in others:
        np.testing.assert_array_equal(first, other)
