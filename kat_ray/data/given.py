"""Completions that a step is given in place of rollouts: for scorers, and as samples of the learner.

They are not generated: no sampler and no monitor hears of them, and they are in no count of rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kat_ray.data.batch import TrainingSample, collect_samples
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.types.records import EngineEnd, KeptRollout, Prompt, RolloutChunk, TeacherRows

_ATTEMPT = 0  # of no sampler


@dataclass(frozen=True)
class GivenCompletion:
    """A prompt with its completion, under a rollout id that no rollout of the run has."""

    rollout_id: int
    prompt: Prompt

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The completion."""
        assert self.prompt.completion_ids is not None, "`Config` has seen to the column"
        return self.prompt.completion_ids

    @property
    def scored_prompt(self) -> tuple[int, ...]:
        """The tokens that its teacher has before it."""
        return self.prompt.token_ids if self.prompt.context_ids is None else self.prompt.context_ids

    @property
    def kept(self) -> KeptRollout:
        """It as a part of the learner's work: all of it is learnt."""
        prompt, told = self.prompt, self.prompt.context_ids
        if told is None:
            return KeptRollout(self.rollout_id, len(prompt.token_ids), len(self.token_ids))
        return KeptRollout(
            self.rollout_id, len(prompt.token_ids), len(self.token_ids), prompt_ids=prompt.token_ids,
            context_length=len(told),
        )  # fmt: skip


@dataclass(frozen=True)
class GivenShare:
    """What a rank of the learner has of a step's completions. `teacher` belongs to `chunks`, or is empty."""

    chunks: Sequence[Any]  # references to RolloutChunks, or they themselves
    teacher: Sequence[Any]  # references to TeacherRows
    kept: Sequence[KeptRollout]
    weight: float  # of each token; the denominator is in it


def given_chunk(completions: Sequence[GivenCompletion]) -> RolloutChunk:
    """One chunk of whole completions. No student was asked: its "top k" is the given token, of probability 1."""
    vocabulary = 1 + max((token for c in completions for token in c.token_ids), default=0)
    return build_chunk([_ended(c) for c in completions], [], attempt=_ATTEMPT, top_k=1, vocabulary=vocabulary)


def _ended(completion: GivenCompletion) -> PendingRollout:
    rollout = PendingRollout(completion.rollout_id, completion.scored_prompt, scorer=0, end=EngineEnd.EOS)
    tokens = np.array(completion.token_ids, dtype=np.int32)
    twice = np.stack([tokens, tokens], axis=1)
    rollout.add(tokens.tolist(), twice, np.zeros(twice.shape, dtype=np.float32))
    return rollout


def given_samples(
    share: GivenShare, chunks: Sequence[RolloutChunk], teacher: Sequence[TeacherRows], top_k: int
) -> list[TrainingSample]:
    """The samples of a share, whose records are `chunks` and `teacher`, with rows of `top_k` ids.

    Without a teacher these are any ids: nothing is compared at them.
    """
    rows = teacher or [_unscored(chunk, top_k) for chunk in chunks]
    return [
        replace(sample, given=sample.weights * np.float32(share.weight))
        for sample in collect_samples(chunks, rows, share.kept)
    ]


def _unscored(chunk: RolloutChunk, top_k: int) -> TeacherRows:
    n = chunk.tokens
    even = np.full((n, top_k), -math.log(2 * max(1, top_k)), dtype=np.float16)
    ids = np.broadcast_to(np.arange(top_k, dtype=np.int32), (n, top_k))
    half, nowhere = np.full(n, -math.log(2), dtype=np.float32), np.full(n, -np.inf, dtype=np.float32)
    return TeacherRows(even, half, nowhere, ids.astype(np.uint16), np.zeros((n, 0), dtype=np.uint8))
