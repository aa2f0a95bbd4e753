"""How far two engines are apart on the same tokens, and what is said where that is too far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.errors import UserError
from kat_ray.models.tolerance import LogprobDifference
from kat_ray.types.records import FloatArray


class AgreementError(UserError):
    """Two engines of a run do not compute the same model."""


@dataclass(frozen=True)
class Difference:
    """|log p - log p'| over the tokens of all probes, in nats; infinite where one of the two is not finite."""

    mean: float
    largest: float
    tokens: int
    kind: str  # of the probe with the largest mean

    def within(self, tolerance: LogprobDifference) -> bool:
        """Whether rounding explains it."""
        return self.mean <= tolerance.mean and self.largest <= tolerance.max

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats on average, {self.largest:.2g} at most"


def difference(kinds: Sequence[str], ours: Sequence[FloatArray], theirs: Sequence[FloatArray]) -> Difference:
    """Of two engines' log-probabilities, [tokens] of each probe; `kinds` names the probes.

    ValueError where the two do not have the same tokens: they were not asked the same.
    """
    gaps = []
    for kind, a, b in zip(kinds, ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"{kind}: {a.shape} log-probabilities beside {b.shape}")
        with np.errstate(invalid="ignore"):
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        gaps.append(np.where(np.isfinite(gap), gap, np.inf))
    every = np.concatenate([*gaps, np.zeros(0)])
    if not len(every):
        raise ValueError("no tokens to compare")
    worst = max((i for i, gap in enumerate(gaps) if len(gap)), key=lambda i: gaps[i].mean())
    return Difference(float(every.mean()), float(every.max()), len(every), kinds[worst])


def require(difference: Difference, tolerance: LogprobDifference, ours: str, theirs: str, advice: str) -> None:
    """`AgreementError` where the two sides are further apart than `tolerance`; `advice` says what to change."""
    if not difference.within(tolerance):
        raise AgreementError(
            f"{ours} and {theirs} do not compute the same model: their log-probabilities of {difference.tokens} "
            f"tokens differ by {difference} (allowed: {tolerance.mean:g} and {tolerance.max:g}), most at: "
            f"{difference.kind}. {advice}. run.check_agreement = false goes on all the same"
        )
