"""Processes that calls of reward functions leave running in a grading child: at most a few stay."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

MOST_LEFT = 16  # a pool that a function keeps for its next calls has fewer; a process for each answer soon has more
_PR_SET_CHILD_SUBREAPER = 36


class LeftBehind:
    """The descendants of this process; on systems without Linux's /proc nothing is known of them.

    What is orphaned becomes a child of this process, also where it has a session of its own. So a process without
    children, which is what nearly all functions leave, is told by one system call.
    """

    def __init__(self) -> None:
        """After the files of functions were imported: what these started stays, and is not counted."""
        with contextlib.suppress(OSError, AttributeError):  # on another system what is orphaned leaves
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._imported = frozenset(_descendants())
        self._known = frozenset[int]()

    def bound(self) -> None:
        """After a call: where more than `MOST_LEFT` run, end those that were not there before it.

        Of the dead that nobody has waited for, those that were there before it go.
        """
        running, dead = self._left()
        for _ in range(3):  # what an ended one had started is orphaned then, or was meanwhile
            if len(running) <= MOST_LEFT or not (new := running - self._known):
                break
            for pid in new:
                _end(pid)
            running, dead = self._left()
        if len(dead) > MOST_LEFT:
            for pid in dead & self._known:
                _end(pid)
        self._known = frozenset(running | dead)

    def _left(self) -> tuple[set[int], set[int]]:
        """Running ones and dead ones."""
        found = _descendants() if _has_children() else {}
        left = found.keys() - self._imported
        return {pid for pid in left if not found[pid]}, {pid for pid in left if found[pid]}


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _descendants() -> dict[int, bool]:
    """Ids of the processes that this one, or one of these, started; whether each is dead, and not waited for."""
    children: dict[int, list[tuple[int, bool]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it has ended
            continue
        children.setdefault(int(parent), []).append((int(stat.parent.name), state == "Z"))
    found, todo = dict[int, bool](), [os.getpid()]
    while todo:
        own = children.get(todo.pop(), [])
        todo += [pid for pid, _ in own]
        found.update(own)
    return found


def _end(pid: int) -> None:
    # It may be gone, or be the child of another, which then waits for it.
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
