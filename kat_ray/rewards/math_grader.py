r"""LaTeX answers graded by math-verify in a child process that can be ended, within a bound of time and of memory.

The parent works from any thread of any process. The child, `python -m kat_ray.rewards.math_grader BYTES`, limits
its own memory, then reads `[seconds, "gold", "text"]` and writes `true` or `false`, or reads `[seconds, null,
"text"]` and writes the expression it would grade (a string, "" if there is none), one JSON line each; `null` says
that it ran out of memory. An answer that takes longer, or kills the child, has no verdict, and the child is
replaced. A child whose parent is gone ends by an alarm that it sets itself.
"""

from __future__ import annotations

import json
import logging
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kat_ray.errors import UserError
from kat_ray.rewards.limits import GradingLimits, Outcome

_START_SECONDS = 120.0  # importing sympy on a busy machine
_LAST_CHARACTERS = 4000  # the answer stands at the end, or in a box; a loop beside it only costs time
_ORPHAN_SECONDS = 10.0  # after an answer's time, in which the parent ends the child if it is there

_BOX_RE = re.compile(r"\\boxed\s*\{")
_BRACES_RE = re.compile(r"(?<!\\)\{[^{}]*\}")
# What marks a part of a text as LaTeX. A backslash before it makes it another sign: \$ is a dollar, \\[2pt] a line.
_DELIMITED = r"(?<!\\)\$.+?(?<!\\)\$|(?<!\\)\\\(.+?(?<!\\)\\\)|(?<!\\)\\\[.+?(?<!\\)\\\]"
_DELIMITED_RE = re.compile(_DELIMITED, re.DOTALL)
# The height of a matrix's line, which math-verify takes for a factor of the next entry.
_LINE_HEIGHT_RE = re.compile(r"\\\\\s*\[\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in|mu|bp|pc)\s*\]")


class MathGrader:
    """A child process that grades, one answer after the other; ended by `close` or a `with` block.

    It is started by the first question: `UserError` where math-verify cannot be used.
    """

    def __init__(self, limits: GradingLimits | None = None) -> None:
        self._limits = limits or GradingLimits()
        self._child: subprocess.Popen[str] | None = None
        self._ready = False
        self._started = 0.0

    def grade(self, text: str, gold: str, within: float = _START_SECONDS) -> Outcome:
        """Whether the text's last expression equals the gold answer; wrong where either cannot be read.

        `within` bounds the seconds in all, the child's start included. `NOT_REACHED` if that was too short.
        """
        reply = self._ask(gold, text, within)
        if isinstance(reply, Outcome):
            return reply
        return Outcome.RIGHT if reply == "true" else Outcome.WRONG

    def extract(self, text: str) -> str | None:
        """The text's last expression, as it stands there; None where there is none that can be read."""
        reply = self._ask(None, text, _START_SECONDS)
        return None if isinstance(reply, Outcome) else json.loads(reply) or None

    def close(self) -> None:
        """End the child; the next question starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
        self._child, self._ready = None, False

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _ask(self, gold: str | None, text: str, within: float) -> str | Outcome:
        """The child's reply; an outcome where there is none, and then another child takes its place."""
        end = time.monotonic() + within
        if not self._is_ready(within):
            return Outcome.NOT_REACHED
        left = end - time.monotonic()
        if left <= 0:
            return Outcome.NOT_REACHED
        assert self._child is not None and self._child.stdin is not None
        seconds = self._limits.seconds
        try:
            self._child.stdin.write(json.dumps([seconds, gold, readable_part(text)]) + "\n")
            self._child.stdin.flush()
            reply = self._read(min(seconds, left))
        except BrokenPipeError:
            reply = ""
        if reply and reply != "null":
            return reply
        self.close()
        return Outcome.RAN_OUT if reply is not None or left >= seconds else Outcome.NOT_REACHED

    def _is_ready(self, within: float) -> bool:
        """Whether the child takes questions; it goes on starting where it does not yet."""
        if self._ready:
            return True
        if self._child is None:
            self._child, self._started = self._start(), time.monotonic()
        start_ends = self._started + _START_SECONDS
        line = self._read(min(within, start_ends - time.monotonic()))
        self._ready = line == "ready"
        if line is None and time.monotonic() < start_ends:
            return False
        if not self._ready:
            self.close()
            raise UserError(
                "evaluation.verifier = math: math-verify cannot be used here "
                f"({line or 'its process did not start'}); pip install 'kat-ray[math]', and give it memory "
                f"(evaluation.grading_memory_gib = {self._limits.memory_gib:g})"
            )
        return True

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kat_ray.rewards.math_grader", str(int(self._limits.memory_gib * 2**30))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def _read(self, seconds: float) -> str | None:
        """The child's next line, "" when it is gone, None when it is late. Replies are short, so it comes whole."""
        assert self._child is not None and self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], max(0.0, seconds))
        return self._child.stdout.readline().strip() if readable else None


