"""What interleavings do to a run: each one built on a fake cluster, on purpose, and then as always the same result.

`tests.support.scenarios` says what must be the same: rows kept, cuts, calibration, weights.
"""

import pytest

from actors.watch import Preempted
from kat_ray.errors import UserError
from tests.support.scenarios import Run, check, compare, undisturbed

ROLES = ("sampler:1", "scorer:0", "monitor:0", "learner:0")


def finish(run):
    """Its result, which is that of a run that nothing was done to."""
    result = run.go()
    check(result)
    assert result.error is None, result.error
    assert result.finished
    compare(result, undisturbed(run.changes))
    return result


def test_an_undisturbed_run_depends_on_no_interleaving():
    for seed in range(1, 6):
        finish(Run(seed))


def test_cuts_happen_in_the_run_that_all_others_are_compared_with():
    ended = Run().go().run.summary["rollouts_ended"]
    assert ended["trapped"] >= 3 and ended["eos"] >= 3 and ended["max_tokens"] >= 3


@pytest.mark.parametrize("role", ROLES)
def test_one_kill_of_each_role(role):
    run = Run()
    run.cluster.when("scorer", "score", lambda: run.cluster.kill(role), nth=12)
    result = finish(run)
    assert any("kill" in line for line in result.cluster.log)
