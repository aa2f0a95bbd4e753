"""The stages of a rollout with a trap: before, agreement, after (arXiv 2606.09471, section 3).

    before     [0, cut)           agreement  [cut, recovered)           after  [recovered, length)

`cut` and `recovered` are the KAT rule's: the start of the first streak of C low windows, and the token that lifts
the window mean to the threshold again. Only rollouts that were seen to their end have all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.analysis.replay import Replayed, Traces, apply_rule, uncensored_rows
from kat_ray.analysis.replay_rules import calibrate_by_teacher
from kat_ray.report.run_records import RunRecords
from kat_ray.termination.settings import KatParameters
from kat_ray.types.records import FloatArray, IntArray

PHASES = ("before", "agreement", "after")
NO_TRAP = "no trap"


@dataclass(frozen=True)
class Phases:
    """The rollouts that were seen to their end, and the stages of their tokens."""

    rows: IntArray  # [R] their indices among the run's traces
    traces: Traces  # of these rollouts
    replayed: Replayed  # what the rule says of them
    thresholds: FloatArray  # [R] nats, NaN where the rule was inactive
    active: IntArray  # [R] bool, the rule had a threshold
    stage: IntArray  # [N] int8: index into PHASES; -1 no trap; -2 the rule was inactive
    tokens: IntArray  # [N] int64, where each value stands among the run's values

    @property
    def trapped(self) -> IntArray:
        """[R] bool: rollouts in which the rule sees a trap."""
        return self.active & (self.replayed.cut >= 0)


@dataclass(frozen=True)
class Lens:
    """The KAT settings through which a report looks at a run, on all of its rollouts as far as they were scored."""

    rule: KatParameters
    own: bool  # the run's own, with the thresholds that it had; else applied afterwards
    thresholds: FloatArray  # [R] nats, NaN where the settings were inactive
    cut: IntArray  # [R] first token that they would remove; -1 if none


@dataclass(frozen=True)
class PhaseRow:
    """Means over the tokens of a stage; None where a feature was not recorded."""

    name: str
    tokens: int
    share: float  # of all tokens of rollouts for which the rule was active
    kl: float  # nats
    features: dict[str, float | None]


def phases_of(records: RunRecords, rule: KatParameters, own: bool) -> Phases:
    """Divide a run's uncensored rollouts into stages under `rule`; `own`: with the thresholds the run had."""
    rows = uncensored_rows(records.traces, records.config)
    traces = records.traces.take(rows)
    if own:
        thresholds, replayed = traces.threshold, apply_rule(traces, rule, traces.threshold)
    else:
        thresholds, replayed = calibrate_by_teacher(traces, rule, records.config.run.seed)
    active = ~np.isnan(thresholds)
    stage = np.full(len(traces.d), -2, dtype=np.int8)
    for i, (start, end) in enumerate(zip(traces.offsets[:-1], traces.offsets[1:], strict=True)):
        if not active[i]:
            continue
        cut, back = int(replayed.cut[i]), int(replayed.recovered[i])
        if cut < 0:
            stage[start:end] = -1
        else:
            stage[start : start + cut] = 0
            stage[start + cut : end] = 1
            if back >= 0:
                stage[start + back : end] = 2
    spans = [np.arange(records.traces.offsets[r], records.traces.offsets[r + 1]) for r in rows]
    tokens = np.concatenate([*spans, np.zeros(0, np.int64)]).astype(np.int64)
    return Phases(rows, traces, replayed, thresholds, active, stage, tokens)


def lens_of(records: RunRecords, rule: KatParameters, own: bool, phases: Phases | None) -> Lens:
    """What `rule` says of every rollout; without `phases` settings that are not the run's own have no threshold."""
    traces = records.traces
    if own:
        thresholds = traces.threshold
    else:
        thresholds = np.full(len(traces.step), np.nan)
        if phases is not None and len(phases.rows):
            seen = dict(phases.traces.by_teacher())
            for name, own_rows in traces.by_teacher():
                if name in seen:
                    thresholds[own_rows] = _by_step(traces.step[own_rows], rule, phases, seen[name])
    return Lens(rule, own, thresholds, apply_rule(traces, rule, thresholds).cut)


def _by_step(steps: IntArray, rule: KatParameters, phases: Phases, seen: IntArray) -> FloatArray:
    """The thresholds that the rollouts `seen` of one teacher had, for rollouts of these steps."""
    found = np.full(len(steps), np.nan)
    # A step without a rollout that feeds the calibration has the threshold of the next one that has some.
    known_steps, first = np.unique(phases.traces.step[seen], return_index=True)
    at = np.searchsorted(known_steps, steps)
    known = (at < len(known_steps)) & (steps >= rule.min_steps)
    found[known] = phases.thresholds[seen][first[at[known]]]
    return found


def phase_table(records: RunRecords, phases: Phases) -> list[PhaseRow]:
    """Means of KL and the recorded features over each stage, and over rollouts without a trap."""
    columns = {name: records.feature(name) for name in ("overlap", "teacher_max", "student_tail")}
    teacher, student = records.feature("teacher_entropy"), records.feature("student_entropy")
    gap = None if teacher is None or student is None else np.abs(teacher.astype(np.float32) - student)
    columns["entropy_gap"] = gap
    total = int((phases.stage >= -1).sum())
    rows = []
    for code, name in ((-1, NO_TRAP), *enumerate(PHASES)):
        inside = phases.stage == code
        if not inside.any():
            continue
        where = phases.tokens[inside]
        means = {key: None if column is None else _mean(column[where]) for key, column in columns.items()}
        kl = _mean(phases.traces.d[inside])
        rows.append(
            PhaseRow(name, int(inside.sum()), inside.sum() / total, float("nan") if kl is None else kl, means)
        )
    return rows


def phase_means(phases: Phases) -> dict[str, FloatArray]:
    """For each stage the mean KL of every rollout that has it, nats."""
    means: dict[str, list[float]] = {name: [] for name in (NO_TRAP, *PHASES)}
    for i in np.flatnonzero(phases.active):
        span = slice(int(phases.traces.offsets[i]), int(phases.traces.offsets[i + 1]))
        for code, name in ((-1, NO_TRAP), *enumerate(PHASES)):
            values = phases.traces.d[span][phases.stage[span] == code]
            mean = _mean(values) if len(values) else None
            if mean is not None:
                means[name].append(mean)
    return {name: np.array(values) for name, values in means.items()}


def teacher_tokens(records: RunRecords, phases: Phases, most: int) -> dict[str, Sequence[tuple[int, float]]]:
    """For each stage the teacher's most frequent top tokens, (id, share), the commonest first."""
    top = records.feature("teacher_top")
    if top is None:
        return {}
    found: dict[str, Sequence[tuple[int, float]]] = {}
    for code, name in enumerate(PHASES):
        ids = top[phases.tokens[phases.stage == code]]
        ids = ids[ids >= 0].astype(np.int64)
        if len(ids):
            counts = np.bincount(ids)
            best = np.argsort(-counts, kind="stable")[:most]
            found[name] = [(int(i), float(counts[i] / len(ids))) for i in best if counts[i]]
    return found


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(finite.mean()) if finite.size else None
