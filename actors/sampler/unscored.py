"""The chunks of rollouts that nobody scores: records for the learner, and nothing to wait for."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from kat_ray.types.records import ChunkRefs, RolloutChunk, array_bytes


class UnscoredStream:
    """Stands where `actors.sampler.score_stream.ScoringStream` does, for a sampler that is wired to no teacher.

    No decision comes back, so every rollout goes on to the end that its engine gives it.
    """

    recovered = 0  # there is nobody to lose
    wait_seconds = 0.0
    decision_seconds: Sequence[float] = ()

    def __init__(self) -> None:
        self.chunks: list[ChunkRefs] = []

    def unanswered(self, scorer: int) -> int:
        """No answer is owed."""
        return 0

    def take_released(self, scorer: int) -> list[int]:
        """Nobody holds a rollout's state."""
        return []

    def send(self, scorer: int, chunk: RolloutChunk) -> None:
        """Keep a chunk for the learner."""
        self.chunks.append(ChunkRefs(tuple(chunk.rollout_ids.tolist()), ray.put(chunk), array_bytes(chunk)))

    def poll(self) -> None:
        """No decision can have arrived."""

    def wait(self, scorer: int) -> None:
        """Never called: `unanswered` is 0."""
        raise AssertionError("there is no decision to wait for")

    def drain(self) -> None:
        """Nothing is under way."""
