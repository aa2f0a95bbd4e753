"""`kat-ray replay --objective`: a run's advantages again, and what other settings would make of its rewards."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kat_ray.analysis.objective import (
    ELSEWHERE,
    Difference,
    RecordedStep,
    Worth,
    differences,
    recorded_steps,
    replayed,
    with_objective,
    without_history,
    worth,
)
from kat_ray.analysis.ratios import policy_ratios, ratio_words
from kat_ray.cli.replay import grid_of, run_config, terminal
from kat_ray.config import PolicyObjective
from kat_ray.errors import UserError, writing

_FIGURES = {
    "abs_mean": "mean |A|",
    "zero_share": "A = 0",
    "constant_share": "constant",
    "correlation": "correlation",
}


def replay_objective(run_dir: Path, settings: Sequence[str], out: Path | None) -> list[Path]:
    """Say whether the traces hold what the run's objective gives, print what each setting would; write a CSV.

    Of a run that recorded them, also how the ratios of learner to sampler were.

    A setting is FIELD=VALUE or FIELD=[VALUE, ...] with a field of `objective.rl`. Returns the files.
    """
    console, config = terminal(), run_config(run_dir)
    grid = _grid(settings)
    changes = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    changed = [with_objective(config, each) for each in changes]  # what is not allowed is said before all else
    steps, notes = recorded_steps(run_dir, config)
    for note in notes:
        console.print(f"warning: {note}", markup=False)
    own = replayed(steps, config)
    unknown = without_history(steps, own, config)
    console.print(_reproduction(steps, differences(steps, own, unknown), unknown), markup=False)
    if len(ratios := policy_ratios(steps)):
        console.print(ratio_words(ratios, config.objective.rl.clip), markup=False)
    mine = config.objective.rl.model_dump()
    results = [worth({name: mine[name] for name in grid}, own, own)]
    for each, other in zip(changes, changed, strict=True):
        results.append(worth(each, replayed(steps, other), own))
    _print(console, results)
    path = (out or run_dir / "replay") / "objective.csv"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_csv(path, results)
    console.print(str(path), markup=False)
    return [path]


def _grid(settings: Sequence[str]) -> dict[str, list[Any]]:
    whose = {name: who for who, names in ELSEWHERE.items() for name in names}
    known = {name: None for name in PolicyObjective.model_fields if name not in whose}
    for setting in settings:
        name = setting.partition("=")[0]
        if name in whose:
            raise UserError(
                f"{setting!r}: objective.rl.{name} is {whose[name]}, which a replay does without; what makes "
                f"advantages is one of {', '.join(known)}"
            )
    return grid_of(tuple(known), settings)


def _reproduction(steps: Sequence[RecordedStep], found: Sequence[Difference], unknown: Mapping[int, int]) -> str:
    """`unknown` are steps that are not compared, each with the missing one that it depends on."""
    count = sum(len(step.ended.rollouts) for step in steps if step.step not in unknown)
    aside = ""
    if unknown:
        first_step, missing = next(iter(unknown.items()))
        aside = (
            f"; {len(unknown)} step{'s' * (len(unknown) > 1)} from {first_step} on cannot be compared: with "
            f"cut_reward = probe_mean they depend on the probes of step {missing}, which is missing or not whole"
        )
    if not found:
        return (
            f"the run's own objective, computed again, gives the credit of all {count:,} rollouts to the bit{aside}"
        )
    first, wrong = found[0], len({(d.step, d.rollout_id) for d in found})
    return (
        f"warning: the run's own objective, computed again, differs in {wrong:,} of {count:,} rollouts; the first: "
        f"{first.column} of rollout {first.rollout_id} in step {first.step} is {_exact(first.written)} in the "
        f"traces, and {_exact(first.computed)} computed{aside}"
    )


def _exact(value: float | None) -> str:
    return "nothing" if value is None else repr(value)


def _print(console: Console, results: Sequence[Worth]) -> None:
    """The first of the results is the run's own; what the others correlate with is that one."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in results[0].changes:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in (*_FIGURES.values(), "left out"):
        table.add_column(heading, justify="right")
    for r in results:
        shares = ["-" if x is None else f"{x:.1%}" for x in (r.zero_share, r.constant_share)]
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(r.left_out.items()))
        whose = "the run" if r is results[0] else ""
        values = map(_text, r.changes.values())
        figures = (_number(r.abs_mean), *shares, _number(r.correlation), left_out or "none")
        table.add_row(whose, *values, *figures, style="bold" if whose else None)
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _write_csv(path: Path, results: Sequence[Worth]) -> None:
    names = tuple(results[0].changes)
    reasons = sorted({reason for r in results for reason in r.left_out})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["the_run", *names, *_FIGURES, *(f"left out: {reason}" for reason in reasons)])
        for r in results:
            own = int(r is results[0])
            figures = [getattr(r, name) for name in _FIGURES]
            left_out = [r.left_out.get(reason, 0) for reason in reasons]
            writer.writerow([own, *(_text(r.changes[name]) for name in names), *figures, *left_out])
