"""Engines without a model: tokens, log-probabilities and KL at a set rate, to benchmark everything around them.

They stand where vLLM and the teacher stand, inside the real actors. Values depend on (rollout, position) alone, so
the rule's outcomes do not depend on how many samplers, scorers or monitors share the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from actors.teacher_columns import OVERLAP_TOP, TeacherColumns
from kat_ray.config import Config, ModelConfig
from kat_ray.types import EngineEnd, EngineRows, RolloutChunk, SamplingSettings, WeightUpdate

_ROWS = 256  # different rows of log-probabilities


class StubEngine:
    """Gives every running request one token a step, `rate` tokens a second in all, or as fast as it can."""

    def __init__(self, top_k: int, vocabulary: int, rate: float | None = None) -> None:
        rng = np.random.default_rng(0)
        logits = -np.sort(-rng.normal(0.0, 3.0, (_ROWS, 4 * top_k)), axis=1)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        best = logprobs[:, :top_k].astype(np.float32)
        ids = (
            np.argsort(rng.random((_ROWS, max(4 * top_k, 8))), axis=1)[:, :top_k].astype(np.int32) + vocabulary // 2
        )
        # The sampled token, here the most likely one, stands first.
        self._ids = np.concatenate([ids[:, :1], ids], axis=1)
        self._logprobs = np.concatenate([best[:, :1], best], axis=1)
        self._tokens = [[int(t)] for t in ids[:, 0]]
        self._views = [(self._ids[i : i + 1], self._logprobs[i : i + 1]) for i in range(_ROWS)]
        self._left: dict[str, int] = {}
        self._rate = rate
        self._due = 0.0
        self.cpu_seconds = 0.0  # of the stub itself: not part of what is measured

    def set_rate(self, rate: float | None) -> None:
        """Tokens a second from now on; None for as fast as it can."""
        self._rate, self._due = rate, 0.0

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._left)

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None:
        """Queue one request; it ends after `settings.max_tokens` tokens."""
        self._left[request_id] = settings.max_tokens

    def step(self) -> list[EngineRows]:
        """One token of every running request, not before the rate allows it."""
        started = time.thread_time()
        if self._rate is not None:
            now = time.monotonic()
            self._due = max(self._due, now) + len(self._left) / self._rate
            time.sleep(max(0.0, self._due - now))
        rows = []
        for number, (request_id, left) in enumerate(self._left.items()):
            row = (number + left) % _ROWS
            ids, logprobs = self._views[row]
            end = EngineEnd.RUNNING if left > 1 else EngineEnd.MAX_TOKENS
            rows.append(EngineRows(request_id, self._tokens[row], ids, logprobs, end))
        self._left = {r: left - 1 for r, left in self._left.items() if left > 1}
        self.cpu_seconds += time.thread_time() - started
        return rows

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def load_weights(self, update: WeightUpdate) -> None:
        """There are none."""


def stub_engine(config: Config, model: ModelConfig, model_dir: str, max_model_len: int) -> StubEngine:
    """A `make_engine` of StudentSampler; `model_dir` is the size of the vocabulary."""
    return StubEngine(config.rollout.top_k_logprobs, int(model_dir))


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
    def held(self) -> int:
        """Rollouts with a state."""
        return len(self._held)

    @property
    def cache_bytes(self) -> int:
        """There is no cache."""
        return 0

    def score(self, chunk: RolloutChunk) -> TeacherColumns:
        """The student's own rows, lower by the KL that is wanted: sum p (log p - (log p - c)) = c."""
        started = time.thread_time()
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
            topk, tail, torch.full((n,), -16.0), half, half, half, torch.full((n,), OVERLAP_TOP, dtype=torch.int32)
        )
        self.cpu_seconds += time.thread_time() - started
        return columns

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Forget rollouts."""
        self._held.difference_update(rollout_ids)


def stub_teacher(
    config: Config, teacher_dir: str, stop_ids: tuple[int, ...], max_model_len: int = 0
) -> StubTeacher:
    """A `make` of TeacherScorer."""
    return StubTeacher(config.rollout.max_tokens)


def stub_kl(rollout: np.ndarray, position: np.ndarray, horizon: int) -> np.ndarray:
    """Reverse KL [N] float32 in nats of tokens given by rollout id and position [N]."""
    falls_at = _uniform(rollout, 0) * 1.6 * horizon
    level = np.where(position < falls_at, 1.0, 0.05) * (0.5 + _uniform(rollout, 1))
    noise = 0.5 + _uniform(rollout * 65537 + position, 2)
    return (level * noise).astype(np.float32)


def _uniform(numbers: np.ndarray, stream: int) -> np.ndarray:
    """A number in [0, 1) for each integer, the same everywhere (splitmix64)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(stream + 1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
