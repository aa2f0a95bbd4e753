"""Ray jobs that are runs: submitted, followed, stopped, through the HTTP interface of Ray's dashboard.

A job is named after its run, `NAME-1`; a run that is submitted again is `NAME-2`, and goes on where the first ended
(`run.resume`). Nothing is uploaded before configuration and cluster have been checked.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from actors.ray_jobs.upload import Upload, silence_packager
from kat_ray.cluster.auth import choose_mode, refused
from kat_ray.cluster.versions import CLIENT_VARIABLE, versions
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.observability.redact import redact

log = logging.getLogger("kat_ray.jobs")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
RUN_KEY = "kat-ray-run"  # in a job's metadata
_STOP_MARGIN = 30  # seconds for a driver beside run.grace_seconds
_ENDED = {"SUCCEEDED": 0, "STOPPED": 143, "FAILED": 1}
# Seconds to find a cluster again whose log was followed, and for the agent of a new one to come up.
_PATIENCE = 60.0
_NO_AGENT = "No available agent"  # what the dashboard answers while none has told it where it is
_NO_AGENT_CAME = (
    f"no agent that starts jobs within {_PATIENCE:g} s. It listens on port 52365 of the head's machine, which "
    "another Ray there may hold: end that one, or start this head with a port of its own (ray start --head "
    "--dashboard-agent-listen-port=PORT); see dashboard_agent.log of the head's session"
)
# Seconds for the first call, and for any later one, an upload among them: Ray's client itself would wait for ever.
_CONNECT, _ANSWER, _CALL = 10.0, 30.0, 300.0
_SILENCE = 300.0  # of a followed log, until it is asked for anew: a connection may break without a word
_GCS_PORT, _DASHBOARD_PORT = "6379", "8265"
_IS_IT_UP = (
    "Is the cluster up, with its dashboard? From outside Kubernetes: kubectl port-forward "
    "service/NAME-head-svc 8265, then --address http://127.0.0.1:8265"
)
_DASHBOARD = "such as http://HOST:8265; on Kubernetes behind `kubectl port-forward service/NAME-head-svc 8265`"


def address_of(given: str | None) -> str:
    """The dashboard's address: the one given, the environment's, or this machine's."""
    variable, address = next(
        ((v, os.environ[v]) for v in ADDRESS_VARIABLES if os.environ.get(v)), ("", DEFAULT_ADDRESS)
    )
    where, address = ("--address", given) if given else (variable, address)
    scheme, _, rest = address.rpartition("://")
    port = rest.partition("/")[0].rpartition(":")[2]
    # Without a scheme Ray takes its own variable for the address of the GCS, and so does KubeRay, which sets it in
    # every pod. Asked for jobs, that gives nonsense.
    if port == _GCS_PORT or (where == "RAY_ADDRESS" and not scheme and port != _DASHBOARD_PORT):
        raise UserError(
            f"{where} = {redact(address)!r}: that is where a cluster's own processes meet (its GCS); jobs are "
            f"sent to its dashboard: --address or RAY_API_SERVER_ADDRESS, {_DASHBOARD}"
        )
    if not scheme:
        address = f"http://{address}"
    if not re.match(r"^https?://[^/\s]+", address):
        raise UserError(f"{where} = {redact(address)!r}: jobs are sent to the dashboard, {_DASHBOARD}")
    return address.rstrip("/")


