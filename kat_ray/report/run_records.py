"""What a run left, read once for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kat_ray.analysis.replay import Traces, load_table, traces_from
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.records.json_records import EVALUATION, METRICS, SUMMARY, read_json, read_json_lines
from kat_ray.types.records import FloatArray


@dataclass(frozen=True)
class RunRecords:
    """A run directory's content. `steps` and `evaluations` are lines of metrics.jsonl and evaluations.jsonl."""

    path: Path
    config: Config
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None  # None of a run that has not ended
    table: pa.Table
    traces: Traces
    notes: tuple[str, ...]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it has one."""
        rows = [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]

    def feature(self, name: str) -> FloatArray | None:
        """A recorded feature of every scored token, flat as `traces.d`; None if the run did not record it."""
        column = self.table.column(name)
        if column.null_count:
            return None
        values = np.asarray(column.combine_chunks().flatten())
        return values if len(values) == len(self.traces.d) else None

    def per_rollout(self, name: str) -> list[Any]:
        """A column of the traces, one value a rollout."""
        values: list[Any] = self.table.column(name).to_pylist()
        return values


def read_run(path: Path) -> RunRecords:
    """Read a run; damaged records are read up to the damage and named in `notes`."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: no config.yaml in it; name a run directory, such as runs/latest")
    config = load_config(path / "config.yaml")
    table, notes = load_table(path)
    lines, more = read_json_lines(path / "metrics.jsonl", METRICS)
    evaluations, still_more = read_json_lines(path / "evaluations.jsonl", EVALUATION)
    summary = path / "summary.json"
    return RunRecords(
        path=path,
        config=config,
        steps=lines,
        evaluations=evaluations,
        summary=read_json(summary, SUMMARY) if summary.is_file() else None,
        table=table,
        traces=traces_from(table),
        notes=(*notes, *more, *still_more),
    )
