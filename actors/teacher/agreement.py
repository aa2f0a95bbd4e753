"""The teacher's log-probabilities in a scorer: as chunks are scored in a run, and by a plain forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.teacher.backend import Sequences, Teacher
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.types.records import EngineEnd, FloatArray


def chunked_logprobs(teacher: Teacher, sequences: Sequences, top_k: int, pieces: int = 3) -> list[FloatArray]:
    """Log-probabilities of the answers, [tokens] each, scored together in ragged pieces.

    After the first piece every second rollout is forgotten and sent again with its whole past, as where another
    scorer takes it over. No state is left. The rollouts' numbers are negative: none of a run's.
    """
    rollouts = [PendingRollout(-1 - i, tuple(prompt), 0) for i, (prompt, _) in enumerate(sequences)]
    found: list[list[float]] = [[] for _ in sequences]
    for piece in range(pieces):
        for i, (rollout, (_, answer)) in enumerate(zip(rollouts, sequences, strict=True)):
            _add(
                rollout, answer[_cut(answer, piece, pieces, i) : _cut(answer, piece + 1, pieces, i)], top_k, teacher
            )
            if piece == 1 and i % 2:
                teacher.release([rollout.rollout_id])
                rollout.known = False
            if piece == pieces - 1:
                rollout.end = EngineEnd.MAX_TOKENS
        chunk = build_chunk(rollouts, [], attempt=0, top_k=top_k, vocabulary=teacher.vocabulary)
        columns = teacher.score(chunk, chunk.topk_ids())
        for i in range(len(rollouts)):
            found[i] += columns.topk[chunk.offsets[i] : chunk.offsets[i + 1], 0].tolist()
    teacher.release([r.rollout_id for r in rollouts])
    return [np.array(values, dtype=np.float32) for values in found]


def _cut(answer: Sequence[int], piece: int, pieces: int, number: int) -> int:
    """Where a piece begins: a different token in each rollout, so that a pass holds rollouts of all lengths."""
    if piece in (0, pieces):
        return 0 if piece == 0 else len(answer)
    return min(len(answer), max(0, piece * len(answer) // pieces + number % 3 - 1))


def _add(rollout: PendingRollout, answer: Sequence[int], top_k: int, teacher: Teacher) -> None:
    """New tokens with rows whose first id is the token itself; the student's side of a row is not looked at."""
    if not answer:
        return
    tokens = np.array(answer, dtype=np.int64)[:, None]
    # Distinct ids, as a student's are.
    ids = (tokens + np.arange(top_k)) % teacher.vocabulary
    rows = np.concatenate([tokens, ids], axis=1).astype(np.int32)
    rollout.add(list(answer), rows, np.full(rows.shape, -np.log(2.0 * top_k), dtype=np.float32))
