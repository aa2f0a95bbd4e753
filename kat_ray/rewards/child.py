"""A child process that grades, and can be ended: the parent's side of `serve.py`.

The parent works from any thread of any process. Both sides speak JSON, a line each, over pipes that nothing else
writes to. A call that takes too long, or ends the child, costs that call: the child's whole process group is killed
(what a function forked is in it), and the next call starts another child. Of several calls under way at once, each
that could have been its victim is to be asked again, alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from kat_ray.errors import RewardError, UserError
from kat_ray.rewards.libraries import library_of
from kat_ray.rewards.limits import Again, Call, Fault, GradingLimits, Reply

START_SECONDS = 120.0  # importing sympy, or what a user's file imports, on a busy machine
_BLOCK = 1 << 16  # bytes that are written or read at once
_SLACK = 2.0  # seconds that a call which was given up may take to end
_LONGEST_LINE = 1 << 20  # bytes; a reply is a number, or a text that its side keeps short


class GradingChild:
    """Started by its first call; ended by `close` or a `with` block."""

    def __init__(self, limits: GradingLimits, graders: Sequence[str], pattern: str = "") -> None:
        """`graders`: what the child loads, by the names of `serve.load`; `pattern` is that of `format`."""
        self._limits = limits
        self._graders = tuple(graders)
        self._pattern = pattern
        self._child: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._started = 0.0
        self._asked = 0
        self._read_so_far = b""
        self.together: frozenset[str] = frozenset()  # graders that take several calls at once, once it has started

    def ask(self, call: Call, within: float = START_SECONDS) -> Reply:
        """What a call gives, in at most `within` seconds in all, the child's start included.

        `UserError` where the child cannot load what is to grade.
        """
        end = time.monotonic() + within
        late = Reply(fault=Fault.NOT_REACHED, error=f"not reached within {self._limits.words('step_seconds')}")
        if not self.start(within):
            return late
        left = end - time.monotonic()
        if left <= 0:
            return late
        self._asked += 1
        seconds = self._limits.seconds
        request = json.dumps([self._asked, seconds, call.grader, call.arguments]).encode() + b"\n"
        deadline = time.monotonic() + min(seconds, left)
        reply = self._reply(deadline) if self._send(request, deadline) else None
        if isinstance(reply, list):
            what, value = reply
            if what == "value":
                return Reply(value)
            if what == "error":
                return Reply(fault=Fault.RAISED, error=str(value))
            self.close()  # its memory is in pieces
            return Reply(fault=Fault.MEMORY, error=f"took more memory than {self._limits.words('memory_gib')}")
        code = self.close()
        if reply == "":
            return Reply(fault=Fault.DIED, error=f"ended its process ({_how(code)})")
        if left < seconds:
            return Reply(fault=Fault.NOT_REACHED, error=f"not done within {self._limits.words('step_seconds')}")
        return Reply(fault=Fault.TIME, error=f"took longer than {self._limits.words('seconds')}")

    def ask_together(self, calls: Sequence[Call], within: float) -> list[Reply | Again]:
        """What calls of one grader of `together` give, in at most `within` seconds in all.

        The process is ended where one of them is late: what it has left running would be beside the next ones.
        """
        first, seconds, end = self._asked + 1, self._limits.seconds, time.monotonic() + within
        self._asked += len(calls)
        request = json.dumps([first, seconds, calls[0].grader, [call.arguments for call in calls]]).encode() + b"\n"
        found: dict[int, Reply | Again] = {}
        whole = self._send(request, end) and self._take_replies(found, first, len(calls), end)
        if not whole or Again.ALONE in found.values():
            self.close()
        started = len(found) + self._limits.calls_at_once  # they are begun in their order
        for i in range(len(calls)):
            found.setdefault(i, Again.ALONE if i < started else Again.ANYHOW)
        if time.monotonic() >= end:
            late = Reply(fault=Fault.NOT_REACHED, error=f"not done within {self._limits.words('step_seconds')}")
            found = {i: late if isinstance(reply, Again) else reply for i, reply in found.items()}
        return [found[i] for i in range(len(calls))]

    def start(self, within: float) -> bool:
        """Whether the child takes calls; it goes on starting where it does not yet after `within` seconds."""
        if self._ready:
            return True
        now = time.monotonic()
        if self._child is None:
            self._child, self._started = self._spawn(), now
        last = self._started + START_SECONDS
        line = self._line(min(now + within, last))
        if line is None and time.monotonic() < last:
            return False
        said = _parsed(line)
        if said is not None and said[0] == "ready":
            self._ready, self.together = True, frozenset(said[1])
            return True
        self._refuse(line, said)

    def close(self) -> int:
        """End the child and what it started; the next call starts another. Returns its exit code, 0 without one."""
        code = 0
        if self._child is not None:
            assert self._child.stdin is not None and self._child.stdout is not None
            with contextlib.suppress(ProcessLookupError):  # not yet waited for, so that the number is still its own
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.stdin.close()
            self._child.stdout.close()
            code = self._child.wait()
        self._child, self._ready, self._read_so_far = None, False, b""
        return code

    def interrupt(self) -> None:
        """Kill the process from another thread than the one that asks it, whose call then ends."""
        child = self._child
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def __enter__(self) -> GradingChild:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # --- inside -----------------------------------------------------------------------------------------------

    def _take_replies(self, found: dict[int, Reply | Again], first: int, count: int, end: float) -> bool:
        """Take the replies to `count` calls from the number `first` on; False where some do not come."""
        numbers = {first + i for i in range(count)}
        while numbers:
            said = _parsed(self._line(min(end, time.monotonic() + self._limits.seconds + _SLACK)))
            if said is None or said[0] not in numbers or said[1] == "memory":
                return False
            numbers.remove(said[0])
            found[said[0] - first] = _reply_of(*said[1:])
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        setup = [int(limits.memory_gib * 2**30), self._graders, self._pattern, limits.calls_at_once]
        # One thread: those of a pool take address space, which is limited. Hashes are the same in every child.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONHASHSEED": "0"}
        child = subprocess.Popen(
            [sys.executable, "-m", "kat_ray.rewards.serve", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env=environment,
        )
        assert child.stdin is not None
        os.set_blocking(child.stdin.fileno(), False)
        return child

    def _refuse(self, line: bytes | None, said: list[Any] | None) -> NoReturn:
        """Say why the child did not start."""
        code = self.close()
        name, reason = " and ".join(self._graders), f"its process did not start: {_how(code)}"
        if line is None:
            reason = f"it was not loaded within {START_SECONDS:g} s"
        if said is not None:
            _, name, reason = said
        give = f"give it memory ({self._limits.words('memory_gib')})"
        if (library := library_of(name)) is not None:
            raise UserError(
                f"{library.field}: {library.name} cannot be used here ({reason}); pip install "
                f"'kat-ray[{library.extra}]', and {give}"
            )
        raise RewardError(f"reward.functions: {name} cannot be loaded, or {give}: {reason}")

    def _send(self, request: bytes, deadline: float) -> bool:
        """Whether the child took all of a request; False where it is late or gone, which `_reply` would say."""
        assert self._child is not None and self._child.stdin is not None
        pipe = self._child.stdin.fileno()
        while request:
            if not _wait(pipe, select.POLLOUT, deadline):
                return False
            try:
                request = request[os.write(pipe, request[:_BLOCK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return True
        return True

    def _reply(self, deadline: float) -> list[Any] | str | None:
        """The reply to the last request; "" where the child is gone, None where it is late."""
        while (line := self._line(deadline)) is not None:
            if not line:
                return ""
            said = _parsed(line)
            if said is None:
                return ""  # not from `serve`: what follows cannot be trusted either
            if said[0] == self._asked:
                return said[1:]
        return None

    def _line(self, deadline: float) -> bytes | None:
        """The child's next line, b"" where it is gone, None where it is late."""
        assert self._child is not None and self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        while b"\n" not in self._read_so_far:
            if not _wait(pipe, select.POLLIN, deadline):
                return None
            block = os.read(pipe, _BLOCK)
            if not block or len(self._read_so_far) > _LONGEST_LINE:
                return b""
            self._read_so_far += block
        line, _, self._read_so_far = self._read_so_far.partition(b"\n")
        return line


def _reply_of(what: str, value: Any) -> Reply | Again:
    """What one of several calls gave."""
    if what == "late":
        return Again.ALONE
    return Reply(value) if what == "value" else Reply(fault=Fault.RAISED, error=str(value))


def _wait(pipe: int, event: int, deadline: float) -> bool:
    """Whether a pipe can be read or written, or has lost its other side, before the deadline."""
    poll = select.poll()
    poll.register(pipe, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _parsed(line: bytes | None) -> list[Any] | None:
    try:
        said = json.loads(line or b"null")
    except ValueError:
        return None
    return said if isinstance(said, list) and len(said) == 3 else None


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
