"""`kat-ray replay`: what a rule with other settings would have done to a run's rollouts."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kat_ray.analysis.replay import Replayed, Traces, load_traces, uncensored, with_changes
from kat_ray.analysis.replay_rules import reproduce, rules_of, sweep
from kat_ray.analysis.tradeoff import Tradeoff, frontier, recommend
from kat_ray.config import Config
from kat_ray.config.load import load_config, yaml_value
from kat_ray.errors import UserError, writing
from kat_ray.termination import RULES, Effect, RunFacts, kat_parameters
from kat_ray.termination.settings import KatParameters, KatSettings, RuleSettings

_KAT_HEADINGS = {"window": "W", "consecutive": "C"}
_BUDGET = 0.02  # where neither the user nor the rule names one


def replay(
    run_dir: Path, rule: str | None, settings: Sequence[str], budget: float | None, out: Path | None
) -> list[Path]:
    """Print the trade-off of every setting and the recommended one; write CSV and plot. Returns the files.

    `budget` is the share of a rollout's KL that the recommended setting may lose on average; None takes the rule's
    own, or 2 %.
    """
    console, config = terminal(), run_config(run_dir)
    base = _base(config, rule)
    grid = _grid(base, settings, config.rollout.max_tokens)
    rules_of(base, grid)  # what is not allowed is said before anything is read
    read = {name for rule in (base, config.termination) for name in RULES[rule.rule].reads}
    traces, notes = load_traces(run_dir, sorted(read))
    for note in notes:
        console.print(f"warning: {note}", markup=False)
    if not len(traces.d):
        raise UserError(
            f"{run_dir}: none of its tokens was scored, so there is nothing that a rule could be applied to; a run "
            "whose teacher is asked (objective.opd.weight > 0, or a rule but none) records the KL of every token"
        )
    facts = RunFacts(config.run.seed, config.rollout.max_tokens)
    if RULES[config.termination.rule].effect is not Effect.NOTHING:
        replayed = reproduce(traces, config.termination, facts)
        console.print(_reproduction(traces, replayed), markup=False)
    _check_columns(traces, base)
    seen = uncensored(traces, config)
    console.print(
        f"{len(traces.step):,} rollouts, {len(traces.d):,} scored tokens; {len(seen.step):,} of them were seen to "
        "their end and show what a cut removes",
        markup=False,
    )
    results = sweep(seen, base, grid, facts)
    kat = kat_parameters(base)
    if budget is None:
        budget = (kat.budget if kat else None) or _BUDGET
    best, reason = recommend(results, budget)
    shown = _shown(kat, grid) if kat else tuple(grid)
    _print(console, sorted(results, key=lambda r: r.generated_tokens), best, shown)
    console.print(f"recommended: {best.rule.rule} {_values_of(best.rule, shown)}\n  {reason}", markup=False)
    folder = out or run_dir / "replay"
    files = [folder / "replay.csv", folder / "replay.png"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(files[0], results, shown)
        plot(files[1], results, best, _own(seen, config.termination, facts), shown)
    for file in files:
        console.print(str(file), markup=False)
    return files


def terminal() -> Console:
    """Where a command over a run prints to."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def run_config(run_dir: Path) -> Config:
    """The configuration of a run; UserError if the directory holds none."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no config.yaml in it; name a run directory, such as runs/latest")
    return load_config(run_dir / "config.yaml")


def _base(config: Config, rule: str | None) -> RuleSettings:
    """The settings that others are tried around: the run's own where it ran under this rule, else the defaults."""
    own = config.termination
    kat = kat_parameters(own)
    name = rule or (own.rule if kat else "kat")
    if rule is None and kat and not _ends_rollouts(name):
        return KatSettings(**{f: getattr(kat, f) for f in KatSettings.model_fields if f != "rule"})
    if name not in RULES or not _ends_rollouts(name):
        known = ", ".join(filter(_ends_rollouts, RULES))
        raise UserError(f"--rule {name!r}: must be one of {known}")
    if own.rule == name:
        return own
    return RULES[name].settings.model_construct(rule=name)  # checked with the user's values: some have no default


