"""The preStop hook, with a client that is told what to answer; with a real Ray: test_drain_job.py."""

import importlib.util
from types import SimpleNamespace

import pytest
import requests

from tests.deploy.manifests import CHART

_spec = importlib.util.spec_from_file_location("drain", CHART / "files/drain.py")
drain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drain)


class Client:
    """Jobs that end after so many looks; None never ends."""

    def __init__(self, jobs):
        self.jobs, self.looks, self.stopped = jobs, 0, []

    def list_jobs(self):
        self.looks += 1
        ended = {k: v is not None and self.looks > v for k, v in self.jobs.items()}
        return [
            SimpleNamespace(submission_id=k, status=SimpleNamespace(is_terminal=lambda k=k: ended[k]))
            for k in ended
        ]

    def stop_job(self, name):
        self.stopped.append(name)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    now = [0.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(drain, "time", fake)
    return now


def test_stop_stops_what_runs_and_waits(clock):
    client = Client({"a": 0, "b": 5, "c": 3})
    assert drain.drain(client, True, 60)
    assert client.stopped == ["b", "c"] and clock[0] == 5


def test_wait_stops_nothing():
    client = Client({"a": 2})
    assert drain.drain(client, False, 60) and client.stopped == []


def test_it_gives_up(clock, capsys):
    assert not drain.drain(Client({"a": None}), True, 7)
    assert clock[0] == 7 and "still running after 7 s: ['a']" in capsys.readouterr().err


def test_a_job_of_no_submission_is_not_ours(clock):
    assert drain.drain(Client({None: None}), True, 60) and clock[0] == 0


def test_no_dashboard_is_the_end():
    class Gone(Client):
        def list_jobs(self):
            raise requests.exceptions.ConnectionError("gone")

    assert drain.drain(Gone({}), True, 60)


def test_an_error_is_asked_about_again(clock):
    class Busy(Client):
        def list_jobs(self):
            jobs = super().list_jobs()
            if self.looks < 4:
                raise RuntimeError("status code 500")
            return jobs

    client = Busy({"a": 6})
    assert drain.drain(client, True, 60)
    assert client.stopped == ["a"] and clock[0] == 6


def test_an_order_that_is_not_taken_is_given_again():
    class Deaf(Client):
        def stop_job(self, name):
            super().stop_job(name)
            if len(self.stopped) < 3:
                raise RuntimeError("status code 500")

    client = Deaf({"a": 5})
    assert drain.drain(client, True, 60)
    assert client.stopped == ["a", "a", "a"]
