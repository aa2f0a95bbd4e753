"""An actor's class, guarded against going on after what is fatal; without Ray."""

import pickle
import threading

import cloudpickle
import pytest

from actors.cluster import replica
from actors.cluster.replica import dies_of_fatal_errors
from actors.sampler.student_sampler import StudentSampler
from kat_ray.errors import StateLost, UserError


class Worker:
    """Fails as it is told."""

    constant = 3

    def __init__(self, error=None):
        self._error = error
        if isinstance(error, str):
            raise RuntimeError(error)

    def work(self, number):
        """What it does."""
        if self._error is not None and number > 1:
            raise self._error
        return self._inner(number)

    def _inner(self, number):
        return number + self.constant

    def health(self):
        return "well"


@pytest.fixture
def ends(monkeypatch):
    """Called instead of the end of this process."""
    calls = []
    monkeypatch.setattr(replica, "_end_soon", lambda: calls.append(1))
    return calls


def test_what_is_fatal_ends_the_process_and_tells_the_caller_why(ends, caplog):
    worker = dies_of_fatal_errors(Worker)(RuntimeError("CUDA error: device-side assert triggered\nmore"))
    assert worker.work(1) == 4 and not ends
    with pytest.raises(StateLost, match="its process cannot go on: RuntimeError: CUDA error: device-side assert"):
        worker.work(2)
    assert len(ends) == 1
    assert "CUDA error: device-side assert triggered" in caplog.text


def test_a_dying_process_answers_nobody(ends, monkeypatch):
    """Its state may be half of a step's: neither work nor health may come from it."""
    worker = dies_of_fatal_errors(Worker)(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(StateLost):
        worker.work(2)
    asked, left = threading.Event(), []

    def wait(seconds):
        asked.set()
        raise SystemExit  # the process's end, which a test cannot have

    monkeypatch.setattr(replica.time, "sleep", wait)
    for call in (worker.health, lambda: worker.work(1)):
        asked.clear()
        with pytest.raises(SystemExit):
            left.append(call())
        assert asked.is_set()
    assert not left


@pytest.mark.parametrize("error", [UserError("n = 0: must be >= 1"), ValueError("no"), StateLost("a new process")])
def test_other_errors_pass_through(ends, error):
    worker = dies_of_fatal_errors(Worker)(error)
    with pytest.raises(type(error)) as caught:
        worker.work(2)
    assert caught.value is error and not ends
    assert worker.work(1) == 4


def test_a_constructors_error_is_not_a_death(ends):
    with pytest.raises(RuntimeError, match="out of memory"):
        dies_of_fatal_errors(Worker)("CUDA out of memory")
    assert not ends


def test_the_class_keeps_its_name_and_travels():
    guarded = dies_of_fatal_errors(StudentSampler)
    assert (guarded.__name__, guarded.__module__) == ("StudentSampler", StudentSampler.__module__)
    assert issubclass(pickle.loads(cloudpickle.dumps(guarded)), StudentSampler)
