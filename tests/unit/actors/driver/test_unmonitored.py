"""Ends of rollouts without a monitor."""

from types import SimpleNamespace

import numpy as np
import pytest

from actors.driver.dispatcher import CompletedRequest
from actors.driver.unmonitored import Unmonitored
from kat_ray.types.records import EngineEnd, GenerateRequest, RolloutSpec, SampledRollout, StopReason


def completed(attempt, ends):
    specs = tuple(RolloutSpec(i, "p", (1,), 0, probe=False, max_tokens=4) for i in ends)
    rollouts = tuple(SampledRollout(i, np.zeros(3, np.int32), end=end) for i, end in ends.items())
    return CompletedRequest(GenerateRequest(attempt, 0, 0, specs, {}), SimpleNamespace(rollouts=rollouts), None)


def test_ends_are_the_engines_in_the_order_of_ids():
    ends = Unmonitored({"a": 1})
    assert (start := ends.start_step(0, {})).threshold is None and start.budget is None
    requests = [completed(2, {5: EngineEnd.EOS, 1: EngineEnd.FAILED}), completed(1, {3: EngineEnd.MAX_TOKENS})]
    closed = ends.close(requests)
    assert [(o.rollout_id, o.stop_reason) for o in closed.outcomes] == [
        (1, StopReason.FAILED), (3, StopReason.MAX_TOKENS), (5, StopReason.EOS),
    ]  # fmt: skip
    assert all(o.scored is None and o.cut is None for o in closed.outcomes) and closed.busy_seconds == 0
    assert ends.state == {"a": 1}, "no rollout changes what a rule that never acts knows"


def test_one_that_has_not_ended_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="rollout 5 has not ended"):
        Unmonitored({}).close([completed(1, {5: EngineEnd.RUNNING})])