@contextmanager
def _sent_to(address: str) -> Iterator[None]:
    """Ray's clients prefer these variables to the address that they are given; inside, they say the same."""
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    os.environ[ADDRESS_VARIABLES[0]] = address
    try:
        yield
    finally:
        del os.environ[ADDRESS_VARIABLES[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect; `UserError` says why not."""
        self.address = address
        choose_mode(os.environ)
        self._knock()
        from ray.job_submission import JobSubmissionClient

        silence_packager()
        with self._asking("the cluster's version"), _sent_to(address):
            self._client = JobSubmissionClient(address)
        self._client._do_request = partial(self._client._do_request, timeout=(_CONNECT, _CALL))
        # Asked for by the client when it connects, and kept where only this release of Ray keeps it.
        self.ray_version = str(self._client._server_ray_version)

    def _knock(self) -> None:
        """`UserError` where no dashboard answers; whether it takes this token is seen later."""
        import requests

        try:
            answer = requests.get(f"{self.address}/api/version", timeout=(_CONNECT, _ANSWER))
            known = answer.status_code in (401, 403) or (answer.ok and "ray_version" in answer.json())
        except requests.exceptions.SSLError as error:
            raise UserError(
                f"{self.address}: no https there, or a certificate that is not trusted: {error}"
            ) from error
        except requests.exceptions.Timeout as error:
            raise UserError(f"{self.address}: no answer within {_ANSWER:g} s. {_IS_IT_UP}") from error
        except requests.exceptions.RequestException as error:
            raise UserError(self._silent(error)) from error
        if not known:
            raise UserError(
                f"{self.address}: what answers there (status {answer.status_code}) is no Ray dashboard. {_IS_IT_UP}"
            )

    def _silent(self, error: Exception) -> str:
        from urllib3.exceptions import ProtocolError

        if any(isinstance(reason, ProtocolError) for reason in error.args):
            return (
                f"{self.address}: what answers there speaks no HTTP: the GCS, or another port of Ray? {_IS_IT_UP}"
            )
        return f"{self.address}: no Ray dashboard answers there. {_IS_IT_UP}"

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Translate what Ray's client raises."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except UserError:  # ours, and says all
            raise
        except AuthenticationError as error:
            raise UserError(f"{self.address}: {refused(os.environ)}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise UserError(f"{self.address}: no Ray dashboard answers any more ({what}). {_IS_IT_UP}") from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{self.address}: {what}: {_first_line(error)}") from error

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

        with self._asking("the nodes"), _sent_to(self.address):
            try:
                return [n for n in list_nodes(self.address, detail=True, limit=10_000) if n.state == "ALIVE"]
            except RayStateApiException as error:
                raise UserError(f"{self.address}: its nodes cannot be listed: {_first_line(error)}") from error

    def link(self, job_id: str) -> str:
        """The job's page on the dashboard."""
        return f"{self.address}/#/jobs/{job_id}"

    # --- what is done ----------------------------------------------------------------------------------------

    def submit(self, config: Config, command: Sequence[str], upload: Upload, waits: Callable[[str], object]) -> str:
        """Upload a folder and run `command` in it on the head; returns the job's id.

        `waits` is told, in one line, where it takes longer than it should.
        """
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
        }
        send = partial(
            self._client.submit_job,
            entrypoint=shlex.join(command),
            submission_id=job_id,
            runtime_env={"working_dir": str(upload.folder), "excludes": list(upload.excludes), "env_vars": env},
            metadata={RUN_KEY: name, "name": name},
            entrypoint_num_cpus=0,
        )
        with self._asking("the upload"):
            return self._once_an_agent_is_there(send, waits)

    def _once_an_agent_is_there(self, send: Callable[[], str], waits: Callable[[str], object]) -> str:
        """Send a job, again for a minute while no agent takes it: the head's comes up after its dashboard.

        What was uploaded is there the second time, and is not uploaded again.
        """
        deadline = time.monotonic() + _PATIENCE
        told = False
        while True:
            try:
                return send()
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(f"{self.address}: {_NO_AGENT_CAME}") from error
            if not told:
                waits(f"the cluster's agent, which starts jobs, is not ready: trying again for {_PATIENCE:g} s")
                told = True
            time.sleep(1.0)

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
        import asyncio

        import aiohttp

        position = 0
        texts = self._client.tail_job_logs(job_id)
        try:
            while True:
                text = await asyncio.wait_for(anext(texts), _SILENCE)
                if position + len(text) > skip:
                    write(text[max(0, skip - position) :])
                position += len(text)
        except StopAsyncIteration:
            pass
        except (aiohttp.ClientError, RuntimeError, OSError):  # `find` says why, if it lasts
            log.info("the connection to %s broke", self.address)
        return max(position, skip)


def status_of(job: Any) -> str:
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    return str(getattr(job.status, "value", job.status))


def is_over(job: Any) -> bool:
    """Whether a job has ended, in whatever way."""
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
    if not lines:
        return type(error).__name__
    # The dashboard answers what went wrong in it with a traceback, whose last line says what that was.
    return f"the dashboard failed: {lines[-1]}" if "Traceback (most recent call last)" in lines[0] else lines[0]
