"""Retries and the number of requests under way, as pure state: no clock, no sockets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_ray.remote.retry import Retry, Window, verdict


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(status):
    assert verdict(status) == "again"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 409, 413, 501])
def test_what_is_an_answer_is_not_asked_again(status):
    assert verdict(status) == "answer"


def test_waits_double_up_to_the_longest():
    retry = Retry(started=100.0, give_up_after=1000.0, first=0.25, longest=3.0)
    assert [retry.wait(100.0, spread=1.0) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert Retry(0.0, 10.0, first=0.25).wait(0.0, spread=0.0) == 0.125, "spread over the upper half"
    assert Retry(0.0, 1e9, failures=10_000).wait(0.0, spread=1.0) == 10.0, "no power overflows"


def test_what_the_server_asks_for_is_waited_for_at_least():
    assert Retry(0.0, 60.0).wait(0.0, spread=0.5, asked=7.0) == 7.0
    assert Retry(0.0, 60.0).wait(0.0, spread=0.5, asked=61.0) is None, "beyond the end: give up now"


def test_it_is_given_up_where_the_next_attempt_would_begin_too_late():
    retry = Retry(started=0.0, give_up_after=5.0, first=4.0)
    assert retry.wait(now=0.5, spread=1.0) == 4.0
    assert retry.wait(now=4.5, spread=1.0) is None
    assert retry.left(4.5) == 0.5 and retry.failures == 2


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=60), st.floats(0.1, 300))
def test_attempts_end_in_time(spreads, total):
    """Where attempts themselves take no time, no wait ends after the end."""
    now, retry = 0.0, Retry(0.0, total)
    for spread in spreads:
        if (seconds := retry.wait(now, spread)) is None:
            return
        now += seconds
        assert now < total


def test_the_window_halves_and_grows_again():
    window = Window(8)
    for _ in range(8):
        window.begin()
    assert not window.is_free
    window.end(too_many=True)
    assert window.size == 4 and window.running == 7 and not window.is_free
    for _ in range(7):
        window.end(too_many=False)
    assert window.size == 5 and window.running == 0, "one more after four good answers; the fifth takes five"
    for _ in range(3):
        window.begin()
        window.end(too_many=True)
    assert window.size == 1, "never none"
    for _ in range(200):
        window.begin()
        window.end(too_many=False)
    assert window.size == 8, "never more than `most`"


@given(st.lists(st.sampled_from(["begin", "good", "many"])), st.integers(1, 9))
def test_no_more_run_than_the_window_has(events, most):
    window = Window(most)
    for event in events:
        if event == "begin" and window.is_free:
            window.begin()
            assert window.running <= window.size <= most
        elif event != "begin" and window.running:
            window.end(event == "many")
        assert window.running >= 0 and 1 <= window.size <= most
