"""How a lost actor is waited for: Ray starts another process under the same handle, which has to answer.

A pure machine: answers and times in, one instruction out. `actors.cluster.revival` carries it out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kat_ray.cluster.heartbeat import HeartbeatReport
from kat_ray.errors import UserError

PAUSE = 0.2  # seconds between an answer and the next question


@dataclass(frozen=True)
class Unavailable:
    """The actor is not there. `for_good`: Ray says that it does not start it again, and why."""

    for_good: bool = False
    reason: str = ""


class Step(enum.Enum):
    """What to do next."""

    WAIT = enum.auto()  # for the answer, or until it is time to ask again
    PING = enum.auto()  # ask for a heartbeat
    KILL = enum.auto()  # end the process, so that another one is started; then ask again
    READY = enum.auto()  # another process than the old one answers: `pid`


class Revival:
    """Waits until another process than `old_pid` answers, killing one that lives on or does not answer."""

    def __init__(
        self, name: str, old_pid: int | None, now: float, *, start_timeout: float, hang_timeout: float
    ) -> None:
        """`start_timeout` and `hang_timeout` are those of the configuration's `cluster`, seconds."""
        self.pid: int | None = None  # of the process that is ready
        self._name, self._old_pid = name, old_pid
        self._start_timeout, self._hang_timeout = start_timeout, hang_timeout
        self._deadline = now + start_timeout
        self._asked_at: float | None = None  # of the question that is not answered
        self._ask_at = now
        self._has_killed = False
        self._deaths_in_a_row = 0  # answers that it is dead for good

    def handle(self, now: float, answer: HeartbeatReport | Unavailable | None = None) -> Step:
        """Take the answer to the last ping, if there is one, and say what to do.

        `UserError` if the actor did not come back within `start_timeout`, or never will.
        """
        if answer is not None and self._take(now, answer):
            return Step.KILL
        if self.pid is not None:
            return Step.READY
        if now > self._deadline:
            raise UserError(
                f"{self._name} did not come back within {self._start_timeout:g} s (cluster.start_timeout)"
            )
        if self._asked_at is None:
            if now < self._ask_at:
                return Step.WAIT
            self._asked_at = now
            return Step.PING
        if now - self._asked_at < self._hang_timeout:
            return Step.WAIT
        self._ask_again(now)
        return Step.KILL

    def _take(self, now: float, answer: HeartbeatReport | Unavailable) -> bool:
        """Whether the process that answered is the old one, and has to be killed."""
        self._ask_again(now)
        if isinstance(answer, Unavailable):
            # A call that was under way when the process died may say so of one that comes back.
            self._deaths_in_a_row = self._deaths_in_a_row + 1 if answer.for_good else 0
            if self._deaths_in_a_row > 1:
                raise UserError(answer.reason)
            return False
        self._deaths_in_a_row = 0
        if answer.pid != self._old_pid:
            self.pid = answer.pid
            return False
        kill, self._has_killed = not self._has_killed, True
        return kill

    def _ask_again(self, now: float) -> None:
        self._asked_at, self._ask_at = None, now + PAUSE
