"""Rollouts are cut at lengths drawn so that they become as long as KAT's, regardless of KL: the control that KAT's
paper (arXiv 2606.09471) lacks. It tells "cutting the trap" from "cutting shorter".

KAT cuts mostly rollouts that would have become long, so its cut lengths cannot simply be dealt out: a long rollout
would draw "not cut" as often as a short one, and rollouts would become a third longer than KAT's. With F the
lengths that KAT kept, and G those of rollouts that nothing cut (the recorded run's probes), a rollout of length
L ~ G that is cut at D keeps min(L, D), so that

    P(D > t) = P(F > t) / P(G > t)        [t in tokens]

gives P(min(L, D) > t) = P(F > t) whatever a rollout's KL is. The ratio is made to fall in t; F and G are taken from
the steps within POOL of the rollout's own in which the recorded rule was active.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from kat_ray.errors import UserError
from kat_ray.records.traces import read_rows
from kat_ray.termination.base import RolloutStart, RuleType, RunFacts
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import LengthRule
from kat_ray.types.records import FloatArray, IntArray

POOL = 5  # steps: a step's probes alone are too few to say how long rollouts get
_MATCHED = 12  # tells this draw from the others that are seeded with (run seed, rollout id)


class LengthMatchedSettings(CuttingSettings):
    """Rollouts are cut at random so that they become as long as those of a recorded run, regardless of KL."""

    rule: Literal["length_matched"] = "length_matched"
    run: str = Field(min_length=1)
    """Directory of the recorded run, such as runs/kat. It needs probes, which tell how long its rollouts were."""


class StepLengths(NamedTuple):
    """Lengths of a recorded step, tokens: kept ones of rollouts that the rule could cut, and those of probes."""

    kept: IntArray
    uncut: IntArray


def recorded_lengths(run: str) -> dict[int, StepLengths | None]:
    """The lengths of each step of a run; None of a step in which its rule was not active yet."""
    files = sorted((Path(run) / "traces").glob("*.parquet"))
    if not files:
        raise UserError(f"termination.run = {run!r}: no traces in it (traces/*.parquet); name a finished run")
    steps: dict[int, StepLengths | None] = {}
    for file in files:
        try:
            table, note = read_rows(file)
        except (pa.ArrowException, OSError) as error:
            note = f"{file} cannot be read: {str(error).splitlines()[0]}"
        if note:
            raise UserError(f"termination.run = {run!r}: {note}; a control needs the whole run")
        for step in np.unique(table.column("step").to_numpy()):
            steps[int(step)] = _lengths(table.filter(pc.equal(table.column("step"), int(step))))
    active = [s for s in steps.values() if s is not None]
    if not active:
        raise UserError(f"termination.run = {run!r}: that run cut no rollouts, so there are no lengths to match")
    if not any(len(s.uncut) for s in active):
        raise UserError(
            f"termination.run = {run!r}: that run kept no probes, so nothing says how long its rollouts would have "
            "been; record one with termination.probe_share above 0"
        )
    return steps


def _lengths(table: pa.Table) -> StepLengths | None:
    probe = np.asarray(table.column("probe"), dtype=bool)
    length = np.asarray(pc.list_value_length(table.column("token_ids")), dtype=np.int64)
    cut = np.asarray(table.column("cut").fill_null(-1), dtype=np.int64)
    if table.column("threshold").null_count == len(table) and not (cut >= 0).any():
        return None
    return StepLengths(np.where(cut >= 0, cut, length)[~probe], length[probe])


def survival(kept: IntArray, uncut: IntArray) -> FloatArray:
    """P(D > t) for t = 0, 1, ... up to the longest length given: falling, between 1 and 0."""
    t = np.arange(max(kept.max(initial=0), uncut.max(initial=0)) + 1)
    beyond_kept = 1.0 - np.searchsorted(np.sort(kept), t, side="right") / max(1, len(kept))
    beyond_uncut = 1.0 - np.searchsorted(np.sort(uncut), t, side="right") / max(1, len(uncut))
    ratio = np.divide(beyond_kept, beyond_uncut, out=np.ones(len(t)), where=beyond_uncut > 0)
    falling: FloatArray = np.minimum.accumulate(np.minimum(ratio, 1.0))
    return falling


def _pooled(steps: Mapping[int, StepLengths | None], step: int) -> FloatArray | None:
    """The distribution of the cuts of a step; steps after the record's end are like its last one."""
    step = min(step, max(steps))
    if steps.get(step) is None:
        return None
    near = [s for n, s in steps.items() if s is not None and abs(n - step) <= POOL]
    uncut = np.concatenate([s.uncut for s in near])
    return survival(np.concatenate([s.kept for s in near]), uncut) if len(uncut) else None


def make(settings: LengthMatchedSettings, facts: RunFacts) -> LengthRule:
    """The rule that the settings describe."""
    steps = recorded_lengths(settings.run)
    by_step = {step: _pooled(steps, step) for step in steps}

    def length(start: RolloutStart, step: int) -> int | None:
        beyond = by_step.get(min(step, max(by_step)))
        if beyond is None:
            return None
        chance = np.random.default_rng([facts.seed, _MATCHED, start.rollout_id]).random()
        reached = np.flatnonzero(beyond <= chance)
        return int(reached[0]) if len(reached) else None

    return LengthRule(length)


KIND = RuleType(LengthMatchedSettings, make, reads=(), copies="run")
