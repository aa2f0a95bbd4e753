"""Ray jobs that are runs: submitted, followed, stopped, through the HTTP interface of Ray's dashboard.

A job is named after its run, `NAME-1`; a run that is submitted again is `NAME-2`, and goes on where the first ended
(`run.resume`). Nothing is uploaded before the configuration and the cluster were looked at.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.redact import redact
from kat_ray.versions import CLIENT_VARIABLE, versions

log = logging.getLogger("kat_ray.jobs")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
RUN_KEY = "kat-ray-run"  # in a job's metadata
# Left out of what is uploaded, beside what .gitignore names.
EXCLUDES = ("/.git", "/.venv*", "/runs", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache")
_STOP_MARGIN = 30  # seconds for a driver beside run.grace_seconds
_ENDED = {"SUCCEEDED": 0, "STOPPED": 143, "FAILED": 1}
_PATIENCE = 60.0  # seconds to find a cluster again whose log was followed


def address_of(given: str | None) -> str:
    """The dashboard's address: the one given, the environment's, or this machine's."""
    variable, address = next(
        ((v, os.environ[v]) for v in ADDRESS_VARIABLES if os.environ.get(v)), ("", DEFAULT_ADDRESS)
    )
    where, address = ("--address", given) if given else (variable, address)
    if not re.match(r"^[a-z]+://", address):
        address = f"http://{address}"
    if not re.match(r"^https?://[^/\s]+", address):
        raise UserError(
            f"{where} = {redact(address)!r}: jobs are sent to the dashboard, such as http://HOST:8265; on "
            "Kubernetes behind `kubectl port-forward service/NAME-head-svc 8265`"
        )
    return address.rstrip("/")


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str, environment: Mapping[str, str] | None = None) -> None:
        """Connect; `UserError` says why not."""
        env = os.environ if environment is None else environment
        # Before ray is imported, which is when it reads it. A token without a mode can only mean this.
        if "RAY_AUTH_MODE" not in env and (env.get("RAY_AUTH_TOKEN") or env.get("RAY_AUTH_TOKEN_PATH")):
            os.environ["RAY_AUTH_MODE"] = "token"
        logging.getLogger("ray").setLevel(logging.WARNING)
        from ray.job_submission import JobSubmissionClient

        self.address = address
        with self._asking("the cluster's version"):
            self._client = JobSubmissionClient(address)
        # Asked for by the client when it connects, and kept where only this release of Ray keeps it.
        self.ray_version = str(self._client._server_ray_version)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Translate what Ray's client raises."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(self._refused(str(error))) from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise UserError(
                f"{self.address}: no Ray dashboard answers there ({what}). Is the cluster up, with its dashboard? "
                "From outside Kubernetes: kubectl port-forward service/NAME-head-svc 8265, then --address http://127.0.0.1:8265"
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{self.address}: {what}: {_first_line(error)}") from error

    def _refused(self, reason: str) -> str:
        sent = os.environ.get("RAY_AUTH_MODE") == "token"
        why = "the cluster does not know this token" if sent else "the cluster asks for a token, and none was sent"
        if "403" in reason or "invalid" in reason.lower():
            why = "the cluster does not know this token"
        return (
            f"{self.address}: {why}. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it; on Kubernetes "
            "it is in the Secret named like the RayCluster, under auth_token"
        )

    # --- what is there ---------------------------------------------------------------------------------------

    def all(self) -> list[Any]:
        """Submitted jobs, newest last."""
        with self._asking("the jobs"):
            jobs = [j for j in self._client.list_jobs() if j.submission_id]
        return sorted(jobs, key=lambda j: j.start_time or 0)

    def find(self, name: str) -> Any:
        """The job of this id, or the newest of the run of this name."""
        jobs = self.all()
        fitting = [j for j in jobs if j.submission_id == name] or [j for j in jobs if run_of(j) == name]
        if not fitting:
            ids = ", ".join(j.submission_id for j in jobs[-5:]) or "it has none"
            raise UserError(f"{name}: {self.address} knows no such job or run; its newest jobs: {ids}")
        return fitting[-1]

    def logs(self, job_id: str) -> str:
        """All that a job has written so far."""
        with self._asking(f"the log of {job_id}"):
            return self._client.get_job_logs(job_id)

    def nodes(self) -> list[Any]:
        """The cluster's nodes, as Ray's state interface lists them."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._asking("the nodes"):
            try:
                return [n for n in list_nodes(self.address, detail=True, limit=10_000) if n.state == "ALIVE"]
            except RayStateApiException as error:
                raise UserError(f"{self.address}: its nodes cannot be listed: {_first_line(error)}") from error

    def link(self, job_id: str) -> str:
        """The job's page on the dashboard."""
        return f"{self.address}/#/jobs/{job_id}"

    # --- what is done ----------------------------------------------------------------------------------------

    def submit(self, config: Config, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
        """Upload `folder` and run `command` in it on the head; returns the job's id."""
        name, taken = config.run.name, self.all()
        running = [j.submission_id for j in taken if run_of(j) == name and not is_over(j)]
        if running:
            raise UserError(
                f"run.name = {name!r}: job {running[-1]} is at it; follow it (kat-ray logs {name} --follow), stop "
                f"it (kat-ray stop {name}), or give another run.name"
            )
        ids = {j.submission_id for j in taken}
        job_id = next(i for n in range(1, len(ids) + 2) if (i := f"{name}-{n}") not in ids)
        env = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.run.grace_seconds) + _STOP_MARGIN),
            CLIENT_VARIABLE: versions(),
            **variables,
        }
        with self._asking("the upload"):
            return self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "excludes": list(EXCLUDES), "env_vars": env},
                metadata={RUN_KEY: name, "name": name},
                entrypoint_num_cpus=0,
            )

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False if it had ended."""
        with self._asking(f"stopping {job_id}"):
            return self._client.stop_job(job_id)

    def follow(self, job_id: str, write: Callable[[str], object]) -> int:
        """Write a job's log as it grows, from its beginning until the job ends; returns its exit code.

        A connection that breaks (a port-forward that ends) is made again, for a minute.
        """
        import asyncio

        seen, broken_since = 0, None
        while True:
            try:
                seen = asyncio.run(self._tail(job_id, write, seen))
                job = self.find(job_id)
                broken_since = None
            except UserError:
                broken_since = broken_since or time.monotonic()
                if time.monotonic() - broken_since > _PATIENCE:
                    raise
            else:
                if is_over(job):
                    asyncio.run(self._tail(job_id, write, seen))  # what came between the two
                    return exit_code(job)
            time.sleep(1.0)

    async def _tail(self, job_id: str, write: Callable[[str], object], skip: int) -> int:
        """Write what follows the first `skip` characters of a log until the connection ends; returns its length."""
        import aiohttp

        position = 0
        try:
            async for text in self._client.tail_job_logs(job_id):
                if position + len(text) > skip:
                    write(text[max(0, skip - position) :])
                position += len(text)
        except (aiohttp.ClientError, RuntimeError, OSError):  # `find` says why, if it lasts
            log.info("the connection to %s broke", self.address)
        return max(position, skip)


def status_of(job: Any) -> str:
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    return str(getattr(job.status, "value", job.status))


def is_over(job: Any) -> bool:
    """Whether it has ended."""
    return status_of(job) in _ENDED


def run_of(job: Any) -> str:
    """The run that a job is at; its own id where it was not submitted by `kat-ray submit`."""
    return str((job.metadata or {}).get(RUN_KEY, job.submission_id))


def exit_code(job: Any) -> int:
    """A job's exit code: its driver's own where it has one."""
    code = job.driver_exit_code
    if status_of(job) == "STOPPED" or code is None:
        return _ENDED[status_of(job)]
    return 128 - code if code < 0 else int(code)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
