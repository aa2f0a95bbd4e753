"""Apply a rule again to the recorded KL traces of a run: no model, millions of tokens a second.

What a cut rollout would have gone on to is not in its trace. A replay therefore takes rollouts that were seen
to their end: the probes of a run with a rule and all rollouts from before it was active; all of a run without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from kat_ray.config import Config
from kat_ray.config.load import refuse_flags, section_error
from kat_ray.data.prompt_order import is_probe
from kat_ray.errors import UserError
from kat_ray.records.traces import read_rows
from kat_ray.termination import RULES, RunFacts, make_rule
from kat_ray.termination.base import Finished
from kat_ray.termination.calibration import MinimaBuffer
from kat_ray.termination.kat import KatRule, tells_all
from kat_ray.termination.settings import KatParameters, RuleSettings, with_threshold_of
from kat_ray.termination.staircase import Staircase, staircase
from kat_ray.types.records import DEFAULT_TEACHER, FloatArray, IntArray

Settings = TypeVar("Settings", bound=BaseModel)
_BLOCK_VALUES = 1 << 20  # padded values that are worked on at once


@dataclass(frozen=True)
class Traces:
    """Recorded rollouts, R of them, in the order of steps and ids; d is flat."""

    d: FloatArray  # [N] float64, nats
    offsets: IntArray  # [R + 1] int64
    rollout_id: IntArray  # [R]
    step: IntArray  # [R]
    threshold: FloatArray  # [R] nats, NaN while the rule was inactive
    probe: IntArray  # [R] bool
    trapped: IntArray  # [R] bool
    full: IntArray  # [R] bool, it ran into its token limit
    cut: IntArray  # [R] first token not kept; -1 if not cut
    would_cut: IntArray  # [R] of a probe; -1 if not
    correct: IntArray  # [R] 1 right, 0 wrong, -1 not graded
    # Token ids and features of every scored token [N], by name, where a rule needs them and the run has them.
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    teacher: np.ndarray | None = None  # [R] names of who scored them; None of a run without teachers by name

    @property
    def lengths(self) -> IntArray:
        """Scored tokens of each rollout."""
        return np.diff(self.offsets)

    def take(self, rows: IntArray) -> Traces:
        """The rollouts with these indices."""
        where = _flat(self.offsets[rows], self.lengths[rows])
        flat = ("d", "offsets", "columns", "teacher")
        return Traces(
            teacher=None if self.teacher is None else self.teacher[rows],
            d=self.d[where],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            columns={name: values[where] for name, values in self.columns.items()},
            **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in flat},
        )

    def by_teacher(self) -> list[tuple[str, IntArray]]:
        """The names of teachers, and the indices of the rollouts of each: what one calibration is made of."""
        if self.teacher is None:
            return [("", np.arange(len(self.step)))]
        return [(str(name), np.flatnonzero(self.teacher == name)) for name in np.unique(self.teacher)]


@dataclass(frozen=True)
class Replayed:
    """What a rule does to each rollout; arrays [R]."""

    cut: IntArray  # first token not kept; -1 if not cut
    confirmed: IntArray  # tokens seen at the decision; -1
    recovered: IntArray  # token that lifted the window mean to the threshold again after the cut; -1
    minimum: FloatArray  # smallest window mean of the whole trace, nats; NaN without a window

    @classmethod
    def joined(cls, parts: Sequence[tuple[IntArray, Replayed]]) -> Replayed:
        """Of all rollouts, from parts and their indices, each rollout in one of them."""
        count = sum(len(rows) for rows, _ in parts)
        columns = {f.name: np.full(count, math.nan if f.name == "minimum" else -1) for f in fields(cls)}
        for rows, part in parts:
            for name, values in columns.items():
                values[rows] = getattr(part, name)
        return cls(**columns)


def load_traces(run_dir: Path, columns: Sequence[str] = ()) -> tuple[Traces, tuple[str, ...]]:
    """All traces of a run, and a note for every damaged file: it is read up to the damage."""
    table, notes = load_table(run_dir)
    return traces_from(table, columns), notes


def load_table(run_dir: Path) -> tuple[pa.Table, tuple[str, ...]]:
    """The trace files of a run as one table in the order of steps and ids, and a note for every damaged file."""
    files = sorted((run_dir / "traces").glob("*.parquet"))
    if not files:
        raise UserError(f"{run_dir}: no traces in it (traces/*.parquet); name a run directory, such as runs/latest")
    tables, notes = [], []
    for file in files:
        try:
            table, note = read_rows(file)
            tables.append(table)
        except (pa.ArrowException, OSError) as error:
            note = f"{file} is damaged and was left out: {str(error).splitlines()[0]}"
        if note:
            notes.append(note)
    if not tables:
        raise UserError(f"{run_dir}: none of its {len(files)} trace files can be read; {notes[0]}")
    return pa.concat_tables(tables).sort_by([("step", "ascending"), ("rollout_id", "ascending")]), tuple(notes)


def traces_from(table: pa.Table, columns: Sequence[str] = ()) -> Traces:
    """What a replay needs of a table of traces; of `columns` those that the run recorded for every rollout."""
    lists = table.column("d").combine_chunks()
    lengths = np.asarray(lists.value_lengths().fill_null(0))

    def ints(name: str) -> IntArray:
        return np.asarray(table.column(name).cast(pa.int32()).fill_null(-1).to_numpy(), dtype=np.int32)

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stop = np.asarray(table.column("stop_reason").to_numpy(zero_copy_only=False))
    return Traces(
        d=np.asarray(lists.flatten(), dtype=np.float64),
        offsets=offsets,
        rollout_id=np.asarray(table.column("rollout_id").to_numpy(), dtype=np.int64),
        step=ints("step"),
        threshold=np.asarray(table.column("threshold").fill_null(math.nan).to_numpy(), dtype=np.float64),
        probe=ints("probe") == 1,
        trapped=stop == "trapped",
        full=stop == "max_tokens",
        cut=ints("cut"),
        would_cut=ints("would_cut"),
        correct=ints("correct"),
        columns={name: values for name in columns if (values := _column(table, name, lengths)) is not None},
        teacher=_teachers(table),
    )


def _teachers(table: pa.Table) -> np.ndarray | None:
    names = table.column("teacher")
    return None if names.null_count == len(names) else np.array(names.fill_null(DEFAULT_TEACHER).to_pylist())


def _column(table: pa.Table, name: str, lengths: IntArray) -> np.ndarray | None:
    """A recorded value of every scored token, flat; tokens that were not scored are left out."""
    lists = table.column(name).combine_chunks()
    if lists.null_count:
        return None
    counts = np.asarray(lists.value_lengths())
    if (counts < lengths).any():
        return None
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return np.asarray(lists.flatten())[_flat(starts, lengths)]


def uncensored(traces: Traces, config: Config) -> Traces:
    """The rollouts that were seen to their end."""
    return traces.take(uncensored_rows(traces, config))


def uncensored_rows(traces: Traces, config: Config) -> IntArray:
    """Indices of the rollouts that the run's rule neither cut nor could have cut or bounded in length."""
    rule = config.termination
    if not traces.trapped.any() and not _bounds_lengths(config):
        return np.arange(len(traces.step))
    free = (traces.probe == 1) & ~traces.trapped
    if RULES[rule.rule].calibrates:
        free |= np.isnan(traces.threshold)  # not active yet
    if not (traces.probe == 1).any():
        raise UserError(
            "this run cut rollouts and kept no probes: nothing in it shows what a cut would have removed"
        )
    return np.flatnonzero(free)


