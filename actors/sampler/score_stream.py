"""Sends the chunks of one attempt to scorers and monitor, and receives the decisions.

Scorers and monitors may die at any moment; Ray restarts them, empty, under the same handle. `actors.sampler.stream`
decides what to do then; this module does it.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from actors.sampler.stream import (
    Abort,
    Admit,
    Answered,
    AwaitMonitor,
    AwaitScorer,
    Drained,
    Event,
    Instruction,
    MonitorLost,
    Observe,
    Release,
    Rescore,
    Score,
    ScorerLost,
    Sent,
    Stream,
)
from kat_ray.cluster.heartbeat import Heartbeat
from kat_ray.config.cluster import ClusterConfig
from kat_ray.data.chunks import PendingRollout, with_context
from kat_ray.errors import StateLost, UserError
from kat_ray.types.records import (
    ChunkRefs,
    EngineEnd,
    GenerateRequest,
    RolloutChunk,
    TerminationDecision,
    array_bytes,
)

# Errors that mean that an actor is gone, or is a new process under the old name.
LOST = (RayActorError, StateLost, ObjectLostError)
_SLICE = 1.0  # seconds between two heartbeats while waiting for another actor


def scorer_ranges(groups: Mapping[str, Sequence[Any]]) -> dict[str, range]:
    """Numbers of each group's scorers, all of them counted from 0."""
    ranges: dict[str, range] = {}
    start = 0
    for name, scorers in groups.items():
        ranges[name] = range(start, start := start + len(scorers))
    return ranges


