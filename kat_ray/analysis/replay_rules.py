"""Any termination rule on recorded rollouts: its own code, in the order in which the monitor calls it.

The KAT rule has a faster way (`kat_ray.analysis.replay.apply_rule`), which gives the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kat_ray.analysis.replay import (
    Blocks,
    Replayed,
    Traces,
    apply_rule,
    blocks_of,
    calibrate,
    with_changes,
)
from kat_ray.analysis.tradeoff import Tradeoff, weigh
from kat_ray.termination import (
    RULES,
    Effect,
    Finished,
    NewTokens,
    RolloutStart,
    RolloutTracker,
    RunFacts,
    kat_parameters,
    make_rule,
)
from kat_ray.termination.settings import KatParameters, RuleSettings
from kat_ray.types.records import FloatArray, IntArray

COLUMNS = tuple(name for name in NewTokens._fields if name != "d")


def rules_of(base: RuleSettings, grid: Mapping[str, Sequence[Any]]) -> list[RuleSettings]:
    """Every combination of the grid's values on top of `base`; `UserError` where one is not allowed."""
    names = sorted(grid, key=lambda name: name != "window")  # windows are the work: one after the other
    return [
        with_changes(base, dict(zip(names, values, strict=True)))
        for values in itertools.product(*(grid[name] for name in names))
    ]


def sweep(traces: Traces, base: RuleSettings, grid: Mapping[str, Sequence[Any]], facts: RunFacts) -> list[Tradeoff]:
    """Every combination of the grid's values on top of `base`, each on rollouts that were seen to their end."""
    results = []
    width, windows = 0, None
    for rule in rules_of(base, grid):
        kat = kat_parameters(rule)
        if kat is not None:
            if windows is None or kat.window != width:
                width, windows = kat.window, _windows_by_teacher(traces, kat.window)
            thresholds, replayed = _calibrated(len(traces.step), kat, facts.seed, windows)
            results.append(weigh(traces, rule, ~np.isnan(thresholds), replayed))
        else:
            replayed = follow(traces, rule, facts)
            results.append(weigh(traces, rule, np.ones(len(traces.step), dtype=bool), replayed))
    return results


_Windows = list[tuple[IntArray, Traces, Blocks]]  # of each teacher: indices, rollouts, their windows


def _windows_by_teacher(traces: Traces, width: int) -> _Windows:
    parts = [(rows, _part(traces, rows)) for _, rows in traces.by_teacher()]
    return [(rows, own, blocks_of(own, width)) for rows, own in parts]


def _part(traces: Traces, rows: IntArray) -> Traces:
    return traces if len(rows) == len(traces.step) else traces.take(rows)


def calibrate_by_teacher(traces: Traces, rule: KatParameters, seed: int) -> tuple[FloatArray, Replayed]:
    """`calibrate`, for the rollouts of each teacher alone."""
    return _calibrated(len(traces.step), rule, seed, _windows_by_teacher(traces, rule.window))


def _calibrated(count: int, rule: KatParameters, seed: int, windows: _Windows) -> tuple[FloatArray, Replayed]:
    """`calibrate` of each teacher's rollouts, put together."""
    thresholds, parts = np.full(count, math.nan), []
    for rows, own, blocks in windows:
        thresholds[rows], replayed = calibrate(own, rule, seed, blocks)
        parts.append((rows, replayed))
    return thresholds, Replayed.joined(parts)


def follow(traces: Traces, settings: RuleSettings, facts: RunFacts) -> Replayed:
    """What a rule does to rollouts that were seen to their end; a length budget ends a rollout as a cut does."""
    return _run_by_teacher(traces, settings, facts, as_recorded=False)


def reproduce(traces: Traces, settings: RuleSettings, facts: RunFacts) -> Replayed:
    """A run's own rule on all of the run's own rollouts, as far as each was scored: gives the run's cuts again.

    KAT is taken with the thresholds of the run; of other rules what rollouts share is built up again, by teacher.
    Of a rule that cuts none (`kat_stages`), only what it says of probes is recorded.
    """
    kat = kat_parameters(settings)
    if kat is not None:
        replayed = apply_rule(traces, kat, traces.threshold)
        if RULES[settings.rule].effect is not Effect.CUTS:
            replayed.cut[traces.probe != 1] = -1
        return replayed
    return _run_by_teacher(traces, settings, facts, as_recorded=True)


def _run_by_teacher(traces: Traces, settings: RuleSettings, facts: RunFacts, as_recorded: bool) -> Replayed:
    parts = [(rows, _part(traces, rows)) for _, rows in traces.by_teacher()]
    return Replayed.joined([(rows, _run(own, settings, facts, as_recorded)) for rows, own in parts])


def _run(traces: Traces, settings: RuleSettings, facts: RunFacts, as_recorded: bool) -> Replayed:
    rule = make_rule(settings, facts)
    count = len(traces.step)
    cut, confirmed, recovered = (np.full(count, -1) for _ in range(3))
    replayed = Replayed(cut, confirmed, recovered, np.full(count, math.nan))
    for step in np.unique(traces.step):
        rule.start_step(int(step))
        budget, finished = rule.budget, []
        for row in np.flatnonzero(traces.step == step):
            probe = bool(traces.probe[row])
            # A probe is followed to its end: that is what is asked of every rollout unless it is as recorded.
            tracker = rule.begin(RolloutStart(int(traces.rollout_id[row]), probe or not as_recorded))
            tracker.observe(_tokens(traces, int(row)))
            bound = None if as_recorded else budget
            full = bool(traces.full[row]) if bound is None else bool(traces.lengths[row] >= bound)
            is_cut = _note(replayed, int(row), tracker, bound, int(traces.lengths[row]))
            full = full and not is_cut
            finished.append(
                Finished(
                    tracker.minimum,
                    cut=is_cut and not probe,
                    probe=probe and as_recorded,
                    length=int(traces.lengths[row]),
                    full=full,
                )
            )
        rule.end_step(finished)
    return replayed


def _note(replayed: Replayed, row: int, tracker: RolloutTracker, bound: int | None, length: int) -> bool:
    """Enter where a rollout ended; whether the rule cut it. A budget that was reached first is an end too."""
    replayed.minimum[row] = math.nan if tracker.minimum is None else tracker.minimum
    cut = tracker.cut
    if bound is not None and bound < length and (cut is None or cut.confirmed > bound):
        replayed.cut[row] = replayed.confirmed[row] = bound
        return False
    if cut is not None:
        replayed.cut[row], replayed.confirmed[row] = cut.at, cut.confirmed
    return cut is not None


def _tokens(traces: Traces, row: int) -> NewTokens:
    part = slice(int(traces.offsets[row]), int(traces.offsets[row + 1]))
    return NewTokens(traces.d[part], **{name: values[part] for name, values in traces.columns.items()})
