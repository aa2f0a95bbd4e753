"""A run's directory: configuration, metrics, traces, log, checkpoints, summary.

Each file is written so that what was there before stays good: lines are appended whole, files are renamed into
place. A full disk is an error that names the path, and what was recorded until then remains.

Nothing is written into a run that exists before `begin`: what fails until then (a model that does not load, engines
that disagree) leaves a run that is resumed, or that is to be replaced (`run.overwrite`), as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kat_ray.config import RunConfig
from kat_ray.observability.logs import line_format, name_driver
from kat_ray.observability.redact import RedactingFormatter
from kat_ray.records.traces import TraceRow, write_traces
from kat_ray.run.lock import RecordError, ReplacedRun, discard_replaced, lock_run, naming
from kat_ray.storage.address import Place

if TYPE_CHECKING:
    from kat_ray.run.stored_checkpoints import StoredCheckpoints

# A run that starts with less would end in the middle of its first checkpoint.
MIN_FREE_BYTES = 64 * 2**20


_HELD_LINES, _NEVER = 10_000, logging.CRITICAL + 1  # of the log, before a run that exists is written again
METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"  # appended to, line by line


class RunDirectory:
    """One run's directory, locked for this process. What is appended to its growing files: `JsonlTracker`."""

    checkpoints: StoredCheckpoints | None = None  # where they are in a bucket

    def __init__(self, path: Path, config_yaml: str | None = None, replaced: ReplacedRun | None = None) -> None:
        """A new run is written from now on, one that goes on (with `config_yaml`) from `begin` on."""
        self.path = path
        self._lock = lock_run(path)
        self._config_yaml, self._replaced = config_yaml, replaced
        self._log: logging.Handler = MemoryHandler(_HELD_LINES, flushLevel=_NEVER, flushOnClose=False)
        self.has_begun = False
        root = logging.getLogger("kat_ray")
        root.addHandler(self._log)
        root.setLevel(logging.INFO)
        name_driver(path.name)
        if config_yaml is None:
            self._write_log()

    @property
    def home(self) -> Place:
        """Where a user finds the run; it is resumed from there."""
        return self.path

    @classmethod
    def create(cls, run: RunConfig, config_yaml: str) -> RunDirectory:
        """Make `<dir>/<name>` (or `<name>-2`, ... if it exists) and point `<dir>/latest` to it.

        With `run.overwrite` the run of this name is put aside until the new one begins. `RecordError` where another
        process is writing it.
        """
        root = Path(run.dir)
        with naming(root):
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < MIN_FREE_BYTES:
                raise RecordError(f"{root}: only {free / 2**20:.0f} MiB are free; a run needs more (run.dir)")
            replaced = ReplacedRun.put_aside(root / run.name) if run.overwrite else None
            try:
                path = _new_directory(root, run.name)
                fill_new(path, config_yaml)
                link = root / f".latest-{os.getpid()}"
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
                link.replace(root / "latest")
                return cls(path, replaced=replaced)
            except BaseException:
                if replaced is not None:
                    replaced.put_back()
                raise

    @classmethod
    def reopen(cls, path: Path, config_yaml: str) -> RunDirectory:
        """Lock a run that exists, to go on with it; nothing of it is changed before `begin` and `rewind`."""
        with naming(path):
            return cls(path, config_yaml)

    def begin(self) -> None:
        """The run is about to take its first step, or its next: from now on its records are written."""
        if self.has_begun:
            return
        with naming(self.path):
            self.has_begun = True
            if self._config_yaml is not None:
                (self.path / "traces").mkdir(exist_ok=True)
                (self.path / METRICS).touch()
                self._write_log()
                _replace(self.path / "config.yaml", self._config_yaml)
            discard_replaced(self.path)
            if self._replaced is not None:
                self._replaced.release()
                self._replaced = None

    def _write_log(self) -> None:
        held = self._log
        self._log = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        self._log.setFormatter(RedactingFormatter(line_format(self.path.name, "driver")))
        root = logging.getLogger("kat_ray")
        root.addHandler(self._log)
        root.removeHandler(held)
        assert isinstance(held, MemoryHandler)
        held.setTarget(self._log)
        held.flush()

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
        if self._replaced is not None:
            self._replaced.put_back()
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

    def paths(self, checkpoint: Place) -> dict[str, Place]:
        """What a user looks for after a run."""
        return {
            "checkpoint": checkpoint,
            "metrics": self.home / METRICS,
            "traces": self.home / "traces",
            "summary": self.home / "summary.json",
            "log": self.home / "run.log",
        }


def fill_new(path: Path, config_yaml: str) -> None:
    """What a run's directory has from the start."""
    (path / "traces").mkdir()
    (path / METRICS).touch()
    (path / "config.yaml").write_text(config_yaml, encoding="utf-8")


def _new_directory(root: Path, name: str) -> Path:
    path, number = root / name, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = root / f"{name}-{number}"


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
