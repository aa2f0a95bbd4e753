"""A step's kept rollouts: assigned to the learner's ranks, and gathered into training samples. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.errors import UserError
from kat_ray.types.records import FloatArray, IntArray, KeptRollout, PolicyCredit, RolloutChunk, TeacherRows
from kat_ray.types.token_ids import out_of_vocabulary, out_of_vocabulary_message


@dataclass(frozen=True)
class TrainingSample:
    """The kept part of one rollout, T tokens, with the teacher's targets."""

    rollout_id: int
    prompt_ids: IntArray  # [P] int32
    token_ids: IntArray  # [T] int32
    topk_ids: IntArray  # [T, k]
    teacher_topk: FloatArray  # [T, k]
    teacher_tail: FloatArray  # [T]
    teacher_stop: FloatArray  # [T]
    sampled_logprobs: FloatArray  # [T]
    weights: FloatArray  # [T] of the KL
    policy: PolicyCredit | None = None
    given: FloatArray | None = None  # [T] weights in the loss of given completions; None: it was generated

    @property
    def input_length(self) -> int:
        """Tokens of the forward pass: the last one predicts nothing that is kept."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


def assign_ranks(kept: Sequence[KeptRollout], world_size: int) -> list[list[KeptRollout]]:
    """Assign rollouts to ranks, the longest first, each to the rank with the fewest tokens. Deterministic."""
    shares: list[list[KeptRollout]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for rollout in sorted(kept, key=lambda k: (-(k.prompt_length + k.kept), k.rollout_id)):
        rank = loads.index(min(loads))
        shares[rank].append(rollout)
        loads[rank] += rollout.prompt_length + rollout.kept
    return shares


def collect_samples(
    chunks: Sequence[RolloutChunk], teacher: Sequence[TeacherRows], kept: Sequence[KeptRollout]
) -> list[TrainingSample]:
    """Gather the first `kept` tokens of each rollout from its chunks, in the order of `kept`.

    `teacher` belongs to `chunks` one by one, or is empty where nobody scored them.
    ValueError if a rollout's rows are missing, out of order or not contiguous, or if tokens were inserted before
    one that is kept: a sample is a prompt and an answer without gaps.
    """
    teacher = teacher or [_without_teacher(chunk) for chunk in chunks]
    wanted = {k.rollout_id: k for k in kept}
    pieces: dict[int, list[tuple[int, int, slice]]] = {k.rollout_id: [] for k in kept}
    prompts: dict[int, IntArray] = {}
    for c, chunk in enumerate(chunks):
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            if rollout_id not in wanted:
                continue
            rows = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            pieces[rollout_id].append((int(chunk.start[i]), c, rows))
            _check_without_insertions(wanted[rollout_id], chunk, i)
            if chunk.whole_past[i]:
                prompts[rollout_id] = _prompt(wanted[rollout_id], chunk.context(i))
    return [_join(k, prompts.get(k.rollout_id), sorted(pieces[k.rollout_id]), chunks, teacher) for k in kept]


def _prompt(kept: KeptRollout, past: IntArray) -> IntArray:
    """The student's prompt; `past` is what the scorer had, which is another where the teacher was told more."""
    if kept.prompt_ids is None:
        return past[: kept.prompt_length]
    return np.array(kept.prompt_ids, dtype=np.int32)


def _without_teacher(chunk: RolloutChunk) -> TeacherRows:
    """What any teacher says where no token is told from the others: all of its mass is in the one event left."""
    n, k = chunk.topk_logprobs.shape
    assert k == 0, f"nobody scored a chunk that was sampled to be scored (top k of {k})"
    nowhere = np.full(n, -np.inf, dtype=np.float32)
    return TeacherRows(np.zeros((n, 0), dtype=np.float16), np.zeros(n, dtype=np.float32), nowhere)


def _check_without_insertions(kept: KeptRollout, chunk: RolloutChunk, i: int) -> None:
    start, context = int(chunk.start[i]), len(chunk.context(i))
    if not chunk.inserted[i]:  # the whole past may hold insertions, and does not say where
        context = max(0, context - kept.past_length - start)
        start = 0
    if context and start < kept.kept:
        raise ValueError(
            f"rollout {kept.rollout_id}: {context} tokens were inserted among its {kept.kept} kept ones; "
            "the learner cannot train on such a rollout"
        )


def _join(
    kept: KeptRollout,
    prompt: IntArray | None,
    pieces: Sequence[tuple[int, int, slice]],
    chunks: Sequence[RolloutChunk],
    teacher: Sequence[TeacherRows],
) -> TrainingSample:
    have, spans = 0, []
    for start, c, rows in pieces:
        if start != have:
            raise ValueError(f"rollout {kept.rollout_id}: a chunk starts at token {start}, expected {have}")
        stop = min(rows.stop, rows.start + max(0, kept.kept - start))
        spans.append((c, slice(rows.start, stop)))
        have += rows.stop - rows.start
    if have < kept.kept:
        raise ValueError(f"rollout {kept.rollout_id}: {kept.kept} tokens are kept, the chunks hold {have}")
    if prompt is None or len(prompt) != kept.prompt_length:
        held = 0 if prompt is None else len(prompt)
        raise ValueError(
            f"rollout {kept.rollout_id}: its prompt has {kept.prompt_length} tokens, the chunks hold {held}"
        )
    return TrainingSample(
        rollout_id=kept.rollout_id,
        prompt_ids=prompt,
        token_ids=np.concatenate([chunks[c].token_ids[s] for c, s in spans]),
        topk_ids=np.concatenate([_event_ids(chunks[c], teacher[c], s) for c, s in spans]),
        teacher_topk=np.concatenate([teacher[c].topk_logprobs[s] for c, s in spans]),
        teacher_tail=np.concatenate([teacher[c].tail_logprobs[s] for c, s in spans]),
        teacher_stop=np.concatenate([teacher[c].stop_logprobs[s] for c, s in spans]),
        sampled_logprobs=np.concatenate([chunks[c].sampled_logprobs[s] for c, s in spans]),
        weights=_weights(kept),
        policy=kept.policy,
    )


def _event_ids(chunk: RolloutChunk, teacher: TeacherRows, rows: slice) -> IntArray:
    """The ids that are events on their own: those that the teacher names, or else the student's top k."""
    own = teacher.topk_ids(rows)
    return chunk.topk_ids(rows) if own is None else own


def _weights(kept: KeptRollout) -> FloatArray:
    weights = np.ones(kept.kept, dtype=np.float32) if kept.weights is None else kept.weights
    return weights if kept.scale == 1.0 else weights * np.float32(kept.scale)


def check_vocabulary(samples: Sequence[TrainingSample], vocabulary: int, model: str) -> None:
    """UserError if a sample holds an id that `model`, a field and its value, has no token for.

    Without this check the model fails with an index error, which on a GPU names neither tensor nor sample.
    """
    for sample in samples:
        parts = (("prompt", sample.prompt_ids), ("answer", sample.token_ids), ("top k", sample.topk_ids))
        for name, ids in parts:
            if (foreign := out_of_vocabulary(ids, vocabulary)) is not None:
                raise UserError(out_of_vocabulary_message(sample.rollout_id, name, foreign, vocabulary, model))
