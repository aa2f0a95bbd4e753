"""A sampler's chunks while scorers and monitor die: every interleaving, without Ray.

`World` has scorers and a monitor that know what the real ones know of tokens, each with an inbox; `Schedules` draws
who works next and who dies.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from actors.sampler.score_stream import scorer_ranges
from actors.sampler.stream import (
    Abort,
    Admit,
    Answered,
    AwaitMonitor,
    AwaitScorer,
    Drained,
    MonitorLost,
    Observe,
    Release,
    Rescore,
    Score,
    ScorerLost,
    Sent,
    Stream,
)
from kat_ray.data.chunks import PendingRollout, build_chunk, with_context
from kat_ray.errors import UserError
from kat_ray.types.records import EngineEnd, RolloutChunk

LOST = "lost"


class RecordsLost(Exception):
    """What the sampler's order ends with: all its rollouts are sampled again."""


@dataclass
class Scores:
    """Of one chunk given to a scorer; `state` is None until it was scored or lost.

    `fetched`: a monitor that sees all again gets it. Its loss between the look at it and the monitor's is not
    tried: the monitor would find a gap.
    """

    chunk: RolloutChunk
    scorer: int
    state: str | None = None
    fetched: bool = False


@dataclass
class Scorer:
    held: dict = field(default_factory=dict)  # tokens by rollout, context included
    inbox: deque = field(default_factory=deque)
    dropped: set = field(default_factory=set)
    context_sent: set = field(default_factory=set)  # rollouts whose context this process was sent


@dataclass
class Decision:
    value: object = None  # None: not yet there; LOST; GAP; or the rollouts that it names


GAP = "gap"


