"""The arithmetic of what a checkpoint costs; nothing is timed here."""

import pytest

from actors.bench import checkpoint
from actors.bench.end_to_end import SHORT

# Recorded at these times; a step takes 2 s, or 3 s while the checkpoint that was taken before it is written.
STEPS = [
    {"step": step, "time": time, "time/step": seconds}
    for step, time, seconds in [(1, 10.0, 9.0), (2, 12.1, 2.0), (3, 16.0, 3.0), (4, 18.1, 2.0), (5, 22.2, 3.0)]
]


def test_steps_after_a_checkpoint_are_told_from_others():
    with_one, without = checkpoint.split(STEPS)
    assert with_one == [pytest.approx((3.9, 3.0)), pytest.approx((4.1, 3.0))]
    assert without == [pytest.approx((2.1, 2.0)), pytest.approx((2.1, 2.0))]


def test_all_that_is_outside_a_step_counts_as_standing_still():
    still, slower = checkpoint._figures(SHORT, STEPS)
    assert still.value == pytest.approx((0.9 + 1.1) / (3.9 + 4.1)) and still.met is False
    assert slower.value == pytest.approx(1.5) and slower.met is None


def test_without_a_run_nothing_is_claimed():
    assert [figure.value for figure in checkpoint._figures(SHORT, [])] == [None, None]
