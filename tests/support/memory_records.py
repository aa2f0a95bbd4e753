"""What a run on the fake cluster leaves: records, metrics and checkpoints, in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kat_ray.observability.trackers import Tracker
from kat_ray.run.checkpoint import FileDigest, FindDamage, Loaded, check_state, unread
from tests.support.memory_learner import World


class MemoryRun:
    """The records of a run, in memory."""

    def __init__(self) -> None:
        self.path = Path("/nowhere/run")
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[tuple[int, dict[str, Any]]] = []
        self.traces: dict[int, list[Any]] = {}
        self.summary: dict[str, Any] | None = None
        self.has_begun = False
        self.checkpoints = None  # none in a bucket

    def begin(self) -> None:
        self.has_begun = True

    def write_traces(self, step: int, rows: Sequence[Any]) -> None:
        self.traces[step] = list(rows)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)

    def positions(self) -> dict[str, int]:
        return {"metrics.jsonl": len(self.metrics), "evaluations.jsonl": len(self.evaluations)}

    def rewind(self, step: int, positions: Mapping[str, int]) -> None:
        del self.metrics[positions.get("metrics.jsonl", 0) :]
        del self.evaluations[positions.get("evaluations.jsonl", 0) :]
        self.traces = {s: rows for s, rows in self.traces.items() if s < step}
        self.summary = None

    def paths(self, checkpoint: Path) -> dict[str, Path]:
        return {"checkpoint": checkpoint}


class MemoryTracker(Tracker):
    """Keeps the metrics of a run's steps, and its evaluations."""

    def __init__(self, run: MemoryRun) -> None:
        self._run = run

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._run.metrics.append((done, dict(metrics)))

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._run.evaluations.append((done, dict(record)))


class MemoryCheckpoints:
    """The checkpoints of a run, in memory; what the learner wrote is on the world's disk."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.written: dict[int, tuple[str, int]] = {}  # by step: state as JSON, and weights

    def begin(self, step: int) -> Path:
        path = Path(f"/nowhere/run/checkpoints/step-{step}.partial")
        self._world.disk.pop(str(path), None)
        return path

    def commit(self, step: int, state: Mapping[str, Any], files: Mapping[str, Any], metric: float | None) -> Path:
        check_state(state)
        weights = self._world.disk.pop(f"/nowhere/run/checkpoints/step-{step}.partial")
        final = Path(f"/nowhere/run/checkpoints/step-{step}")
        self._world.disk[str(final)] = weights
        self.written[step] = (json.dumps(state), weights)
        return final

    def newest(self, find_damage: FindDamage = unread) -> tuple[Loaded | None, list[str]]:
        notes = []
        for step in sorted(self.written, reverse=True):
            path = Path(f"/nowhere/run/checkpoints/step-{step}")
            damage = find_damage(path, {f"{path}/{part}": FileDigest(1, "") for part in "abc"})
            if damage is None:
                return Loaded(path, step, None, json.loads(self.written[step][0])), notes
            notes.append(damage)
        return None, notes
