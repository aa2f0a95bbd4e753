"""Thousands of schedules of failures on a fake cluster: whatever happens, the run comes to the same.

A schedule is a seed, which draws every latency and who runs next, and a list of what is done at which switch. One
that fails is shrunk, and printed as the command that replays it with every call. `KAT_RAY_SCHEDULES=N` runs N times
as many, other ones each time.
"""

import gc
import logging
import os
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.support.scenarios import AVERAGE, GIVEN, LAYOUTS, LIVE, TWO_TEACHERS, check_schedule

MORE = int(os.environ.get("KAT_RAY_SCHEDULES", "0"))
ACTORS = ("sampler:0", "sampler:1", "scorer:0", "scorer:1", "monitor:0", "monitor:1", "learner:0", "learner:1")
GROUPS = ("scorer-math:0", "scorer-math:1", "scorer-prose:0")  # of teachers by name
FEWER = (TWO_TEACHERS, LIVE, AVERAGE, GIVEN)
SWITCHES = st.integers(30, 1000)  # of a run that has some 800 of them


@contextmanager
def many_runs():
    """What a run logs, and what it leaves to be collected, cost as much as a third of it; the replay logs."""
    threshold = gc.get_threshold()
    logging.disable()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def schedules(layout, kinds):
    """Up to four failures; what is done to an actor that is not there does nothing."""
    actors = (*ACTORS, *GROUPS) if layout == TWO_TEACHERS else ACTORS
    return st.lists(st.tuples(SWITCHES, st.sampled_from(kinds), st.sampled_from(actors)), max_size=4)


def checked(count, layout, *kinds):
    """Check so many schedules of this layout."""

    @settings(
        max_examples=count * max(1, MORE), derandomize=not MORE, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(seed=st.integers(0, 2**16), schedule=schedules(layout, kinds))
    def check(seed, schedule):
        events = ",".join(f"{switch}:{what}:{whom}" for switch, what, whom in schedule)
        note(f"python -m tests.support.scenarios --layout '{layout}' --seed {seed} --schedule '{events}'")
        check_schedule(seed, schedule, layout)

    with many_runs():
        check()


def test_deaths():
    checked(300, "plain", "kill")


@pytest.mark.integration  # 12 s
def test_deaths_freezes_lost_nodes_and_the_end():
    checked(300, "plain", "kill", "kill", "freeze", "lose", "terminate")


@pytest.mark.integration  # two minutes in all
@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - {"plain"}))
def test_all_of_it_in_other_layouts(layout):
    checked(60 if layout in FEWER else 175, layout, "kill", "kill", "freeze", "lose", "terminate")
