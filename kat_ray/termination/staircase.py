"""What a cut removes of a rollout's KL, for every threshold at once.

The rule (kat.py) cuts a rollout at the first streak of C tested windows that are all low. A streak that begins with
token j is low under every threshold above

    v(j) = max(z of the windows that begin at j, j + S, ..., j + (C - 1) S)

so the cut under a threshold s is the first j with v(j) < s. As s rises the cut moves towards the start in jumps,
one at every v(j) that is smaller than all before it. These few jumps say all that a calibration asks of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kat_ray.termination.settings import KatParameters
from kat_ray.types.records import FloatArray


@dataclass(frozen=True)
class Staircase:
    """Under a threshold s a rollout loses the share at the first of K jumps with `value < s`, if there is one."""

    value: FloatArray  # [K] nats, falling
    share: FloatArray  # [K] of the rollout's summed KL, 0 to 1, falling


def staircase(kl: FloatArray, rule: KatParameters) -> Staircase:
    """The jumps of a rollout that was seen to its end; kl [T] is the reverse KL of its tokens, nats.

    A value that is not finite makes the windows that hold it undefined, hence not low, and adds nothing to the sum.
    """
    kl = np.asarray(kl, dtype=np.float64)
    tested = _window_means(kl, rule.window)[:: rule.stride][-(-rule.exempt // rule.stride) :]
    count = len(tested) - rule.consecutive + 1
    if count < 1:
        return Staircase(np.zeros(0), np.zeros(0))
    value = tested[:count].copy()
    for shift in range(1, rule.consecutive):
        np.maximum(value, tested[shift : shift + count], out=value)
    before = np.minimum.accumulate(np.concatenate([[np.inf], value[:-1]]))
    jumps = np.flatnonzero(value < before)
    cut = (jumps + -(-rule.exempt // rule.stride)) * rule.stride
    sums = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(kl), kl, 0.0))])
    total = sums[-1]
    share = (total - sums[cut]) / total if total > 0 else np.zeros(len(cut))
    return Staircase(value[jumps], share)


def _window_means(kl: FloatArray, width: int) -> FloatArray:
    """z(width + j) for every j, infinite where undefined; sums strictly in order, as window.py adds them."""
    if len(kl) < width:
        return np.zeros(0)
    finite = np.isfinite(kl)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, kl, 0.0))])
    means = (sums[width:] - sums[:-width]) / width
    if not finite.all():
        bad = np.concatenate([[0], np.cumsum(~finite)])
        means[bad[width:] > bad[:-width]] = np.inf
    return np.asarray(means)