def readable_part(text: str) -> str:
    r"""The end of a text, after its last complete `\boxed{...}` where that stands further up."""
    start = max(0, len(text) - _LAST_CHARACTERS)
    for box in reversed(list(_BOX_RE.finditer(text))):
        end = _closing_brace(text, box.end())
        if end is not None:
            return text[start:] if box.start() >= start else f"{text[box.start() : end]}\n{text[max(start, end) :]}"
    return text[start:]


def _closing_brace(text: str, start: int) -> int | None:
    """Index behind the brace that closes the one before `start`; None where that is not near, or not there."""
    depth = 1
    for i in range(start, min(len(text), start + _LAST_CHARACTERS)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if not depth:
                return i + 1
    return None


def as_latex(gold: str) -> str:
    r"""A gold answer between delimiters: its own, or dollars around the whole.

    Its own are a pair, unescaped, at both ends, or around a part of a sentence; `\$18.90`, `\\[2pt]` in a matrix
    and a pair within braces are none. `\boxed{...}` is taken as it is.
    """
    gold = gold.strip()
    outside, deeper = gold, 1
    while deeper:
        outside, deeper = _BRACES_RE.subn("", outside)
    if _DELIMITED_RE.fullmatch(gold) or _DELIMITED_RE.search(outside) or "\\boxed" in outside:
        return gold
    escaped = re.sub(r"(?<!\\)\$", r"\\$", gold)  # a lone dollar is a price
    return f"${escaped}$"


def _equal(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    options: dict[str, Any] = {"parsing_timeout": None}
    ours, theirs = (_LINE_HEIGHT_RE.sub(r"\\\\", part) for part in (as_latex(gold), text))
    return bool(verify(parse(ours, **options), parse(theirs, **options), timeout_seconds=None))


def _expression(text: str) -> str:
    """What math-verify reads as the answer: its last alternative is the text itself."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return str(found[-1]) if found else ""


def _limit_memory(size: int) -> None:
    """Bytes of address space and of data, and no core file; an allocation beyond them is a MemoryError."""
    import resource

    for kind, most in ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, size), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _is_bloated(limit: int) -> bool:
    """Whether this process once held half of its memory.

    What grows by doubling fails from there on, and math-verify takes most errors, a MemoryError too, for "not
    equal".
    """
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux
        return False
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    return peak is not None and int(peak[1]) * 1024 > limit // 2


def _reply(gold: str | None, text: str, limit: int) -> str:
    try:
        reply = json.dumps(_expression(text) if gold is None else _equal(gold, text))
    except MemoryError:
        return "null"
    return "null" if reply != "true" and _is_bloated(limit) else reply


def _serve(limit: int) -> None:
    _limit_memory(limit)
    logging.disable(logging.WARNING)  # math-verify warns that the time limit is ours to set: it is
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        _equal("1", "1")
    except ImportError as error:
        print(f"{error}", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, gold, text = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + _ORPHAN_SECONDS)
        print(_reply(gold, text, limit), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
