"""Arms set against each other: the table, paired differences to the baselines, and the files that hold them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.analysis.bootstrap import Difference, bootstrap
from kat_ray.analysis.compare_curves import COSTS, POINT
from kat_ray.analysis.compare_equal import (
    BANDS,
    EQUAL_COST,
    ArmCurve,
    EqualCost,
    arm_curves,
    equal_cost,
    equal_document,
    equal_heading,
    equal_row,
    without_curves,
)
from kat_ray.analysis.compare_results import MEANING, MEASURES, PARTS, FinishedRun, Result
from kat_ray.termination import RULES, Effect

_SHARES = ("avg_at_k", "pass_at_k")
_RELATIVE = ("mean_length", "generated_tokens", "tflop")

INTERVALS = (
    "Differences are rule minus against, over the seeds that both have. avg@k and pass@k: paired by seed and "
    "held-out problem, in points, with a 95 % bootstrap interval that resamples seeds and problems (with one seed, "
    "problems only). An interval that contains 0 does not tell the two apart. Tokens and TFLOP: relative to the "
    "other run of the same seed, mean over seeds [smallest, largest]; no interval: there are too few seeds for one."
)


@dataclass(frozen=True, eq=False)
class Paired:
    """One arm against a baseline: at equal steps, and, where it is known, at equal cost by the cost's name."""

    result: Result
    baseline: Result
    seeds: tuple[int, ...]
    differences: dict[str, Difference]
    equal: dict[str, EqualCost]


@dataclass(frozen=True, eq=False)
class Compared:
    """Arms set against each other; `curves` by label, `unknown` says whose are lacking."""

    results: Sequence[Result]
    notes: Sequence[str]
    pairs: Sequence[Paired]
    curves: dict[str, ArmCurve]
    unknown: str | None

    @classmethod
    def of(cls, results: Sequence[Result], notes: Sequence[str]) -> Compared:
        return cls(results, notes, paired(results), arm_curves(results), without_curves(results))


def paired(results: Sequence[Result]) -> list[Paired]:
    """Every arm against every baseline: rules that do nothing, and controls, which are held against the former."""
    nothing = [r for r in results if RULES[r.rule].effect is Effect.NOTHING]
    baselines = nothing + [r for r in results if RULES[r.rule].copies]
    found = []
    for number, baseline in enumerate(baselines):
        for result in results:
            pairs = result.pairs_with(baseline)
            if pairs and result not in baselines[:number]:
                seeds = tuple(a.seed for a, _ in pairs)
                equal = {name: at for name in COSTS if (at := equal_cost(pairs, name)) is not None}
                found.append(Paired(result, baseline, seeds, _differences(pairs), equal))
    return found


def _differences(pairs: Sequence[tuple[FinishedRun, FinishedRun]]) -> dict[str, Difference]:
    right = [np.array([run.right for run in runs]) for runs in zip(*pairs, strict=True)]
    gaps = {"avg_at_k": right[0] - right[1], "pass_at_k": (right[0] > 0) * 1.0 - (right[1] > 0)}
    found = {name: bootstrap(gap) for name, gap in gaps.items()}
    for name in _RELATIVE:
        ratios = [a.measures[name] / b.measures[name] - 1 for a, b in pairs]
        found[name] = Difference(float(np.mean(ratios)), min(ratios), max(ratios))
    return found


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: mean and, over several seeds, standard deviation."""
    rows = []
    for result in results:
        row = [result.label]
        for name in MEASURES:
            values = result.measure(name)
            digits = ".1%" if name in _SHARES else ".3f" if name == "tflop" else ",.0f"
            spread = f" ± {values.std(ddof=1):{digits}}" if len(values) > 1 else ""
            row.append("-" if np.isnan(values).any() else f"{values.mean():{digits}}{spread}")
        rows.append(row)
    return ["rule", *MEASURES.values()], rows


def difference_table(pairs: Sequence[Paired]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the paired differences."""
    rows = []
    for pair in pairs:
        cells = [f"{d.mean:+.1%} [{d.low:+.1%}, {d.high:+.1%}]" for d in pair.differences.values()]
        rows.append([pair.result.label, pair.baseline.label, ", ".join(map(str, pair.seeds)), *cells])
    return ["rule", "against", "seeds", *(MEASURES[name] for name in (*_SHARES, *_RELATIVE))], rows


