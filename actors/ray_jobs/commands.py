"""`kat-ray submit | status | logs | stop | list`: what they check, say and return."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.ray_jobs.client import Jobs, exit_code, is_over, run_of, status_of
from actors.ray_jobs.upload import Upload, dashboard_limit, plan_upload
from kat_ray.cluster.versions import other_ray
from kat_ray.config import Config
from kat_ray.config.load import EMBEDDED, config_files
from kat_ray.config.local_paths import is_url
from kat_ray.errors import UserError
from kat_ray.run.reward_functions import reward_files
from kat_ray.watch.view import View, view_of_log

# A step's line of `kat_ray.observability.progress`: in a terminal one replaces the other.
_STEP = re.compile(r"^step +\d+/\d+ ")
_NO_PACKAGE = (
    "the image lacks the package: build it from docker/Dockerfile, or submit from a working tree of kat-ray "
    "(--working-dir)"
)
_KILLED = (
    "its driver was killed (SIGKILL), as happens for want of memory on the head: give that more, or see what ended "
    "it (`kubectl describe pod`, the kernel's log); submitted again, the run goes on from its newest checkpoint"
)
_NO_PYTHON = "the head has no `python` on its PATH"
# What a failed job's log or message holds, and what to do about it; the first that is found is said.
_ADVICE = {
    "No module named kat_ray": _NO_PACKAGE,
    "No module named 'kat_ray'": _NO_PACKAGE,
    "python: not found": _NO_PYTHON,
    "python: command not found": _NO_PYTHON,
    "No module named": "the cluster lacks a package: use the project's image, or install docker/*.lock there",
}


def submit(
    jobs: Jobs, config: Config, source: str, overrides: Sequence[str], folder: Path, wait: bool, console: Console
) -> int:
    """Submit a run whose configuration was found right; follow it if told to. Returns the exit code."""
    check_ray_version(jobs)
    command = train_command(config, source, overrides, folder)
    upload = _checked_upload(config, source, command, folder, console)
    job_id = jobs.submit(config, command, upload, partial(_say, console))
    _say(console, f"job {job_id} is submitted: {jobs.link(job_id)}")
    if not wait:
        _say(console, f"follow it: kat-ray logs {job_id} --follow; end it: kat-ray stop {job_id}")
        return 0
    return follow(jobs, job_id, console)


def show_upload(config: Config, source: str, overrides: Sequence[str], folder: Path, console: Console) -> int:
    """Show each file that `submit` would upload, the largest first, and what the job would run; send nothing."""
    command = train_command(config, source, overrides, folder)
    upload = _checked_upload(config, source, command, folder, console)
    for line in upload.listing():
        _say(console, line)
    _say(console, f"the job would run: {shlex.join(command)}")
    return 0


def _checked_upload(config: Config, source: str, command: Sequence[str], folder: Path, console: Console) -> Upload:
    """What is to be uploaded, said in a few lines; `UserError` for a file that the job would miss, or too much."""
    upload = plan_upload(folder, config)
    for line in upload.lines():
        _say(console, line)
    if source not in EMBEDDED:
        upload.check_holds(command[4])
    for name in reward_files(config):
        upload.check_holds(name)
    upload.check_size(dashboard_limit())
    return upload


def check_ray_version(jobs: Jobs) -> None:
    """`UserError` where the cluster has another release of Ray than this client."""
    from importlib import metadata

    ours = metadata.version("ray")
    if ours.split(".")[:2] != jobs.ray_version.split(".")[:2]:
        raise UserError(f"{jobs.address}: {other_ray(jobs.ray_version, ours)}")


def train_command(config: Config, source: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """What the job runs, in the uploaded folder; `UserError` for what cannot be found there."""
    if not is_url(config.run.dir) and not Path(config.run.dir).expanduser().is_absolute():
        raise UserError(
            f"run.dir = {config.run.dir!r}: on a cluster a relative path lies in the job's temporary folder and "
            "goes with it; name one on storage that all nodes share, such as run.dir=/runs, or a bucket, such as "
            "run.dir=s3://my-bucket/runs"
        )
    if source not in EMBEDDED:
        extended = [file for file in config_files(source)[1:] if file not in EMBEDDED.values()]
        source, *_ = [_within(folder, file) for file in (Path(source), *extended)]
    return ["python", "-m", "kat_ray.cli", "train", source, *overrides]


def _within(folder: Path, file: Path) -> str:
    """The file's path in the uploaded folder; `UserError` where it is not in there."""
    try:
        return file.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError as error:
        raise UserError(
            f"{file}: lies outside the folder that is uploaded, {folder}; choose that with --working-dir"
        ) from error


def follow(jobs: Jobs, job_id: str, console: Console) -> int:
    """Show a job's log until it ends, then how it ended; returns its exit code."""
    with _Lines(console) as lines:
        try:
            code = jobs.follow(job_id, lines.write)
        except KeyboardInterrupt:
            _say(console, f"not followed any more; {job_id} goes on. To end it: kat-ray stop {job_id}")
            return 130
    job = jobs.find(job_id)
    _say(console, f"job {job_id}: {status_of(job)}, {_lasted(job)}")
    if status_of(job) == "FAILED":
        for line in _advice(job, jobs.logs(job_id)):
            _say(console, line)
    return code


