"""A step's rollouts while they are generated: which sampler has which, and what must be given out again.

A sampler's rollouts are one order, under an attempt number of their own. If it dies, its records die with it, those
of rollouts that had ended too: all of them are ordered again, under the same ids, prompts and seeds, from whichever
sampler is idle first. What other samplers made is kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.cluster.pools import Pools, shard_of
from actors.cluster.waiting import LOST, get, slices
from kat_ray.types.records import GenerateRequest, RolloutSpec, SamplerReport, StepStart

log = logging.getLogger("kat_ray.sampling")


@dataclass(frozen=True)
class Done:
    """An order that was carried out, and the monitor that saw it."""

    order: GenerateRequest
    report: SamplerReport
    monitor: int


class Sampling:
    """The orders of one step."""

    def __init__(
        self,
        pools: Pools,
        step: int,
        specs: Sequence[RolloutSpec],
        step_start: StepStart,
        rule_state: Mapping[str, Any],
        attempts: Iterator[int],
    ) -> None:
        """Set all samplers going: the i-th of n on `specs[i::n]`."""
        self.step, self.specs, self.step_start, self.version = step, specs, step_start, pools.version
        self.rule_state = rule_state
        self.lost = 0  # samplers
        self._pools, self._attempts = pools, attempts
        self._running: dict[Any, tuple[int, GenerateRequest]] = {}
        self._pending: list[RolloutSpec] = []
        self._idle: set[int] = set()
        self._reviving: dict[Future[bool], int] = {}
        self._done: list[Done] = []
        self._over = Event()  # nobody waits for lost samplers any more
        self._lost_records: Counter[int] = Counter()  # orders whose records were lost, by sampler
        n = len(pools.samplers)
        for i in range(n):
            self._give(i, specs[i::n])

    def finish(self) -> list[Done]:
        """Wait until every rollout of the step has ended, every chunk was answered, and lost samplers are back."""
        waiting = slices(self._pools.limits.step_timeout, "rollouts")
        threads = ThreadPoolExecutor(max(1, len(self._pools.samplers)), "revive")
        try:
            while self._running or self._pending or (self._reviving and not self._can_do_without()):
                self._give_out()
                seconds = next(waiting)
                if self._running:
                    for ref in ray.wait(list(self._running), timeout=seconds)[0]:
                        self._take(ref, threads)
                else:
                    futures.wait(self._reviving, seconds, futures.FIRST_COMPLETED)
                self._welcome()
                self._pools.tick(interruptible=True)
        finally:
            self._over.set()
            threads.shutdown()  # who recovers from what ended this must be the only one to revive anything
        return self._done

    def _give(self, sampler: int, specs: Sequence[RolloutSpec]) -> None:
        self._idle.discard(sampler)
        if specs:
            order = GenerateRequest(next(self._attempts), self.step, self.version, tuple(specs), self.rule_state)
            self._running[self._pools.samplers[sampler].generate.remote(order)] = (sampler, order)

    def _give_out(self) -> None:
        idle = sorted(self._idle)
        if self._pending and idle:
            pending, self._pending = self._pending, []
            for i, sampler in enumerate(idle):
                self._give(sampler, pending[i :: len(idle)])

    def _take(self, ref: Any, threads: ThreadPoolExecutor) -> None:
        sampler, order = self._running.pop(ref)
        try:
            (report,) = get([ref], "rollouts")
        except LOST as error:
            self._pools.note_loss("sampler", sampler, error)
            self.lost += 1
            self._again(order)
            self._reviving[threads.submit(self._pools.revive_sampler, sampler, self._over.is_set)] = sampler
        except ObjectLostError as error:  # scores that a new monitor would have to see: the sampler is as it was
            self._note_lost_records(sampler, error)
            self._again(order)
            self._idle.add(sampler)
        else:
            self._idle.add(sampler)
            self._done.append(Done(order, report, shard_of(sampler, len(self._pools.monitors))))

    def _can_do_without(self) -> bool:
        """Whether all else is done, and the lost samplers find no place and are not needed."""
        if self._running or self._pending:
            return False
        spare = self._pools.spare_lost("sampler")
        if {*spare} != {*self._reviving.values()}:
            return False
        self._pools.drop("sampler", spare)
        return True

    def _note_lost_records(self, sampler: int, error: ObjectLostError) -> None:
        """A node that is lost may cost every sampler's order its records: that counts once."""
        before = max(self._lost_records.values(), default=0)
        self._lost_records[sampler] += 1
        if self._lost_records[sampler] > before:
            self._pools.note_loss("record", self.step, error)

    def _again(self, order: GenerateRequest) -> None:
        """Nothing that was made of an order is used: its rollouts wait for a sampler."""
        self._pools.abandon(order)
        self._pending += order.specs

    def _welcome(self) -> None:
        """Samplers that have come back are idle."""
        for revived in [r for r in self._reviving if r.done()]:
            self._idle.add(self._reviving.pop(revived))
            revived.result()
