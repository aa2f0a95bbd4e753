"""A learner without a model: its weights are a number, a function of every kept token of every step.

Its ranks meet and reduce as real ones do: where one dies, the others wait for ever.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import ray

from actors.learner.settings import LearnerSettings
from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.batch import collect_samples
from kat_ray.data.given import GivenShare, given_samples
from kat_ray.errors import StateLost
from kat_ray.run.step_result import LearnerReport
from kat_ray.types.records import KeptRollout, WeightUpdate

_PRIME = 2**61 - 1
_FIGURES = ("loss", "grad_norm", "lr", "entropy", "stop_mass")
_NONE = ("logprob_diff_mean", "logprob_diff_max")


@dataclass
class Meeting:
    """Ranks that reduce sums together."""

    size: int
    condition: threading.Condition = field(default_factory=threading.Condition)
    parts: dict[tuple[int, int], int] = field(default_factory=dict)  # by round and rank

    def total(self, number: int, rank: int, part: int) -> int:
        """The sum of all ranks' parts in this round."""
        with self.condition:
            self.parts[number, rank] = part
            self.condition.notify_all()
            while not all((number, other) in self.parts for other in range(self.size)):
                self.condition.wait()
            return sum(self.parts[number, other] for other in range(self.size))


@dataclass
class World:
    """What ranks reach beside each other: the network and the disk."""

    meetings: dict[int, Meeting] = field(default_factory=dict)
    disk: dict[str, tuple[int, int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)  # checkpoints
    seconds: float = 0.2  # of every piece of work
    on_collect: Callable[[Any, Any], object] = lambda chunks, teacher: None  # told of every batch


class MemoryLearner:
    """One rank; the calls of `actors.learner.learner.Learner`."""

    world: ClassVar[World]

    def __init__(self, rank: int, settings: LearnerSettings) -> None:
        self._rank, self._size, self._top_k = rank, settings.learner.world_size, settings.top_k
        self._heartbeat = Heartbeat()
        self._meeting: Meeting | None = None
        self._round = 0
        self._weights = self._average = 0
        self._rows: list[Any] | None = None
        self._kept: Sequence[KeptRollout] = ()
        self._given: list[Any] = []
        self._logprobs: dict[int, Any] = {}
        self._written: tuple[str, int] | None = None

    def spans(self) -> tuple[()]:
        return ()

    def health(self) -> HeartbeatReport:
        return self._heartbeat.read()

    def address(self) -> tuple[str, int]:
        port = len(self.world.meetings) + 1
        self.world.meetings[port] = Meeting(self._size)
        return "host", port

    def start(self, host: str, port: int) -> dict[str, Any]:
        self._meeting, self._round = self.world.meetings[port], 0
        self._work()
        return {"rank": self._rank, "seconds": 0.0}

    def collect(
        self,
        chunks: Sequence[Any],
        teacher: Sequence[Any],
        kept: Sequence[KeptRollout],
        given: GivenShare | None = None,
    ) -> None:
        self._check_started()
        with self._heartbeat.busy("collect"):
            records = ray.get(list(chunks)), ray.get(list(teacher))
            self.world.on_collect(*records)
            self._rows = collect_samples(*records, kept)
            self._kept, self._given = kept, []
            if given is not None:
                scored = ray.get(list(given.chunks)), ray.get(list(given.teacher))
                self._given = given_samples(given, *scored, self._top_k)

    def learn(self, global_weight: float, policy_version: int) -> LearnerReport:
        if self._rows is None:
            raise StateLost("no batch is held")
        rows, self._rows = self._rows, None
        self._logprobs = {row.rollout_id: row.sampled_logprobs + np.float32(0.25) for row in rows}
        with self._heartbeat.busy("learn"):
            own = sum(_number(row) for row in (*rows, *self._given))
            tokens = self._work(sum(map(_tokens, rows)))
            weight = self._work(sum(k.weight for k in self._kept))
            sums = [float(row.weights.sum(dtype=np.float64)) for row in rows]
            assert sums == [k.weight * k.scale for k in self._kept], "the teachers' weights are in no denominator"
            weight = weight or float(any(row.policy for row in rows) or bool(self._given))
            self._weights = (self._weights * 31 + self._work(own)) % _PRIME
            self._average = (self._average + self._weights) % _PRIME  # of all steps so far, as an average is
        assert weight == global_weight, (weight, global_weight)
        fixed: dict[str, Any] = dict.fromkeys(_FIGURES, 0.5) | dict.fromkeys(_NONE, 0.0)
        fixed["tail_mass"] = 0.0 if self._top_k else None
        return LearnerReport(
            policy_version, tokens=tokens, dropped_tokens=0, micro_batches=1, seconds=0.1, skipped=False, **fixed
        )

    def step_logprobs(self) -> dict[int, Any]:
        self._work()
        return self._logprobs

    def weights(self, policy_version: int) -> tuple[WeightUpdate | None, int]:
        self._work()
        if self._rank:
            return None, policy_version
        array = np.array([self._weights], dtype=np.int64)
        return WeightUpdate(policy_version, ("w",), ("int64",), (array,)), policy_version

    def average(self, policy_version: int) -> tuple[WeightUpdate | None, int]:
        self._work()
        if self._rank:
            return None, policy_version
        array = np.array([self._average], dtype=np.int64)
        return WeightUpdate(policy_version, ("w",), ("int64",), (array,)), policy_version

    def snapshot(self, path: str, _tokenizer: str) -> None:
        self._work()
        self._written = (path, (self._weights, self._average))

    def written(self) -> dict[str, Any]:
        self._check_started()
        assert self._written is not None
        with self._heartbeat.busy("write the checkpoint"):
            time.sleep(self.world.seconds)
        path, weights = self._written
        self.world.disk[path] = weights
        return {}

    def find_damage(self, path: str, files: Mapping[str, Any]) -> str | None:
        with self._heartbeat.busy("verify the checkpoint"):
            time.sleep(self.world.seconds)
            return "weights are damaged" if path in self.world.damaged else None

    def restore(self, path: str) -> None:
        with self._heartbeat.busy("restore"):
            self._work()
            self._weights, self._average = self.world.disk[path]

    def _work(self, part: int = 0) -> int:
        """Work of a while, and a sum over all ranks."""
        self._check_started()
        assert self._meeting is not None
        self._heartbeat.beat()
        time.sleep(self.world.seconds)
        self._round += 1
        return self._meeting.total(self._round, self._rank, part)

    def _check_started(self) -> None:
        if self._meeting is None:
            raise StateLost(f"learner {self._rank} was not started: its process is new")


def _tokens(row: Any) -> int:
    """In the loss: those that have a KL, or else an advantage."""
    with_kl = int((row.weights > 0).sum())
    return with_kl if with_kl or row.policy is None else int(row.policy.tokens)


def _number(row: Any) -> int:
    """Of a rollout's kept part: other tokens, or other targets, give another."""
    parts = [row.prompt_ids, row.token_ids, row.topk_ids, row.sampled_logprobs, row.teacher_topk, row.teacher_tail]
    if row.given is not None:
        parts.append(row.given)
    if row.policy is not None:
        parts.append(np.array([row.policy.advantage, row.policy.tokens, row.policy.weight]))
    number = row.rollout_id
    for part in parts:
        number = (number * 1_000_003 + int.from_bytes(_digest(part), "little")) % _PRIME
    return number


def _digest(part: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(part).tobytes(), digest_size=7).digest()
