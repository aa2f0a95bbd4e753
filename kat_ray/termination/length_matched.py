"""Rollouts are cut at the lengths that KAT produced, regardless of KL: the control that KAT's paper lacks.

    cut ~ cuts of the recorded run's rollouts of the same step, "not cut" among them        [tokens]

It tells "cutting the trap" from "cutting shorter": both runs have the same lengths, only KAT's stand where KL says.
A rollout that ends before its drawn length is not cut, so this control keeps slightly fewer tokens than the run
that it copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from kat_ray.errors import UserError
from kat_ray.termination.base import RolloutStart, RunFacts
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import LengthRule

_MATCHED = 12  # tells this draw from the others that are seeded with (run seed, rollout id)


class LengthMatchedSettings(CuttingSettings):
    """Rollouts are cut at lengths drawn from those of a recorded run, regardless of KL."""

    rule: Literal["length_matched"] = "length_matched"
    run: str = Field(min_length=1)
    """Directory of the recorded run, such as runs/kat; its probes are left out."""


def recorded_cuts(run: str) -> list[list[int | None]]:
    """For each step of a run the cut of every rollout that was no probe, None where it was not cut."""
    files = sorted((Path(run) / "traces").glob("*.parquet"))
    if not files:
        raise UserError(f"termination.run = {run!r}: no traces in it (traces/*.parquet); name a finished run")
    steps = []
    for file in files:
        rows = pq.read_table(file, columns=["cut", "probe"]).to_pylist()
        steps.append([row["cut"] for row in rows if not row["probe"]])
    if not any(cut is not None for step in steps for cut in step):
        raise UserError(f"termination.run = {run!r}: that run cut no rollouts, so there are no lengths to match")
    return steps


def make(settings: LengthMatchedSettings, facts: RunFacts) -> LengthRule:
    """The rule that the settings describe; steps after the record's end draw from its last one."""
    steps = recorded_cuts(settings.run)

    def length(start: RolloutStart, step: int) -> int | None:
        cuts = steps[min(step, len(steps) - 1)]
        if not cuts:
            return None
        return cuts[int(np.random.default_rng([facts.seed, _MATCHED, start.rollout_id]).integers(len(cuts)))]

    return LengthRule(length)
