"""Which sampler has which rollouts, whatever dies when: the pure machine, by example and by random schedules."""

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.driver.dispatch import Abandon, Assign, CountRecordLoss, Dispatch, Drop, Revive
from kat_ray.types.records import RolloutSpec


def specs_of(count):
    return [RolloutSpec(i, f"p{i}", (5,), seed=i, probe=False, max_tokens=8) for i in range(count)]


def ids(instruction):
    return [spec.rollout_id for spec in instruction.specs]


def dispatch(rollouts, samplers):
    machine = Dispatch(specs_of(rollouts), range(samplers), itertools.count(1))
    return machine, machine.begin()


def test_rollouts_are_dealt_out_and_all_of_them_are_generated():
    machine, first = dispatch(5, 2)
    assert [(a.sampler, a.attempt, ids(a)) for a in first] == [(0, 1, [0, 2, 4]), (1, 2, [1, 3])]
    assert machine.generated(1) == [] and not machine.is_over
    assert machine.generated(0) == [] and machine.is_over


def test_more_samplers_than_rollouts_leave_some_idle():
    machine, first = dispatch(1, 3)
    assert [(a.sampler, ids(a)) for a in first] == [(0, [0])]
    assert machine.generated(0) == [] and machine.is_over


def test_a_lost_samplers_rollouts_go_to_whoever_is_idle_first():
    machine, _ = dispatch(4, 2)
    assert machine.sampler_lost(0) == [Abandon(1), Revive(0)], "nobody is idle"
    (again,) = machine.generated(1)
    assert (again.sampler, again.attempt, ids(again)) == (1, 3, [0, 2])
    assert machine.ready(0) == [] and not machine.is_over
    assert machine.generated(1) == [] and machine.is_over


def test_a_step_is_over_once_lost_samplers_are_back():
    machine, _ = dispatch(2, 2)
    machine.sampler_lost(0)
    machine.generated(1)
    machine.generated(1)
    assert not machine.needs_samplers and not machine.is_over
    assert machine.ready(0) == [] and machine.is_over


def test_a_lost_sampler_that_comes_back_first_takes_its_rollouts_again():
    machine, _ = dispatch(2, 2)
    machine.sampler_lost(0)
    (again,) = machine.ready(0)
    assert (again.sampler, ids(again)) == (0, [0])


def test_one_lost_node_counts_once_though_it_costs_both_samplers_their_records():
    machine, _ = dispatch(4, 2)
    first = machine.records_lost(0)
    assert first[:2] == [CountRecordLoss(), Abandon(1)] and isinstance(first[2], Assign)
    assert machine.records_lost(1)[0] == Abandon(2), "the same node"
    assert machine.records_lost(0)[0] == CountRecordLoss(), "another one"


def test_samplers_are_dropped_only_where_nothing_but_they_is_waited_for():
    """A question never drops anybody: what changes is said by an instruction."""
    machine, _ = dispatch(3, 3)
    machine.sampler_lost(0)
    machine.sampler_lost(1)
    assert machine.tick({0, 1}) == [], "rollouts are still at work"
    machine.generated(2)
    machine.generated(2)
    assert machine.tick({0}) == [] == machine.tick(set()), "the other one is needed"
    assert machine.tick({0, 1}) == [Drop(0), Drop(1)] and machine.is_over


class Schedules(RuleBasedStateMachine):
    """Samplers die, lose records and come back at any moment."""

    @initialize(rollouts=st.integers(0, 7), samplers=st.integers(1, 4))
    def begin(self, rollouts, samplers):
        self.rollouts, self.samplers = rollouts, samplers
        self.busy, self.lost, self.dropped, self.generated_by = {}, set(), set(), {}
        self.attempts, self.abandoned = [], set()
        self.machine = Dispatch(specs_of(rollouts), range(samplers), itertools.count(1))
        self.carry_out(self.machine.begin())

    def carry_out(self, instructions):
        for instruction in instructions:
            match instruction:
                case Assign(sampler, attempt, specs):
                    assert sampler not in self.busy and sampler not in self.lost | self.dropped and specs
                    self.busy[sampler] = instruction
                    self.attempts.append(attempt)
                case Abandon(attempt):
                    assert attempt not in self.abandoned, "an attempt is abandoned once"
                    self.abandoned.add(attempt)
                case Revive(sampler):
                    self.lost.add(sampler)
                case Drop(sampler):
                    self.lost.remove(sampler)
                    self.dropped.add(sampler)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def generated(self, data):
        sampler = data.draw(st.sampled_from(sorted(self.busy)))
        done = self.busy.pop(sampler)
        for rollout in ids(done):
            assert rollout not in self.generated_by, "no rollout is generated twice"
            self.generated_by[rollout] = done.attempt
        self.carry_out(self.machine.generated(sampler))

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), node=st.booleans())
    def lost_something(self, data, node):
        sampler = data.draw(st.sampled_from(sorted(self.busy)))
        lost = self.busy.pop(sampler)
        self.carry_out((self.machine.records_lost if node else self.machine.sampler_lost)(sampler))
        assert lost.attempt in self.abandoned

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def ready(self, data):
        sampler = data.draw(st.sampled_from(sorted(self.lost)))
        self.lost.remove(sampler)
        self.carry_out(self.machine.ready(sampler))

    @precondition(lambda self: len(self.dropped) + len(self.lost) < self.samplers)
    @rule(data=st.data())
    def tick(self, data):
        expendable = data.draw(st.sets(st.sampled_from(sorted(self.lost)))) if self.lost else ()
        self.carry_out(self.machine.tick(expendable))

    @invariant()
    def every_rollout_is_in_one_place_and_the_end_is_the_end(self):
        at_work = [rollout for request in self.busy.values() for rollout in ids(request)]
        assert len(at_work) == len(set(at_work)) and not set(at_work) & set(self.generated_by)
        assert len(self.attempts) == len(set(self.attempts)), "no attempt number is given twice"
        everything = len(self.generated_by) == self.rollouts
        assert self.machine.needs_samplers == (not everything)
        assert self.machine.is_over == (everything and not self.lost)
        if not everything and not self.busy:
            assert self.lost or self.dropped, "somebody who is idle has been given what is left"


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
