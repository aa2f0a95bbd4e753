"""The losses of a step that also learns from given completions: those tokens have a loss of their own, apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.policy import PolicyAndDistillation
from kat_ray.losses.term import StudentLogprobs, TermSums, TokenRows


@dataclass(frozen=True)
class WithGiven:
    """`generated` over the tokens that were generated, plus sum w loss over those that were given.

    The loss of a given token is `distillation` from the teacher, or without one -log p(token). Sums and maxima of
    generated tokens are those of a batch without the given ones.
    """

    generated: PolicyAndDistillation
    distillation: Distillation | None

    _own: ClassVar[tuple[str, ...]] = ("given_tokens", "given_weight", "given_dropped", "given_loss", "given_nll")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.generated.stop_ids

    @property
    def temperature(self) -> float:
        """That of both; `objective.opd.student_temperature`."""
        return self.generated.temperature

    @property
    def sum_names(self) -> tuple[str, ...]:
        return (*self.generated.sum_names, *self._own)

    @property
    def max_names(self) -> tuple[str, ...]:
        return self.generated.max_names

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """See `LossTerm`."""
        if rows.given_weights is None:
            found = self.generated(student, rows)
            return found._replace(sums=torch.cat([found.sums, found.sums.new_zeros(len(self._own))]))
        (own, own_rows), (other, other_rows) = _split(student, rows)
        found = self.generated(own, own_rows)
        loss, sums = self._given(other, other_rows)
        return TermSums(found.loss + loss, torch.cat([found.sums, sums.to(found.sums)]), found.maxima)

    def with_gradient(
        self, result: TermSums, student: StudentLogprobs, derivatives: StudentLogprobs, rows: TokenRows
    ) -> TermSums:
        """Counts how hard the losses of generated tokens pull."""
        if rows.given_weights is not None:
            generated = rows.given_weights == 0
            student, derivatives, rows = student.part(generated), derivatives.part(generated), rows.part(generated)
        count = len(self._own)
        inner = result._replace(sums=result.sums[:-count])
        found = self.generated.with_gradient(inner, student, derivatives, rows)
        return result._replace(sums=torch.cat([found.sums, result.sums[-count:]]))

    def _given(self, student: StudentLogprobs, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """Their loss, and the sums of `_own`."""
        nll, weights = -student.sampled, rows.weights
        seen = torch.isfinite(nll)
        if self.distillation is None:
            counts = seen & ~(weights <= 0)
            loss = torch.where(counts, weights * torch.where(counts, nll, 0), 0).sum()
            tokens, weight = counts.sum(), torch.where(counts, weights, 0).sum()
            dropped = (~seen & ~(weights <= 0)).sum()
        else:
            found = self.distillation(student, rows)
            sums = dict(zip(self.distillation.sum_names, found.sums, strict=True))
            loss, tokens, weight, dropped = found.loss, sums["tokens"], sums["weight"], sums["dropped"]
        with torch.no_grad():
            likely = torch.where(seen, nll, 0).sum()
            return loss, torch.stack([x.detach().double() for x in (tokens, weight, dropped, loss, likely)])


def _split(
    student: StudentLogprobs, rows: TokenRows
) -> tuple[tuple[StudentLogprobs, TokenRows], tuple[StudentLogprobs, TokenRows]]:
    """Generated tokens, and given ones, whose weights are those of their own loss."""
    assert rows.given_weights is not None
    given = rows.given_weights != 0  # also where it is NaN: the loss shows it, and the step is skipped
    weights = rows.given_weights[given]
    theirs = rows._replace(given_weights=None, advantages=None, policy_weights=None, sequence=None).part(given)
    own = rows._replace(given_weights=None).part(~given)
    return (student.part(~given), own), (student.part(given), theirs._replace(weights=weights))
