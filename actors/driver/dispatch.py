"""Which sampler has which of a step's rollouts. A pure machine: events in, instructions out, no Ray, no clock.

A sampler's rollouts are one request, under an attempt number of their own. If it dies, its records die with it,
those of rollouts that had ended too: all of them are asked for again, under the same ids, prompts and seeds, from
whichever sampler is idle first. What other samplers made is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kat_ray.types.records import RolloutSpec

Sampler: TypeAlias = int  # number of a replica


@dataclass(frozen=True)
class Assign:
    """Have a sampler generate rollouts, under an attempt number that is new in the run."""

    sampler: Sampler
    attempt: int
    specs: tuple[RolloutSpec, ...]


@dataclass(frozen=True)
class Abandon:
    """Have the scorers forget an attempt: nothing that was made of it is used."""

    attempt: int


@dataclass(frozen=True)
class Revive:
    """Bring a lost sampler back."""

    sampler: Sampler


@dataclass(frozen=True)
class CountRecordLoss:
    """Records were lost with a node. One node may cost every sampler's request its records: that counts once."""


@dataclass(frozen=True)
class Drop:
    """Go on without a lost sampler."""

    sampler: Sampler


Instruction: TypeAlias = Assign | Abandon | Revive | CountRecordLoss | Drop


class Dispatch:
    """The requests of one step. Every rollout is in exactly one place: pending, at a sampler, or generated."""

    def __init__(self, specs: Sequence[RolloutSpec], samplers: Sequence[Sampler], attempts: Iterator[int]) -> None:
        """The i-th of n samplers is to get `specs[i::n]`; `begin` says so."""
        self._attempts = attempts
        self._pending: list[RolloutSpec] = list(specs)
        self._idle = list(samplers)
        self._busy: dict[Sampler, Assign] = {}
        self._lost: set[Sampler] = set()  # and being brought back
        self._record_losses: Counter[Sampler] = Counter()

    @property
    def needs_samplers(self) -> bool:
        """Whether rollouts are still to be generated."""
        return bool(self._pending or self._busy)

    @property
    def is_over(self) -> bool:
        """Whether every rollout is generated and every lost sampler is back or dropped."""
        return not (self._pending or self._busy or self._lost)

    def begin(self) -> list[Instruction]:
        """The first requests."""
        return list(self._assign())

    def generated(self, sampler: Sampler) -> list[Instruction]:
        """A sampler's request was carried out."""
        del self._busy[sampler]
        self._idle.append(sampler)
        return list(self._assign())

    def sampler_lost(self, sampler: Sampler) -> list[Instruction]:
        """A sampler died with its request."""
        self._lost.add(sampler)
        return [self._take_back(sampler), Revive(sampler), *self._assign()]

    def records_lost(self, sampler: Sampler) -> list[Instruction]:
        """Scores that a new monitor would have to see are gone; the sampler is as it was."""
        before = max(self._record_losses.values(), default=0)
        self._record_losses[sampler] += 1
        counts = [CountRecordLoss()] if self._record_losses[sampler] > before else []
        abandon = self._take_back(sampler)
        self._idle.append(sampler)
        return [*counts, abandon, *self._assign()]

    def ready(self, sampler: Sampler) -> list[Instruction]:
        """A lost sampler is back and knows all it must."""
        self._lost.discard(sampler)
        self._idle.append(sampler)
        return list(self._assign())

    def tick(self, expendable: Collection[Sampler]) -> list[Instruction]:
        """Once a second: `expendable` samplers have found no place for long and the run can do without them.

        They are dropped where nothing but they is waited for.
        """
        if self.needs_samplers or not self._lost or not self._lost <= set(expendable):
            return []
        dropped, self._lost = sorted(self._lost), set()
        return [Drop(sampler) for sampler in dropped]

    def _take_back(self, sampler: Sampler) -> Abandon:
        request = self._busy.pop(sampler)
        self._pending += request.specs
        return Abandon(request.attempt)

    def _assign(self) -> Iterator[Assign]:
        """Deal what is pending to the samplers that are idle."""
        idle = sorted(self._idle)
        pending, self._pending = (self._pending, []) if idle else ([], self._pending)
        for i, sampler in enumerate(idle):
            if specs := tuple(pending[i :: len(idle)]):
                self._idle.remove(sampler)
                self._busy[sampler] = Assign(sampler, next(self._attempts), specs)
                yield self._busy[sampler]
