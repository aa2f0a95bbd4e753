"""Jobs: what is refused before anything is sent, and what is made of what a cluster answers."""

import asyncio
import contextlib
import http.server
import io
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from actors.ray_jobs import client as jobs
from actors.ray_jobs.client import RUN_KEY, Jobs, address_of, exit_code, run_of
from actors.ray_jobs.commands import _advice, _Lines, check_ray_version, train_command
from kat_ray.cli import main as cli
from kat_ray.cluster.versions import CLIENT_VARIABLE, skew, versions
from kat_ray.errors import UserError
from tests.support.configs import make_config


def job(status="SUCCEEDED", code=None, message=None, **more):
    return SimpleNamespace(status=status, driver_exit_code=code, message=message, metadata=None, **more)


@pytest.mark.parametrize(
    "given, environment, address",
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("head:8265", {}, "http://head:8265"),
        ("https://head/", {}, "https://head"),
        (None, {"RAY_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://b:2"),
        ("http://c:3", {"RAY_ADDRESS": "http://a:1"}, "http://c:3"),
        ("c:3", {"RAY_ADDRESS": "a:6379"}, "http://c:3"),
        (None, {"RAY_ADDRESS": "a:6379", "RAY_API_SERVER_ADDRESS": "b:2"}, "http://b:2"),
        (None, {"RAY_ADDRESS": "a:8265"}, "http://a:8265"),
    ],
)
def test_where_jobs_are_sent(monkeypatch, given, environment, address):
    for name in jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert address_of(given) == address