class World:
    """One attempt: a sampler that generates, and everybody who looks at its chunks."""

    def __init__(self, rollouts, scorers, traps, max_restarts=10**6):
        self.rollouts = {i: PendingRollout(i, (90, i), i % scorers) for i in range(rollouts)}
        self.active = dict(self.rollouts)
        self.traps = traps  # by rollout: it is trapped once the monitor has seen so many tokens
        self.scorers = [Scorer() for _ in range(scorers)]
        self.seen = None  # the monitor's tokens by rollout; None: it does not know the attempt
        self.trapped = set()
        self.inbox = deque()
        self.scores, self.decisions, self.chunks = {}, {}, {}
        self.aborted = Counter()
        self.stream = Stream(self.rollouts, [range(scorers)], max_restarts)
        self.carry_out([Admit()])

    # --- the sampler

    def generate(self, rollout, tokens, end):
        for _ in range(tokens):
            token = len(rollout.token_ids) + 1
            rollout.add([token], np.array([[token, 1, 2]], np.int32), np.full((1, 3), -1.0, np.float32))
        if end:
            rollout.end = EngineEnd.MAX_TOKENS

    def flush(self):
        for scorer in range(len(self.scorers)):
            news = [r for r in self.active.values() if r.has_news and r.scorer == scorer]
            if news:
                released = self.stream.take_released(scorer)
                chunk = build_chunk(news, released, attempt=1, top_k=2, vocabulary=100)
                ids, ended = chunk.rollout_ids, chunk.rollout_ids[chunk.ended != EngineEnd.RUNNING]
                event = Sent(scorer, tuple(ids.tolist()), frozenset(ended.tolist()))
                self.carry_out(self.stream.handle(event), chunk)

    def carry_out(self, instructions, chunk=None):
        for instruction in instructions:
            match instruction:
                case Admit():
                    self.inbox.append(None)
                case Score(number, scorer):
                    self.submit(number, scorer, chunk)
                case Rescore(number, scorer):
                    self.submit(number, scorer, with_context(self.chunks[number], self.rollouts))
                case Observe(number, answered):
                    if answered and self.resolved(number) == LOST:
                        raise RecordsLost
                    decision = Decision()
                    self.scores[number].fetched |= answered
                    self.inbox.append((self.scores[number], decision))
                    if not answered:
                        self.decisions[number] = decision
                case Release(scorer, ids):
                    self.scorers[scorer].inbox.append(ids)
                case Abort(ids):
                    self.aborted.update(ids)
                    for i in ids:
                        rollout = self.active.pop(i)
                        rollout.topk_ids.clear()
                        rollout.logprobs.clear()
                case AwaitScorer() | AwaitMonitor():
                    pass  # whoever dies here is up again at once

    def submit(self, number, scorer, chunk):
        self.chunks[number], self.scores[number] = chunk, Scores(chunk, scorer)
        self.scorers[scorer].inbox.append(self.scores[number])
        sent = self.scorers[scorer].context_sent
        sent.update(i for n, i in enumerate(chunk.rollout_ids.tolist()) if chunk.context(n).size)

    def resolved(self, number):
        while self.scores[number].state is None:
            self.score(self.scores[number].scorer)
        return self.scores[number].state

    def poll(self):
        for scorer in self.stream.owing:
            while (owed := self.stream.owed(scorer)) and self.decisions[owed[0]].value is not None:
                self.answer(scorer)

    def answer(self, scorer):
        owed = list(self.stream.owed(scorer))
        value = self.decisions[owed[0]].value
        assert value != GAP, "the monitor was given a rollout's chunks out of order"
        if value != LOST:
            self.carry_out(self.stream.handle(Answered(scorer, value)))
        elif self.resolved(owed[0]) != LOST:
            self.carry_out(self.stream.handle(MonitorLost("")))
        else:
            scored = frozenset(n for n in owed if self.resolved(n) != LOST)
            self.carry_out(self.stream.handle(ScorerLost(scorer, scored, "")))

    # --- the others

    def score(self, index):
        scorer = self.scorers[index]
        task = scorer.inbox.popleft()
        if isinstance(task, tuple):
            self.drop(scorer, task)
            return
        self.drop(scorer, task.chunk.released.tolist())
        ids = task.chunk.rollout_ids.tolist()
        contexts = {i: task.chunk.context(n).tolist() for n, i in enumerate(ids)}
        for i in ids:
            if not contexts[i] and i not in scorer.held:
                assert i not in scorer.context_sent, "a living scorer lacks what it was sent"
                task.state = LOST
                scorer.context_sent.difference_update(i for i in ids if contexts[i])  # it took nothing of the chunk
                return
        for n, i in enumerate(ids):
            held = contexts[i] or scorer.held[i]
            assert held == [90, i, *range(1, int(task.chunk.start[n]) + 1)], "not the context of these rows"
            scorer.held[i] = held + task.chunk.new_tokens(n).tolist()
            scorer.dropped.discard(i)
            if task.chunk.ended[n]:
                self.forget(scorer, i)
        task.state = "scored"

    def drop(self, scorer, ids):
        for i in ids:
            assert i not in scorer.dropped, f"rollout {i} is released twice"
            if i in scorer.held:
                scorer.dropped.add(i)
                self.forget(scorer, i)

    def forget(self, scorer, i):
        del scorer.held[i]
        scorer.context_sent.discard(i)

    def observe(self):
        task = self.inbox[0]
        if task is None:
            self.seen = {i: 0 for i in self.rollouts} if self.seen is None else self.seen
            self.inbox.popleft()
            return
        scores, decision = task
        if scores.state is None:
            return  # it comes once its scores are there
        self.inbox.popleft()
        decision.value = LOST if scores.state == LOST or self.seen is None else self.decide(scores.chunk)

    def decide(self, chunk):
        rows = list(zip(chunk.rollout_ids.tolist(), chunk.start.tolist(), np.diff(chunk.offsets), strict=True))
        rows = [row for row in rows if row[0] not in self.trapped and row[1] >= self.seen[row[0]]]
        if any(start != self.seen[i] for i, start, _ in rows):
            return GAP
        for i, _, count in rows:
            self.seen[i] += int(count)
        new = tuple(i for i, *_ in rows if self.seen[i] >= self.traps[i])
        self.trapped |= {*new}
        return new

    def kill_scorer(self, index, scores_too):
        for task in self.scorers[index].inbox:
            if isinstance(task, Scores):
                task.state = LOST
        self.scorers[index] = Scorer()
        if scores_too:
            self.lose_scores(index, scores_too)

    def lose_scores(self, index, which):
        """Scores that lay on a lost node, small ones not among them."""
        for number, scores in self.scores.items():
            if scores.scorer == index and scores.state is not None and number % 2 in which and not scores.fetched:
                scores.state = LOST

    def kill_monitor(self):
        for task in self.inbox:
            if task is not None:
                task[1].value = LOST
        self.inbox.clear()
        self.seen, self.trapped = None, set()

    # --- the end

    def finish(self):
        """All rollouts end, all work is done; what must hold then."""
        for rollout in self.active.values():
            if rollout.end is EngineEnd.RUNNING:
                self.generate(rollout, 1, end=True)
        self.flush()
        while self.stream.owing:
            self.work()
            self.poll()
        self.carry_out(self.stream.handle(Drained()))
        if self.seen is None:  # it was lost when nothing was owed any more: the driver finds that out
            self.carry_out(self.stream.handle(MonitorLost("")))
        self.work()
        for i, rollout in self.rollouts.items():
            if i in self.trapped:
                assert rollout.cut and self.seen[i] >= self.traps[i]
            else:
                assert not rollout.cut and self.seen[i] == len(rollout.token_ids)
        assert all(count == 1 for count in self.aborted.values())
        assert [scorer.held for scorer in self.scorers] == [{}] * len(self.scorers), "states are left"
        assert all(scores.state is not None for scores in self.scores.values())

    def work(self):
        for index, scorer in enumerate(self.scorers):
            while scorer.inbox:
                self.score(index)
        while self.inbox:
            self.observe()


