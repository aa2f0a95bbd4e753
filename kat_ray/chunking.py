"""From an engine's rows to RolloutChunks: what has been generated and not yet been sent to a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kat_ray.packing import pack_ids
from kat_ray.types import EngineEnd, FloatArray, IntArray, RolloutChunk

# Below fp32's resolution of `1 - sum(p)` a tail mass is rounding noise; the same floor as in
# kat_ray.divergence, restated there with its reason.
TAIL_FLOOR = 2.0**-24


def tail_logprobs(topk_logprobs: FloatArray) -> FloatArray:
    """Log of the mass outside the top k, from their log-probabilities [N, k] float32; shape [N]."""
    # In double precision 1 - sum(p) is exact to 1e-16, far below the floor.
    outside = 1.0 - np.exp(topk_logprobs, dtype=np.float64).sum(axis=-1)
    return np.log(np.maximum(outside, TAIL_FLOOR)).astype(np.float32)


@dataclass
class PendingRollout:
    """One rollout as its sampler sees it: all tokens, and the rows not yet sent."""

    rollout_id: int
    prompt_ids: tuple[int, ...]
    scorer: int
    token_ids: list[int] = field(default_factory=list)
    sent: int = 0
    end: EngineEnd = EngineEnd.RUNNING
    end_sent: bool = False
    topk_ids: list[IntArray] = field(default_factory=list)
    logprobs: list[FloatArray] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], topk_ids: IntArray, logprobs: FloatArray) -> None:
        """Add new tokens with their rows: ids and log-probabilities [n, 1 + k], the sampled token first."""
        self.token_ids.extend(token_ids)
        self.topk_ids.append(topk_ids)
        self.logprobs.append(logprobs)

    @property
    def unsent(self) -> int:
        """Tokens not yet sent."""
        return len(self.token_ids) - self.sent

    @property
    def has_news(self) -> bool:
        """Whether a chunk has to mention this rollout: new tokens, or its end."""
        return self.unsent > 0 or (self.end is not EngineEnd.RUNNING and not self.end_sent)


def build_chunk(
    rollouts: Sequence[PendingRollout],
    released: Sequence[int],
    *,
    sampler: str,
    policy_version: int,
    top_k: int,
    vocabulary: int,
) -> RolloutChunk:
    """One chunk of everything the rollouts have not sent yet; marks it as sent.

    All rollouts belong to one scorer. `released` names rollouts whose state that scorer can drop.
    """
    counts = [r.unsent for r in rollouts]
    contexts = [r.prompt_ids if r.sent == 0 else () for r in rollouts]
    rows = sum(counts)
    ids = np.zeros((rows, top_k + 1), dtype=np.int32)
    logprobs = np.zeros((rows, top_k + 1), dtype=np.float32)
    if rows:
        np.concatenate([a for r in rollouts for a in r.topk_ids], out=ids, casting="same_kind")
        np.concatenate([a for r in rollouts for a in r.logprobs], out=logprobs)
    low, high = pack_ids(ids[:, 1:], vocabulary)
    chunk = RolloutChunk(
        sampler=sampler,
        policy_version=policy_version,
        rollout_ids=np.array([r.rollout_id for r in rollouts], dtype=np.int64),
        start=np.array([r.sent for r in rollouts], dtype=np.int32),
        offsets=_offsets(counts),
        token_ids=np.array([t for r in rollouts for t in r.token_ids[r.sent :]], dtype=np.int32),
        sampled_logprobs=np.ascontiguousarray(logprobs[:, 0]),
        topk_ids_low=low,
        topk_ids_high=high,
        topk_logprobs=logprobs[:, 1:].astype(np.float16),
        tail_logprobs=tail_logprobs(logprobs[:, 1:]),
        context_offsets=_offsets([len(c) for c in contexts]),
        context_ids=np.array([t for c in contexts for t in c], dtype=np.int32),
        ended=np.array([r.end for r in rollouts], dtype=np.int8),
        released=np.asarray(released, dtype=np.int64),
    )
    for rollout in rollouts:
        rollout.sent = len(rollout.token_ids)
        rollout.end_sent = rollout.end is not EngineEnd.RUNNING
        rollout.topk_ids.clear()
        rollout.logprobs.clear()
    return chunk


def _offsets(counts: Sequence[int]) -> IntArray:
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets
