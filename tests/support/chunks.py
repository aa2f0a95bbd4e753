"""Chunks by hand, and of a real student, as samplers and scorers send them."""

import numpy as np
import torch

from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.types.records import EngineEnd, RolloutChunk, ScoredChunk, TeacherRows
from kat_ray.types.token_ids import pack_ids


@torch.no_grad()
def chunk_of(
    student,
    rollouts,
    *,
    top_k=64,
    start=None,
    end=None,
    context=None,
    inserted=(),
    ended=None,
    released=(),
    logprob_dtype=np.float16,
):
    """A RolloutChunk as a sampler would send it: rows of the real student for tokens start..end.

    `rollouts` maps ids to (prompt, tokens); `start`, `end`, `ended` map ids to token indices or EngineEnd.
    """
    start, end, ended = start or {}, end or {}, ended or {}
    rows, contexts, ids, logprobs, sampled, tails = [], [], [], [], [], []
    for i, (prompt, tokens) in rollouts.items():
        a, b = start.get(i, 0), end.get(i, len(tokens))
        full = torch.log_softmax(student(torch.tensor([[*prompt, *tokens]])).logits[0].float(), dim=-1)
        lp = full[len(prompt) - 1 + a : len(prompt) - 1 + b]
        best, best_ids = lp.topk(top_k)
        new = torch.tensor(tokens[a:b], dtype=torch.long)
        rows.append(tokens[a:b])
        sampled.append(lp.gather(-1, new[:, None])[:, 0])
        ids.append(best_ids)
        logprobs.append(best)
        tails.append(torch.log((1 - best.double().exp().sum(-1)).clamp_min(2.0**-24)))
        contexts.append((context or {}).get(i, prompt if a == 0 else []))
    low, high = pack_ids(torch.cat(ids).numpy(), vocabulary=200)
    offsets = lambda parts: np.cumsum([0, *map(len, parts)]).astype(np.int32)  # noqa: E731
    flat = lambda parts, dtype: np.array([x for p in parts for x in p], dtype=dtype)  # noqa: E731
    return RolloutChunk(
        attempt=0,
        rollout_ids=np.array(list(rollouts), dtype=np.int64),
        start=np.array([start.get(i, 0) for i in rollouts], dtype=np.int32),
        offsets=offsets(rows),
        token_ids=flat(rows, np.int32),
        sampled_logprobs=torch.cat(sampled).numpy().astype(np.float32),
        topk_ids_low=low,
        topk_ids_high=high,
        topk_logprobs=torch.cat(logprobs).numpy().astype(logprob_dtype),
        tail_logprobs=torch.cat(tails).numpy().astype(np.float32),
        context_offsets=offsets(contexts),
        context_ids=flat(contexts, np.int32),
        inserted=np.array([i in inserted for i in rollouts], dtype=bool),
        ended=np.array([ended.get(i, EngineEnd.RUNNING) for i in rollouts], dtype=np.int8),
        released=np.array(released, dtype=np.int64),
    )


def random_rollouts(count, *, seed=0, vocabulary=200, prompt=(2, 9), tokens=(5, 30)):
    """Random prompts and tokens by rollout id."""
    rng = np.random.default_rng(seed)
    draw = lambda bounds: rng.integers(2, vocabulary, rng.integers(*bounds)).tolist()  # noqa: E731
    return {i: (draw(prompt), draw(tokens)) for i in range(count)}


K = 3


def stream(rollouts, size):
    """Chunks of `size` tokens as a sampler builds them, with teacher rows that name their token."""
    pending = {i: PendingRollout(i, tuple(p), scorer=0) for i, (p, _) in rollouts.items()}
    chunks, teacher = [], []
    for at in range(0, max(len(t) for _, t in rollouts.values()), size):
        for i, (_, tokens) in rollouts.items():
            for token in tokens[at : at + size]:
                row = np.arange(token, token + K + 1, dtype=np.int32)[None]
                pending[i].add([token], row, -row.astype(np.float32) / 10)
            if at < len(tokens) <= at + size:
                pending[i].end = EngineEnd.EOS
        news = [r for r in pending.values() if r.has_news]
        chunks.append(build_chunk(news, [], attempt=0, top_k=K, vocabulary=500))
        ids = chunks[-1].token_ids
        column = ids.astype(np.float32)
        teacher.append(TeacherRows(np.repeat(column[:, None], K, 1), column + 0.25, column + 0.5))
    return chunks, teacher


def chunk(ids, start, rows, ended=None, overlap=None):
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32)
    d = np.concatenate([np.asarray(r, dtype=np.float32) for r in rows])
    extra = dict.fromkeys(("overlap", "teacher_max", "teacher_entropy", "student_entropy", "student_tail"), d)
    extra["overlap"] = d if overlap is None else np.concatenate([np.asarray(r, np.float32) for r in overlap])
    return ScoredChunk(
        scorer="s", attempt=0, rollout_ids=np.asarray(ids, np.int64), start=np.asarray(start,
        np.int32), offsets=offsets, d=d, token_ids=np.zeros(len(d), np.int32), teacher_top=np.zeros(len(d),
        np.int32), ended=np.asarray(ended or [0] * len(ids), np.int8), seconds=0.0, **extra,
    )  # fmt: skip
