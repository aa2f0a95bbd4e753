"""What the monitor says of chunks that it cannot take."""

import pytest

from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.errors import StateLost
from kat_ray.termination import RunFacts
from kat_ray.termination.settings import NoneSettings
from tests.support.chunks import chunk


def test_a_gap_is_told_as_state_that_was_lost():
    """A new monitor is shown all scores again; where some were lost on the way, all has to be said once more."""
    monitor = TrapMonitor(NoneSettings(), RunFacts(0, 16))
    monitor.start_step(0, [7], [False])
    monitor.observe(chunk([7], [0], [[1.0, 1.0]]))
    with pytest.raises(StateLost, match="rollout 7: a chunk starts at token 4, but 2 tokens were scored so far"):
        monitor.observe(chunk([7], [4], [[1.0]]))
    monitor.observe(chunk([7], [2], [[1.0, 1.0]]))
    monitor.observe(chunk([7], [4], [[1.0]]))
