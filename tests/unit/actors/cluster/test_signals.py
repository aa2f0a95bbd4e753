"""A run that is told to end: what is said of it beforehand."""

from actors.cluster.signals import StopRequest


def test_a_step_that_outlasts_the_grace_is_told_of_once():
    stop = StopRequest(60.0)
    assert stop.too_long(60.0) is None
    said = stop.too_long(61.5)
    assert said is not None and "took 62 s" in said and "run.grace_seconds=124" in said
    assert stop.too_long(90.0) is None, "once is enough"
