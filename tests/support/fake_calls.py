"""Calls on actors of the fake cluster, on their way, carried out and answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from tests.support.fake_actors import Actor, Call, Failed, Lane, Process, Ref, short, task_error
from tests.support.virtual_time import START, Killed, Scheduler


@dataclass
class Rule:
    """`do` happens when a method of an actor (or any of its role) comes there for the `nth` time."""

    actor: str
    method: str
    do: Callable[[], Any]
    nth: int = 1
    # Of its execution; or its end, before anybody learns of the result; or call, reply. At send and answer, `do`
    # may return how many seconds the message is under way.
    at: str = "begin"
    seen: int = 0


class Calls:
    """Messages between processes, how long they take by the seed, and what happens at which of them."""

    def __init__(self, seed: int) -> None:
        self.scheduler = Scheduler(seed)
        self.rules: list[Rule] = []
        self.trace: Callable[[str], Any] | None = None  # takes a line for every call, its execution and its answer
        self.one_node = bool(seed % 2)  # arguments are at hand when a call goes out, not when it is carried out
        self.pings_in_store = False  # a scorer's other results, too: RAY_max_direct_call_object_size = 0 does it
        self.lanes: dict[tuple[Process, Actor], Lane] = {}

    @property
    def here(self) -> Process:
        """The process that runs now."""
        owner = self.scheduler.current.owner
        assert isinstance(owner, Process)
        return owner

    def submit(self, call: Call) -> None:
        self.scheduler.pause(0.1)
        self._happens("call", call)
        if not self.here.alive:
            raise Killed
        call.lane.waiting.append(call)
        self._pump(call.lane)

    def _pump(self, lane: Lane) -> None:
        """Send what need not wait for its arguments."""
        while lane.waiting:
            missing = [a for a in lane.waiting[0].args if isinstance(a, Ref) and not a.done]
            if missing:
                missing[0].lanes.append(lane)
                return
            call = lane.waiting.popleft()
            if self.one_node:
                call.fetch()
            slow = self._happens("send", call)
            lane.last = max(lane.last, self.scheduler.now + (slow or self._latency()))
            self.scheduler.at(lane.last, partial(self._deliver, call))

    def _deliver(self, call: Call) -> None:
        actor = call.actor
        if actor.state in ("dead", "restarting"):
            self._refuse(call)
        elif actor.state == "pending":
            actor.first.append(call)
        else:
            process = actor.process
            assert process is not None
            process.calls[call] = None
            process.queues.setdefault(call.group, deque()).append(call)
            if call.group not in process.busy:
                process.busy.add(call.group)
                work = partial(self._work_off, process, call.group)
                process.tasks.append(self.scheduler.spawn(f"{process.name} {call.method}", work, process))

    def _refuse(self, call: Call) -> None:
        actor = call.actor
        words = f"{actor.name} is being started again"
        died = actor.state == "dead"
        self._answer(call, ActorDiedError(actor.death) if died else ActorUnavailableError(words, None))

    def _work_off(self, process: Process, group: str) -> None:
        queue = process.queues[group]
        while queue:
            call = queue.popleft()
            self._happens("begin", call)
            self.scheduler.pause(0.1)
            result = self._carry_out(process, call)
            self._happens("end", call)
            self.scheduler.pause(0.1)
            slow = self._happens("answer", call)
            call.lane.last_reply = max(call.lane.last_reply, self.scheduler.now + (slow or self._latency()))
            self.scheduler.at(call.lane.last_reply, partial(self._reply, process, call, result))
        process.busy.discard(group)

    def _carry_out(self, process: Process, call: Call) -> Any:
        try:
            call.fetch()
            for _, error in call.found:
                if error is not None:
                    raise error
            return getattr(process.instance, call.method)(*(value for value, _ in call.found), **call.kwargs)
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            return Failed(task_error(call.method, cause))

    def _reply(self, process: Process, call: Call, result: Any) -> None:
        if process.alive and process.calls.pop(call, 0) is None:
            if self.in_store(process.name, call.method):
                for ref in call.refs:
                    ref.home = process
            self._answer(call, result.error if isinstance(result, Failed) else None, result)
            self._happens("reply", call)

    def _answer(self, call: Call, error: RayError | None, result: Any = None) -> None:
        values = result if error is None and len(call.refs) > 1 else [result] * len(call.refs)
        assert len(values) == len(call.refs)
        for ref, value in zip(call.refs, values, strict=True):
            if not ref.done:
                self.resolve(ref, value, error)

    def resolve(self, ref: Ref, value: Any, error: RayError | None) -> None:
        ref.done, ref.value, ref.error = True, value, error
        self.scheduler.wake_all(ref.waiters)
        for future in ref.futures:
            ref._tell(future)
        ref.futures.clear()
        lanes, ref.lanes = ref.lanes, []
        for lane in lanes:
            self._pump(lane)

    def _happens(self, at: str, call: Call) -> float:
        if not self.rules and self.trace is None:  # so it is in thousands of schedules
            return 0.0
        if self.trace is not None and at in ("call", "begin", "reply"):
            value = f" -> {short(call.refs[0])}" if at == "reply" else ""
            self.trace(
                self._line(f"{at:5s} {call.actor.name}.{call.method}({', '.join(map(short, call.args))}){value}")
            )
        seconds = 0.0
        for rule in self.rules:
            if rule.method == call.method and rule.at == at and f"{call.actor.name}:".startswith(f"{rule.actor}:"):
                rule.seen += 1
                if rule.seen == rule.nth:
                    result = rule.do()
                    seconds = result if isinstance(result, float) else seconds
        return seconds

    def in_store(self, actor: str, method: str) -> bool:
        """Whether results go to the store of the actor's node: large ones, and all of a process that is told so.

        Others are handed to who called, and are lost with it only.
        """
        return method == "weights" or (actor.startswith("scorer") and (method == "score" or self.pings_in_store))

    def _line(self, text: str) -> str:
        return f"{self.scheduler.switches:5d} {self.scheduler.now - START:8.3f} {self.here.name:10s} {text}"

    def _latency(self) -> float:
        """Of a message: short as a rule, at times longer than all that is waited for."""
        draw = self.scheduler.random
        if draw is None:
            return 0.001
        kind = draw.random()
        return 0.001 if kind < 0.5 else draw.random() * (0.02 if kind < 0.85 else 0.2 if kind < 0.97 else 3.0)
