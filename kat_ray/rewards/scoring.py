"""Rewards by functions of the user's: their calls dealt out to child processes, their values weighed and summed.

A call that fails in any way (an exception, a value that is no number, too much time or memory) gives no reward: its
rollout is not graded, which is not a reward of 0. A value of None, which a function returns on purpose, leaves its
rollout ungraded too; but a function of the user's that returned None for every answer to a prompt has nothing to
say about that prompt, as TRL's functions for several tasks do, and there the others count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kat_ray.errors import RewardError
from kat_ray.rewards.grader_pool import Check, GraderPool, nothing
from kat_ray.rewards.limits import (
    Call,
    Failures,
    Fault,
    GradingLimits,
    Outcome,
    Reply,
    last_line,
    no_verdict,
    unusable,
)
from kat_ray.rewards.source import VERIFIERS, labels
from kat_ray.rewards.task import Task
from kat_ray.types.records import Reward

PART = "reward/part/"  # metrics of single functions, by their labels

_VERDICTS = {Outcome.RIGHT: 1.0, Outcome.WRONG: 0.0}
_NO_GOLD = "0"  # an answer to try a function with, where the first prompt has no gold answer


@dataclass(frozen=True)
class RewardRules:
    """The section `reward` of the configuration."""

    weights: Mapping[str, float]  # by function, as the configuration names it
    pattern: str = ""  # of `format`
    limits: GradingLimits = field(default_factory=GradingLimits)
    threshold: float | None = None


@dataclass(frozen=True)
class Answer:
    """One to be rewarded; `verdict` and `worth` are of `evaluation.verifier`, None without a gold answer."""

    prompt_id: str
    text: str
    token_ids: Sequence[int]
    verdict: Outcome | None = None
    worth: float | None = None  # where it is not the verdict's 1 or 0
    reply: Reply | None = None  # of the child that gave no verdict


@dataclass(frozen=True)
class Scored:
    """Rewards of answers, by rollout, and what the metrics say of them."""

    rewards: Mapping[int, Reward]
    metrics: Mapping[str, float]
    failures: Failures = field(default_factory=Failures)


class RewardScorer:
    """Rewards the answers of one step after the other; ended by `close`."""

    def __init__(self, rules: RewardRules, tasks: Mapping[str, Task]) -> None:
        """`tasks` by prompt id."""
        self._rules, self._tasks = rules, tasks
        self._labels = labels(list(rules.weights))
        self._asked = [name for name in rules.weights if name not in VERIFIERS]
        self._pool = GraderPool(rules.limits, self._asked, rules.pattern)
        self._first = True

    def ask(
        self, answers: Mapping[int, Answer], check: Check = nothing, spent: float = 0.0
    ) -> dict[int, dict[str, Reply]]:
        """What the functions reply to answers, by rollout and name, but for verifiers.

        `spent` seconds of those of a step are over; `check` is as for `GraderPool.ask`.
        """
        calls = [
            Call(name, self._tasks[answer.prompt_id].arguments(answer.text, answer.token_ids))
            for answer in answers.values()
            for name in self._asked
        ]
        if self._first and calls:  # what the files import is no part of a step's time
            self._pool.start(max(len(calls), self._rules.limits.processes), check)
            self._first = False
        replies = iter(self._pool.ask(calls, self._rules.limits.total_seconds - spent, check))
        return {i: {name: next(replies) for name in self._asked} for i in answers}

    def score(
        self,
        answers: Mapping[int, Answer],
        check: Check = nothing,
        replies: Mapping[int, Mapping[str, Reply]] | None = None,
        seconds: float = 0.0,
    ) -> Scored:
        """Reward answers of a step, by rollout. How many may have failed is for the step as a whole to say.

        `replies` are what `ask` gave, for which the step waited `seconds`; None asks now.
        """
        started = time.monotonic()
        given = self.ask(answers, check) if replies is None else replies
        seconds += time.monotonic() - started
        found = [
            {name: given[i][name] if name in given[i] else _verdict(answer) for name in self._rules.weights}
            for i, answer in answers.items()
        ]
        prompt_ids = [answer.prompt_id for answer in answers.values()]
        silent = _silent(prompt_ids, found)
        rewards = [self._reward(parts, silent[p]) for p, parts in zip(prompt_ids, found, strict=True)]
        failures = Failures.of([_with_sum(parts, reward) for parts, reward in zip(found, rewards, strict=True)])
        metrics = self._metrics(found, seconds) | failures.metrics if found else {}
        return Scored(dict(zip(answers, rewards, strict=True)), metrics, failures)

    def try_out(self, prompt_id: str, encode: Callable[[str], Sequence[int]]) -> None:
        """Call each function once, with the gold answer of a prompt as its answer; `RewardError` where one fails.

        `encode` gives the token ids of that answer.
        """
        task = self._tasks[prompt_id]
        text = _NO_GOLD if task.answer is None else str(task.answer)
        self._pool.start(len(self._asked))  # what the files import is no part of a step's time
        replies = self._pool.ask([Call(name, task.arguments(text, encode(text))) for name in self._asked])
        for name, reply in zip(self._asked, replies, strict=True):
            if reply.fault is not None:
                raise RewardError(
                    f"reward.functions: {name} was tried on prompt {prompt_id} with the answer {text[:80]!r}, and "
                    f"gave no reward: {reply.error}"
                )

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()

    def _reward(self, parts: Mapping[str, Reply], silent: frozenset[str]) -> Reward:
        shown = {self._labels[name]: reply.value for name, reply in parts.items()}
        error = next((f"{self._labels[n]}: {last_line(r.error)}" for n, r in parts.items() if r.error), "")
        counted = {name: reply.value for name, reply in parts.items() if name not in silent}
        if error or not counted or any(value is None for value in counted.values()):
            return Reward(None, shown, error)
        value = sum(self._rules.weights[name] * value for name, value in counted.items())
        if (why := unusable(value)) is not None:
            return Reward(None, shown, f"the weighted sum is {value:g}, {why}")
        if self._rules.threshold is not None:
            value = float(value >= self._rules.threshold)
        return Reward(float(value), shown)

    def _metrics(self, found: Sequence[Mapping[str, Reply]], seconds: float) -> dict[str, float]:
        figures = {"reward/seconds": seconds}
        for name, label in self._labels.items():
            values = [parts[name].value for parts in found if parts[name].value is not None]
            if values:
                figures[PART + label] = float(np.mean(values))
        return figures


def _with_sum(parts: Mapping[str, Reply], reward: Reward) -> Mapping[str, Reply]:
    """Replies to an answer, with one of nobody's where their weighted sum is no reward."""
    if not reward.error or any(reply.fault is not None for reply in parts.values()):
        return parts
    return {**parts, "them all": Reply(fault=Fault.RAISED, error=reward.error)}


def _verdict(answer: Answer) -> Reply:
    """That of a verifier, which is there already, as a reply."""
    if answer.verdict is None or answer.verdict in _VERDICTS:
        known = None if answer.verdict is None else _VERDICTS[answer.verdict]
        return Reply(known if answer.worth is None else answer.worth)
    return no_verdict(answer.verdict, answer.reply)


def _silent(prompt_ids: Sequence[str], found: Sequence[Mapping[str, Reply]]) -> dict[str, frozenset[str]]:
    """By prompt, the functions that gave None, without an error, for each of its answers that they replied to.

    A verifier is never among them: where there is no gold answer, nothing is graded.
    """
    spoke: dict[str, set[str]] = {p: set() for p in prompt_ids}
    quiet: dict[str, set[str]] = {p: set() for p in prompt_ids}
    for prompt_id, parts in zip(prompt_ids, found, strict=True):
        for name, reply in parts.items():
            if reply.fault is None and name not in VERIFIERS:
                (quiet if reply.value is None else spoke)[prompt_id].add(name)
    return {p: frozenset(quiet[p] - spoke[p]) for p in spoke}
