"""The watch on the object store, on figures by hand."""

import pytest

from actors.cluster.object_store import StoreUsage, StoreWatch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("actors.cluster.object_store.time.monotonic", lambda: now[0])
    return now


def test_it_says_once_that_the_store_is_too_full_and_what_was_spilled(clock):
    usages, lines = [], []
    watch = StoreWatch(0.7, lines.append, ask=lambda: usages.pop(0))
    for used, spilled, room in ((0.2, 5.0, True), (0.8, 5.0, False), (0.9, 5.0 + 2**20, False), (0.7, 5.0, True)):
        usages.append(StoreUsage(used, spilled))
        assert watch.sample() == {"store/used_share": used, "store/spilled_bytes": spilled - 5.0}
        assert watch.has_room is room
        clock[0] += 10
    assert len(lines) == 1 and "80% full" in lines[0] and "cluster.store_share = 0.7" in lines[0]


def test_a_step_ahead_needs_as_much_as_the_one_that_is_held(clock):
    """0.1 are others': at 0.4 a step has 0.3, and a second one beside it makes 0.7."""
    usages, lines = [StoreUsage(0.1, 0.0), StoreUsage(0.4, 0.0), StoreUsage(0.45, 0.0)], []
    watch = StoreWatch(0.75, lines.append, ahead=1, ask=lambda: usages.pop(0))
    watch.start()
    watch.sample()
    assert watch.has_room and not lines
    clock[0] += 10
    watch.sample()
    assert not watch.has_room
    assert len(lines) == 1 and "45% full with a step's records, and would be 80% full with the next" in lines[0]


def test_it_does_not_ask_more_often_than_every_two_seconds(clock):
    asked = []
    watch = StoreWatch(0.7, print, ask=lambda: asked.append(1) or StoreUsage(0.1, 0.0))
    for _ in range(10):
        watch.sample()
        clock[0] += 0.5
    assert len(asked) == 3