class Schedules(RuleBasedStateMachine):
    """Anybody may be the next to work, or to die."""

    @initialize(scorers=st.integers(1, 3), traps=st.lists(st.integers(1, 12), min_size=1, max_size=4))
    def start(self, scorers, traps):
        self.world, self.over = World(len(traps), scorers, traps), False

    def may_end(self, call):
        try:
            call()
        except RecordsLost:
            self.over = True

    @precondition(lambda self: not self.over)
    @rule(tokens=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=4, max_size=4))
    def sample(self, tokens):
        for rollout, (count, end) in zip(list(self.world.active.values()), tokens, strict=False):
            if rollout.end is EngineEnd.RUNNING:
                self.world.generate(rollout, count, end and count == 3)
        self.world.flush()

    @precondition(lambda self: not self.over)
    @rule()
    def poll(self):
        self.may_end(self.world.poll)

    @precondition(lambda self: not self.over)
    @rule(index=st.integers(0, 2), times=st.integers(1, 4))
    def score(self, index, times):
        for _ in range(times):
            if index < len(self.world.scorers) and self.world.scorers[index].inbox:
                self.world.score(index)

    @precondition(lambda self: not self.over)
    @rule(times=st.integers(1, 4))
    def observe(self, times):
        for _ in range(times):
            if self.world.inbox:
                self.world.observe()

    @precondition(lambda self: not self.over)
    @rule(index=st.integers(0, 2), scores_too=st.sampled_from([(), (0,), (1,), (0, 1)]))
    def kill_scorer(self, index, scores_too):
        self.world.kill_scorer(index % len(self.world.scorers), scores_too)

    @precondition(lambda self: not self.over)
    @rule(index=st.integers(0, 2), which=st.sampled_from([(0,), (1,)]))
    def lose_scores(self, index, which):
        self.world.lose_scores(index % len(self.world.scorers), which)

    @precondition(lambda self: not self.over)
    @rule()
    def kill_monitor(self):
        self.world.kill_monitor()

    def teardown(self):
        if hasattr(self, "world") and not self.over:
            self.may_end(self.world.finish)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=100, stateful_step_count=15, deadline=None, phases=[Phase.generate])


def a_chunk_each(scorers, **limits):
    """A world in which every scorer was sent a chunk of one rollout."""
    world = World(scorers, scorers, traps=[100] * scorers, **limits)
    for rollout in world.rollouts.values():
        world.generate(rollout, 2, end=False)
    world.flush()
    return world


def test_a_lost_scorers_chunk_goes_to_the_next_with_its_context():
    stream = a_chunk_each(2).stream
    assert stream.handle(ScorerLost(1, frozenset(), "")) == [
        AwaitScorer(0), Release(1, (1,)), Rescore(1, 0), Observe(1),
    ]  # fmt: skip
    assert (stream.owing, list(stream.owed(0))) == ([0], [0, 1])


def test_a_lost_scorers_chunk_goes_to_one_of_the_same_teacher():
    world = a_chunk_each(4)
    assert scorer_ranges({"math": "ab", "code": "cd"}) == {"math": range(2), "code": range(2, 4)}
    world.stream = Stream(world.rollouts, [range(2), range(2, 4)], 5)
    for number in range(4):
        world.stream.handle(Sent(number, (number,)))
    for lost, target in ((1, 0), (3, 2)):
        instructions = world.stream.handle(ScorerLost(lost, frozenset(), ""))
        assert [i for i in instructions if isinstance(i, Rescore)] == [Rescore(lost, target)]
        assert world.rollouts[lost].scorer == target


def test_a_lost_monitor_sees_all_again_and_nothing_else_is_done():
    world = a_chunk_each(2)
    world.carry_out(world.stream.handle(Answered(0, ())))
    assert world.stream.handle(MonitorLost("")) == [AwaitMonitor(), Admit(), Observe(0, answered=True), Observe(1)]


def test_scores_that_follow_lost_ones_are_made_again():
    """A node took the large scores of one chunk with it, not the small ones of the next: the next scorer must run
    both.
    """
    world = a_chunk_each(1)
    world.generate(world.rollouts[0], 1, end=False)
    world.flush()
    instructions = world.stream.handle(ScorerLost(0, frozenset({1}), ""))
    assert [i for i in instructions if isinstance(i, Rescore)] == [Rescore(0, 0), Rescore(1, 0)]


def test_losses_without_end_end_the_run():
    world = a_chunk_each(1, max_restarts=2)
    for _ in range(2):
        world.carry_out(world.stream.handle(ScorerLost(0, frozenset(), "killed")))
        world.carry_out(world.stream.handle(MonitorLost("killed")))
    with pytest.raises(
        UserError, match=r"1 scorers and the monitor were lost 5 times .*max_restarts = 2.*: killed"
    ):
        world.stream.handle(MonitorLost("killed"))
