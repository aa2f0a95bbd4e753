"""Who may write a run's directory: one process at a time; and what becomes of a run that another one replaces."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kat_ray.errors import UserError


class RecordError(UserError):
    """A record could not be written; what was written before is intact."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` in this `with` becomes a `RecordError` that names the path."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be written: {error.strerror or error}; earlier records are intact"
        ) from error


def lock_run(path: Path) -> int:
    """A lock on a run directory, held until the file is closed: two writers would mix their records.

    `RecordError` names the process that holds it.
    """
    lock = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
        holder = os.pread(lock, 300, 0).decode(errors="replace").strip()
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        who = f"another process ({holder})" if holder.isprintable() and holder else "another process"
        raise RecordError(f"{path}: {who} is writing this run; end it first, or wait for it") from error
    return lock


@dataclass(frozen=True)
class ReplacedRun:
    """A run that a new one takes the place of: put aside and locked until the new one has begun."""

    path: Path
    lock: int

    @classmethod
    def put_aside(cls, path: Path) -> ReplacedRun | None:
        """Move the run at `path` out of the way; None where there is none. `RecordError` if it is being written."""
        aside = _aside(path)
        if aside.is_dir():  # the process that put it there was killed before its run began: that one is not kept
            if path.is_dir():
                unbegun = lock_run(path)
                shutil.rmtree(path)
                os.close(unbegun)
            aside.rename(path)
        if not path.is_dir():
            return None
        lock = lock_run(path)
        path.rename(aside)
        return cls(path, lock)

    def put_back(self) -> None:
        """The new run did not begin: only its log is kept, as `<name>.failed.log`."""
        with naming(self.path):
            if self.path.is_dir():
                if (self.path / "run.log").is_file():
                    (self.path / "run.log").replace(self.path.with_name(f"{self.path.name}.failed.log"))
                shutil.rmtree(self.path)
            _aside(self.path).rename(self.path)
        self.release()

    def release(self) -> None:
        """Give up the lock."""
        os.close(self.lock)


def discard_replaced(path: Path) -> None:
    """Delete the run that was put aside for the one at `path`, which has begun."""
    aside, doomed = _aside(path), path.with_name(f".{path.name}.deleted")
    if doomed.is_dir():
        shutil.rmtree(doomed)
    if aside.is_dir():
        aside.rename(doomed)  # half deleted under its own name, it would be put back by the next run
        shutil.rmtree(doomed)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
