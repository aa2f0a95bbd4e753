"""An engine without a model: tokens and log-probabilities at a set rate, to benchmark everything around it.

It stands where vLLM stands, inside the real sampler. The teacher's stub is in a file of its own: it needs torch,
which a process with a stub engine need not load.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import numpy as np

from actors.monitor.trap_monitor import TrapMonitor
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from kat_ray.types.records import EngineEnd, EngineRows, FloatArray, IntArray, SamplingSettings, WeightUpdate

_ROWS = 256  # different rows of log-probabilities
STUB_RATE = 300.0  # tokens a second of one small stub


@functools.cache
def _rows(top_k: int, vocabulary: int) -> tuple[list[list[int]], list[tuple[IntArray, FloatArray]]]:
    """The token of each row, and its top k with their log-probabilities; the same for all engines of a process."""
    rng = np.random.default_rng(0)
    logits = -np.sort(-rng.normal(0.0, 3.0, (_ROWS, 4 * top_k)), axis=1)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    best = logprobs[:, :top_k].astype(np.float32)
    ids = np.argsort(rng.random((_ROWS, max(4 * top_k, 8))), axis=1)[:, :top_k].astype(np.int32) + vocabulary // 2
    # The sampled token, here the most likely one, stands first.
    ids_with, best_with = np.concatenate([ids[:, :1], ids], axis=1), np.concatenate([best[:, :1], best], axis=1)
    return [[int(t)] for t in ids[:, 0]], [(ids_with[i : i + 1], best_with[i : i + 1]) for i in range(_ROWS)]


class StubEngine:
    """Gives every running request one token a step, `rate` tokens a second in all, or as fast as it can."""

    def __init__(self, top_k: int, vocabulary: int, rate: float | None = None) -> None:
        self._tokens, self._views = _rows(top_k, vocabulary)
        self._left: dict[str, int] = {}
        self._row: dict[str, int] = {}  # of a request: what it is given depends on its rollout alone
        self._columns: int | None = None  # of log-probabilities that were asked for; None: all there are
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
        self._columns = None if settings.logprobs is None else 1 + settings.logprobs
        self._row[request_id] = int(request_id.rpartition("-")[2])  # an evaluation's are named complete-N

    def step(self) -> list[EngineRows]:
        """One token of every running request, not before the rate allows it."""
        started = time.thread_time()
        if self._rate is not None:
            now = time.monotonic()
            self._due = max(self._due, now) + len(self._left) / self._rate
            time.sleep(max(0.0, self._due - now))
        rows = []
        for request_id, left in self._left.items():
            row = (self._row[request_id] + left) % _ROWS
            ids, logprobs = self._views[row]
            end = EngineEnd.RUNNING if left > 1 else EngineEnd.MAX_TOKENS
            if self._columns is not None and self._columns < ids.shape[1]:
                ids, logprobs = ids[:, : self._columns], logprobs[:, : self._columns]
            rows.append(EngineRows(request_id, self._tokens[row], ids, logprobs, end))
        self._left = {r: left - 1 for r, left in self._left.items() if left > 1}
        if not self._left:
            self._row.clear()
        self.cpu_seconds += time.thread_time() - started
        return rows

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def load_weights(self, update: WeightUpdate) -> None:
        """There are none."""

    def clear_cache(self) -> None:
        """There is none."""


def stub_engine(settings: SamplerSettings) -> StubEngine:
    """A `make_engine` of StudentSampler; `model_dir` is the size of the vocabulary."""
    return StubEngine(settings.rollout.top_k_logprobs, int(settings.model_dir))


def small_stub_engine(settings: SamplerSettings) -> StubEngine:
    """A `make_engine` whose tokens a model of some hundred tokens can learn from; slow enough to be disturbed."""
    return StubEngine(settings.rollout.top_k_logprobs, vocabulary=16, rate=STUB_RATE)


def fast_stub_engine(settings: SamplerSettings) -> StubEngine:
    """A `make_engine` of the same tokens, as fast as it can."""
    return StubEngine(settings.rollout.top_k_logprobs, vocabulary=16)


class StubSampler(StudentSampler):
    """The sampler, which also tells its CPU time."""

    def cpu(self) -> tuple[float, float]:
        """CPU seconds of the process, and the stub's part of them."""
        assert isinstance(self._engine, StubEngine)
        return time.process_time(), self._engine.cpu_seconds

    def set_rate(self, rate: float | None) -> None:
        """Tokens a second of this sampler."""
        assert isinstance(self._engine, StubEngine)
        self._engine.set_rate(rate)


class PlainMonitor(TrapMonitor):
    """The monitor, which also tells its CPU time."""

    def cpu(self) -> tuple[float, float]:
        """CPU seconds of the process."""
        return time.process_time(), 0.0
