"""Arms at equal cost: accuracy where two runs of a seed have taken as many tokens, or as much arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kat_ray.analysis.bootstrap import Band, Difference, band, bootstrap
from kat_ray.analysis.compare_curves import COSTS, STEPS, Curve
from kat_ray.analysis.compare_results import FinishedRun, Result
from kat_ray.types.records import FloatArray

_GRID = 101  # places of a curve's mean and band

EQUAL_COST = (
    "avg@k of both runs of a seed where they have cost the same: the smaller of their two totals. Each held-out "
    "problem's share of right answers is interpolated linearly between the evaluations before and after; those "
    "along the way may have fewer than k answers. Differences are rule - against, paired and with intervals as at "
    "equal steps. The run that cost more is looked at before its end, where its learning rate has not come down "
    "yet: planned for that cost, it might have done better."
)
BANDS = (
    "Mean over seeds of what the evaluations along the runs gave, linear between them; dots are single seeds. "
    "Bands are 95 % bootstrap intervals of each rule alone, over seeds and problems (with one seed, problems "
    "only). All rules answer the same problems, so differences are known better than the bands suggest: see the "
    "tables."
)


@dataclass(frozen=True, eq=False)
class EqualCost:
    """Two arms at equal cost, S seeds: `costs` [S], which share of each run that is, and avg@k of both there."""

    seeds: tuple[int, ...]
    costs: FloatArray
    shares: tuple[float, float]  # mean over seeds
    avg_at_k: tuple[float, float]
    difference: Difference


def equal_cost(pairs: Sequence[tuple[FinishedRun, FinishedRun]], name: str) -> EqualCost | None:
    """Pairs of runs of one seed at the largest cost that both curves cover; None where no pair has two curves."""
    seeds, costs, shares, right = [], [], [], []
    for one, other in pairs:
        if one.curve is None or other.curve is None:
            continue
        a, b = (curve.cost(name) for curve in (one.curve, other.curve))
        cost = min(a[-1], b[-1])
        if cost < max(a[0], b[0]):
            continue
        seeds.append(one.seed)
        costs.append(cost)
        shares.append((cost / a[-1], cost / b[-1]))
        right.append([curve.at(name, np.array([cost]))[0] for curve in (one.curve, other.curve)])
    if not seeds:
        return None
    both = np.array(right)  # [seeds, 2, problems]
    return EqualCost(
        seeds=tuple(seeds),
        costs=np.array(costs),
        shares=_two(np.mean(shares, axis=0)),
        avg_at_k=_two(both.mean(axis=(0, 2))),
        difference=bootstrap(both[:, 0] - both[:, 1]),
    )


def _two(values: FloatArray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def without_curves(results: Sequence[Result]) -> str | None:
    """One line on the runs that cannot be held against others at equal cost."""
    lacking = {r.label: [str(run.seed) for run in r.runs if run.curve is None] for r in results}
    runs = [f"{label} (seed {', '.join(seeds)})" for label, seeds in lacking.items() if seeds]
    if not runs:
        return None
    return (
        f"Not evaluated along the way, so not known at equal cost: {'; '.join(runs)}. Set evaluation.every, or "
        "`kat-ray compare --evaluate-every`, before a run."
    )


@dataclass(frozen=True, eq=False)
class ArmCurve:
    """Mean and band of an arm's accuracy at costs [G], and its runs' curves by seed."""

    costs: Mapping[str, FloatArray]
    bands: Mapping[str, Band]
    runs: Mapping[int, Curve]

    def document(self) -> dict[str, Any]:
        """As compare.json holds it: the points, and by what they are drawn against mean and band."""
        return {
            "points": [{"seed": seed, **point} for seed, curve in self.runs.items() for point in curve.points],
            **{
                name: {"at": costs.tolist(), **{n: v.tolist() for n, v in self.bands[name]._asdict().items()}}
                for name, costs in self.costs.items()
            },
        }


def arm_curves(results: Sequence[Result]) -> dict[str, ArmCurve]:
    """By label, the arms all of whose runs were evaluated along the way, at costs that are the same for all arms.

    An arm's own end at the latest: where its cheapest run has ended, a mean would be of other runs.
    """
    curves: dict[str, dict[int, Curve]] = {}
    for result in results:
        own = {run.seed: run.curve for run in result.runs if run.curve is not None}
        if len(own) == len(result.runs) and len({curve.right.shape[1] for curve in own.values()}) == 1:
            curves[result.label] = own
    found: dict[str, ArmCurve] = {}
    names = (*COSTS, STEPS)
    for label, own in curves.items():
        costs = {name: _grid(name, own, curves) for name in names}
        bands = {n: band(np.stack([c.at(n, costs[n]) for c in own.values()], axis=1)) for n in names}
        found[label] = ArmCurve(costs, bands, own)
    return found


def _grid(name: str, own: Mapping[int, Curve], curves: Mapping[str, Mapping[int, Curve]]) -> FloatArray:
    """Places from 0 to the furthest arm's end, as far as all of an arm's own runs have them, and where they end."""
    ends = {label: min(c.cost(name)[-1] for c in runs.values()) for label, runs in curves.items()}
    first, last = max(c.cost(name)[0] for c in own.values()), min(c.cost(name)[-1] for c in own.values())
    places = np.linspace(0, max(ends.values()), _GRID)
    return np.array([*places[(first <= places) & (places < last)], last])


def equal_row(label: str, against: str, equal: EqualCost, name: str) -> list[str]:
    """A row of the table at equal cost."""
    digits = ",.0f" if name == "generated_tokens" else ",.3f"
    low, high = (f"{value:{digits}}" for value in (equal.costs.min(), equal.costs.max()))
    d = equal.difference
    return [
        label,
        against,
        ", ".join(map(str, equal.seeds)),
        low if low == high else f"{equal.costs.mean():{digits}} [{low}, {high}]",
        *(f"{share:.0%}" for share in equal.shares),
        *(f"{share:.1%}" for share in equal.avg_at_k),
        f"{d.mean:+.1%} [{d.low:+.1%}, {d.high:+.1%}]",
    ]


def equal_heading(name: str) -> list[str]:
    """The heading of `equal_row`."""
    of_both = ("share of its run", "share of the other run", "avg@k", "avg@k of the other run")
    return ["rule", "against", "seeds", COSTS[name], *of_both, "difference"]


def equal_document(equal: EqualCost) -> dict[str, Any]:
    """As compare.json holds it; of two values the first is the rule's, the second the other's."""
    return {
        "seeds": list(equal.seeds),
        "costs": equal.costs.tolist(),
        "shares": list(equal.shares),
        "avg_at_k": list(equal.avg_at_k),
        "difference": equal.difference._asdict(),
    }
