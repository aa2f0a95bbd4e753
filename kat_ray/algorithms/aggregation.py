"""How the losses of single tokens become one number: what each of them weighs.

A weight is 1 over a count of the *global* batch, so sums over micro-batches and ranks need no further division and
do not depend on how a batch is dealt out. A mean over micro-batch means would.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kat_ray.algorithms.groups import Floats

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def token_weights(
    kind: Aggregation,
    tokens: NDArray[np.int64],
    weight: Floats,
    length: int | None = None,
    stood_for: NDArray[np.bool_] | None = None,
) -> Floats:
    """What each token of a rollout [N] weighs in the loss of a step.

        token_mean     w / sum w T: all tokens of the batch alike
        sequence_mean  w / (T sum w): the mean of rollouts' means
        sequence_sum   w / sum w: the mean of rollouts' sums
        constant       w / (L sum w): the same over a constant `length` L (Dr. GRPO, arXiv 2503.20783)

    `tokens` T [N] are a rollout's tokens in the loss, `weight` w [N] what it counts itself. Rollouts without either
    weigh 0 and are in no count. With `stood_for` [N], rollouts that others' weights stand for, the number of those
    and of all that count is taken for sum w, which depends on the draw. ValueError for `constant` without a length,
    and with `stood_for` for both means, since what those would divide by is not known.
    """
    if kind == "constant" and not length:
        raise ValueError("constant: needs the length of a rollout that tokens are counted by")
    if kind in ("token_mean", "sequence_mean") and stood_for is not None:
        raise ValueError(f"{kind}: divides by lengths, and those of rollouts that others stand for are not known")
    counts = (tokens > 0) & (weight > 0)
    mass = np.where(counts, weight, 0.0)
    per_token = {
        "token_mean": mass,
        "sequence_mean": mass / np.maximum(tokens, 1),
        "sequence_sum": mass,
        "constant": mass / (length or 1),
    }[kind]
    total = (mass * tokens).sum() if kind == "token_mean" else mass.sum()
    if stood_for is not None:
        total = float((counts | (stood_for & (tokens > 0))).sum())
    weights: Floats = per_token / total if total else np.zeros_like(mass)
    return weights
