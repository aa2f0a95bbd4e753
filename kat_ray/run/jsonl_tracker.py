"""metrics.jsonl and evaluations.jsonl: a run's own records of its figures, appended line by line.

What is to be taken back of them when a run goes back is the run directory's affair (`RunDirectory.rewind`), which
knows their sizes at each checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kat_ray.observability.trackers import Tracker
from kat_ray.run.directory import EVALUATIONS, METRICS
from kat_ray.run.lock import naming


class JsonlTracker(Tracker):
    """Writes both files. `RecordError` names the one that cannot be written, and ends the run."""

    essential = True

    def __init__(self, folder: Path) -> None:
        self._metrics_path, self._evaluations_path = folder / METRICS, folder / EVALUATIONS
        with naming(self._metrics_path):
            self._metrics = self._metrics_path.open("a", encoding="utf-8")

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Append one line: step, time and values. What is not finite becomes null and is named."""
        odd = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": done, "time": time.time()}
        line |= {name: None if name in odd else value for name, value in metrics.items()}
        if odd:
            line["non_finite"] = odd
        with naming(self._metrics_path):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Append a line to each file."""
        with naming(self._evaluations_path), self._evaluations_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, **record}) + "\n")
        self.step(done, metrics)

    def close(self) -> None:
        """Close the file; an error in writing a line was raised when the line came."""
        # It would come again here for the same bytes, and hide the first.
        with contextlib.suppress(OSError):
            self._metrics.close()
