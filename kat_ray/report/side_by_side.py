"""`kat-ray report RUN RUN ...`: several runs beside each other, while they go on or afterwards, on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.records.json_records import METRICS, SUMMARY, read_json, read_json_lines
from kat_ray.report.curves import draw, legend
from kat_ray.report.page import Section, png_of, render, write_page
from kat_ray.report.style import figure, percent, thousands

PAGE = "side-by-side.html"
_OWN = ("run.name", "run.dir", "run.overwrite")  # fields in which any two runs differ
# Metric, title, unit; drawn where one of the runs has it.
_CURVES = (
    ("kl/mean", "Reverse KL of all scored tokens", "nats"),
    ("eval/avg_at_k", "Held-out accuracy, avg@k", "share"),
    ("reward/mean", "Reward", ""),
    ("rollout/trapped_share", "Rollouts ended by the rule", "share"),
    ("rollout/mean_length", "Generated tokens per rollout", ""),
    ("kat/threshold", "Threshold", "nats"),
    ("learner/grad_norm", "Gradient norm before clipping", ""),
    ("throughput/tokens_per_second", "Generated tokens per second", ""),
)


@dataclass(frozen=True)
class _Run:
    """What is read of one."""

    name: str
    config: Config
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values."""
        rows = [(line["step"], line[metric]) for line in self.lines if line.get(metric) is not None]
        return [step for step, _ in rows], [value for _, value in rows]


def side_by_side(folders: Sequence[Path], out: Path | None, say: Callable[[str], None]) -> list[Path]:
    """Write the page and its pictures, into the first run's report unless `out` is given; returns the files."""
    runs: list[_Run] = []
    notes: list[str] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no config.yaml in it; name run directories, such as runs/latest")
        lines, damage = read_json_lines(folder / "metrics.jsonl", METRICS)
        summary = folder / "summary.json"
        found = read_json(summary, SUMMARY) if summary.is_file() else None
        runs.append(_Run(name, load_config(folder / "config.yaml"), lines, found))
        notes += damage
    for note in notes:
        say(f"warning: {note}")
    sections = [
        Section(
            "runs", "The runs", "As far as they have come; KL and speed over the last tenth.", table=_table(runs)
        ),
        Section("fields", "Where their configurations differ", *_differences(runs)),
        *_pictures(runs),
    ]
    values = {
        "title": f"kat-ray: {len(runs)} runs",
        "subtitle": ", ".join(run.name for run in runs),
        "notes": notes,
        "sections": sections,
    }
    files = write_page(render("compare.html.j2", values), sections, (out or folders[0] / "report") / PAGE)
    for file in files:
        say(str(file))
    return files


def _names(folders: Sequence[Path]) -> list[str]:
    """The directories' names, with as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if twice := next((str(path) for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice}: is named twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _table(runs: Sequence[_Run]) -> list[list[str]]:
    rows = [["", *(run.name for run in runs)]]

    def row(name: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            rows.append([name, *cells])

    row("rule", [run.config.termination.rule for run in runs])
    row("steps", [f"{_done(run)} of {run.config.run.steps}" for run in runs])
    for metric, name, form in (
        ("kl/mean", "KL, nats", "{:.4f}"),
        ("reward/mean", "reward", "{:.3f}"),
        ("throughput/tokens_per_second", "tokens/s", "{:,.0f}"),
    ):
        row(name, [_late(run.series(metric)[1], form) for run in runs])
    row("accuracy, first and last", [_ends(run.series("eval/avg_at_k")[1]) for run in runs])
    generated = [sum(run.series("rollout/generated_tokens")[1]) for run in runs]
    kept = [sum(run.series("rollout/kept_tokens")[1]) for run in runs]
    row("tokens generated", [f"{count:,.0f}" if count else "-" for count in generated])
    row("of them kept", [f"{k / g:.1%}" if g else "-" for g, k in zip(generated, kept, strict=True)])
    row(
        "wall time, s",
        [f"{(run.summary or {}).get('wall_seconds', 0):,.0f}" if run.summary else "-" for run in runs],
    )
    return rows


def _done(run: _Run) -> int:
    return max((int(line["step"]) for line in run.lines), default=0)


def _late(values: Sequence[float], form: str) -> str:
    last = values[-max(1, len(values) // 10) :]
    return form.format(sum(last) / len(last)) if last else "-"


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} → {values[-1]:.1%}" if values else "-"


def _differences(runs: Sequence[_Run]) -> tuple[str, None, list[list[str]] | None]:
    """Text, no picture, and a table of the fields whose values are not the same in all runs."""
    trees = [_leaves(run.config.model_dump(mode="json")) for run in runs]
    names = [name for tree in trees for name in tree if not name.startswith(_OWN)]
    rows = [
        [name, *cells]
        for name in dict.fromkeys(names)
        if len(set(cells := [tree.get(name, "-") for tree in trees])) > 1
    ]
    if not rows:
        return "They have the same configuration.", None, None
    return "All other fields are the same.", None, [["field", *(run.name for run in runs)], *rows]


def _leaves(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: str(tree)}
    return {
        leaf: text
        for name, value in tree.items()
        for leaf, text in _leaves(value, f"{prefix}.{name}" if prefix else name).items()
    }


def _pictures(runs: Sequence[_Run]) -> list[Section]:
    sections = []
    looks = _looks(runs)
    for metric, title, unit in _CURVES:
        if not any(run.series(metric)[1] for run in runs):
            continue
        fig, (axes,) = figure(1, 3, width=15)
        for run, (colour, label) in zip(runs, looks, strict=True):
            at, values = run.series(metric)
            draw(axes[0], at, values, label, colour)
            for one, cost in zip(axes[1:], ("rollout/generated_tokens", "time/step"), strict=True):
                draw(one, _cost_at(run, cost, at), values, label, colour)
        for one, name in zip(axes, ("step", "tokens generated until then", "seconds of steps"), strict=True):
            one.set(xlabel=name)
            if unit == "share":
                percent(one.yaxis)
        axes[0].set(ylabel=unit)
        thousands(axes[1].xaxis)
        legend(axes[0])
        text = (
            "Faint: single steps; strong: trailing means. By steps, and by what they cost in tokens and in time "
            "without evaluations. Runs that differ in their seed only have one colour."
        )
        sections.append(Section(metric.replace("/", "-"), title, text, png=png_of(fig)))
    return sections


def _looks(runs: Sequence[_Run]) -> list[tuple[str, str | None]]:
    """Colour and label of each run; runs that differ in their seed only share both, and the label stands once."""
    own = (*_OWN, "run.seed")
    kinds = [
        {k: v for k, v in _leaves(r.config.model_dump(mode="json")).items() if not k.startswith(own)} for r in runs
    ]
    looks = []
    for number, kind in enumerate(kinds):
        first, alike = kinds.index(kind), kinds.count(kind)
        colour = f"C{sum(kinds.index(k) == i for i, k in enumerate(kinds[:first])) % 10}"
        label = runs[number].name + (f" and {alike - 1} more" if alike > 1 else "")
        looks.append((colour, label if first == number else None))
    return looks


def _cost_at(run: _Run, metric: str, steps: Sequence[int]) -> list[float]:
    """Sum of a metric over training until each of these steps."""
    total, by_step = 0.0, {0: 0.0}
    for step, value in zip(*run.series(metric), strict=True):
        total += value
        by_step[step] = total
    return [by_step.get(step, total) for step in steps]