def _ends_rollouts(rule: str) -> bool:
    """Whether there is anything to weigh: a rule that ends no rollout saves no token."""
    return RULES[rule].effect in (Effect.BOUNDS, Effect.CUTS)


def _check_columns(traces: Traces, rule: RuleSettings) -> None:
    missing = [name for name in RULES[rule.rule].needs if name not in traces.columns]
    if missing:
        raise UserError(
            f"--rule {rule.rule}: it needs the {' and '.join(missing)} of every token; record it with "
            "run.trace_features"
        )


def _reproduction(traces: Traces, replayed: Replayed) -> str:
    """Whether the run's own rule gives the run's own cuts, and what it says of probes."""
    recorded = traces.cut.copy()
    probes = traces.probe == 1
    recorded[probes] = traces.would_cut[probes]
    wrong = int((replayed.cut != recorded).sum())
    if wrong:
        return (
            f"warning: the run's own rule, applied again, cuts {wrong:,} of {len(recorded):,} rollouts differently"
        )
    cuts = f"the run's own rule, applied again, reproduces its {int((traces.cut >= 0).sum()):,} cuts"
    if traces.teacher is None:
        return cuts
    of_each = (f"{name} {int((traces.cut[rows] >= 0).sum()):,}" for name, rows in traces.by_teacher())
    return f"{cuts} ({', '.join(of_each)})"


def rule_with(run_dir: Path, settings: Sequence[str]) -> KatSettings:
    """The run's KAT settings, or the defaults, with single values in place of some."""
    own = load_config(run_dir / "config.yaml").termination
    base = own if isinstance(own, KatSettings) else KatSettings()
    changes = {}
    for name, values in _grid(base, settings, 1).items():
        if len(values) != 1:
            raise UserError(f"{name} = {values!r}: must be a single value")
        changes[name] = values[0]
    return with_changes(base, changes)


def _grid(base: RuleSettings, settings: Sequence[str], max_tokens: int) -> dict[str, list[Any]]:
    """Values of each swept field: those the user names (`eta=[0.1, 0.3]`), else some around the base's own."""
    grid = grid_of([name for name in type(base).model_fields if name != "rule"], settings)
    return grid or {name: list(values) for name, values in RULES[base.rule].sweep(base, max_tokens).items()}


def grid_of(fields: Sequence[str], settings: Sequence[str]) -> dict[str, list[Any]]:
    """The values that a user names for each field, FIELD=VALUE or FIELD=[VALUE, ...]."""
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in fields or not text:
            raise UserError(
                f"{setting!r}: must be FIELD=VALUE or FIELD=[VALUE, ...] with one of {', '.join(fields)}"
            )
        value = yaml_value(text, repr(setting))
        grid[name] = value if isinstance(value, list) else [value]
    return grid


def _shown(kat: KatParameters, grid: dict[str, list[Any]]) -> tuple[str, ...]:
    """A KAT rule's fields that a table has: those of its windows, what sets the threshold, what is swept."""
    sets = "eta" if kat.budget is None and "budget" not in grid else "budget"
    swept = (name for name, values in grid.items() if len(values) > 1)
    return tuple(dict.fromkeys(("window", "consecutive", "exempt", "stride", sets, *swept)))


def _own(seen: Traces, rule: RuleSettings, facts: RunFacts) -> Tradeoff | None:
    """What the run's own rule did, on the same rollouts; None of a run without one that ends rollouts."""
    if not _ends_rollouts(rule.rule):
        return None
    (own,) = sweep(seen, rule, {}, facts)
    return own if own.rollouts else None