def equal_tables(pairs: Sequence[Paired]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heading and rows at equal cost, by its name; none where no pair is known there."""
    tables = {}
    for name in COSTS:
        rows = [equal_row(p.result.label, p.baseline.label, p.equal[name], name) for p in pairs if name in p.equal]
        if rows:
            tables[name] = (equal_heading(name), rows)
    return tables


def caption(results: Sequence[Result]) -> str:
    """What the table's figures are."""
    k = ", ".join(map(str, sorted({result.k for result in results})))
    return f"Mean over seeds ± standard deviation; k = {k}. {MEANING}"


def write_results(compared: Compared, out: Path) -> list[Path]:
    """Save the comparison as Markdown, CSV (one row a run) and JSON; curves, where there are any, as CSV too."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"compare.{kind}" for kind in ("md", "csv", "json")]
    files[0].write_text(_markdown(compared), encoding="utf-8")
    measures = (*MEASURES, *PARTS)
    runs = [(result.label, run) for result in compared.results for run in result.runs]
    rows = [[label, run.seed, *(run.measures[name] for name in measures)] for label, run in runs]
    _write_csv(files[1], ["rule", "seed", *measures], rows)
    text = json.dumps(_document(compared), indent=2, allow_nan=False)
    files[2].write_text(text + "\n", encoding="utf-8")
    return [*files, *_write_curves(compared.curves, out)]


def _write_curves(curves: Mapping[str, ArmCurve], out: Path) -> list[Path]:
    """compare-points.csv: one row an evaluation; compare-curves.csv: one row a place of a mean and its band."""
    if not curves:
        return []
    files = [out / f"compare-{what}.csv" for what in ("points", "curves")]
    points = [
        [label, seed, *(point[name] for name in POINT)]
        for label, arm in curves.items()
        for seed, curve in arm.runs.items()
        for point in curve.points
    ]
    _write_csv(files[0], ["rule", "seed", *POINT], points)
    places = [
        [label, name, *place]
        for label, arm in curves.items()
        for name, costs in arm.costs.items()
        for place in zip(costs.tolist(), *(values.tolist() for values in arm.bands[name]), strict=True)
    ]
    _write_csv(files[1], ["rule", "axis", "at", "mean", "low", "high"], places)
    return files


def _write_csv(path: Path, heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heading)
        writer.writerows(rows)


def _markdown(compared: Compared) -> str:
    parts = [_markdown_table(*table(compared.results)), caption(compared.results)]
    if compared.pairs:
        parts += [_markdown_table(*difference_table(compared.pairs)), INTERVALS]
    tables = equal_tables(compared.pairs)
    for name, content in tables.items():
        parts += [f"At equal {COSTS[name]}:", _markdown_table(*content)]
    parts += [*([EQUAL_COST] if tables else []), *filter(None, [compared.unknown])]
    if compared.notes:
        parts.append("\n".join(f"- Note: {note}" for note in compared.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in (heading, ["---"] * len(heading), *rows))


def _document(compared: Compared) -> dict[str, Any]:
    return {
        "meaning": caption(compared.results),
        "intervals": INTERVALS,
        "equal_cost": EQUAL_COST,
        "bands": BANDS,
        "not_at_equal_cost": compared.unknown,
        "notes": list(compared.notes),
        "rules": {result.label: _of_arm(result) for result in compared.results},
        "differences": [
            {
                "rule": pair.result.label,
                "against": pair.baseline.label,
                "seeds": list(pair.seeds),
                **{name: d._asdict() for name, d in pair.differences.items()},
                "at_equal": {name: equal_document(equal) for name, equal in pair.equal.items()},
            }
            for pair in compared.pairs
        ],
        "curves": {label: arm.document() for label, arm in compared.curves.items()},
    }


def _of_arm(result: Result) -> dict[str, Any]:
    measures = {n: result.measure(n).tolist() for n in (*MEASURES, *PARTS)}
    return {
        "rule": result.rule,
        "k": result.k,
        "seeds": list(result.seeds),
        "runs": list(map(str, result.folders)),
        **{n: [None if math.isnan(v) else v for v in values] for n, values in measures.items()},
    }
