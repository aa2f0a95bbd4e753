"""Traces: one row per rollout that ended, in Parquet, enough to apply any rule to it again.

A Parquet file keeps its directory at its end: cut off in the middle, it cannot be opened at all. A copy of that
directory lies in `traces/_footers/`, and with it `read_rows` reads what stands before the damage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kat_ray.types.records import FloatArray, IntArray, StopReason

# Of every scored token; half precision: three digits are enough to look at.
FEATURES = ("overlap", "teacher_max", "teacher_entropy", "student_entropy", "student_tail")
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
        ("weights", pa.list_(pa.float16())),
        ("teacher_top", pa.list_(pa.int32())),
        *((name, pa.list_(pa.float16())) for name in FEATURES),
        ("reward", pa.float64()),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("reward_error", pa.string()),
        ("reward_weight", pa.float64()),
        ("advantage", pa.float64()),
        ("policy_tokens", pa.int32()),
        ("policy_weight", pa.float64()),
        ("probe_share", pa.float64()),
        ("sampled_logprobs", pa.list_(pa.float32())),
        ("learner_logprobs", pa.list_(pa.float32())),
        ("teacher", pa.string()),
    ]
)
_GROUPS = 8  # row groups of a file: what a damaged one can be read in
_FOOTERS = "_footers"


@dataclass(frozen=True)
class TokenFeatures:
    """What a scorer says of every scored token of a rollout, beside d; see `ScoredChunk`."""

    teacher_top: IntArray
    overlap: FloatArray
    teacher_max: FloatArray
    teacher_entropy: FloatArray
    student_entropy: FloatArray
    student_tail: FloatArray


@dataclass(frozen=True)
class PolicyTrace:
    """What a rollout was in a run that learns from rewards; `kat_ray.algorithms` makes it of the other columns.

    `reward` is None where it was not graded, and `reward_error` why, where grading was tried; `rewards` are its
    parts by the name of what gave them. `reward_weight` is what it counts in the group of its step and prompt: 1,
    0, or 1 / `probe_share`, the chance with which a rollout of its step was a probe. `advantage` is None where it
    counts nothing. The policy's loss has its first `policy_tokens` tokens, each with `policy_weight`, in which the
    loss's denominator is. `sampled_logprobs` are log p at generation time, of all generated tokens;
    `learner_logprobs` the learner's before its step, of the first ones, those that it was given; None where they
    are not recorded, or it was given none.
    """

    reward: float | None
    rewards: Mapping[str, float | None]
    reward_error: str | None
    reward_weight: float
    advantage: float | None
    policy_tokens: int
    policy_weight: float
    probe_share: float
    sampled_logprobs: FloatArray
    learner_logprobs: FloatArray | None = None


_POLICY = tuple(f.name for f in fields(PolicyTrace))


@dataclass(frozen=True)
class TraceRow:
    """One rollout. `token_ids` are all generated tokens, `d` the reverse KL of every scored one, nats.

    `cut` is the first token not kept, `confirmed` the number of tokens seen when the rule decided; `threshold`
    is None while the rule is inactive; `minimum` is m(y); `would_cut` is what the rule says of a probe;
    `correct` is the verdict on a rollout that no rule touched (None if it was not graded); `weights` are those of
    the tokens in the KL's loss (None where all are 1), but for the weight of the teacher; `features` are None where
    they are not recorded, `policy` where the run does not learn from rewards, `teacher`, the name of who scored it,
    where the configuration has no teachers by name.
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
    weights: FloatArray | None = None
    features: TokenFeatures | None = None
    policy: PolicyTrace | None = None
    teacher: str | None = None

    def column(self, name: str) -> object:
        """The value of a column of SCHEMA."""
        if name == "stop_reason":
            return self.stop_reason.value
        if name in _POLICY:
            value = None if self.policy is None else getattr(self.policy, name)
            return list(value.items()) if name == "rewards" and value is not None else value
        if name in FEATURES or name == "teacher_top":
            value = None if self.features is None else getattr(self.features, name)
        else:
            value = getattr(self, name)
        is_half = name in FEATURES or name == "weights"
        return value.astype(np.float16) if is_half and value is not None else value


