"""The driver's side of a tracker in a process of its own: it says when there is something to read, no more."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kat_ray.observability.trackers import Tracker

END_SECONDS = 30.0  # for all trackers together, at the end of a run
_ID = "run_id"  # file of RUN/tracking
_LONGEST_NAME = 40  # characters of a run's name in its id
_BLOCK = 1 << 16


class TrackingError(Exception):
    """A tracker's process failed; the message says how."""


class Ending:
    """The common deadline of a run's trackers: they hand over what is left side by side."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds`: `END_SECONDS` unless given."""
        self.trackers: list[ServiceTracker] = []
        self.seconds = END_SECONDS if seconds is None else seconds
        self._deadline: float | None = None

    def seconds_left(self) -> float:
        """Counted from the first call, at which every tracker is told that nothing more comes."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.seconds
            for tracker in self.trackers:
                tracker.end_input()
        return max(0.0, self._deadline - time.monotonic())


class ServiceTracker(Tracker):
    """One tracker (`kat_ray.tracking.follow`). What it raises is said once; it is left out from then on."""

    def __init__(
        self, name: str, order: Mapping[str, Any], ending: Ending, say: Callable[[str], None],
        command: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """`order` is for the process: run, project, online. `say` takes a line for the user."""
        self.name, self._order, self._say = f"tracking: {name}", {"service": name, **order}, say
        self._command = command or (sys.executable, "-m", "kat_ray.tracking.follow")
        self._ending = ending
        ending.trackers.append(self)
        self._child: subprocess.Popen[bytes] | None = None
        self._left_out = False
        self._generation, self._unread = 0, b""

    def start(self, done: int) -> None:
        """Begin, or read again from the start: records after `done` were cut off."""
        self._generation += 1
        if self._child is None and not self._left_out:
            self._child = self._spawn()
        self._nudge()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """There is a line more."""
        self._nudge()

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """There is a line more."""
        self._nudge()

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """The summary is there, and the last line."""
        self._nudge()

    def close(self) -> None:
        """Wait until it has handed over what it was told, within `END_SECONDS` for all."""
        if (child := self._child) is None:
            return
        left = self._ending.seconds_left()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(left)
            ended = child.poll() is not None
            if ended:
                self._listen()
            elif not self._left_out:
                raise TrackingError(
                    f"not done {self._ending.seconds:g} s after the end of the run, and ended; what it lacks, "
                    "`kat-ray track RUN` tells it"
                )
        finally:
            self._kill()

    def end_input(self) -> None:
        """Nothing more comes."""
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()

    # --- inside -----------------------------------------------------------------------------------------------

    def _spawn(self) -> subprocess.Popen[bytes]:
        order = {**self._order, "id": run_id(Path(self._order["run"]))}
        child = subprocess.Popen(
            [*self._command, json.dumps(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdin.fileno(), False)
        return child

    def _nudge(self) -> None:
        """A line that is not taken, since the pipe is full or the process gone, is no loss: the next says it."""
        if self._child is None or self._left_out:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._child.stdin.fileno(), f"{self._generation}\n".encode())
        self._listen()

    def _listen(self) -> None:
        """Say what it says; `TrackingError` where it has failed."""
        assert self._child is not None and self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        gone = False
        while not gone and select.select([pipe], [], [], 0)[0]:
            block = os.read(pipe, _BLOCK)
            gone = not block
            self._unread += block
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            what, text = json.loads(line)
            if what == "failed":
                self._leave_out(text)
            self._say(f"{self.name}: {text}")
        if gone and self._child.poll():
            self._leave_out(f"its process ended by itself (exit code {self._child.returncode})")

    def _leave_out(self, why: str) -> None:
        if not self._left_out:
            self._left_out = True
            raise TrackingError(why)

    def _kill(self) -> None:
        child = self._child
        self._child = None
        if child is None:
            return
        if child.returncode is None:  # not yet waited for, so that the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()
        child.wait()


def run_id(run: Path) -> str:
    """The run's id in all trackers: drawn once, and kept in its directory."""
    file = run / "tracking" / _ID
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        name = re.sub(r"[^A-Za-z0-9._-]", "-", run.resolve().name[:_LONGEST_NAME])  # what every tracker takes
        partial.write_text(f"{name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8").strip()
