"""What the tokens of a rollout have in common: the ratio of learner to sampler over all of them.

It needs every log-probability of a rollout before the loss of its first token, hence a pass without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

RolloutRatio = Literal["mean", "sum"]  # log of the geometric mean of the tokens' ratios, or of their product


def rollout_log_ratios(kind: RolloutRatio, log_ratio: Tensor, counts: Tensor, tokens: Sequence[int]) -> Tensor:
    """The mean or sum of `log_ratio` [T] over each rollout's tokens that count, given to each of its tokens, [T].

    Rollouts lie one after another, `tokens` says how many rows each has; `counts` [T] is bool. 0 where none counts.
    """
    rollout = torch.repeat_interleave(
        torch.arange(len(tokens), device=log_ratio.device),
        torch.tensor(tokens, device=log_ratio.device, dtype=torch.long),
    )
    sums = log_ratio.new_zeros((2, len(tokens)), dtype=torch.float64)
    sums[0].index_add_(0, rollout, torch.where(counts, log_ratio, 0).double())
    sums[1].index_add_(0, rollout, counts.double())
    total, number = sums[:, rollout]
    return (total if kind == "sum" else total / number.clamp(min=1)).to(log_ratio.dtype)
