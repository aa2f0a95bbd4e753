"""RolloutChunks from an engine's rows: what was generated and is not yet sent to a scorer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kat_ray.errors import UserError
from kat_ray.types.records import EngineEnd, FloatArray, IntArray, RolloutChunk
from kat_ray.types.token_ids import out_of_vocabulary, out_of_vocabulary_message, pack_ids

# Below fp32's resolution of `1 - sum(p)` a tail mass is rounding noise; the same floor as in
# kat_ray.losses.divergence, restated there with its reason.
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
    prompt_ids: tuple[int, ...]  # that its scorer has: `RolloutSpec.scored_prompt`
    scorer: int
    token_ids: list[int] = field(default_factory=list)
    sent: int = 0
    end: EngineEnd = EngineEnd.RUNNING
    end_sent: bool = False
    known: bool = False  # its scorer holds what was sent
    cut: bool = False  # ended by a decision
    inserted: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by the number of generated tokens before
    topk_ids: list[IntArray] = field(default_factory=list)
    logprobs: list[FloatArray] = field(default_factory=list)
    block: int = 1  # tokens of a block of the scorer's prefix cache
    sampled: array[float] | None = None  # float32, log p of each of its tokens, where they are recorded

    def add(self, token_ids: Sequence[int], topk_ids: IntArray, logprobs: FloatArray) -> None:
        """Add new tokens with their rows: ids and log-probabilities [n, 1 + k], the sampled token first."""
        self.token_ids.extend(token_ids)
        self.topk_ids.append(topk_ids)
        self.logprobs.append(logprobs)
        if self.sampled is not None:
            self.sampled.extend(logprobs[:, 0].tolist())

    def insert(self, token_ids: Sequence[int]) -> None:
        """Add tokens that the student did not generate, as an environment's answer; they go with the next chunk.

        ValueError while generated tokens are unsent: a chunk has room for context before its first row only.
        """
        if self.unsent:
            raise ValueError(
                f"rollout {self.rollout_id}: {self.unsent} generated tokens are not sent yet; send them in a chunk "
                "before tokens are inserted after them"
            )
        self.inserted[self.sent] = (*self.inserted.get(self.sent, ()), *token_ids)

    def context(self, start: int) -> Sequence[int]:
        """What the scorer must run before generated token `start`, the first of a chunk: what was inserted there,
        or the whole past where the scorer does not hold it.
        """
        return self.inserted.get(start, ()) if self.known else self._past(start)

    def _past(self, start: int) -> list[int]:
        past, have = list(self.prompt_ids), 0
        for position in sorted(p for p in self.inserted if p <= start):
            past += (*self.token_ids[have:position], *self.inserted[position])
            have = position
        return past + self.token_ids[have:start]

    @property
    def unsent(self) -> int:
        """Number of tokens not yet sent."""
        return len(self.token_ids) - self.sent

    @property
    def ready(self) -> int:
        """Number of unsent tokens that the next chunk takes: all of them once the rollout has ended.

        Before, the last `(length - 1) % block` wait for the next one: all tokens sent but the last then fill whole
        blocks, which is what a prefix cache keeps, and only the last is run again.
        """
        if self.end is not EngineEnd.RUNNING:
            return self.unsent
        length = len(self.prompt_ids) + sum(map(len, self.inserted.values())) + len(self.token_ids)
        return max(0, self.unsent - (length - 1) % self.block)

    @property
    def has_news(self) -> bool:
        """Whether the next chunk must include this rollout: it has tokens ready, or its end is not sent yet."""
        return self.ready > 0 or (self.end is not EngineEnd.RUNNING and not self.end_sent)

    def take(self, count: int) -> tuple[list[int], list[IntArray], list[FloatArray]]:
        """The first `count` unsent tokens and their rows, which are then marked as sent."""
        tokens, ids, logprobs = self.token_ids[self.sent : self.sent + count], self.topk_ids, self.logprobs
        self.topk_ids, self.logprobs = [], []
        if count < self.unsent:
            whole_ids, whole_logprobs = np.concatenate(ids), np.concatenate(logprobs)
            ids, logprobs = [whole_ids[:count]], [whole_logprobs[:count]]
            self.topk_ids, self.logprobs = [whole_ids[count:]], [whole_logprobs[count:]]
        self.sent += count
        return tokens, ids, logprobs


def build_chunk(
    rollouts: Sequence[PendingRollout],
    released: Sequence[int],
    *,
    attempt: int,
    top_k: int,
    vocabulary: int,
) -> RolloutChunk:
    """One chunk of everything that is `ready` of these rollouts, which is then marked as sent.

    All rollouts belong to one scorer. `released` are rollouts whose state that scorer can drop.
    """
    counts, starts = [r.ready for r in rollouts], [r.sent for r in rollouts]
    contexts = [r.context(r.sent) for r in rollouts]
    inserted = _inserted(rollouts, contexts)
    taken = [r.take(n) for r, n in zip(rollouts, counts, strict=True)]
    rows = sum(counts)
    ids = np.zeros((rows, top_k + 1), dtype=np.int32)
    logprobs = np.zeros((rows, top_k + 1), dtype=np.float32)
    if rows:
        np.concatenate([a for _, ids_of, _ in taken for a in ids_of], out=ids, casting="same_kind")
        np.concatenate([a for _, _, logprobs_of in taken for a in logprobs_of], out=logprobs)
    low, high = pack_ids(ids[:, 1:], vocabulary)
    chunk = RolloutChunk(
        attempt=attempt,
        rollout_ids=np.array([r.rollout_id for r in rollouts], dtype=np.int64),
        start=np.array(starts, dtype=np.int32),
        offsets=_offsets(counts),
        token_ids=np.array([t for tokens, _, _ in taken for t in tokens], dtype=np.int32),
        ended=np.array([r.end for r in rollouts], dtype=np.int8),
        sampled_logprobs=np.ascontiguousarray(logprobs[:, 0]),
        topk_ids_low=low,
        topk_ids_high=high,
        topk_logprobs=logprobs[:, 1:].astype(np.float16),
        tail_logprobs=tail_logprobs(logprobs[:, 1:]),
        context_offsets=_offsets([len(c) for c in contexts]),
        context_ids=np.array([t for c in contexts for t in c], dtype=np.int32),
        inserted=inserted,
        released=np.asarray(released, dtype=np.int64),
    )
    for rollout in rollouts:
        rollout.known = True
        rollout.end_sent = rollout.end is not EngineEnd.RUNNING
    return chunk


def check_chunk_vocabulary(chunk: RolloutChunk, topk_ids: IntArray, vocabulary: int, model: str) -> None:
    """UserError if a chunk holds an id that `model`, a field and its value, has no token for.

    `topk_ids` are the chunk's, unpacked.
    """
    if all(out_of_vocabulary(ids, vocabulary) is None for ids in (chunk.context_ids, chunk.token_ids, topk_ids)):
        return
    for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
        rows = slice(chunk.offsets[i], chunk.offsets[i + 1])
        parts = {"context": chunk.context(i), "answer": chunk.new_tokens(i), "top k": topk_ids[rows]}
        for part, ids in parts.items():
            if (foreign := out_of_vocabulary(ids, vocabulary)) is not None:
                raise UserError(out_of_vocabulary_message(rollout_id, part, foreign, vocabulary, model))


def with_context(chunk: RolloutChunk, rollouts: Mapping[int, PendingRollout]) -> RolloutChunk:
    """A chunk to score again, with the whole past of rollouts that are not `known`; they then are."""
    own = [rollouts[i] for i in chunk.rollout_ids.tolist()]
    contexts = [r.context(start) for r, start in zip(own, chunk.start.tolist(), strict=True)]
    inserted = _inserted(own, contexts)
    for rollout in own:
        rollout.known = True
    return replace(
        chunk,
        context_offsets=_offsets([len(c) for c in contexts]),
        context_ids=np.array([t for c in contexts for t in c], dtype=np.int32),
        inserted=inserted,
        released=np.zeros(0, dtype=np.int64),
    )


def _inserted(rollouts: Sequence[PendingRollout], contexts: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    return np.array([r.known and len(c) > 0 for r, c in zip(rollouts, contexts, strict=True)], dtype=bool)


def _offsets(counts: Sequence[int]) -> IntArray:
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets
