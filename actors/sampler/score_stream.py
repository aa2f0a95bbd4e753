"""Chunks of one attempt on their way from a sampler to scorers and monitor, and the decisions that come back.

Scorers and monitors may die at any moment; Ray starts them anew, empty, under the same handle. What a lost scorer
had not scored goes to the next one with its whole context; what it had scored lies in the object store and is kept.
A monitor that has forgotten the attempt is told of it again: `admit`, and every scored chunk in its order.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from kat_ray.cluster.heartbeat import Heartbeat
from kat_ray.config.cluster import ClusterConfig
from kat_ray.data.chunks import PendingRollout, with_context
from kat_ray.errors import StateLost, UserError
from kat_ray.types.records import ChunkRefs, EngineEnd, GenerateRequest, RolloutChunk, TerminationDecision

# What says that an actor is gone, or is a new process under the old name.
LOST = (RayActorError, StateLost, ObjectLostError)
_SLICE = 1.0  # seconds between two signs of life while waiting for another actor


@dataclass
class _Sent:
    """One chunk without an answer; `number` is its place among all chunks of the attempt."""

    number: int
    refs: ChunkRefs
    decision: Any  # future of a TerminationDecision
    sent_at: float


class ScoringStream:
    """All chunks of one attempt. `rollouts` are its rollouts by id, with every token so far."""

    def __init__(
        self,
        order: GenerateRequest,
        scorers: Sequence[Any],
        monitor: Any,
        rollouts: Mapping[int, PendingRollout],
        limits: ClusterConfig,
        heartbeat: Heartbeat,
    ) -> None:
        self._order, self._scorers, self._monitor = order, scorers, monitor
        self._rollouts = rollouts
        self._limits = limits
        self._heartbeat = heartbeat
        self._unanswered: dict[int, deque[_Sent]] = {}
        self.released: dict[int, list[int]] = {}  # by scorer: rollouts that it can forget
        self.chunks: list[ChunkRefs] = []
        self.decision_seconds: list[float] = []
        self.wait_seconds = 0.0
        self.recovered = 0
        self._admit()

    def unanswered(self, scorer: int) -> int:
        """Chunks that this scorer has not been answered for."""
        return len(self._unanswered.get(scorer, ()))

    def send(self, scorer: int, chunk: RolloutChunk) -> None:
        """Have a chunk scored, and the scores looked at."""
        refs, decision = self._submit(scorer, chunk)
        sent = _Sent(len(self.chunks), refs, decision, time.monotonic())
        self.chunks.append(refs)
        self._unanswered.setdefault(scorer, deque()).append(sent)

    def arrived(self) -> Iterator[TerminationDecision]:
        """Decisions that are there, oldest first of each scorer."""
        for scorer in tuple(self._unanswered):
            while (queue := self._unanswered.get(scorer)) and queue[0].decision.done():
                yield self._answer(scorer)

    def next(self, scorer: int) -> TerminationDecision:
        """Wait for the oldest decision on a chunk of this scorer."""
        started = time.monotonic()
        decision = self._answer(scorer)
        self.wait_seconds += time.monotonic() - started
        return decision

    def drain(self) -> Iterator[TerminationDecision]:
        """Wait for all decisions; then let the scorers forget what was cut since their last chunk."""
        while waiting := [scorer for scorer, queue in self._unanswered.items() if queue]:
            yield self.next(waiting[0])
        for scorer, released in self.released.items():
            if released:
                self._scorers[scorer].release.remote(released)

    def _submit(self, scorer: int, chunk: RolloutChunk) -> tuple[ChunkRefs, Any]:
        chunk_ref = ray.put(chunk)
        scored, teacher = self._scorers[scorer].score.options(num_returns=2).remote(chunk_ref)
        refs = ChunkRefs(tuple(chunk.rollout_ids.tolist()), chunk_ref, scored, teacher)
        return refs, self._monitor.observe.remote(scored).future()

    def _admit(self) -> None:
        order = self._order
        ids, probes = [s.rollout_id for s in order.specs], [s.probe for s in order.specs]
        self._monitor.admit.remote(order.step, order.attempt, ids, probes, order.rule_state)

    def _answer(self, scorer: int) -> TerminationDecision:
        """The oldest answer of a scorer's chunks; what was lost on the way is sent again first."""
        while True:
            queue = self._unanswered[scorer]
            sent = queue[0]
            try:
                decision: TerminationDecision = self._result(sent.decision, "a decision")
            except LOST as error:
                self._mend(scorer, sent, error)
                if not self._unanswered.get(scorer):  # all that this one owed went to another
                    scorer = next(s for s, q in self._unanswered.items() if q)
                continue
            queue.popleft()
            self.decision_seconds.append(time.monotonic() - sent.sent_at)
            return decision

    def _result(self, future: Any, what: str) -> Any:
        """A future's result. Waiting for others is no sign of being stuck; for how long is bounded."""
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

    def _mend(self, scorer: int, sent: _Sent, error: Exception) -> None:
        """Find out who was lost, the scorer or the monitor, and have its work done again."""
        self.recovered += 1
        others = len(self._scorers) + 1
        if self.recovered > self._limits.max_restarts * others:
            raise UserError(
                f"{len(self._scorers)} scorers and the monitor were lost {self.recovered} times in one step "
                f"(cluster.max_restarts = {self._limits.max_restarts} each), last: {str(error).splitlines()[-1]}"
            ) from error
        if self._is_scored(sent):
            self._tell_monitor_again()
        else:
            self._move(scorer)

    def _is_scored(self, sent: _Sent) -> bool:
        try:
            self._result(sent.refs.scored.future(), "a score")
        except LOST:
            return False
        return True

    def _tell_monitor_again(self) -> None:
        self._wait_until_up(self._monitor, "the trap monitor")
        self._admit()
        open_ = {sent.number: sent for queue in self._unanswered.values() for sent in queue}
        for number, refs in enumerate(self.chunks):
            if number not in open_:  # a score that was lost with its node leaves a gap: `ObjectLostError`
                self._result(refs.scored.future(), "a score")
            decision = self._monitor.observe.remote(refs.scored).future()
            if number in open_:
                open_[number].decision = decision

    def _move(self, lost: int) -> None:
        """Give a lost scorer's rollouts to the next one, and send again what was not scored."""
        target = (lost + 1) % len(self._scorers)
        self._wait_until_up(self._scorers[target], f"scorer {target}")
        self.released.pop(lost, None)
        for rollout in self._rollouts.values():
            if rollout.scorer == lost:
                rollout.scorer, rollout.known = target, False
        owed = self._unanswered.pop(lost)
        kept = self._unanswered.setdefault(target, deque())
        for sent in owed:
            if not self._is_scored(sent):
                chunk = with_context(ray.get(sent.refs.chunk), self._rollouts)
                sent.refs, sent.decision = self._submit(target, chunk)
                self.chunks[sent.number] = sent.refs
                self._release_cut(chunk, target)
            kept.append(sent)

    def _release_cut(self, chunk: RolloutChunk, scorer: int) -> None:
        """What was cut meanwhile was in a chunk that had to be scored all the same: it ends here."""
        running = chunk.rollout_ids[chunk.ended == EngineEnd.RUNNING].tolist()
        cut = [i for i in running if self._rollouts[i].cut]
        if cut:
            self.released.setdefault(scorer, []).extend(cut)

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
