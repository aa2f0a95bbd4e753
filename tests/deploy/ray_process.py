"""A Ray of its own in a process of its own, for tests that need ports and jobs; ended by its process group."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.deploy.manifests import ROOT


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outside_port() -> int:
    """A free port that no worker is given: those are 10002 to 19999, and Ray refuses to share them."""
    while 10_000 <= (port := free_port()) < 20_000:
        pass
    return port


def until(done: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of `done`; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = done()
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s: {what}")


@contextlib.contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, ended at the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **environment}
    with log.open("wb") as out:
        child = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextlib.contextmanager
def agent_port_of_its_own() -> Iterator[None]:
    """For a `ray.init` that starts a Ray: its agent, which starts jobs, leaves the one fixed port to others.

    `ray.init` has no option for that.
    """
    from ray._private import parameter

    plain = parameter.RayParams
    parameter.RayParams = functools.partial(plain, dashboard_agent_listen_port=outside_port())
    try:
        yield
    finally:
        parameter.RayParams = plain


@contextlib.contextmanager
def ray_process(code: str, log: Path, cpus: int = 2) -> Iterator[tuple[int, int, Path]]:
    """Run `code` after `ray.init` with dashboard and metrics: yields dashboard port, metrics port, Ray's folder."""
    dashboard, metrics = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="kat-", ignore_cleanup_errors=True) as folder:  # socket paths are short
        start = (
            f"import ray\nfrom tests.deploy.ray_process import agent_port_of_its_own\n"
            f"from tests.support.quick_workers import quick_workers\nquick_workers()\n"
            f"with agent_port_of_its_own(): ray.init(address='local', num_cpus={cpus}, include_dashboard=True,"
            f" dashboard_host='127.0.0.1', dashboard_port={dashboard}, _metrics_export_port={metrics},"
            f" _temp_dir={folder!r}, object_store_memory=100_000_000, log_to_driver=False, namespace='kat-ray')\n"
        )
        with process([sys.executable, "-c", start + code], log):
            yield dashboard, metrics, Path(folder)


def submitted(dashboard: int, entrypoint: str) -> tuple[Any, str]:
    """A client of the Ray with this dashboard, and the id of a job, submitted as soon as it takes one."""
    from ray.job_submission import JobSubmissionClient

    def submit() -> tuple[Any, str] | None:
        try:
            jobs = JobSubmissionClient(f"http://127.0.0.1:{dashboard}")
            return jobs, jobs.submit_job(entrypoint=entrypoint)
        except (ConnectionError, RuntimeError):  # no dashboard yet, no agent yet
            return None

    found: tuple[Any, str] = until(submit, 300, "the dashboard takes a job")
    return found


def job_logs(jobs: Any, job: str) -> str:
    """What a job has said; asked for again where the dashboard has no answer."""

    def ask() -> tuple[str] | None:
        try:
            return (jobs.get_job_logs(job),)
        except RuntimeError:  # its agent is busy, or has no file yet
            return None

    (text,) = until(ask, 120, f"the dashboard has the output of job {job}")
    return str(text)
