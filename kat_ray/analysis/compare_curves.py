"""Accuracy along a run: what its evaluations say, against what training had cost by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kat_ray.types.records import FloatArray

STEPS = "step"
# What a run costs: its name in records, and in tables.
COSTS = {"generated_tokens": "generated tokens", "tflop": "TFLOP"}
_TOKENS = ("prompt_tokens", "generated_tokens", "kept_tokens", "scored_tokens", "trained_tokens")
POINT = (STEPS, "generated_tokens", "scored_tokens", "trained_tokens", "tflop", "k", "avg_at_k")


@dataclass(frozen=True, eq=False)
class Curve:
    """One run's evaluations, E of them, in their order.

    `points` [E] hold the fields of `POINT`; `right` [E, problems] are right answers as shares of k. Steps, tokens
    and TFLOP ascend.
    """

    points: Sequence[Mapping[str, float]]
    right: FloatArray

    def cost(self, name: str) -> FloatArray:
        """A field of the points, [E]."""
        return np.array([point[name] for point in self.points], dtype=float)

    def at(self, name: str, costs: FloatArray) -> FloatArray:
        """Share of right answers to each problem at costs [G] within the curve, [G, problems].

        Linear between the evaluations before and after; exact at them.
        """
        own = self.cost(name)
        before = np.clip(np.searchsorted(own, costs, side="right") - 1, 0, len(own) - 2)
        share = ((costs - own[before]) / (own[before + 1] - own[before]))[:, None]
        at: FloatArray = (1 - share) * self.right[before] + share * self.right[before + 1]
        return at


def curve_of(
    lines: Sequence[Mapping[str, Any]], tflop: Callable[[Mapping[str, Any]], float]
) -> tuple[Curve | None, str | None]:
    """The curve that lines of evaluations.jsonl make, and what is wrong where they make none.

    Neither where the run was not evaluated between its start and its end. Of two lines of one step the later one
    counts. `tflop` takes a line's tokens.
    """
    by_step = {line.get("step", 0): line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    if len(ordered) < 3:
        return None, None
    if any(line.get(name) is None for line in ordered for name in _TOKENS):
        return None, "an earlier version wrote it, without the tokens that training took until each evaluation"
    right = [np.array(line.get("right", ()), dtype=float) / line["k"] for line in ordered]
    if len({len(row) for row in right}) > 1 or not len(right[0]) or max(row.max() for row in right) > 1:
        return None, "its lines are not of the same problems"
    points = [
        {
            **{name: line.get(name, 0) for name in POINT},
            "tflop": tflop(line),
            "avg_at_k": float(row.mean()),
        }
        for line, row in zip(ordered, right, strict=True)
    ]
    curve = Curve(points, np.array(right))
    if any((np.diff(curve.cost(name)) <= 0).any() for name in COSTS):
        return None, "tokens do not grow from line to line"
    return curve, None
