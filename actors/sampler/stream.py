"""A state machine for a sampler's chunks: it takes events and returns instructions.

    Sent         Score, Observe             a chunk goes to its scorer, its scores to the monitor
    Answered     Abort                      the monitor's decision on the oldest chunk of a scorer
    ScorerLost   AwaitScorer, Rescore ...   its rollouts go to the next scorer, with what was not scored
    MonitorLost  AwaitMonitor, Admit, ...   the new one must see every chunk again, in order
    Drained      Release                    nothing is owed: scorers drop what was cut since their last chunk

It uses no Ray, clock or threads: `actors.sampler.score_stream` executes the instructions in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kat_ray.data.chunks import PendingRollout
from kat_ray.errors import UserError


@dataclass(frozen=True)
class Sent:
    """A chunk of these rollouts was built for a scorer. Chunks are numbered from 0 in this order."""

    scorer: int
    rollout_ids: tuple[int, ...]
    ended: frozenset[int] = frozenset()  # those of them that it ends


@dataclass(frozen=True)
class Answered:
    """The decision on the oldest chunk that a scorer owes has arrived."""

    scorer: int
    cut: tuple[int, ...]


@dataclass(frozen=True)
class ScorerLost:
    """The oldest chunk that a scorer owes will not be scored. `scored` are the chunks it owes that were."""

    scorer: int
    scored: frozenset[int]
    reason: str


@dataclass(frozen=True)
class MonitorLost:
    """The monitor does not know these rollouts: it was restarted."""

    reason: str


@dataclass(frozen=True)
class Drained:
    """No chunk is owed, and none will be sent."""


@dataclass(frozen=True)
class Admit:
    """Tell the monitor of the rollouts."""


@dataclass(frozen=True)
class Score:
    """Have the scorer score the new chunk."""

    number: int
    scorer: int


@dataclass(frozen=True)
class Rescore:
    """Have the scorer score a chunk again, with the context of the rollouts that are not `known` to it."""

    number: int
    scorer: int


@dataclass(frozen=True)
class Observe:
    """Have the monitor observe a chunk's scores. If it was `answered` before, nobody waits for the decision, but
    its scores must exist.
    """

    number: int
    answered: bool = False


@dataclass(frozen=True)
class Abort:
    """Stop generating these rollouts, which are cut. Each rollout is named once."""

    rollout_ids: tuple[int, ...]


@dataclass(frozen=True)
class Release:
    """Have a scorer drop the state of these rollouts."""

    scorer: int
    rollout_ids: tuple[int, ...]


@dataclass(frozen=True)
class AwaitScorer:
    """Wait until a scorer is up."""

    scorer: int


@dataclass(frozen=True)
class AwaitMonitor:
    """Wait until the monitor is up."""


Event: TypeAlias = Sent | Answered | ScorerLost | MonitorLost | Drained
Instruction: TypeAlias = Admit | Score | Rescore | Observe | Abort | Release | AwaitScorer | AwaitMonitor


class Stream:
    """The chunks of one attempt. It sets `scorer`, `known` and `cut` of `rollouts`; the sampler adds the tokens."""

    def __init__(
        self, rollouts: Mapping[int, PendingRollout], groups: Collection[range], max_restarts: int
    ) -> None:
        """Scorers are numbered from 0; those of one group are a range, and stand in for another."""
        self._rollouts = rollouts
        self._peers = {scorer: peers for peers in groups for scorer in peers}
        self._scorers = len(self._peers)
        self._max_restarts = max_restarts
        self._chunks: list[Sent] = []
        self._owed: dict[int, deque[int]] = {}  # by scorer: chunks without a decision, oldest first
        self._released: dict[int, list[int]] = {}  # by scorer: rollouts whose state it is still to drop
        self.recovered = 0  # losses so far

    def owed(self, scorer: int) -> Sequence[int]:
        """Chunks of a scorer without a decision, oldest first."""
        return self._owed.get(scorer, ())

    @property
    def owing(self) -> list[int]:
        return [scorer for scorer, numbers in self._owed.items() if numbers]

    def take_released(self, scorer: int) -> list[int]:
        """Rollouts that this scorer must drop with its next chunk. Each is returned once."""
        return self._released.pop(scorer, [])

    def handle(self, event: Event) -> list[Instruction]:
        """The instructions that follow from an event, in order. UserError after too many losses."""
        match event:
            case Sent():
                return self._sent(event)
            case Answered():
                return self._answered(event)
            case ScorerLost():
                self._count_loss(event.reason)
                return self._scorer_lost(event)
            case MonitorLost():
                self._count_loss(event.reason)
                return [AwaitMonitor(), Admit(), *self._observe_all()]
            case Drained():
                assert not self.owing, f"scorers {self.owing} owe chunks"
                released, self._released = self._released, {}
                return [Release(scorer, tuple(ids)) for scorer, ids in released.items() if ids]

    def _sent(self, event: Sent) -> list[Instruction]:
        number = len(self._chunks)
        self._chunks.append(event)
        self._owed.setdefault(event.scorer, deque()).append(number)
        return [Score(number, event.scorer), Observe(number)]

    def _answered(self, event: Answered) -> list[Instruction]:
        self._owed[event.scorer].popleft()
        # A restarted monitor, which sees everything again, names rollouts that were cut before.
        cut = tuple(i for i in event.cut if not self._rollouts[i].cut)
        for rollout in (self._rollouts[i] for i in cut):
            rollout.cut = True
            if rollout.known and not rollout.end_sent:  # a scorer that was told of the end has dropped it
                self._drop(rollout.scorer, [rollout.rollout_id])
        return [Abort(cut)] if cut else []

    def _observe_all(self) -> Iterator[Instruction]:
        owed = {number for numbers in self._owed.values() for number in numbers}
        for number in range(len(self._chunks)):
            yield Observe(number, answered=number not in owed)

    def _scorer_lost(self, event: ScorerLost) -> list[Instruction]:
        lost, peers = event.scorer, self._peers[event.scorer]
        target = peers[(lost + 1 - peers.start) % len(peers)]
        instructions: list[Instruction] = [AwaitScorer(target)]
        moved = [r for r in self._rollouts.values() if r.scorer == lost]
        # If only scores were lost, with a node, the scorer is alive and still holds its rollouts.
        if target != lost and (left := (*self.take_released(lost), *self._held(moved, event))):
            instructions.append(Release(lost, left))
        for rollout in moved:
            rollout.scorer, rollout.known = target, False
        numbers = self._owed.pop(lost)
        self._owed.setdefault(target, deque()).extend(numbers)
        again = self._to_rescore(numbers, event.scored)
        for number in again:
            instructions += [Rescore(number, target), Observe(number)]
        self._drop(target, self._left_by(again))
        return instructions

    def _to_rescore(self, numbers: Iterable[int], scored: frozenset[int]) -> list[int]:
        """Chunks that were not scored, and those that follow them in a rollout, which is scored without a gap."""
        again: list[int] = []
        gaps: set[int] = set()
        for number in numbers:
            live = {i for i in self._chunks[number].rollout_ids if not self._rollouts[i].cut}
            if number not in scored or live & gaps:
                again.append(number)
                gaps |= live
        return again

    def _held(self, moved: Iterable[PendingRollout], event: ScorerLost) -> list[int]:
        """Rollouts that a lost scorer may still hold: it was told neither of their end nor to drop them."""
        unscored = [self._chunks[n] for n in self._owed[event.scorer] if n not in event.scored]
        untold = {i for chunk in unscored for i in chunk.ended}
        running = {r.rollout_id for r in self._rollouts.values() if not r.cut and not r.end_sent}
        return [r.rollout_id for r in moved if r.known and r.rollout_id in running | untold]

    def _left_by(self, numbers: Sequence[int]) -> list[int]:
        """Rollouts that were cut meanwhile, and that a scorer takes up again with these chunks for nothing."""
        left: dict[int, None] = {}
        for number in numbers:
            chunk = self._chunks[number]
            left |= dict.fromkeys(i for i in chunk.rollout_ids if self._rollouts[i].cut)
            left = {i: None for i in left if i not in chunk.ended}
        return list(left)

    def _drop(self, scorer: int, rollout_ids: Iterable[int]) -> None:
        """Have a scorer drop rollouts with its next chunk."""
        released = self._released.setdefault(scorer, [])
        released += [i for i in rollout_ids if i not in released]

    def _count_loss(self, reason: str) -> None:
        self.recovered += 1
        if self.recovered > self._max_restarts * (self._scorers + 1):
            raise UserError(
                f"{self._scorers} scorers and the monitor were lost {self.recovered} times in one step "
                f"(cluster.max_restarts = {self._max_restarts} each), last: {reason}"
            )