def test_a_client_address_is_no_dashboard(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:pass@head:10001")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"RAY_ADDRESS = .*8265") as error:
        address_of(None)
    assert "pass@" not in str(error.value)


@pytest.mark.parametrize(
    "given, variable", [(None, "10.0.0.1:6379"), (None, "head:45323"), (None, "auto"), ("head:6379", ""),
                        ("http://head:6379/", "")],
)  # fmt: skip
def test_a_gcs_address_is_no_dashboard(monkeypatch, given, variable):
    """KubeRay puts RAY_ADDRESS = HOST:6379 into every pod."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", variable)
    where = "--address" if given else "RAY_ADDRESS"
    with pytest.raises(UserError, match=rf"^{where} = .*GCS.*dashboard: --address .*http://HOST:8265"):
        address_of(given)


def test_rays_clients_ask_the_address_that_is_given(monkeypatch):
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert get_address_for_submission_client("http://b:2") == "http://a:1", "why this is needed"
    with jobs._sent_to("http://b:2"):
        assert get_address_for_submission_client("http://b:2") == "http://b:2"
    assert address_of(None) == "http://a:1"


@contextlib.contextmanager
def server(status, body):
    """Whatever is asked of it on its port of this machine, it answers this."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{there.server_port}"
        there.shutdown()


@pytest.mark.parametrize(
    "status, body, words",
    [(404, b"", "status 404) is no Ray dashboard"), (200, b"<html>", "no Ray dashboard answers there"),
     (200, b"{}", "status 200) is no Ray dashboard"), (503, b"", "status 503) is no Ray dashboard")],
)  # fmt: skip
def test_something_else_answers(capsys, status, body, words):
    with server(status, body) as address:
        assert cli.main(["list", "--address", address]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {address}: ") and words in said and "port-forward" in said


def test_nobody_answers(capsys):
    assert cli.main(["list", "--address", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: http://127.0.0.1:9: no Ray dashboard answers there") and "port-forward" in said


def config_in(folder="/runs", **sections):
    return make_config("a", "b", run={"dir": folder}, **sections)


def test_the_run_must_outlast_the_job(tmp_path):
    with pytest.raises(UserError, match=r"run\.dir = 'runs': .*run\.dir=/runs"):
        train_command(config_in("runs"), "demo", [], tmp_path)


def test_the_job_takes_what_the_client_was_given(tmp_path):
    overrides = ["run.dir=/runs", "learner.betas=[0.9, 0.95]"]
    assert train_command(config_in(), "demo", overrides, tmp_path) == [
        "python", "-m", "kat_ray.cli", "train", "demo", *overrides,
    ]  # fmt: skip
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my.yaml").write_text("extends: ../base.yaml\n")
    (tmp_path / "base.yaml").write_text("extends: demo\n")
    assert train_command(config_in(), str(tmp_path / "sub" / "my.yaml"), [], tmp_path)[-1] == "sub/my.yaml"


def test_a_file_that_is_not_uploaded_is_refused(tmp_path):
    (tmp_path / "my.yaml").write_text("run: {steps: 1}\n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "own.yaml").write_text("extends: ../my.yaml\n")
    for source in ("my.yaml", "tree/own.yaml"):
        with pytest.raises(UserError, match=r"my\.yaml: lies outside .*--working-dir"):
            train_command(config_in(), str(tmp_path / source), [], tmp_path / "tree")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["submit", "demo", "run.stpes=3"], "run.stpes"),
        (["submit", "nowhere.yaml"], "nowhere.yaml"),
        (["submit", "demo"], "run.dir = 'runs'"),
        (["submit", "demo", "run.dir=/runs", "--working-dir", "nowhere"], "--working-dir nowhere"),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_cluster_is_asked(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "Jobs", lambda *_: pytest.fail("the cluster was asked"))
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err


def test_another_ray_is_refused():
    with pytest.raises(UserError, match=r"runs Ray 2\.9\.1, here is Ray 2\..*: install ray==2\.9\.1 here"):
        check_ray_version(SimpleNamespace(address="http://a", ray_version="2.9.1"))


@pytest.mark.parametrize(
    "ended, code",
    [(job("SUCCEEDED", 0), 0), (job("SUCCEEDED"), 0), (job("FAILED", 2), 2), (job("FAILED"), 1),
     (job("FAILED", -9), 137), (job("STOPPED", 143), 143), (job("STOPPED"), 143)],
)  # fmt: skip
def test_a_jobs_exit_code_is_its_drivers(ended, code):
    assert exit_code(ended) == code


def test_a_job_is_found_by_its_id_or_its_run():
    known = Jobs.__new__(Jobs)
    known.address = "http://a"
    listed = [job(submission_id="r-1", n=1), job(submission_id="r-2", n=2), job(submission_id="other", n=3)]
    for j in listed[:2]:
        j.metadata = {RUN_KEY: "r"}
    known.all = lambda: listed
    assert known.find("r-1").n == 1 and known.find("r").n == 2 and known.find("other").n == 3
    assert run_of(listed[0]) == "r" and run_of(listed[2]) == "other"
    with pytest.raises(UserError, match="knows no such job or run; its newest jobs: r-1, r-2, other"):
        known.find("x")


def test_a_job_is_watched_by_its_log(monkeypatch, capsys):
    found = job(status="STOPPED", submission_id="r-1")
    found.metadata = {RUN_KEY: "r"}
    line = "step  2/40  KL 0.5000    512 tokens  trapped  25%  threshold 0.1250   2,346 tok/s  ETA 0:00\n"
    monkeypatch.setattr(Jobs, "__init__", lambda self, address: None)
    monkeypatch.setattr(Jobs, "find", lambda self, name: found)
    monkeypatch.setattr(Jobs, "logs", lambda self, name: "loading models: 9 s\n" + line)
    assert cli.main(["watch", "r", "--address", "http://a"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("r  stopped\nstep 2/40  5%\n") and "0.5000" in out and "loading models: 9 s" in out


def test_a_log_that_falls_silent_is_asked_for_anew(monkeypatch):
    """A connection may break without a word; what was written is not written again."""
    monkeypatch.setattr(jobs, "_SILENCE", 0.05)
    known = Jobs.__new__(Jobs)
    known.address, known._client = "http://a", SimpleNamespace()

    async def silent(job_id):
        yield "one\n"
        await asyncio.sleep(60)

    async def again(job_id):
        yield "one\ntw"
        yield "o\n"

    seen, written = 0, []
    for known._client.tail_job_logs in (silent, again):
        seen = asyncio.run(known._tail("r-1", written.append, seen))
    assert "".join(written) == "one\ntwo\n" and seen == 8


def test_a_failure_of_the_dashboard_is_one_line():
    known = Jobs.__new__(Jobs)
    known.address = "http://a"
    reply = "Request failed with status code 500: Traceback (most recent call last):\n  File x\nKeyError: 'r-1'\n."
    for said, words in (
        (reply.removesuffix("."), "KeyError: 'r-1'"),
        ("status code 413: too large\nx", "status code 413: too large"),
    ):
        with pytest.raises(UserError) as error, known._asking("the upload"):
            raise RuntimeError(said)
        assert str(error.value).startswith("http://a: the upload: ") and str(error.value).endswith(words)


def without_an_agent(monkeypatch, answers):
    """Jobs of a cluster that answers so to what is submitted: an error, or an id. And what was said meanwhile."""
    known, said, left = Jobs.__new__(Jobs), [], list(answers)
    known.address, known.all = "http://a", lambda: []

    def submit_job(**_):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    known._client = SimpleNamespace(submit_job=submit_job)
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None))
    upload = SimpleNamespace(folder="/tree", excludes=())
    return (lambda: known.submit(config_in(), ["python"], upload, said.append)), said


# What Ray's client makes of the dashboard's answer.
NOBODY = RuntimeError(
    "Request failed with status code 500: No available agent to submit job, please try again later.."
)


def test_an_agent_that_comes_up_late_is_waited_for(monkeypatch):
    submit, said = without_an_agent(monkeypatch, [NOBODY, NOBODY, "run-1"])
    assert submit() == "run-1"
    assert said == ["the cluster's agent, which starts jobs, is not ready: trying again for 60 s"], "said once"


def test_an_agent_that_never_comes_up_may_have_lost_its_port(monkeypatch):
    submit, said = without_an_agent(monkeypatch, [NOBODY])
    with pytest.raises(
        UserError, match=r"^http://a: no agent that starts jobs within 60 s.* another Ray .*-port=PORT"
    ):
        submit()
    assert len(said) == 1


def test_other_answers_to_a_job_are_not_asked_for_again(monkeypatch):
    submit, said = without_an_agent(
        monkeypatch, [RuntimeError("Request failed with status code 500: disk full."), "x"]
    )
    with pytest.raises(UserError, match=r"the upload: .*disk full"):
        submit()
    assert said == []


def test_versions_that_differ_are_said():
    ours = versions()
    assert list(skew({})) == [] and list(skew({CLIENT_VARIABLE: ours})) == []
    (line,) = skew({CLIENT_VARIABLE: ours.replace("python=", "python=0.")})
    assert line.startswith("submitted from python 0.")


@pytest.mark.parametrize(
    "ended, log, words",
    [
        (job("FAILED", 1), "/usr/bin/python: No module named kat_ray\n", "the image lacks the package"),
        (job("FAILED", 127), "sh: 1: python: not found\n", "PATH"),
        (job("FAILED", None, "Runtime env setup failed"), "", "before it wrote a line: Runtime env setup failed"),
        (
            job("FAILED", -11, "exit code -11, last logs:\nstep 1/2"),
            "step 1/2\n",
            "code -11: exit code -11, last logs:",
        ),
        (job("FAILED", -9, "exit code -9"), "step 1/2\n", "killed (SIGKILL), as happens for want of memory"),
        (job("FAILED", 137, "exit code 137"), "", "killed (SIGKILL), as happens for want of memory"),
    ],
)
def test_a_job_that_dies_at_once_says_what_to_do(ended, log, words):
    assert words in " ".join(_advice(ended, log))


def test_a_job_whose_own_message_says_it_needs_no_advice():
    assert list(_advice(job("FAILED", 2), "error: run.stpes: no such field\n")) == []


def test_in_a_terminal_a_step_replaces_the_one_before():
    plain, terminal = io.StringIO(), io.StringIO()
    for out, is_terminal in ((plain, False), (terminal, True)):
        with _Lines(Console(file=out, force_terminal=is_terminal, width=80)) as lines:
            for part in ("loading\nstep 1/2  K", "L 0.1\nstep 2/2  KL 0.2\n", "done\n"):
                lines.write(part)
    assert plain.getvalue().splitlines() == ["loading", "step 1/2  KL 0.1", "step 2/2  KL 0.2", "done"]
    shown = terminal.getvalue()
    assert "loading\n" in shown and "done\n" in shown and "step 1/2" not in shown, "steps are redrawn, not printed"
    assert "step 2/2  KL 0.2" in shown
