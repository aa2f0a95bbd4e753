"""Losses of single tokens from an advantage: what the policy gradient of a step is made of.

Each takes the learner's log-probability of the sampled token, with gradient, the log-probability of the policy that
the ratio is held against, and the token's advantage; each gives a loss [C] in which a positive advantage asks for
more of the token. Sums and means over tokens are the caller's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """Loss of C tokens, with gradient, and where the ratio was held."""

    loss: Tensor  # [C]
    clipped_low: Tensor  # [C] bool: the ratio was below its range and the loss has no gradient, or a bounded one
    clipped_high: Tensor  # [C] bool


def clip_loss(
    logp: Tensor, anchor: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> TokenLoss:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) (PPO, arXiv 1707.06347; high > low: DAPO, arXiv 2503.14476).

    `dual` bounds the loss of a negative advantage by -A dual, whatever the ratio (arXiv 1912.09729).
    """
    ratio = torch.exp(logp - anchor)
    held = ratio.clamp(1.0 - low, 1.0 + high)
    loss = torch.maximum(-advantage * ratio, -advantage * held)
    too_high = (ratio > 1.0 + high) & (advantage > 0)
    if dual is not None:
        bound = -advantage * dual
        over = (advantage < 0) & (loss > bound)
        loss = torch.where(over, bound, loss)
        too_high = too_high | over
    return TokenLoss(loss, (ratio < 1.0 - low) & (advantage < 0), too_high)


def reinforce_loss(logp: Tensor, advantage: Tensor) -> TokenLoss:
    """-A log p."""
    nowhere = torch.zeros_like(logp, dtype=torch.bool)
    return TokenLoss(-advantage * logp, nowhere, nowhere)


def cispo_loss(logp: Tensor, anchor: Tensor, advantage: Tensor, low: float, high: float) -> TokenLoss:
    """-A clip(rho, 1 - low, 1 + high) log p, with no gradient through the ratio (arXiv 2506.13585).

    Unlike a clipped ratio it leaves every token its gradient.
    """
    ratio = torch.exp(logp.detach() - anchor)
    held = ratio.clamp(1.0 - low, 1.0 + high)
    return TokenLoss(-advantage * held * logp, ratio < 1.0 - low, ratio > 1.0 + high)


def gspo_loss(logp: Tensor, sequence: Tensor, advantage: Tensor, low: float, high: float) -> TokenLoss:
    """The clipped loss of a ratio that is the same for all tokens of a rollout (GSPO-token, arXiv 2507.18071).

    `sequence` [C] is the mean over the rollout's tokens of log rho, without gradient.
    """
    return clip_loss(sequence + logp - logp.detach(), torch.zeros_like(logp), advantage, low, high)


def truncated_weight(log_ratio: Tensor, cap: float) -> Tensor:
    """min(rho, cap), without gradient: truncated importance sampling of learner against sampler."""
    return torch.exp(log_ratio.detach()).clamp(max=cap)


def interval_weight(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where it lies in [low, high], else 0, without gradient: of a token (IcePop), or of its rollout."""
    ratio = torch.exp(log_ratio.detach())
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


def sequence_mask_weight(sequence: Tensor, low: float, high: float) -> Tensor:
    """1 for the tokens of rollouts whose ratio lies in [low, high], else 0; `sequence` [C] is its logarithm."""
    ratio = torch.exp(sequence.detach())
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
