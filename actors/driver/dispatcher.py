"""A step's rollouts while they are generated: carries out what `actors.driver.dispatch` decides, on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.cluster.handles import Ref, remote
from actors.cluster.replica import Replica
from actors.cluster.revival import ReplicaRevival
from actors.cluster.run_actors import RunActors, shard_of
from actors.cluster.waiting import ACTOR_LOST, SLICE, Limit, get, ready
from actors.driver.dispatch import Abandon, Assign, CountRecordLoss, Dispatch, Drop, Instruction, Revive
from actors.driver.ended import EndedRollouts
from actors.sampler.student_sampler import StudentSampler
from kat_ray.types.records import EndedRollout, GenerateRequest, RolloutSpec, SamplerReport, StepStart


@dataclass(frozen=True)
class CompletedRequest:
    """A request that was carried out, and the monitor that saw it; None where there are none."""

    request: GenerateRequest
    report: SamplerReport
    monitor: int | None


class RolloutDispatcher:
    """The requests of one step, from the moment that it is made."""

    def __init__(
        self,
        actors: RunActors,
        step: int,
        specs: Sequence[RolloutSpec],
        step_start: StepStart,
        rule_state: Mapping[str, Any],
        attempts: Iterator[int],
        take_ended: Callable[[Sequence[EndedRollout]], object] | None = None,
    ) -> None:
        """Set all samplers going. `take_ended` is told of ended rollouts, while `finish` waits for the others."""
        self.step, self.specs, self.step_start = step, specs, step_start
        self.version, self.rule_state = actors.samplers.version, rule_state
        self._actors = actors
        self._replicas: dict[int, Replica[StudentSampler]] = {r.number: r for r in actors.samplers.replicas}
        # A sampler's place among all, which says whose its monitor is. It changes between two steps only.
        self._position = {r.number: i for i, r in enumerate(actors.samplers.replicas)}
        self._running: dict[Ref[SamplerReport], tuple[int, GenerateRequest]] = {}  # sampler, request
        self._requests: dict[int, GenerateRequest] = {}  # by attempt
        self._revivals: dict[int, ReplicaRevival] = {}
        self._completed: list[CompletedRequest] = []
        self._ended = None if take_ended is None else EndedRollouts(take_ended)
        self._dispatch = Dispatch(specs, list(self._replicas), attempts)
        self._carry_out(self._dispatch.begin())

    def finish(self) -> list[CompletedRequest]:
        """Wait until every rollout of the step has ended, every chunk was answered, and lost samplers are back."""
        limit = Limit.of(self._actors.supervisor.limits, "step_timeout")
        deadline, checked = time.monotonic() + limit.seconds, time.monotonic()
        while not self._dispatch.is_over:
            self._wait_a_while()
            for ref in ready(list(self._running)):
                self._take(ref)
            for number, revival in tuple(self._revivals.items()):
                if revival.poll():
                    del self._revivals[number]
                    self._carry_out(self._dispatch.ready(number))
            now = time.monotonic()
            if now - checked >= SLICE:
                checked = now
                self._tick()
                if now > deadline:
                    raise limit.error("rollouts")
        return self._completed

    def _wait_a_while(self) -> None:
        """Until something of what is waited for is there, or somebody has to be looked at."""
        refs = [*self._running, *(ref for revival in self._revivals.values() for ref in revival.pending)]
        patience = min((revival.patience for revival in self._revivals.values()), default=SLICE)
        if refs:
            ray.wait(refs, timeout=patience)
        else:
            time.sleep(patience)

    def _tick(self) -> None:
        self._actors.supervisor.check(interruptible=True)
        if self._ended is not None:
            working = [(self._replicas[sampler].handle, r.attempt) for sampler, r in self._running.values()]
            self._ended.tick(working)
        if self._revivals:
            expendable = [r.number for r in self._actors.samplers.expendable_lost()]
            self._carry_out(self._dispatch.tick(expendable))

    def _take(self, ref: Ref[SamplerReport]) -> None:
        sampler, request = self._running.pop(ref)
        try:
            (report,) = get([ref], "rollouts")
        except ACTOR_LOST as error:
            self._actors.supervisor.lost(self._replicas[sampler], error)
            self._carry_out(self._dispatch.sampler_lost(sampler))
        except ObjectLostError as error:
            self._carry_out(self._dispatch.records_lost(sampler), error)
        else:
            monitor = shard_of(self._position[sampler], len(self._actors.monitors.replicas))
            self._completed.append(CompletedRequest(request, report, monitor))
            self._carry_out(self._dispatch.generated(sampler))

    def _carry_out(self, instructions: Sequence[Instruction], error: BaseException | None = None) -> None:
        for instruction in instructions:
            match instruction:
                case Assign(sampler, attempt, specs):
                    weights = self._actors.teacher_weights
                    request = GenerateRequest(attempt, self.step, self.version, specs, self.rule_state, weights)
                    self._requests[attempt] = request
                    reference = remote(self._replicas[sampler].handle, StudentSampler.generate)(request)
                    self._running[reference] = (sampler, request)
                case Abandon(attempt):
                    self._actors.abandon(self._requests.pop(attempt))
                case Revive(sampler):
                    self._revivals[sampler] = self._actors.samplers.begin_revival(self._replicas[sampler])
                case CountRecordLoss():
                    assert error is not None
                    self._actors.supervisor.count_loss(f"record:{self.step}", error)
                case Drop(sampler):
                    del self._revivals[sampler]
                    self._actors.samplers.drop([self._replicas[sampler]])