def _advice(job: Any, log: str) -> Iterator[str]:
    """What to do about a job that failed, beside what its log says."""
    said = f"{job.message or ''}\n{log}"
    # Ray repeats the log in its message, from the second line on.
    reason = next(iter((job.message or "").strip().splitlines()), "Ray gives no reason")
    found = next((advice for sign, advice in _ADVICE.items() if sign in said), None)
    if found:
        yield found
    elif exit_code(job) == 137:
        yield _KILLED
    elif not log.strip():
        yield f"it ended before it wrote a line: {reason}"
    elif job.driver_exit_code not in (0, 1, 2, None):
        yield f"its driver ended with code {job.driver_exit_code}: {reason}"


def _say(console: Console, line: str) -> None:
    """A line that is not broken where it is read by a program, or pasted."""
    console.print(Text(line), soft_wrap=True)


class _Lines:
    """A log on the console; in a terminal the line of a step takes the place of the one before."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._step = Text("")
        self._live = Live(
            console=console, refresh_per_second=4, transient=True, get_renderable=lambda: self._step
        )  # fmt: skip

    def __enter__(self) -> _Lines:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rest:
            self._show(self._rest)
        if self._live.is_started:
            self._live.stop()

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)

    def _show(self, line: str) -> None:
        if self._live.is_started and _STEP.match(line):
            self._step = Text(line, overflow="ellipsis", no_wrap=True)
        else:
            self._console.print(Text(line), soft_wrap=True)


def show_list(jobs: Jobs, console: Console) -> None:
    """All jobs of the cluster, newest last."""
    found = jobs.all()
    if not found:
        _say(console, f"{jobs.address} has no jobs")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "status", "started", "lasted"):
        table.add_column(heading, no_wrap=True)
    for job in found:
        table.add_row(job.submission_id, run_of(job), status_of(job), _time(job.start_time), _lasted(job))
    console.print(table)


def show_status(jobs: Jobs, name: str, console: Console) -> int:
    """One job: its state and the last line of its steps. Returns 1 if it failed."""
    job = jobs.find(name)
    steps = [line for line in jobs.logs(job.submission_id).splitlines() if _STEP.match(line)]
    rows = {
        "job": job.submission_id,
        "run": run_of(job),
        "status": status_of(job),
        "started": f"{_time(job.start_time)}, {_lasted(job)}",
        "last step": steps[-1] if steps else "-",
        "message": job.message or "-",
        "dashboard": jobs.link(job.submission_id),
    }
    for label, value in rows.items():
        console.print(Text(f"{label:<10} {value}"), soft_wrap=True)
    return 1 if status_of(job) == "FAILED" else 0


def view_of(jobs: Jobs, name: str) -> View:
    """A job's run as its log shows it."""
    job = jobs.find(name)
    status = status_of(job)
    return view_of_log(run_of(job), jobs.logs(job.submission_id).splitlines(), status == "SUCCEEDED", is_over(job))


def show_logs(jobs: Jobs, name: str, console: Console, keep_on: bool) -> int:
    """A job's log; with `keep_on` until it ends."""
    job_id = jobs.find(name).submission_id
    if keep_on:
        return follow(jobs, job_id, console)
    console.print(Text(jobs.logs(job_id).rstrip("\n")), soft_wrap=True)
    return 0


def stop(jobs: Jobs, name: str, console: Console, seconds: float) -> int:
    """End a job and wait until it has: its run writes a checkpoint first. Returns 1 if it has not in time."""
    job = jobs.find(name)
    job_id = job.submission_id
    if is_over(job) or not jobs.stop(job_id):
        _say(console, f"job {job_id} has ended before: {status_of(job)}")
        return 0
    with _waiting(console, f"{job_id}: told to end; its run is writing a checkpoint"):
        deadline = time.monotonic() + seconds
        while not is_over(job := jobs.find(job_id)):
            if time.monotonic() > deadline:
                _say(
                    console, f"job {job_id} is still {status_of(job)} after {seconds:g} s; it will be ended by Ray"
                )
                return 1
            time.sleep(0.5)
    said = [line for line in jobs.logs(job_id).splitlines() if line.startswith("stopped; go on with")]
    _say(console, f"job {job_id}: {status_of(job)}")
    if said:
        _say(console, "its run is saved; submit it again and it goes on")
    return 0


@contextmanager
def _waiting(console: Console, text: str) -> Iterator[None]:
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        _say(console, text)
        yield


def _time(milliseconds: int | None) -> str:
    return "-" if not milliseconds else datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


def _lasted(job: Any) -> str:
    if not job.start_time:
        return "not started"
    until = job.end_time or time.time() * 1000
    seconds = int(max(0, until - job.start_time) / 1000)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
