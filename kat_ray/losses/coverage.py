"""What the top k leaves out: how much mass the student's k most likely tokens hold, and the KL in the rest.

The events of the loss are the top k and one tail. The tail hides how the models differ within it: the KL over
events is below that over the vocabulary by tail mass x KL(student's tail || teacher's tail). The teacher's half of
that is not known, so it is estimated; the student's is, and says which k would see more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kat_ray.losses.divergence import event_logprobs, log_add, log_sum, reverse_kl
from kat_ray.losses.eos import EosMode

Parts = tuple[Tensor, Tensor, Tensor]  # top k, tail and stop

# A top k compared with its own most likely quarter shows what resolving more mass gives.
COARSER = 4


def coarser_kl(student: Parts, teacher: Parts, is_stop: Tensor, eos: EosMode) -> tuple[Tensor, Tensor]:
    """KL [N] and the student's tail mass [N] had the top k been a quarter as long.

    Both distributions are log-masses as `kat_ray.losses.divergence` has them: top k [N, k], most likely first,
    tail [N] and stop [N]. `is_stop` [N, k] says which ids are stop ids. The rest of the top k joins tail and stop.
    """
    k = max(1, student[0].shape[-1] // COARSER)
    own, given = _coarser(student, is_stop, k), _coarser(teacher, is_stop, k)
    kl = reverse_kl(event_logprobs(*own, is_stop[:, :k], eos), event_logprobs(*given, is_stop[:, :k], eos))
    return kl, log_add(own[1], own[2]).exp()


def _coarser(parts: Parts, is_stop: Tensor, k: int) -> Parts:
    topk, tail, stop = parts
    rest, stops = topk[:, k:], is_stop[:, k:]
    return (
        topk[:, :k],
        log_sum(torch.cat([rest.masked_fill(stops, -math.inf), tail[:, None]], dim=-1)),
        log_sum(torch.cat([rest.masked_fill(~stops, -math.inf), stop[:, None]], dim=-1)),
    )


def hidden_kl(kl: float, tail_mass: float, coarser: float, coarser_tail_mass: float) -> float:
    """Estimate of the KL within the tail, nats, from means at k and at a quarter of it.

    Mass that is still in the tail is taken to hold as much KL as that which the last three quarters of the top k
    took out of it. 0 where these hold next to nothing.
    """
    resolved = coarser_tail_mass - tail_mass
    return max(0.0, kl - coarser) / resolved * tail_mass if resolved > 1e-6 else 0.0


class MassCurve:
    """Sums over tokens of the student's mass in its k most likely ones, for k = 1, 2, 4 ... and the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.sizes = (*(2**i for i in range(math.ceil(math.log2(vocabulary)))), vocabulary)
        self.counts = True  # False: what is added is not taken
        self._sums = torch.zeros(len(self.sizes) + 1, dtype=torch.float64)

    @torch.no_grad()
    def add(self, logits_CV: Tensor) -> None:
        """Take C tokens; those whose distribution is not finite are left out."""
        if not self.counts:
            return
        masses_CV = torch.softmax(logits_CV.float(), dim=-1).sort(dim=-1, descending=True).values.cumsum(dim=-1)
        at = torch.tensor(self.sizes, device=masses_CV.device) - 1
        masses_CS = masses_CV[:, at]
        masses_CS = masses_CS[torch.isfinite(masses_CS).all(dim=-1)].double().cpu()
        self._sums += torch.cat([masses_CS.sum(dim=0), masses_CS.new_tensor([float(len(masses_CS))])])

    def take(self) -> list[float]:
        """Sums by `sizes`, then the number of tokens; they begin again at 0."""
        sums: list[float] = self._sums.tolist()
        self._sums.zero_()
        return sums

    def size_for(self, sums: Sequence[float], share: float) -> int | None:
        """The k that holds this share of the mass on average; None without a token.

        Between two sizes the mass is taken to be linear in log k.
        """
        *masses, tokens = sums
        if not tokens:
            return None
        means = [mass / tokens for mass in masses]
        above = next((i for i, mean in enumerate(means) if mean >= share), len(means) - 1)
        if above == 0:
            return self.sizes[0]
        low, high = means[above - 1], means[above]
        part = (share - low) / (high - low) if high > low else 1.0
        first, last = self.sizes[above - 1], self.sizes[above]
        return min(last, math.ceil(first * (last / first) ** part))
