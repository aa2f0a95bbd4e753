"""Work for one component alone: rollouts of random tokens as the chunks that a sampler would send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kat_ray.data.chunks import tail_logprobs
from kat_ray.types.records import EngineEnd, IntArray, KeptRollout, RolloutChunk, TeacherRows
from kat_ray.types.token_ids import pack_ids

TOP_K = 64
PROMPT = (8, 33)  # tokens of a prompt, drawn from this range

Rollouts = Sequence[tuple[IntArray, IntArray]]  # prompt and tokens of each, int32


def random_rollouts(count: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0) -> Rollouts:
    """Prompts and tokens; lengths are drawn evenly from lengths[0]..lengths[1] - 1."""
    rng = np.random.default_rng(seed)

    def draw(bounds: tuple[int, int]) -> IntArray:
        return rng.integers(2, vocabulary, rng.integers(*bounds), dtype=np.int32)

    return [(draw(PROMPT), draw(lengths)) for _ in range(count)]


def chunks_of(rollouts: Rollouts, chunk_tokens: int, vocabulary: int) -> Iterator[RolloutChunk]:
    """All rollouts in step, `chunk_tokens` tokens of each at a time, until the longest has ended."""
    rng = np.random.default_rng(1)
    for start in range(0, max(len(t) for _, t in rollouts), chunk_tokens):
        live = [i for i, (_, tokens) in enumerate(rollouts) if len(tokens) > start]
        news = [rollouts[i][1][start : start + chunk_tokens] for i in live]
        contexts = [rollouts[i][0] if start == 0 else rollouts[i][0][:0] for i in live]
        ended = [start + chunk_tokens >= len(rollouts[i][1]) for i in live]
        yield _chunk(rng, live, start, news, contexts, ended, vocabulary)


def _chunk(
    rng: np.random.Generator,
    ids: Sequence[int],
    start: int,
    news: Sequence[IntArray],
    contexts: Sequence[IntArray],
    ended: Sequence[bool],
    vocabulary: int,
) -> RolloutChunk:
    rows = sum(map(len, news))
    # Distinct ids in each row, anywhere in the vocabulary: a random start and a stride.
    first = rng.integers(0, vocabulary, (rows, 1))
    topk_ids = (first + np.arange(TOP_K) * (vocabulary // TOP_K)) % vocabulary
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(TOP_K + 1), rows)[:, :TOP_K] + 1e-9), axis=-1)[:, ::-1]
    low, high = pack_ids(topk_ids, vocabulary)
    return RolloutChunk(
        attempt=0,
        rollout_ids=np.array(ids, dtype=np.int64),
        start=np.full(len(ids), start, dtype=np.int32),
        offsets=_offsets(news),
        token_ids=np.concatenate(news),
        sampled_logprobs=np.ascontiguousarray(logprobs[:, 0], dtype=np.float32),
        topk_ids_low=low,
        topk_ids_high=high,
        topk_logprobs=logprobs.astype(np.float16),
        tail_logprobs=tail_logprobs(logprobs),
        context_offsets=_offsets(contexts),
        context_ids=np.concatenate(contexts),
        inserted=np.zeros(len(ids), dtype=bool),
        ended=np.where(ended, EngineEnd.MAX_TOKENS, EngineEnd.RUNNING).astype(np.int8),
        released=np.zeros(0, dtype=np.int64),
    )


def _offsets(parts: Sequence[IntArray]) -> IntArray:
    return np.cumsum([0, *map(len, parts)]).astype(np.int32)


def teacher_rows(chunk: RolloutChunk) -> TeacherRows:
    """Targets near the student's own, so that a step's gradient is finite and small."""
    values = chunk.topk_logprobs - np.float16(0.1)
    none = np.full(chunk.tokens, -np.inf, dtype=np.float32)
    return TeacherRows(values, tail_logprobs(values), none)


def all_kept(rollouts: Rollouts) -> list[KeptRollout]:
    """Every token of every rollout is trained on."""
    return [KeptRollout(i, len(prompt), len(tokens)) for i, (prompt, tokens) in enumerate(rollouts)]
