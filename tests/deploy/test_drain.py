"""The preStop hook, with a client that is told what to answer; with a real Ray: test_drain_job.py."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import requests

from tests.deploy.manifests import CHART
from tests.deploy.ray_process import free_port

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


def drained(client, stop, seconds):
    return drain.drain(lambda: client, stop, seconds)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(drain, "time", fake)
    return now


def test_stop_stops_what_runs_and_waits(clock):
    client = Client({"a": 0, "b": 5, "c": 3})
    assert drained(client, True, 60)
    assert client.stopped == ["b", "c"] and clock[0] == 5


def test_wait_stops_nothing(clock):
    client = Client({"a": 2})
    assert drained(client, False, 60) and client.stopped == []


def test_it_gives_up(clock, capsys):
    assert not drained(Client({"a": None}), True, 7)
    assert clock[0] == 7 and "gave up, still running: ['a']" in capsys.readouterr().err


def test_a_job_of_no_submission_is_not_ours(clock):
    assert drained(Client({None: None}), True, 60) and clock[0] == 0


def test_no_dashboard_is_the_end(clock):
    class Gone(Client):
        def list_jobs(self):
            raise requests.exceptions.ConnectionError("gone")

    assert drained(Gone({}), True, 60)


def test_an_error_is_asked_about_again(clock):
    class Busy(Client):
        def list_jobs(self):
            jobs = super().list_jobs()
            if self.looks < 4:
                raise RuntimeError("status code 500")
            return jobs

    client = Busy({"a": 6})
    assert drained(client, True, 60)
    assert client.stopped == ["a"] and clock[0] == 6


def test_an_order_that_is_not_taken_is_given_again(clock):
    class Deaf(Client):
        def stop_job(self, name):
            super().stop_job(name)
            if len(self.stopped) < 3:
                raise RuntimeError("status code 500")

    client = Deaf({"a": 5})
    assert drained(client, True, 60)
    assert client.stopped == ["a", "a", "a"]


class Dashboard(BaseHTTPRequestHandler):
    """Gives every question the same status and text."""

    status, text = 200, ""

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def dashboard(status, text, base=Dashboard):
    """Address of a server that answers so."""
    answer = type("Answer", (base,), {"status": status, "text": text})
    server = HTTPServer(("127.0.0.1", 0), answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def hook(monkeypatch, address, seconds):
    """The exit code of `drain.py stop SECONDS` at this dashboard."""
    monkeypatch.setenv("KAT_RAY_DASHBOARD", address)
    monkeypatch.setattr(sys, "argv", ["drain.py", "stop", str(seconds)])
    return drain.main()


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (500, "busy", "500"),
        (404, "", "404"),
        (401, "no token", "AuthenticationError"),
        (403, "wrong token", "AuthenticationError"),
        (200, "<html>welcome</html>", "JSONDecodeError"),
        (200, "[]", "TypeError"),
        (200, "{}", "KeyError"),
        (200, '{"ray_version": "new"}', "InvalidVersion"),
        (200, '{"ray_version": "2.60.0"}', "TypeError"),  # then the same as the list of jobs
    ],
)
def test_a_bad_answer_is_asked_about_until_the_end(status, text, said, clock, monkeypatch, capsys):
    with dashboard(status, text) as address:
        assert hook(monkeypatch, address, 2) == 1
    out = capsys.readouterr().err
    assert clock[0] == 2 and said in out and "gave up, still running: not known" in out
    assert "Traceback" not in out


def test_the_sdk_is_asked_as_it_wants(clock, monkeypatch):
    """Ray's own client, and a dashboard that has one job, which ends when it is told to."""

    class Jobs(Dashboard):
        stopped = False

        def do_GET(self):
            job = {"type": "SUBMISSION", "submission_id": "r1-1", "entrypoint": "x", "status": "RUNNING"}
            job |= {"status": "STOPPED"} if Jobs.stopped else {}
            self.text = json.dumps({"ray_version": "2.60.0"} if self.path == "/api/version" else [job])
            super().do_GET()

        def do_POST(self):
            assert self.path == "/api/jobs/r1-1/stop"
            Jobs.stopped, self.text = True, json.dumps({"stopped": True})
            super().do_GET()

    with dashboard(200, "", Jobs) as address:
        assert hook(monkeypatch, address, 60) == 0
    assert Jobs.stopped and clock[0] == 1


def test_a_dashboard_that_recovers_is_heard(clock, monkeypatch):
    """At the first call too: the hook begins while the head is busy."""
    client = Client({"a": 1})
    calls = []

    def connect():
        calls.append(clock[0])
        if len(calls) < 3:
            raise RuntimeError("status code 503")
        return client

    assert drain.drain(connect, True, 60)
    assert client.stopped == ["a"] and clock[0] == 3


def test_nobody_there_is_the_end(clock, monkeypatch, capsys):
    assert hook(monkeypatch, f"http://127.0.0.1:{free_port()}", 60) == 0
    assert clock[0] == 0 and "no dashboard any more" in capsys.readouterr().err


def test_what_does_not_speak_http_is_no_dashboard(clock, monkeypatch, capsys):
    def babble():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(4096)
                connection.sendall(b"220 mail.example ready\r\n")
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=babble, daemon=True).start()
        assert hook(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}", 60) == 0
        server.shutdown(socket.SHUT_RDWR)  # ends accept
    assert clock[0] == 0 and "no dashboard any more" in capsys.readouterr().err


def test_silence_ends_in_time():
    """A process: what ends it is its end. It takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "KAT_RAY_DASHBOARD": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        command = [sys.executable, str(CHART / "files/drain.py"), "wait", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["drain: gave up: the dashboard takes calls and does not answer"]
