"""`kat-ray replay`: what other settings of the rule would have done to a run's rollouts."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from kat_ray.config_io import load_config
from kat_ray.errors import UserError
from kat_ray.replay import Traces, Tradeoff, apply_rule, checked, load_traces, recommend, sweep, uncensored
from kat_ray.termination.settings import KatParameters, KatSettings

# What is swept where the user names nothing, around the settings of the run.
_FACTORS = {"window": (0.5, 1, 2), "consecutive": (0.5, 1, 2), "exempt": (0, 1, 2), "stride": (1, 4)}
_ETAS = (0.1, 0.2, 0.3, 0.5, 0.7)


def replay(run_dir: Path, settings: Sequence[str], keep_kl: float, out: Path | None) -> list[Path]:
    """Print the trade-off of every setting and the recommended one; write CSV and plot. Returns the files."""
    console = Console(highlight=False, soft_wrap=True)
    traces, notes = load_traces(run_dir)
    for note in notes:
        console.print(f"warning: {note}", markup=False)
    base, own = _settings_of(run_dir)
    if own:
        console.print(_reproduction(traces, base), markup=False)
    seen = uncensored(traces)
    console.print(
        f"{len(traces.step):,} rollouts, {len(traces.d):,} scored tokens; {len(seen.step):,} of them were seen to "
        "their end and tell what a cut removes",
        markup=False,
    )
    results = sweep(seen, base, _grid(base, settings))
    best, reason = recommend(results, keep_kl)
    _print(console, sorted(results, key=lambda r: r.generated_tokens), best)
    console.print(f"recommended: {_words(best.rule)}\n  {reason}", markup=False)
    folder = out or run_dir / "replay"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "replay.csv", folder / "replay.png"]
    _write_csv(files[0], results)
    plot(files[1], results, best, keep_kl)
    for file in files:
        console.print(str(file), markup=False)
    return files


def _settings_of(run_dir: Path) -> tuple[KatSettings, bool]:
    """The run's own KAT settings, and whether it ran under them; the defaults for a run without the rule."""
    rule = load_config(run_dir / "config.yaml").termination
    return (rule, True) if isinstance(rule, KatSettings) else (KatSettings(), False)


def _reproduction(traces: Traces, rule: KatSettings) -> str:
    """Whether the run's own rule under its own thresholds gives the run's own cuts."""
    cut = apply_rule(traces, rule, traces.threshold).cut
    recorded = traces.cut.copy()
    recorded[traces.probe] = traces.would_cut[traces.probe]
    wrong = int((cut != recorded).sum())
    if wrong:
        return f"warning: replaying the run's own rule gives other cuts for {wrong:,} of {len(cut):,} rollouts"
    return f"the run's own rule under its own thresholds gives its {int((traces.cut >= 0).sum()):,} cuts again"


def rule_with(run_dir: Path, settings: Sequence[str]) -> KatSettings:
    """The run's KAT settings, or the defaults, with single values in place of some."""
    base, _ = _settings_of(run_dir)
    changes = {}
    for name, values in _grid(base, settings).items():
        if len(values) != 1:
            raise UserError(f"{name} = {values!r}: one value, please")
        changes[name] = values[0]
    return checked(base, changes)


def _grid(base: KatSettings, settings: Sequence[str]) -> dict[str, list[Any]]:
    """Values of each swept field: those the user names (`eta=[0.1, 0.3]`), else some around the run's own."""
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in KatSettings.model_fields or name == "rule" or not text:
            fields = ", ".join(n for n in KatSettings.model_fields if n != "rule")
            raise UserError(f"{setting!r}: must be FIELD=VALUE or FIELD=[VALUE, ...] with one of {fields}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{setting!r}: the value is not YAML") from error
        grid[name] = value if isinstance(value, list) else [value]
    if not settings:
        for name, factors in _FACTORS.items():
            own = getattr(base, name)
            grid[name] = sorted({max(0 if name == "exempt" else 1, round(own * f)) for f in factors})
        grid["eta"] = sorted({*_ETAS, base.eta})
    return grid


def _words(rule: KatParameters) -> str:
    return (
        f"window={rule.window} consecutive={rule.consecutive} exempt={rule.exempt} stride={rule.stride} "
        f"eta={rule.eta:g}"
    )


def _print(console: Console, results: Sequence[Tradeoff], best: Tradeoff, most: int = 20) -> None:
    table = Table(box=None, pad_edge=False)
    headings = ("W", "C", "exempt", "stride", "eta", "cut", "generated", "kept", "KL kept", "right, but cut")
    for heading in headings:
        table.add_column(heading, justify="right")
    stride = max(1, math.ceil(len(results) / most))
    shown = [r for i, r in enumerate(results) if i % stride == 0 or r is best]
    for r in shown:
        false_cut = "-" if r.false_cut_share is None else f"{r.false_cut_share:.1%} of {r.right_share:.1%}"
        rule = r.rule
        values = [rule.window, rule.consecutive, rule.exempt, rule.stride, f"{rule.eta:g}"]
        shares = [f"{x:.1%}" for x in (r.cut_share, r.generated_tokens, r.kept_tokens, r.kept_kl)]
        table.add_row(*map(str, values), *shares, false_cut, style="bold" if r is best else None)
    console.print(table)
    if len(shown) < len(results):
        console.print(f"({len(shown)} of {len(results)} settings shown; all are in the CSV)", markup=False)


def _write_csv(path: Path, results: Sequence[Tradeoff]) -> None:
    measures = (
        "rollouts",
        "cut_share",
        "generated_tokens",
        "kept_tokens",
        "kept_kl",
        "false_cut_share",
        "right_share",
    )
    fields = ("window", "consecutive", "exempt", "stride", "eta")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *measures])
        for r in results:
            writer.writerow([getattr(r.rule, f) for f in fields] + [getattr(r, m) for m in measures])


def plot(path: Path, results: Sequence[Tradeoff], best: Tradeoff, keep_kl: float) -> None:
    """Tokens that are still generated against the KL that is kept, a point for every setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    windows = sorted({r.rule.window for r in results})
    for number, window in enumerate(windows):
        group = [r for r in results if r.rule.window == window and r.rollouts]
        axes.scatter(
            [r.generated_tokens for r in group], [r.kept_kl for r in group],
            s=22, alpha=0.75, color=f"C{number % 10}", label=f"window {window}",
        )  # fmt: skip
    ends = [0.0, 1.0]
    axes.plot(ends, ends, color="grey", linewidth=0.8, linestyle="--", label="KL spread evenly over tokens")
    axes.axhline(keep_kl, color="grey", linewidth=0.8, linestyle=":")
    axes.scatter(
        [best.generated_tokens], [best.kept_kl], s=170, facecolors="none", edgecolors="black", linewidths=1.5
    )
    axes.annotate(
        f"recommended\n{_words(best.rule)}", (best.generated_tokens, best.kept_kl), textcoords="axes fraction",
        xytext=(0.02, 0.97), ha="left", va="top", fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "black", "lw": 0.6},
    )  # fmt: skip
    axes.set(
        xlabel="tokens generated, share of those without the rule",
        ylabel="summed reverse KL before the cuts, share",
        title="What other settings of the rule would have done to this run's rollouts",
        xlim=(0, 1.02),
        ylim=(0, 1.03),
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
