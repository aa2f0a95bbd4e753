"""Rollouts that have ended in a step that goes on, asked for at the samplers that are at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ray.exceptions import ObjectLostError

from actors.cluster.handles import Handle, Ref, remote
from actors.cluster.waiting import ACTOR_LOST, get, ready
from actors.sampler.student_sampler import StudentSampler
from kat_ray.types.records import EndedRollout


class EndedRollouts:
    """One question at a time to each request; the answer is taken when it is there, and never waited for.

    What a lost sampler did not say any more is not missed: its rollouts are given out again, and reports hold all.
    """

    def __init__(self, take: Callable[[Sequence[EndedRollout]], object]) -> None:
        self._take = take
        self._asked: dict[int, Ref[list[EndedRollout]]] = {}  # by attempt
        self._seen: Counter[int] = Counter()

    def tick(self, working: Iterable[tuple[Handle[StudentSampler], int]]) -> None:
        """Take what has been answered, and ask the samplers at work, each with the attempt that it is at."""
        there = ready(list(self._asked.values()))
        for attempt, ref in [(a, r) for a, r in self._asked.items() if r in there]:
            del self._asked[attempt]
            try:
                (ended,) = get([ref], "rollouts that have ended")
            except (*ACTOR_LOST, ObjectLostError):
                continue
            self._seen[attempt] += len(ended)
            self._take(ended)
        for sampler, attempt in working:
            if attempt not in self._asked:
                ask = remote(sampler, StudentSampler.ended, concurrency_group="health")
                self._asked[attempt] = ask(attempt, self._seen[attempt])