def write_traces(folder: Path, step: int, rows: Sequence[TraceRow]) -> Path:
    """Write the rollouts of one step; the file appears under its name only when it is complete."""
    columns = {name: [row.column(name) for row in rows] for name in SCHEMA.names}
    path = folder / f"step-{step:06d}.parquet"
    partial = path.with_suffix(".partial")
    size = max(16, -(-len(rows) // _GROUPS))
    pq.write_table(pa.table(columns, schema=SCHEMA), partial, compression="zstd", row_group_size=size)
    footer = folder / _FOOTERS / path.name
    footer.parent.mkdir(exist_ok=True)
    pq.read_metadata(partial).write_metadata_file(footer)
    os.replace(partial, path)
    return path


def read_rows(file: Path) -> tuple[pa.Table, str | None]:
    """The rows of one file, and what is wrong with it; of a damaged file those before the damage.

    pa.ArrowException or OSError if nothing can be read. Columns that an older version did not write are null.
    """
    note = None
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        table, rows = _before_the_damage(file, error)
        note = f"{file} is damaged or cut off: read {len(table)} of its {rows} rollouts, those before the damage"
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    for name in missing:
        table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    table = table.select(SCHEMA.names).cast(SCHEMA)
    table.validate(full=True)
    if contradiction := _contradiction(table):
        raise pa.ArrowInvalid(f"these are no traces: {contradiction}")
    return table, note


def _contradiction(table: pa.Table) -> str | None:
    """What no run can have written; whoever reads traces relies on it."""
    for name in ("rollout_id", "step", "policy_version", "token_ids", "d", "stop_reason", "probe"):
        if table.column(name).null_count:
            return f"{name} is missing"
    for field in SCHEMA:
        if pa.types.is_list(field.type) and pc.list_flatten(table.column(field.name)).null_count:
            return f"{field.name} has gaps"
    for name in ("rollout_id", "step"):
        if (pc.min(table.column(name)).as_py() or 0) < 0:
            return f"{name} is negative"
    if (pc.min(pc.list_flatten(table.column("token_ids"))).as_py() or 0) < 0:
        return "token_ids are negative"
    if unknown := {*pc.unique(table.column("stop_reason")).to_pylist()} - {r.value for r in StopReason}:
        return f"stop_reason {min(unknown)!r} is unknown"
    tokens = pc.list_value_length(table.column("token_ids"))
    if _any(pc.greater(pc.list_value_length(table.column("d")), tokens)):
        return "more tokens were scored than generated"
    for name in ("sampled_logprobs", "learner_logprobs"):
        if _any(pc.greater(pc.list_value_length(table.column(name)), tokens)):
            return f"{name} are of more tokens than were generated"
    for name in ("cut", "would_cut", "confirmed", "policy_tokens"):
        place = table.column(name)
        if _any(pc.less(place, 0)) or _any(pc.greater(place, tokens)):
            return f"{name} lies outside of the rollout"
    if _any(pc.greater(table.column("cut"), table.column("confirmed"))):
        return "cut lies after confirmed"
    share = table.column("probe_share")
    if _any(pc.invert(pc.and_(pc.greater_equal(share, 0.0), pc.less_equal(share, 1.0)))):
        return "probe_share is no share"
    return None


def _any(flags: Any) -> bool:
    return bool(pc.any(flags).as_py())


def _before_the_damage(file: Path, error: Exception) -> tuple[pa.Table, int]:
    """Whole row groups from the start of a file whose end is lost; raises `error` if there are none."""
    try:
        metadata = pq.read_metadata(file.parent / _FOOTERS / file.name)
        damaged = pq.ParquetFile(file, metadata=metadata)
    except (pa.ArrowException, OSError):
        raise error from None
    groups: list[pa.Table] = []
    for number in range(metadata.num_row_groups):
        try:
            groups.append(damaged.read_row_group(number))
        except (pa.ArrowException, OSError):
            break
    if not groups:
        raise error
    return pa.concat_tables(groups), metadata.num_rows


def read_traces(run_dir: Path) -> pa.Table:
    """All traces of a run in the order of steps; an empty table if there are none."""
    files = sorted((run_dir / "traces").glob("*.parquet"))
    return pa.concat_tables([read_rows(f)[0] for f in files] or [SCHEMA.empty_table()])