class ScoringStream:
    """All chunks of one attempt. `rollouts` are its rollouts by id; `abort` is called with the ids of those that a
    decision cuts.
    """

    def __init__(
        self,
        request: GenerateRequest,
        groups: Mapping[str, Sequence[Any]],
        monitor: Any,
        rollouts: Mapping[int, PendingRollout],
        abort: Callable[[Sequence[int]], None],
        limits: ClusterConfig,
        heartbeat: Heartbeat,
    ) -> None:
        self._request, self._monitor = request, monitor
        self._scorers = [scorer for scorers in groups.values() for scorer in scorers]
        self._groups = [name for name, scorers in groups.items() for _ in scorers]
        self._rollouts, self._abort = rollouts, abort
        self._limits, self._heartbeat = limits, heartbeat
        self._stream = Stream(rollouts, scorer_ranges(groups).values(), limits.max_restarts)
        self._decisions: dict[int, Any] = {}  # futures, of chunks that have no answer yet
        self._sent_at: list[float] = []
        self.chunks: list[ChunkRefs] = []
        self.decision_seconds: list[float] = []
        self.wait_seconds = 0.0
        self._carry_out(Admit())

    @property
    def recovered(self) -> int:
        return self._stream.recovered

    def unanswered(self, scorer: int) -> int:
        """Number of this scorer's chunks without a decision."""
        return len(self._stream.owed(scorer))

    def take_released(self, scorer: int) -> list[int]:
        """Rollouts that this scorer must drop with its next chunk. Each is returned once."""
        return self._stream.take_released(scorer)

    def send(self, scorer: int, chunk: RolloutChunk) -> None:
        """Have the scorer score a chunk, and the monitor observe the scores."""
        self._sent_at.append(time.monotonic())
        ended = frozenset(chunk.rollout_ids[chunk.ended != EngineEnd.RUNNING].tolist())
        self._handle(Sent(scorer, tuple(chunk.rollout_ids.tolist()), ended), chunk)

    def poll(self) -> None:
        """Apply the decisions that have arrived, the oldest of each scorer first."""
        for scorer in self._stream.owing:
            while (owed := self._stream.owed(scorer)) and self._decisions[owed[0]].done():
                self._answer(scorer)

    def wait(self, scorer: int) -> None:
        """Wait for the decision on this scorer's oldest chunk, and apply it."""
        started = time.monotonic()
        self._answer(scorer)
        self.wait_seconds += time.monotonic() - started

    def drain(self) -> None:
        """Wait for all decisions; then have the scorers drop what was cut since their last chunk."""
        while owing := self._stream.owing:
            self.wait(owing[0])
        self._handle(Drained())

    def _handle(self, event: Event, chunk: RolloutChunk | None = None) -> None:
        for instruction in self._stream.handle(event):
            self._carry_out(instruction, chunk)

    def _carry_out(self, instruction: Instruction, chunk: RolloutChunk | None = None) -> None:
        match instruction:
            case Admit():
                request = self._request
                ids, probes = [s.rollout_id for s in request.specs], [s.probe for s in request.specs]
                teachers = [s.teacher for s in request.specs]
                self._monitor.admit.remote(request.step, request.attempt, ids, probes, request.rule_state, teachers)
            case Score(_, scorer):
                assert chunk is not None
                self.chunks.append(self._score(scorer, chunk))
            case Rescore(number, scorer):
                again = with_context(ray.get(self.chunks[number].chunk), self._rollouts)
                self.chunks[number] = self._score(scorer, again)
            case Observe(number, answered):
                scored = self.chunks[number].scored
                if answered:  # a score that was lost with its node leaves a gap: `ObjectLostError`
                    self._result(scored.future(), "a score")
                decision = self._monitor.observe.remote(scored).future()
                if not answered:
                    self._decisions[number] = decision
            case Abort(rollout_ids):
                self._abort(rollout_ids)
            case Release(scorer, rollout_ids):
                self._scorers[scorer].release.remote(list(rollout_ids))
            case AwaitScorer(scorer):
                self._wait_until_up(self._scorers[scorer], f"scorer {scorer}")
                self._brief(scorer)
            case AwaitMonitor():
                self._wait_until_up(self._monitor, "the trap monitor")

    def _brief(self, scorer: int) -> None:
        """Tell a scorer that may be new which of the student's weights the request is scored with, if any are."""
        weights, group = self._request.teacher_weights, self._groups[scorer]
        if group in weights:
            self._scorers[scorer].follow.remote(self._request.version, weights[group], True)

    def _score(self, scorer: int, chunk: RolloutChunk) -> ChunkRefs:
        chunk_ref = ray.put(chunk)
        scored, teacher = self._scorers[scorer].score.options(num_returns=2).remote(chunk_ref)
        return ChunkRefs(tuple(chunk.rollout_ids.tolist()), chunk_ref, array_bytes(chunk), scored, teacher)

    def _answer(self, scorer: int) -> None:
        """Apply the decision on a scorer's oldest chunk; what was lost is sent again first."""
        while True:
            if not self._stream.owed(scorer):  # its chunks went to another
                scorer = self._stream.owing[0]
            number = self._stream.owed(scorer)[0]
            try:
                decision: TerminationDecision = self._result(self._decisions[number], "a decision")
            except LOST as error:
                self._handle(self._loss(scorer, error))
                continue
            del self._decisions[number]
            self.decision_seconds.append(time.monotonic() - self._sent_at[number])
            self._handle(Answered(scorer, tuple(decision.rollout_ids.tolist())))
            return

    def _loss(self, scorer: int, error: Exception) -> ScorerLost | MonitorLost:
        """Whether scorer or monitor was lost: the monitor, if the chunk was scored."""
        owed = self._stream.owed(scorer)
        reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
        if self._is_scored(owed[0]):
            return MonitorLost(reason)
        return ScorerLost(scorer, frozenset(n for n in owed if self._is_scored(n)), reason)

    def _is_scored(self, number: int) -> bool:
        try:
            self._result(self.chunks[number].scored.future(), "a score")
        except LOST:
            return False
        return True

    def _result(self, future: Any, what: str) -> Any:
        """A future's result. It beats while it waits for others, for at most `cluster.step_timeout`."""
        deadline = time.monotonic() + self._limits.step_timeout
        while True:
            try:
                return future.result(timeout=_SLICE)
            except concurrent.futures.TimeoutError:
                self._heartbeat.beat()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"waited {self._limits.step_timeout:g} s for {what} (cluster.step_timeout)"
                    ) from None

    def _wait_until_up(self, actor: Any, what: str) -> None:
        deadline = time.monotonic() + self._limits.start_timeout
        while True:
            try:
                self._result(actor.health.options(concurrency_group="health").remote().future(), what)
                return
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{what} did not come back within {self._limits.start_timeout:g} s (cluster.start_timeout)"
                    ) from error
                self._heartbeat.beat()
                time.sleep(0.2)