def _bounds_lengths(config: Config) -> bool:
    facts = RunFacts(config.run.seed, config.rollout.max_tokens)
    return make_rule(config.termination, facts).budget is not None


Blocks = Sequence[tuple[IntArray, FloatArray]]


def apply_rule(
    traces: Traces, rule: KatParameters, thresholds: FloatArray, blocks: Blocks | None = None
) -> Replayed:
    """The KAT rule on every rollout under its threshold [R] (NaN: inactive), to the bit as it acts online.

    `blocks` are the rule's windows where they are at hand (`blocks_of`).
    """
    count = len(traces.lengths)
    cut, confirmed, recovered = (np.full(count, -1) for _ in range(3))
    result = Replayed(cut, confirmed, recovered, np.full(count, math.nan))
    for rows, z in blocks if blocks is not None else blocks_of(traces, rule.window):
        if z.shape[1]:
            with np.errstate(invalid="ignore"):
                smallest = np.fmin.reduce(z[:, :: rule.stride], axis=1)
            result.minimum[rows] = smallest
            first = _first_streak(z, thresholds[rows], rule)
            hit = first >= 0
            result.cut[rows[hit]] = first[hit]
            span = (rule.consecutive - 1) * rule.stride
            result.confirmed[rows[hit]] = first[hit] + span + rule.window
            back = _first_high(
                z[hit], thresholds[rows[hit]], rule, first[hit] + span + 1, traces.lengths[rows[hit]]
            )
            result.recovered[rows[hit]] = np.where(back >= 0, back + rule.window - 1, -1)
    return result


