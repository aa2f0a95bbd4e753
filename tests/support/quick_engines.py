"""Engines of runs on the fake cluster: stubs whose tokens depend on the weights, and a teacher without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.sampler.settings import SamplerSettings
from actors.teacher.settings import ScorerSettings
from actors.testing.stub_engine import StubEngine
from actors.testing.stub_teacher import stub_kl
from kat_ray.errors import StateLost
from kat_ray.types.records import (
    EngineEnd,
    EngineRows,
    RolloutChunk,
    SamplingSettings,
    ScoredChunk,
    TeacherRows,
    WeightUpdate,
)

PROMPT_LENGTH = 3  # tokens, of all prompts


class ShiftingEngine(StubEngine):
    """The stub engine, with tokens that depend on the weights, and with answers of different lengths."""

    def __init__(self, top_k: int, fixed: bool) -> None:
        super().__init__(top_k, vocabulary=16, rate=300.0)
        self._fixed = fixed  # tokens depend on the rollout alone
        self._shift = 0
        self._short: set[str] = set()  # requests that end before they must

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None:
        """Queue one request; the seed says how long its answer is."""
        assert request_id not in self._left, f"{request_id} is under way already"
        super().add(request_id, prompt_ids, seed, settings)
        self._left[request_id] = length = min(settings.max_tokens, 6 + seed % 16)
        self._row[request_id] += self._shift
        if length < settings.max_tokens:
            self._short.add(request_id)

    def step(self) -> list[EngineRows]:
        """One token of every running request."""
        short = self._short
        return [r._replace(end=EngineEnd.EOS) if r.end and r.request_id in short else r for r in super().step()]

    def load_weights(self, update: WeightUpdate) -> None:
        """The next tokens are of these weights."""
        assert not self._left, "weights are changed under rollouts"
        self._shift = 0 if self._fixed else int(update.arrays[0][0]) % 251


def make_engine(fixed: bool, settings: SamplerSettings) -> ShiftingEngine:
    """A `make_engine` of StudentSampler."""
    return ShiftingEngine(settings.rollout.top_k_logprobs, fixed)


@dataclass(frozen=True)
class _Columns:
    """What `quick_compare` needs of a chunk: its reverse KL."""

    d: np.ndarray


SCALES = {"other": 1.5, "third": 0.5}  # of the KL, by the model that computes it


class QuickTeacher:
    """The teacher of `actors.testing.stub_teacher` without torch, which would take half of the time."""

    run_tokens = 0
    vocabulary = 2**24
    cache_bytes = 0

    def __init__(self, settings: ScorerSettings) -> None:
        self._horizon = settings.rollout.max_tokens
        self._scale = SCALES.get(settings.teacher.path, 1.0)
        self._follows = settings.follows_student
        self._held: dict[int, int] = {}  # tokens of a rollout that it knows

    @property
    def held(self) -> int:
        return len(self._held)

    def load_weights(self, update: WeightUpdate) -> None:
        """Its KL is of these weights from now on."""
        assert self._follows
        self._held.clear()
        self._scale = 1.0 + int(update.arrays[0][0]) % 7 / 8

    def score(self, chunk: RolloutChunk, topk_ids: Any, own_top: int = 0) -> _Columns:
        """Reverse KL by rollout and position; what a chunk leaves out must be known."""
        for i, rollout in enumerate(chunk.rollout_ids.tolist()):
            start, context = int(chunk.start[i]), chunk.context(i)
            if not len(context) and rollout not in self._held:
                raise StateLost(f"the past of rollout {rollout} is not held")
            known = len(context) - PROMPT_LENGTH if len(context) else self._held[rollout]
            assert known == start, f"rollout {rollout}: {known} tokens are known, the chunk starts at {start}"
            self._held[rollout] = start + len(chunk.new_tokens(i))
        counts = np.diff(chunk.offsets)
        position = np.arange(chunk.tokens) - np.repeat(chunk.offsets[:-1] - chunk.start, counts)
        own = stub_kl(np.repeat(chunk.rollout_ids, counts), position, self._horizon)
        return _Columns((own * self._scale).astype(own.dtype))

    def release(self, rollout_ids: Sequence[int]) -> None:
        for rollout in rollout_ids:
            self._held.pop(rollout, None)


def quick_rows(_scorer: Any, columns: _Columns) -> TeacherRows:
    """Stands in for what a teacher says of given completions, over ids of its own."""
    n, low = len(columns.d), np.arange(4, dtype=np.uint16)
    rows, tail = np.repeat(columns.d[:, None], 4, axis=1), columns.d + 0.25
    ids = np.broadcast_to(low, (n, 4)), np.zeros((n, 0), dtype=np.uint8)
    return TeacherRows(rows.astype(np.float16), tail, np.full(n, -16.0, dtype=np.float32), *ids)


def quick_compare(
    scorer: Any, chunk: RolloutChunk, _ids: Any, columns: _Columns, _started: float, _run: int
) -> tuple[ScoredChunk, TeacherRows]:
    """Stands in for the scorer's arithmetic in torch."""
    n = chunk.tokens
    half = np.full(n, 0.5, dtype=np.float16)
    scored = ScoredChunk(
        **chunk.of_rows(), scorer=scorer._name, d=columns.d, overlap=half, teacher_max=half, teacher_entropy=half,
        student_entropy=half,        student_tail=half, teacher_top=np.zeros(n, dtype=np.int32), seconds=0.001,
    )  # fmt: skip
    rows = (chunk.topk_logprobs - columns.d[:, None]).astype(np.float16)
    return scored, TeacherRows(rows, chunk.tail_logprobs - columns.d, np.full(n, -16.0, dtype=np.float32))
