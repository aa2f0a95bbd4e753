"""What a checkpoint costs a step: how long training stands still for it, and what its writing takes from the step.

One run of kat-ray for each pair, a checkpoint after every second step, so that steps with one and without one
alternate. From one step's record to the next passes the time of the step itself (`time/step`), and outside it what
a checkpoint holds up: its copy to host memory before the step, what is left of its writing after it, and its
completion. All that lies outside counts, bookkeeping that has nothing to do with checkpoints included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.bench.end_to_end import LARGE, SHORT
from actors.bench.figure import Figure
from actors.bench.pairs import make_pair
from actors.bench.sides import WARM_UP, SideError, Size, run_kat_ray

GROUP = "checkpoint"
EVERY = 2
_OVERRIDES = (f"run.checkpoint_every={EVERY}", "run.keep_checkpoints=1", "run.keep_best=false")
# Even numbers of measured steps: as many with a checkpoint as without, the last one's own left out.
SIZES = (replace(SHORT, steps=12), replace(LARGE, steps=8))


def figures(folder: Path) -> list[Figure]:
    """All figures of this part, below `folder`."""
    made = []
    for size in SIZES:
        where = folder / "checkpoint" / size.pair
        try:
            run_kat_ray(size, make_pair(size.pair, folder / "pairs"), "none", where, overrides=_OVERRIDES)
        except SideError as error:
            made += [replace(f, note=str(error)) for f in _figures(size, [])]
            continue
        lines = (where / "none" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        made += _figures(size, [m for m in map(json.loads, lines) if "time/step" in m])
    return made


def _figures(size: Size, steps: Sequence[dict[str, float]]) -> list[Figure]:
    still = Figure(
        GROUP, f"share of a step and its checkpoint that training stands still, {size.name}", None, 0.05, "<="
    )
    slower = Figure(GROUP, f"step while a checkpoint is written / step without, {size.name}", None)
    if not steps:
        return [still, slower]
    with_one, without = split(steps)
    outside = [wall - step for wall, step in with_one]
    detail = {
        "outside_step_s": _rounded(outside),
        "outside_step_without_checkpoint_s": _rounded([wall - step for wall, step in without]),
        "step_s": _rounded([step for _, step in with_one]),
        "step_without_checkpoint_s": _rounded([step for _, step in without]),
    }
    share = sum(outside) / sum(wall for wall, _ in with_one)
    means = [sum(step for _, step in side) / len(side) for side in (with_one, without)]
    return [
        replace(still, value=share, detail=detail),
        replace(slower, value=means[0] / means[1], detail=detail, note=_note(detail["step_without_checkpoint_s"])),
    ]


def _note(without: Sequence[float]) -> str:
    return (
        "the writing shares the cores with the step, and the machine is shared with others: steps without a "
        f"checkpoint took {min(without):.1f} to {max(without):.1f} s"
    )


def split(
    steps: Sequence[dict[str, float]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds since the step before was recorded, and of the step itself; steps after a checkpoint, and others."""
    with_one: list[tuple[float, float]] = []
    without: list[tuple[float, float]] = []
    for before, step in zip(steps[WARM_UP - 1 :], steps[WARM_UP:], strict=False):
        side = with_one if before["step"] % EVERY == 0 else without
        side.append((step["time"] - before["time"], step["time/step"]))
    return with_one, without


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(s, 4) for s in seconds]