def blocks_of(traces: Traces, width: int) -> Blocks:
    """All rollouts in blocks of similar length: their indices, and z(width + j) of every row and j."""
    return [(rows, _windows(traces, rows, width)) for rows in _blocks(traces.lengths)]


def _blocks(lengths: IntArray) -> Iterator[IntArray]:
    """Rows of similar length together, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * max(1, lengths[order[end]]) <= _BLOCK_VALUES:
            end += 1
        yield order[start:end]
        start = end


def _windows(traces: Traces, rows: IntArray, width: int) -> FloatArray:
    """z(width + j) of every row and j, NaN where it is undefined; sums strictly in order, as online."""
    lengths = traces.lengths[rows]
    columns = np.arange(int(lengths.max(initial=0)))
    inside = columns < lengths[:, None]
    values = np.zeros(inside.shape)
    values[inside] = traces.d[_flat(traces.offsets[rows], lengths)]
    bad = ~np.isfinite(values)
    prefix = np.zeros((len(rows), inside.shape[1] + 1))
    np.cumsum(np.where(bad, 0.0, values), axis=1, out=prefix[:, 1:])
    z = (prefix[:, width:] - prefix[:, :-width]) / width if inside.shape[1] >= width else np.zeros((len(rows), 0))
    if bad.any():
        bads = np.zeros_like(prefix)
        np.cumsum(bad, axis=1, out=bads[:, 1:])
        z[bads[:, width:] > bads[:, :-width]] = math.nan
    z[np.arange(z.shape[1]) + width > lengths[:, None]] = math.nan
    return z


def windows_of(traces: Traces, width: int) -> list[FloatArray]:
    """For every rollout z of the window that ends with token width - 1, width, ...; nats, NaN where undefined."""
    found: list[FloatArray] = [np.zeros(0)] * len(traces.lengths)
    for rows in _blocks(traces.lengths):
        z = _windows(traces, rows, width)
        for i, row in enumerate(rows):
            found[row] = z[i, : max(0, traces.lengths[row] - width + 1)]
    return found


def _flat(starts: IntArray, lengths: IntArray) -> IntArray:
    """Indices of all values of rows that start at `starts`, row after row."""
    total = int(lengths.sum())
    shifts = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(total) + shifts


def _first_streak(z: FloatArray, thresholds: FloatArray, rule: KatParameters) -> IntArray:
    """Start token of the first streak of low windows in each row; -1 if there is none."""
    skip = -(-rule.exempt // rule.stride)
    tested = z[:, :: rule.stride][:, skip:]
    width = tested.shape[1] - rule.consecutive + 1
    if width < 1:
        return np.full(len(z), -1)
    with np.errstate(invalid="ignore"):
        low = tested < thresholds[:, None]
    streak = low[:, :width].copy()
    for shift in range(1, rule.consecutive):
        streak &= low[:, shift : shift + width]
    first = streak.argmax(axis=1)
    return np.where(streak.any(axis=1), (first + skip) * rule.stride, -1)


def _first_high(
    z: FloatArray, thresholds: FloatArray, rule: KatParameters, after: IntArray, lengths: IntArray
) -> IntArray:
    """Start token of the first checked window from `after` on that is not low; -1 if there is none."""
    starts = np.arange(0, z.shape[1], rule.stride)
    with np.errstate(invalid="ignore"):
        high = ~(z[:, :: rule.stride] < thresholds[:, None])
    high &= (starts >= np.maximum(after[:, None], rule.exempt)) & (starts + rule.window <= lengths[:, None])
    return np.where(high.any(axis=1), starts[high.argmax(axis=1)] if len(starts) else -1, -1)


def calibrate(
    traces: Traces, rule: KatParameters, seed: int = 0, blocks: Blocks | None = None
) -> tuple[FloatArray, Replayed]:
    """Thresholds [R] as the rule would have set them step by step on these uncensored rollouts; and its cuts.

    They are those of one teacher (`Traces.by_teacher`).

    As online, all rollouts feed the buffer until the rule is active, and then those that `calibrate_on` admits:
    probes, with the minimum of their whole trace; those that are not cut; or all, one that is cut with its minimum
    up to the decision. With a budget: probes, with what every cut would remove.
    """
    blocks = blocks if blocks is not None else blocks_of(traces, rule.window)
    if rule.budget is not None:
        thresholds = _budgeted(traces, rule, seed)
        return thresholds, apply_rule(traces, rule, thresholds, blocks)
    whole = apply_rule(traces, rule, np.full(len(traces.step), math.nan), blocks).minimum
    probe = _probes(traces, rule, seed)
    buffer, thresholds = MinimaBuffer(rule.buffer, rule.eta), np.full(len(traces.step), math.nan)
    for step in np.unique(traces.step):
        rows = np.flatnonzero(traces.step == step)
        minima = whole[rows]
        if step >= rule.min_steps and len(buffer) >= rule.min_samples:
            thresholds[rows] = buffer.threshold()
            minima = _admitted(minima, probe[rows], rule, _until_cut(rows, rule, thresholds, blocks))
        for minimum in minima[~np.isnan(minima)].tolist():
            buffer.add(minimum)
    return thresholds, apply_rule(traces, rule, thresholds, blocks)


def _budgeted(traces: Traces, rule: KatParameters, seed: int) -> FloatArray:
    """The thresholds [R] of a rule with a budget, by the rule itself; NaN while inactive."""
    own, kat, thresholds = _probes(traces, rule, seed), KatRule(rule), np.full(len(traces.step), math.nan)
    drawn = not (traces.probe == 1).any()
    for step in np.unique(traces.step):
        rows = np.flatnonzero(traces.step == step)
        kat.start_step(int(step))
        probes = own[rows]
        if kat.threshold is not None:
            thresholds[rows] = kat.threshold
        if drawn and kat.probe_share is not None:
            probes = np.array([is_probe(seed, int(i), kat.probe_share) for i in traces.rollout_id[rows]])
        kat.end_step(
            [
                Finished(None, cut=False, probe=bool(p), evidence=_evidence(traces, row, rule, kat.threshold, p))
                for row, p in zip(rows, probes, strict=True)
            ]
        )
    return thresholds


def _evidence(
    traces: Traces, row: int, rule: KatParameters, threshold: float | None, probe: bool
) -> Staircase | None:
    if not tells_all(rule, threshold, probe):
        return None
    return staircase(traces.d[traces.offsets[row] : traces.offsets[row + 1]], rule)


def _admitted(whole: FloatArray, probe: IntArray, rule: KatParameters, until_cut: FloatArray) -> FloatArray:
    """What a step's rollouts feed while the rule is active, NaN for nothing; `until_cut` is NaN where not cut."""
    cut = ~np.isnan(until_cut) & ~probe
    match rule.calibrate_on:
        case "probes":
            return np.where(probe, whole, math.nan)
        case "finished":
            return np.where(cut, math.nan, whole)
        case "all":
            return np.where(cut, until_cut, whole)