def _values_of(rule: RuleSettings, shown: Sequence[str]) -> str:
    return " ".join(f"{name}={_cell(getattr(rule, name))}" for name in shown)


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print(
    console: Console, results: Sequence[Tradeoff], best: Tradeoff, fields: Sequence[str], most: int = 20
) -> None:
    table = Table(box=None, pad_edge=False)
    names = [_KAT_HEADINGS.get(name, name) for name in fields]
    for heading in (*names, "cut", "generated", "kept", "KL kept", "lost", "right, but cut"):
        table.add_column(heading, justify="right")
    stride = max(1, math.ceil(len(results) / most))
    shown = [r for i, r in enumerate(results) if i % stride == 0 or r is best]
    for r in shown:
        false_cut = "-" if r.false_cut_share is None else f"{r.false_cut_share:.1%} of {r.right_share:.1%}"
        values = [_cell(getattr(r.rule, name)) for name in fields]
        shares = [f"{x:.1%}" for x in (r.cut_share, r.generated_tokens, r.kept_tokens, r.kept_kl, r.lost_share)]
        table.add_row(*values, *shares, false_cut, style="bold" if r is best else None)
    console.print(table)
    if len(shown) < len(results):
        console.print(f"({len(shown)} of {len(results)} settings shown; all are in the CSV)", markup=False)


def _write_csv(path: Path, results: Sequence[Tradeoff], fields: Sequence[str]) -> None:
    measures = (
        "rollouts",
        "cut_share",
        "generated_tokens",
        "kept_tokens",
        "kept_kl",
        "lost_share",
        "lost_bound",
        "lost_check",
        "false_cut_share",
        "right_share",
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *measures])
        for r in results:
            writer.writerow([getattr(r.rule, f) for f in fields] + [getattr(r, m) for m in measures])


def plot(
    path: Path, results: Sequence[Tradeoff], best: Tradeoff, own: Tradeoff | None, fields: Sequence[str]
) -> None:
    """What every setting costs against the tokens that it still generates: in KL, and in right answers cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    acting = [r for r in results if r.rollouts]
    graded = any(r.false_cut_share is not None for r in acting)
    figure, all_axes = pyplot.subplots(
        1, 1 + graded, figsize=(7 + 4.5 * graded, 5), layout="constrained", squeeze=False
    )
    colour_by = next((f for f in fields if len({getattr(r.rule, f) for r in acting}) > 1), None)
    panels = [
        ("kept_kl", "summed reverse KL before the cuts, share"),
        ("false_cut_share", "right answers cut, share"),
    ]
    for axes, (measure, label) in zip(all_axes[0], panels, strict=False):
        _scatter(axes, acting, measure, colour_by)
        if measure == "kept_kl":
            front = frontier(results)
            axes.plot(
                [r.generated_tokens for r in front], [r.kept_kl for r in front], color="0.5", lw=0.8, zorder=0
            )
        axes.scatter(
            best.generated_tokens, getattr(best, measure),
            s=170, facecolors="none", edgecolors="black", linewidths=1.5, label="recommended",
        )  # fmt: skip
        if own is not None and getattr(own, measure) is not None:
            axes.scatter(
                own.generated_tokens,
                getattr(own, measure),
                s=130,
                marker="*",
                color="black",
                label="this run's rule",
            )
        axes.set(xlabel="tokens generated, share of those without the rule", ylabel=label)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.1%}")
        axes.grid(alpha=0.25)
    all_axes[0][0].legend(loc="lower right", fontsize=8)
    figure.suptitle(
        "What other settings of the rule would have done to this run's rollouts\n"
        f"recommended: {best.rule.rule} {_values_of(best.rule, fields)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _scatter(axes: Any, results: Sequence[Tradeoff], measure: str, colour_by: str | None) -> None:
    groups: dict[str, list[Tradeoff]] = {}
    for r in results:
        label = "a setting" if colour_by is None else f"{colour_by} {_cell(getattr(r.rule, colour_by))}"
        groups.setdefault(label, []).append(r)
    for number, (label, group) in enumerate(groups.items()):
        axes.scatter(
            [r.generated_tokens for r in group], [getattr(r, measure) for r in group],
            s=22, alpha=0.75, color=f"C{number % 10}", label=label,
        )  # fmt: skip
