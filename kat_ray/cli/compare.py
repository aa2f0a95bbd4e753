"""The command `kat-ray compare`: its arguments, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kat_ray.analysis.compare import (
    Arm,
    Planned,
    evaluated_along_the_way,
    order_of,
    parse_arm,
    plan_runs,
    run_all,
)
from kat_ray.analysis.compare_curves import COSTS
from kat_ray.analysis.compare_results import Result, notes_of, read_results, read_runs
from kat_ray.analysis.compare_table import Compared, difference_table, equal_tables, table, write_results
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.config.local_paths import is_url
from kat_ray.errors import UserError, writing

RULES_BY_DEFAULT = ("none", "kat", "length_matched")
SEEDS_BY_DEFAULT = ("0", "1", "2")


@dataclass(frozen=True)
class Comparison:
    """A comparison whose every run has been checked, and none started."""

    config: Config
    arms: Sequence[Arm]
    seeds: Sequence[int]
    out: Path
    runs: Sequence[Planned]

    @property
    def evaluated(self) -> str:
        """How often each run that is to be made is evaluated."""
        every, k = self.config.evaluation.every, self.config.evaluation.every_k or self.config.evaluation.k
        if not every:
            return (
                "evaluated before and after training only: nothing will be known at equal cost (--evaluate-every)"
            )
        return (
            f"evaluated along the way: evaluation.every = {every}, evaluation.every_k = {k}, for accuracy at equal "
            "cost (--evaluate-every)"
        )


def plan(
    config: str | None,
    overrides: Sequence[str],
    rules: Sequence[str] | None,
    seeds: Sequence[str] | None,
    out: Path | None,
    evaluate_every: str | None = None,
) -> Comparison:
    """What the arguments ask for; `UserError` before anything is started.

    An override may stand among the rules or the seeds, as in `--rules none kat learner.lr=1e-5`: argparse takes it
    for one of them. A rule's name holds no `=`.
    """
    rules, seeds = rules or RULES_BY_DEFAULT, seeds or SEEDS_BY_DEFAULT
    if config is None:
        raise UserError("name a configuration file, or `demo`; or finished runs with --runs")
    misplaced = [a for a in rules if "=" in a.partition(":")[0]] + [s for s in seeds if "=" in s]
    base = load_config(config, [*overrides, *misplaced])
    arms = order_of([parse_arm(a) for a in rules if a not in misplaced])
    numbers = [_whole("--seeds", s, "whole numbers") for s in seeds if s not in misplaced]
    if base.evaluation.data is None:
        raise UserError("evaluation.data = null: a comparison needs held-out problems")
    if len(set(numbers)) < len(numbers):
        raise UserError("--seeds: the same seed is named twice")
    every = None if evaluate_every is None else _whole("--evaluate-every", evaluate_every)
    base = evaluated_along_the_way(base, every)
    if out is None and is_url(base.run.dir):
        raise UserError(f"run.dir = {base.run.dir!r}: a comparison is written into a folder; name one with --out")
    out = out or Path(base.run.dir) / f"compare-{base.run.name}"
    return Comparison(base, arms, numbers, out, plan_runs(base, arms, numbers, out))


def _whole(option: str, text: str, what: str = "a whole number") -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise UserError(f"{option} {text}: must be {what} from 0 to {2**31 - 1}")
    return int(text)


def run(comparison: Comparison, train: Callable[[Config], object], say: Callable[[str], None]) -> None:
    """Train what is not there yet, and show how the rules compare."""
    say(comparison.evaluated)
    run_all(comparison.runs, train, say)
    results = read_results(comparison.arms, comparison.seeds, comparison.out)
    show(results, notes_of(results), comparison.out, say)


def show_finished(
    runs: Sequence[Path], others: Sequence[str], out: Path | None, say: Callable[[str], None]
) -> None:
    """Compare finished runs; `others` are arguments that mean nothing beside them."""
    if others:
        raise UserError(f"--runs compares finished runs and trains nothing: leave {', '.join(others)} out")
    results, notes = read_runs(runs)
    show(results, [*notes, *notes_of(results)], out or Path("compare"), say)


def show(results: Sequence[Result], notes: Sequence[str], out: Path, say: Callable[[str], None]) -> None:
    """Print notes, figures and files."""
    from kat_ray.report.comparison import write_comparison

    compared = Compared.of(results, notes)
    for note in notes:
        say(f"note: {note}")
    _print(*table(results), say)
    if compared.pairs:
        say("")
        _print(*difference_table(compared.pairs), say)
    for name, content in equal_tables(compared.pairs).items():
        say(f"\nat equal {COSTS[name]}")
        _print(*content, say)
    if compared.unknown is not None:
        say(f"\n{compared.unknown}")
    with writing(out):
        files = [*write_results(compared, out), *write_comparison(compared, out)]
    for file in files:
        say(str(file))


def _print(heading: list[str], rows: list[list[str]], say: Callable[[str], None]) -> None:
    for line in zip(heading, *rows, strict=True):  # one line a measure: a terminal is higher than it is wide
        say("  ".join(f"{cell:<24}" for cell in line).rstrip())
