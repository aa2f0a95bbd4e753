"""The learner's log-probabilities of the sampled tokens, kept as a step's passes compute them anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kat_ray.data.batch import TrainingSample
from kat_ray.losses.term import LossTerm, SeesGradient, StudentLogprobs, TermSums, TokenRows, temperature_of
from kat_ray.types.records import FloatArray


class LogprobLog:
    """Of one step's rollouts; terms that are `watched` write to it."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # of the pass that is made
        self._found: dict[int, FloatArray] = {}

    def watched(self, term: LossTerm) -> LossTerm:
        """The same term, whose passes are kept here."""
        return _Watched(term, self._parts.append)

    def end_pass(self, samples: Sequence[TrainingSample]) -> None:
        """The pass that was made is that of these samples, token by token; of none: it counts nothing."""
        if samples:
            values = torch.cat(self._parts).cpu().numpy()
            ends = np.cumsum([len(sample.token_ids) for sample in samples])
            assert ends[-1] == len(values), f"{len(values)} log-probabilities of {ends[-1]} tokens"
            parts = np.split(values, ends[:-1])
            self._found |= {sample.rollout_id: part for sample, part in zip(samples, parts, strict=True)}
        self._parts.clear()

    def take(self) -> dict[int, FloatArray]:
        """[T] float32 of every rollout since the last call, T the tokens that the learner was given of it."""
        found, self._found = self._found, {}
        return found


class _Watched:
    """A term whose value and gradient are another's."""

    def __init__(self, term: LossTerm, keep: Callable[[Tensor], None]) -> None:
        self._term, self._keep = term, keep

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._term.stop_ids

    @property
    def temperature(self) -> float:
        return temperature_of(self._term)

    @property
    def sum_names(self) -> tuple[str, ...]:
        return self._term.sum_names

    @property
    def max_names(self) -> tuple[str, ...]:
        return self._term.max_names

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        self._keep(student.sampled.detach().float())
        return self._term(student, rows)

    def with_gradient(
        self, result: TermSums, student: StudentLogprobs, derivatives: StudentLogprobs, rows: TokenRows
    ) -> TermSums:
        term = self._term
        return term.with_gradient(result, student, derivatives, rows) if isinstance(term, SeesGradient) else result