def _until_cut(rows: IntArray, rule: KatParameters, thresholds: FloatArray, blocks: Blocks) -> FloatArray:
    """Of these rollouts the smallest window mean up to the decision, nats; NaN of those that are not cut."""
    found = np.full(len(rows), math.nan)
    span = (rule.consecutive - 1) * rule.stride
    for members, z in blocks:
        inside = np.isin(members, rows)
        if rule.calibrate_on == "probes" or not inside.any() or not z.shape[1]:
            continue
        mine, windows = members[inside], z[inside]
        first = _first_streak(windows, thresholds[mine], rule)
        seen = np.arange(windows.shape[1]) <= (first + span)[:, None]
        smallest = np.fmin.reduce(np.where(seen & (first >= 0)[:, None], windows, math.nan), axis=1)
        found[np.searchsorted(rows, mine)] = smallest
    return found


def _probes(traces: Traces, rule: KatParameters, seed: int) -> IntArray:
    """Which rollouts the rule would have taken for probes, a mask [R].

    Of a run without any, those that a run with this seed would have had. Of a run with probes the run's own, where
    they alone feed the rule; else a share of them, drawn anew, as they stand for all of its rollouts.
    """
    own = traces.probe == 1
    if own.any() and rule.calibrate_on == "probes":
        return own
    drawn = seed + 1 if own.any() else seed
    return np.array([is_probe(drawn, int(i), rule.probe_share) for i in traces.rollout_id], dtype=bool)


def with_changes(base: Settings, changes: Mapping[str, Any], section: str = "termination") -> Settings:
    """`base`, of a section of a configuration, with other values; `UserError` names what is not allowed."""
    taken = with_threshold_of(changes) if isinstance(base, KatParameters) else changes
    try:
        changed_one = type(base).model_validate({**base.model_dump(), **taken})
        refuse_flags(taken, changed_one)
        return changed_one
    except ValidationError as error:
        rule = (base.rule,) if isinstance(base, RuleSettings) else ()
        raise section_error(error, (*section.split("."), *rule), changes) from None
