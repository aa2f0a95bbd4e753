"""A teacher without a model, inside the real scorer: reverse KL by rollout and position.

Values depend on these two alone, so the rule's outcomes do not depend on how many samplers, scorers or monitors
share the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from actors.teacher.backend import OVERLAP_TOP, Sequences, TeacherColumns, TeacherTargets
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.errors import StateLost
from kat_ray.types.records import FloatArray, IntArray, RolloutChunk


class StubTeacher:
    """Agrees with the student after a while: reverse KL starts near 1 nat and falls to 0.05 in most rollouts.

    Where it falls is drawn from the rollout id, uniformly over 1.6 times `horizon` tokens: with KAT's default eta
    about half of the rollouts end trapped, as in the embedded task.
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._held: set[int] = set()
        self.run_tokens = 0
        self.cpu_seconds = 0.0

    @property
    def vocabulary(self) -> int:
        """Any id that can be packed."""
        return 2**24

    @property
    def held(self) -> int:
        """Rollouts with a state."""
        return len(self._held)

    @property
    def cache_bytes(self) -> int:
        """There is no cache."""
        return 0

    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The student's own rows, lower by the KL that is wanted: sum p (log p - (log p - c)) = c."""
        started = time.thread_time()
        unknown = [i for i in chunk.rollout_ids[~chunk.whole_past].tolist() if i not in self._held]
        if unknown:
            raise StateLost(f"the past of rollouts {unknown} is not held: send their context")
        self._held.update(chunk.rollout_ids.tolist())
        self.run_tokens += chunk.tokens
        counts = np.diff(chunk.offsets)
        rollout = np.repeat(chunk.rollout_ids, counts)
        position = np.arange(chunk.tokens) - np.repeat(chunk.offsets[:-1] - chunk.start, counts)
        c = torch.from_numpy(stub_kl(rollout, position, self._horizon))
        topk = torch.from_numpy(chunk.topk_logprobs.astype(np.float32)) - c[:, None]
        tail = torch.from_numpy(chunk.tail_logprobs) - c
        n = chunk.tokens
        half = torch.full((n,), 0.5)
        columns = TeacherColumns(
            topk,
            tail,
            torch.full((n,), -torch.inf),
            half,
            half,
            half,
            torch.full((n,), OVERLAP_TOP, dtype=torch.int32),
            _own(n, own_top) if own_top else None,
        )
        self.cpu_seconds += time.thread_time() - started
        return columns

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Forget rollouts."""
        self._held.difference_update(rollout_ids)

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        """There is no model to ask."""
        raise NotImplementedError


def _own(n: int, top: int) -> TeacherTargets:
    """Half of its mass, evenly on the first ids; the rest elsewhere."""
    half = torch.full((n,), 0.5).log()
    even = torch.full((n, top), 0.5 / top).log()
    return TeacherTargets(even, half, torch.full((n,), -torch.inf), torch.arange(top).expand(n, top))


def stub_teacher(settings: ScorerSettings) -> StubTeacher:
    """A `make` of TeacherScorer."""
    return StubTeacher(settings.rollout.max_tokens)


def stub_kl(rollout: np.ndarray, position: np.ndarray, horizon: int) -> np.ndarray:
    """Reverse KL [N] float32 in nats of tokens given by rollout id and position [N]."""
    falls_at = _uniform(rollout, 0) * 1.6 * horizon
    level = np.where(position < falls_at, 1.0, 0.05) * (0.5 + _uniform(rollout, 1))
    noise = 0.5 + _uniform(rollout * 65537 + position, 2)
    return (level * noise).astype(np.float32)


def _uniform(numbers: np.ndarray, stream: int) -> np.ndarray:
    """A number in [0, 1) for each integer, the same everywhere (splitmix64)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (stream + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


class StubScorer(TeacherScorer):
    """The scorer, which also tells its CPU time."""

    def cpu(self) -> tuple[float, float]:
        """CPU seconds of the process, and the stub's part of them."""
        assert isinstance(self._teacher, StubTeacher)
        return time.process_time(), self._teacher.cpu_seconds
