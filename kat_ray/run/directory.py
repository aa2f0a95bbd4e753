"""A run's directory: configuration, metrics, traces, log, checkpoints, summary.

Each file is written so that what was there before stays good: lines are appended whole, files are renamed into
place. A full disk is an error that names the path, and what was recorded until then remains.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from kat_ray.config import RunConfig
from kat_ray.errors import UserError
from kat_ray.observability.logs import line_format, name_driver
from kat_ray.observability.redact import RedactingFormatter
from kat_ray.records.traces import TraceRow, write_traces

# A run that starts with less would end in the middle of its first checkpoint.
MIN_FREE_BYTES = 64 * 2**20


METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"  # appended to, line by line


class RecordError(UserError):
    """A record could not be written; what was written before is intact."""


class RunDirectory:
    """One run's directory, locked for this process. What is appended to its growing files: `JsonlTracker`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        (path / METRICS).touch()
        self._log = logging.FileHandler(path / "run.log", encoding="utf-8")
        self._log.setFormatter(RedactingFormatter(line_format(path.name, "driver")))
        root = logging.getLogger("kat_ray")
        root.addHandler(self._log)
        root.setLevel(logging.INFO)
        name_driver(path.name)

    @classmethod
    def create(cls, run: RunConfig, config_yaml: str) -> RunDirectory:
        """Make `<dir>/<name>` (or `<name>-2`, ... if it exists) and point `<dir>/latest` to it."""
        root = Path(run.dir)
        with naming(root):
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < MIN_FREE_BYTES:
                raise RecordError(f"{root}: only {free / 2**20:.0f} MiB are free; a run needs more (run.dir)")
            path = _new_directory(root, run)
            (path / "traces").mkdir()
            (path / "config.yaml").write_text(config_yaml, encoding="utf-8")
            link = root / f".latest-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(root / "latest")
            return cls(path)

    @classmethod
    def reopen(cls, path: Path, config_yaml: str) -> RunDirectory:
        """Go on with the records of a run; call `rewind` before anything is written."""
        with naming(path):
            (path / "traces").mkdir(exist_ok=True)
            records = cls(path)
            _replace(path / "config.yaml", config_yaml)
        return records

    def positions(self) -> dict[str, int]:
        """Bytes of the files that grow: what `rewind` takes."""
        files = {name: self.path / name for name in (METRICS, EVALUATIONS)}
        return {name: file.stat().st_size if file.is_file() else 0 for name, file in files.items()}

    def rewind(self, step: int, positions: Mapping[str, int]) -> None:
        """Forget what was recorded after `step` steps were done, when the growing files had these sizes.

        A file that is shorter than that lost its end, and stays as it is.
        """
        with naming(self.path):
            for name in (METRICS, EVALUATIONS):
                file = self.path / name
                if file.is_file() and file.stat().st_size > positions.get(name, 0):
                    os.truncate(file, positions.get(name, 0))
            for trace in (self.path / "traces").glob("**/step-*"):
                if int(trace.stem.removeprefix("step-")) >= step:
                    trace.unlink()
            (self.path / "summary.json").unlink(missing_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log = logging.getLogger("kat_ray")
        if error is not None:  # to the file only: what the user has to know is for the caller to say
            trouble = (type(error), error, trace)
            self._log.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "the run ended early", (), trouble))
        log.removeHandler(self._log)
        name_driver()
        self._log.close()
        os.close(self._lock)

    def write_traces(self, step: int, rows: Sequence[TraceRow]) -> None:
        """Write the traces of a step."""
        with naming(self.path / "traces"):
            write_traces(self.path / "traces", step, rows)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json in one piece."""
        path = self.path / "summary.json"
        with naming(path):
            _replace(path, json.dumps(summary, indent=2) + "\n")

    def paths(self, checkpoint: Path) -> dict[str, Path]:
        """What a user looks for after a run."""
        return {
            "checkpoint": checkpoint,
            "metrics": self.path / METRICS,
            "traces": self.path / "traces",
            "summary": self.path / "summary.json",
            "log": self.path / "run.log",
        }


def _new_directory(root: Path, run: RunConfig) -> Path:
    path = root / run.name
    if run.overwrite and path.is_dir():
        shutil.rmtree(path)
    number = 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = root / f"{run.name}-{number}"


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _locked(path: Path) -> int:
    """A lock on a run directory, held until the file is closed: two writers would mix their records."""
    lock = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise RecordError(f"{path}: another process is writing this run; end it first, or wait for it") from error
    return lock


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` in this `with` becomes a `RecordError` that names the path."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be written: {error.strerror or error}; earlier records are intact"
        ) from error
