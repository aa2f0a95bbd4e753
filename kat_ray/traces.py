"""Traces: one row per rollout that ended, in Parquet, enough to apply any rule to it again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kat_ray.types import FloatArray, IntArray, StopReason

SCHEMA = pa.schema(
    [
        ("rollout_id", pa.int64()),
        ("prompt_id", pa.string()),
        ("step", pa.int32()),
        ("policy_version", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("d", pa.list_(pa.float32())),
        ("stop_reason", pa.string()),
        ("cut", pa.int32()),
        ("confirmed", pa.int32()),
        ("threshold", pa.float64()),
        ("probe", pa.bool_()),
        ("minimum", pa.float64()),
        ("would_cut", pa.int32()),
        ("correct", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class TraceRow:
    """One rollout. `token_ids` are all generated tokens, `d` the reverse KL of every scored one, nats.

    `cut` is the first token not kept, `confirmed` the number of tokens seen when the rule decided; `threshold`
    is None while the rule is inactive; `minimum` is m(y); `would_cut` is what the rule says of a probe;
    `correct` is the verdict on a rollout that no rule touched (None if it was not graded).
    """

    rollout_id: int
    prompt_id: str
    step: int
    policy_version: int
    token_ids: IntArray
    d: FloatArray
    stop_reason: StopReason
    cut: int | None
    confirmed: int | None
    threshold: float | None
    probe: bool
    minimum: float | None
    would_cut: int | None
    correct: bool | None


def write_traces(folder: Path, step: int, rows: Sequence[TraceRow]) -> Path:
    """Write the rollouts of one step; the file appears under its name only when it is complete."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["stop_reason"] = [row.stop_reason.value for row in rows]
    path = folder / f"step-{step:06d}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table(columns, schema=SCHEMA), partial, compression="zstd")
    os.replace(partial, path)
    return path


def read_traces(run_dir: Path) -> pa.Table:
    """All traces of a run in the order of steps; an empty table if there are none."""
    files = sorted((run_dir / "traces").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f, schema=SCHEMA) for f in files] or [SCHEMA.empty_table()])
