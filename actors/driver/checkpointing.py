"""When a run's checkpoints are taken and written: copied between two steps, on disk while the next one goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from kat_ray.config import RunConfig
from kat_ray.run.checkpoint import Checkpoints, FileDigest
from kat_ray.run.stored_checkpoints import StoredCheckpoints
from kat_ray.storage.address import Place


class CheckpointWriter:
    """At most one checkpoint is being written; the next one waits for it."""

    def __init__(
        self,
        checkpoints: Checkpoints | StoredCheckpoints,
        run: RunConfig,
        snapshot: Callable[[Place], object],
        written: Callable[[int], Mapping[str, FileDigest]],
        on_commit: Callable[[int, Place], object],
    ) -> None:
        """`snapshot(folder)` copies the learner's state, `written(step)` waits for its files, and returns digests.

        Both may raise `LearnersLost`. `on_commit(step, path)` is told of each one that is complete.
        """
        self._checkpoints, self._run = checkpoints, run
        self._snapshot, self._written, self._on_commit = snapshot, written, on_commit
        self._pending: tuple[int, Mapping[str, Any], float | None] | None = None
        self._stall_seconds = 0.0
        self.saved: int | None = None  # steps done in the newest one, which may still be on its way to disk
        self.newest: Place | None = None  # complete

    def is_due(self, done: int) -> bool:
        """Whether the run wants a checkpoint after so many steps, and has none."""
        every = self._run.checkpoint_every
        wanted = done == self._run.steps or bool(every and done % every == 0)
        return bool(done) and wanted and self.saved != done

    def begin(self, done: int, state: Mapping[str, Any], metric: float | None) -> None:
        """Copy the learner's state. `state` is the driver's, which must not change any more."""
        started = time.monotonic()
        self.finish()
        self._snapshot(self._checkpoints.begin(done))
        self._pending, self.saved = (done, state, metric), done
        self._stall_seconds += time.monotonic() - started

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        if self._pending is None:
            return
        started = time.monotonic()
        (step, state, metric), self._pending = self._pending, None
        self.newest = self._checkpoints.commit(step, state, self._written(step), metric)
        self._on_commit(step, self.newest)
        self._stall_seconds += time.monotonic() - started

    def forget_pending(self) -> None:
        """What was being written is lost with the learner."""
        self._pending = None

    def go_back(self, done: int, newest: Place | None) -> None:
        """The run goes on after `done` steps, which are saved, in the checkpoint `newest` where it was restored."""
        self.saved = done or None
        self.newest = newest or self.newest

    def take_stall_seconds(self) -> float:
        """Seconds that training stood still for checkpoints since this was last asked."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds
