"""What a grading child runs: `python -m kat_ray.rewards.serve '[BYTES, ["grader", ...], "pattern", AT_ONCE]'`.

It limits its own memory, loads its graders, and says `["ready", ["async grader", ...], ""]`, or `["failed", grader,
reason]`. Then it reads `[number, seconds, grader, arguments]` and writes `[number, "value", value]`, `[number,
"error", text]` or `[number, "memory", ""]`, one JSON line each.

An async grader also takes a list of arguments: calls with the numbers from `number` on, of which AT_ONCE are under
way. Each is answered as it ends; one that takes longer than `seconds` is given up here (`[number, "late", ""]`).

The pipes are taken from standard input and output before anything is loaded: what a function prints or reads goes
nowhere. A child whose parent is gone ends at once, with all that it forked: a process beside it sees to that. Where
there is no such process it ends with its input, or by an alarm that it sets itself. What calls leave running is
bounded (kat_ray.rewards.left_behind).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from kat_ray.rewards import math_grader, signatures
from kat_ray.rewards.child import START_SECONDS
from kat_ray.rewards.left_behind import LeftBehind

Grader = Callable[[Mapping[str, Any]], Any]  # from a call's arguments to its value

_ORPHAN_SECONDS = 10.0  # after a call's time, in which the parent ends the child if it is there
_LONGEST_TEXT = 4000  # characters of an error
_FRAMES = 12  # of a traceback, the last ones
_OURS = (str(Path(__file__).parent), "<frozen importlib")


def load(name: str, pattern: str) -> Grader:
    """What answers to this name: `math`, `expression`, `environment`, `problems`, `format`, `file.py:name`."""
    if name == "math":
        return math_grader.load()
    if name == "expression":
        return math_grader.load_expression()
    if name in ("environment", "problems"):
        from kat_ray.rewards import families

        return families.load_grader() if name == "environment" else families.load_maker()
    if name == "format":
        compiled = re.compile(pattern, re.DOTALL)
        return lambda arguments: float(compiled.search(arguments["text"]) is not None)
    return signatures.load(name)


def main() -> None:
    """Serve until the input ends."""
    limit, names, pattern, at_once = json.loads(sys.argv[1])
    if os.getpgrp() == os.getpid():
        _end_group_with(os.getppid(), os.getpid())
    requests, replies = _own_pipes()
    _limit_memory(limit)
    own = os.getpid()
    graders: dict[str, Grader] = {}

    def say(*what: Any) -> None:
        if os.getpid() != own:  # a function forked, and came back twice
            os._exit(0)
        print(json.dumps(what), file=replies, flush=True)

    signal.setitimer(signal.ITIMER_REAL, START_SECONDS + _ORPHAN_SECONDS)
    for name in names:
        try:
            graders[name] = load(name, pattern)
        except BaseException as error:  # whatever it is, the parent is to say it
            return say("failed", name, _words(error))
    signal.setitimer(signal.ITIMER_REAL, 0)
    left = LeftBehind()
    together = [name for name, grader in graders.items() if is_async(grader)]
    if together:  # of `asyncio.to_thread`, which has few threads by itself
        signatures.event_loop().set_default_executor(ThreadPoolExecutor(at_once))
    say("ready", together, "")
    for line in requests:
        number, seconds, name, arguments = json.loads(line)
        rounds = math.ceil(len(arguments) / at_once) if isinstance(arguments, list) else 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, rounds * seconds + _ORPHAN_SECONDS)
        if isinstance(arguments, list):
            _answer_together(graders[name], number, arguments, seconds, at_once, say)
            what = None
        else:
            what = _answer(graders[name], arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() == own:
            left.bound()
        if what is not None:
            say(number, *what)
    if os.getpgrp() == own:  # what functions left running
        os.killpg(own, signal.SIGKILL)


def _end_group_with(*pids: int) -> None:
    """Start a process that kills this process group once one of these processes has ended.

    It does so whatever a function is in: an alarm would end this process and nothing that it forked, and a thread
    might not get its turn. It is no child of this process: a function that waits for all its children shall not
    wait for it.
    """
    try:
        ends = [os.pidfd_open(pid) for pid in pids]
    except (AttributeError, OSError):  # another system than Linux, or an old one
        return
    if first := os.fork():
        for end in ends:
            os.close(end)
        os.waitpid(first, 0)
        return
    if os.fork():
        os._exit(0)
    # The pipes would tell the parent that this process is alive.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _answer(grader: Grader, arguments: Mapping[str, Any]) -> tuple[str, Any]:
    try:
        return "value", grader(arguments)
    except MemoryError:
        return "memory", ""
    except BaseException as error:  # such as the CancelledError of an async function
        return "error", _words(error)


def is_async(grader: Grader) -> bool:
    """Whether several of its calls can be under way at once."""
    return isinstance(grader, signatures.RewardFunction) and grader.is_async


def _answer_together(
    grader: Grader,
    first: int,
    asked: Sequence[Mapping[str, Any]],
    seconds: float,
    at_once: int,
    say: Callable[..., None],
) -> None:
    """Answer calls whose numbers begin with `first`, each as it ends."""
    assert isinstance(grader, signatures.RewardFunction), "the parent was told which are async"

    async def answer(gate: asyncio.Semaphore, number: int, arguments: Mapping[str, Any]) -> None:
        async with gate:
            limit = asyncio.timeout(seconds)
            try:
                async with limit:
                    what: tuple[str, Any] = "value", await grader.awaited(arguments)
            except MemoryError:
                what = "memory", ""
            except BaseException as error:  # as in `_answer`
                what = ("late", "") if limit.expired() else ("error", _words(error))
        say(number, *what)

    async def answer_all() -> None:
        gate = asyncio.Semaphore(at_once)
        await asyncio.gather(*(answer(gate, first + i, each) for i, each in enumerate(asked)))

    signatures.event_loop().run_until_complete(answer_all())


def _own_pipes() -> tuple[TextIO, TextIO]:
    """Standard input and output for ourselves; in their places nothing is read, and what is written is dropped."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    return requests, replies


def _limit_memory(size: int) -> None:
    """Bytes of address space and of data, and no core file; an allocation beyond them is a MemoryError."""
    import resource

    for kind, most in ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, size), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _words(error: BaseException) -> str:
    """An error of ours as it is, any other with its traceback, from where the user's code begins."""
    if isinstance(error, signatures.Unusable):
        return str(error)[:_LONGEST_TEXT]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    shown = traceback.format_list(frames[-_FRAMES:])
    head = ["Traceback (most recent call last):\n"] if shown else []
    last = "".join(traceback.format_exception_only(error))
    return ("".join([*head, *shown])[: _LONGEST_TEXT // 2] + last[-_LONGEST_TEXT // 2 :]).strip()


if __name__ == "__main__":
    main()
