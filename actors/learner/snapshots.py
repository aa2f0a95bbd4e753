"""Checkpoints of a learner rank: copied to host memory between two steps, written while training continues.

Rank 0 also writes the Hugging Face model directory, or that of the adapters. The driver makes the directory and
completes it (`kat_ray.run.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from actors.learner.average import FILE as AVERAGE
from actors.learner.average import Arrays, write_average
from actors.learner.model import StudentModel
from actors.learner.optimizer_state import (
    HostCopy,
    copy_optimizer,
    file_name,
    held_pieces,
    open_saved,
    restore_optimizer,
    write_tensors,
)
from actors.learner.settings import LearnerSettings
from kat_ray.models.load import DTYPES
from kat_ray.run.checkpoint import TRAINING, FileDigest


class Snapshots:
    """At most one snapshot is being written at a time."""

    def __init__(self, engine: Any, student: StudentModel, rank: int, settings: LearnerSettings) -> None:
        self._engine = engine
        self._student = student
        self._rank, self._world_size = rank, settings.learner.world_size
        self._dtype = DTYPES[settings.learner.dtype]
        self._stop_ids = settings.stop_ids
        self._source = settings.student  # whose tokenizer is saved
        self._copy = HostCopy()
        self._tokenizer: Any = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[dict[str, FileDigest]] | None = None

    def take(
        self,
        path: Path,
        tokenizer_dir: str,
        optimizer_steps: int,
        beat: Callable[[], object] = lambda: None,
        average: Arrays | None = None,
        on_written: Callable[[Mapping[str, FileDigest]], object] = lambda files: None,
    ) -> None:
        """Copy the state, and start to write it below `path`. On rank 0 the parameters must be `gathered`.

        `average` is that of the student's weights, of rank 0; its arrays do not change. `on_written` is called by
        the thread, once the files are on disk.
        """
        if self._writing is not None:
            self.written(beat)  # its buffers are about to be overwritten
        pieces = held_pieces(self._engine, self._student, self._rank, self._world_size)
        tensors, metadata = copy_optimizer(
            self._engine, pieces, self._copy, self._rank, self._world_size, optimizer_steps
        )
        own = file_name(self._rank, self._world_size)
        save_model = self._model_writer(path, tokenizer_dir) if self._rank == 0 else None

        def write() -> dict[str, FileDigest]:
            (path / TRAINING).mkdir(exist_ok=True)
            write_tensors(path / own, tensors, metadata)
            digests = {own: FileDigest.synced(path / own)}
            if average is not None:
                write_average(path, average)
                digests[AVERAGE] = FileDigest.synced(path / AVERAGE)
            digests |= save_model() if save_model else {}
            on_written(digests)
            return digests

        self._writing = self._thread.submit(write)

    def written(self, beat: Callable[[], object] = lambda: None) -> dict[str, FileDigest]:
        """Wait for the files of the last snapshot; errors of writing them are raised here.

        `beat` is called every second: a rank that writes a large file to a slow disk is not stuck.
        """
        assert self._writing is not None, "no snapshot is being written"
        writing, self._writing = self._writing, None
        while not wait([writing], timeout=1.0).done:
            beat()
        return writing.result()

    def restore(self, path: Path, beat: Callable[[], object] = lambda: None) -> int:
        """Restore a checkpoint; returns the optimiser steps that it was saved after. All ranks must call it.

        `beat` is called after each tensor.
        """
        self._student.check_base(path)
        with open_saved(path) as saved:
            restore_optimizer(self._engine, self._student, saved, self._rank, self._world_size, beat)
            saved.restore_rng(self._rank, self._world_size)
            return saved.optimizer_steps

    def _model_writer(self, path: Path, tokenizer_dir: str) -> Callable[[], dict[str, FileDigest]]:
        save_student = self._student.copy_for_saving(
            lambda name, tensor: self._copy.take(f"model/{name}", tensor), self._dtype, self._stop_ids
        )

        def save() -> dict[str, FileDigest]:
            save_student(path)
            self._save_tokenizer(tokenizer_dir, path)
            names = [f for f in path.rglob("*") if f.is_file() and (path / TRAINING) not in f.parents]
            return {name.relative_to(path).as_posix(): FileDigest.synced(name) for name in names}

        return save

    def _save_tokenizer(self, tokenizer_dir: str, path: Path) -> None:
        from transformers import AutoTokenizer

        if self._tokenizer is None:  # a large one takes a second to load, of the training's time
            self._tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_dir, revision=self._source.revision, trust_remote_code=self._source.trust_remote_code
            )
        self._tokenizer.save_pretrained(path)
