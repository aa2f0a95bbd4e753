"""Losses of single tokens from an advantage: what the policy gradient of a step is made of.

Each takes the learner's log-probability of the sampled token, with gradient, the log-probability of the policy that
the ratio is held against, and the token's advantage; each gives a loss [C] in which a positive advantage asks for
more of the token. Sums and means over tokens are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import entropy, event_logprobs, is_stop
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.losses.term import StudentLogprobs, TermSums, TokenRows, temperature_of


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


def gradient_pulls(
    student: StudentLogprobs, derivatives: StudentLogprobs, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """L1 norms [C] of the gradients in a token's logits, of the policy's loss and of the KL.

    The policy's loss depends on log p of the sampled token alone, the KL on the other three, so derivatives in them
    tell the two apart. With c = dL / dlog p(token) the policy's gradient in logit v is c (1{v = token} - p(v)), of
    norm 2 |c| (1 - p(token)). Of the KL's, D the sum of its derivatives, an event has its own derivative - D times
    its mass, which its ids share in proportion to their probability: so the sum over events is the sum over ids,
    and takes no pass over the vocabulary. At a temperature T it is of the logits divided by T, hence 1 / T of that.
    """
    policy = 2.0 * derivatives.sampled.abs() * -torch.expm1(student.sampled)
    return policy, _kl_gradient(student, derivatives, temperature).abs().sum(dim=1)


def gradient_alignment(
    student: StudentLogprobs,
    derivatives: StudentLogprobs,
    rows: TokenRows,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
) -> Tensor:
    """Inner product of the two gradients, and square of each one's norm: [C, 3], policy's before KL's.

    In the logits of events, an event's being one that is added to those of all its ids: the top k, the rest, and
    the stop ids outside the top k. Where ids of the tail are pulled at differently cannot be told from them.
    """
    masses = torch.cat([student.topk, student.tail[:, None], student.stop[:, None]], dim=1).exp()
    inside = rows.topk_ids == rows.token_ids[:, None]
    outside = ~inside.any(dim=1)
    stops = is_stop(rows.token_ids, stop_ids)
    sampled = torch.cat([inside, (outside & ~stops)[:, None], (outside & stops)[:, None]], dim=1)
    policy = derivatives.sampled[:, None] * (sampled.to(masses) - masses)
    kl = _kl_gradient(student, derivatives, temperature)
    return torch.stack([(policy * kl).sum(dim=1), (policy**2).sum(dim=1), (kl**2).sum(dim=1)], dim=1)


def _kl_gradient(student: StudentLogprobs, derivatives: StudentLogprobs, temperature: float) -> Tensor:
    """Of the KL in the logits of the events: top k, tail, stop ids; [C, k + 2]."""
    masses, slopes = (
        torch.cat([of.topk, of.tail[:, None], of.stop[:, None]], dim=1)
        for of in (student.learnt, derivatives.learnt)
    )
    return (slopes - slopes.sum(dim=1, keepdim=True) * masses.exp()) / temperature


# The loss of a token from the learner's log-probability, the sampler's, the advantage, and the logarithm of its
# rollout's ratio of learner to sampler. That is the token's own where no pass has been made for it.
PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
# Its weight, without gradient, from log (learner / sampler) of the token and of its rollout.
Correction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PolicyAndDistillation:
    """The policy's loss and the KL in one: opd_weight * sum w KL + rl_weight * sum u PG; their sums stay apart."""

    distillation: Distillation | StudentStatistics  # the latter without a teacher
    loss: PolicyLoss
    correction: Correction | None
    opd_weight: float
    rl_weight: float

    _own: ClassVar[tuple[str, ...]] = (
        "policy_loss", "policy_tokens", "ratio", "ratio_squared", "clipped_low", "clipped_high", "masked",
        "policy_entropy", "kl_loss",
    )  # fmt: skip
    _of_gradient: ClassVar[tuple[str, ...]] = (
        "policy_pull", "kl_pull", "gradient_product", "policy_gradient_squared", "kl_gradient_squared",
    )  # fmt: skip

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.distillation.stop_ids

    @property
    def temperature(self) -> float:
        """That of the KL."""
        return temperature_of(self.distillation)

    @property
    def sum_names(self) -> tuple[str, ...]:
        return (*self.distillation.sum_names, *self._own, *self._of_gradient)

    @property
    def max_names(self) -> tuple[str, ...]:
        return (*self.distillation.max_names, "ratio", "log_ratio")

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """See `LossTerm`; what is counted of the gradient is 0 until `with_gradient`."""
        kl = self.distillation(student, rows)
        kl_loss = kl.loss.detach().double()
        unknown = kl.sums.new_zeros(len(self._of_gradient))
        if rows.advantages is None or rows.policy_weights is None:  # no rollout here is in the policy's loss
            sums = torch.cat([kl.sums, kl.sums.new_zeros(len(self._own) - 1), kl_loss[None], unknown])
            return TermSums(kl.loss * self.opd_weight, sums, torch.cat([kl.maxima, kl.maxima.new_zeros(2)]))
        counts = rows.policy_weights > 0
        log_ratio = (student.sampled - rows.sampled_logprobs).detach()
        of_rollout = log_ratio if rows.sequence is None else rows.sequence
        found = self.loss(student.sampled, rows.sampled_logprobs, rows.advantages, of_rollout)
        weight = torch.ones_like(log_ratio) if self.correction is None else self.correction(log_ratio, of_rollout)
        per_token = found.loss * weight
        policy = torch.where(counts, rows.policy_weights * per_token, torch.zeros_like(per_token)).sum()
        with torch.no_grad():
            ratio = log_ratio.exp()
            columns = (
                torch.ones_like(ratio), ratio, ratio**2, found.clipped_low, found.clipped_high, weight == 0,
                self._entropy(student, rows),
            )  # fmt: skip
            means = [torch.where(counts, c, 0).double().sum() for c in columns]
            own = torch.stack([policy.detach().double(), *means, kl_loss])
            sizes = torch.stack([ratio, log_ratio.abs()], dim=1)
            largest = torch.cat([torch.where(counts[:, None], sizes, 0), sizes.new_zeros(1, 2)]).amax(dim=0)
        loss = self.opd_weight * kl.loss + self.rl_weight * policy
        return TermSums(loss, torch.cat([kl.sums, own, unknown]), torch.cat([kl.maxima, largest.to(kl.maxima)]))

    def with_gradient(
        self, result: TermSums, student: StudentLogprobs, derivatives: StudentLogprobs, rows: TokenRows
    ) -> TermSums:
        """Counts how hard each of the two losses, with its weight, pulls at the logits, and if the same way."""
        pulls = torch.stack(gradient_pulls(student, derivatives, self.temperature), dim=1)
        alignment = gradient_alignment(student, derivatives, rows, self.stop_ids, self.temperature)
        found = torch.cat([pulls, alignment], dim=1).double().sum(dim=0)
        sums = torch.cat([result.sums[: -len(self._of_gradient)], found.to(result.sums)])
        return result._replace(sums=sums)

    def _entropy(self, student: StudentLogprobs, rows: TokenRows) -> Tensor:
        """Of the top k, each on its own, and the rest as one: at most that of the whole distribution, [C].

        Without a top k -log p of the sampled token, whose mean estimates that of the whole distribution.
        """
        if not rows.topk_ids.shape[1]:
            return -student.sampled
        stops = is_stop(rows.topk_ids, self.stop_ids)
        return entropy(event_logprobs(student.topk, student.tail, student.stop, stops, "raw"))
