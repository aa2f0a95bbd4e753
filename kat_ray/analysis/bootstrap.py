"""95 % bootstrap intervals of means over seeds and held-out problems."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kat_ray.types.records import FloatArray, IntArray

RESAMPLES = 4000
_BLOCK = 200  # resamples of all places at once


class Difference(NamedTuple):
    """Mean over seeds; of shares `low` and `high` bound the 95 % interval, of relative ones they are extremes."""

    mean: float
    low: float
    high: float


class Band(NamedTuple):
    """Means and 95 % intervals at G places, each [G]."""

    mean: FloatArray
    low: FloatArray
    high: FloatArray


def bootstrap(gap: FloatArray, seed: int = 0) -> Difference:
    """Mean of differences [seeds, problems] and its 95 % percentile interval over seeds and problems.

    Both are resampled, each on its own; of one seed, problems only. Simulated at 3 seeds x 200 problems, it held
    the true difference in 100 % of cases without run-to-run spread, in 97 % with a standard deviation of 2 points
    between runs, in 94 % with one of 4: too wide where runs hardly vary, slightly too narrow where they vary much.
    """
    (mean,), (low,), (high,) = (values.tolist() for values in band(gap[None], seed))
    return Difference(mean, low, high)


def band(values: FloatArray, seed: int = 0) -> Band:
    """`bootstrap` of values [G, seeds, problems] at each of G places, all with the same resamples."""
    places, seeds, problems = values.shape
    taken_seeds, taken_problems = _resamples(seeds, problems, seed)
    means = np.empty((places, RESAMPLES))
    for start in range(0, RESAMPLES, _BLOCK):
        block = slice(start, start + _BLOCK)
        sums = np.einsum("gsb,bs->gb", values @ taken_problems[block].T.astype(float), taken_seeds[block])
        means[:, block] = sums / (seeds * problems)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return Band(values.mean(axis=(1, 2)), low, high)


@lru_cache(maxsize=2)  # a comparison asks for the same ones again and again; of 5,000 problems they are 80 MB
def _resamples(seeds: int, problems: int, seed: int) -> tuple[IntArray, IntArray]:
    """How often each resample takes each seed, [RESAMPLES, seeds], and each problem, [RESAMPLES, problems]."""
    rng = np.random.default_rng(seed)
    taken_seeds = np.empty((RESAMPLES, seeds), dtype=np.int32)
    taken_problems = np.empty((RESAMPLES, problems), dtype=np.int32)
    for row in range(RESAMPLES):
        taken_seeds[row] = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        taken_problems[row] = np.bincount(rng.integers(problems, size=problems), minlength=problems)
    return taken_seeds, taken_problems
