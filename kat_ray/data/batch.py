"""From chunks in the object store to padded micro-batches. numpy only; lengths make the masks, never ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.errors import UserError
from kat_ray.types.records import FloatArray, IntArray, KeptRollout, RolloutChunk, TeacherRows
from kat_ray.types.token_ids import out_of_vocabulary, out_of_vocabulary_message


@dataclass(frozen=True)
class TrainRow:
    """The kept part of one rollout, T tokens, with the teacher's targets."""

    rollout_id: int
    prompt_ids: IntArray  # [P] int32
    token_ids: IntArray  # [T] int32
    topk_ids: IntArray  # [T, k]
    teacher_topk: FloatArray  # [T, k]
    teacher_tail: FloatArray  # [T]
    teacher_stop: FloatArray  # [T]
    sampled_logprobs: FloatArray  # [T]
    weights: FloatArray  # [T] in the loss

    @property
    def inputs(self) -> int:
        """Tokens of the forward pass: the last token predicts nothing that is kept."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, right-padded with zeros.

    `positions` [T, 2] lists (row, column) of the hidden states that predict the T kept tokens of all rows, in
    the order in which the targets are concatenated.
    """

    rows: tuple[TrainRow, ...]
    input_ids: IntArray  # [B, L] int64
    attention_mask: IntArray  # [B, L] int64
    positions: IntArray  # [T, 2] int64


def assign_ranks(kept: Sequence[KeptRollout], world_size: int) -> list[list[KeptRollout]]:
    """Deal rollouts to ranks, the longest first, each to the rank with the fewest tokens; deterministic."""
    shares: list[list[KeptRollout]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for rollout in sorted(kept, key=lambda k: (-(k.prompt_length + k.kept), k.rollout_id)):
        rank = loads.index(min(loads))
        shares[rank].append(rollout)
        loads[rank] += rollout.prompt_length + rollout.kept
    return shares


def collect_rows(
    chunks: Sequence[RolloutChunk], teacher: Sequence[TeacherRows], kept: Sequence[KeptRollout]
) -> list[TrainRow]:
    """Gather the first `kept` tokens of each rollout from its chunks, in the order of `kept`.

    ValueError if a rollout's rows are missing, out of order or not contiguous.
    """
    wanted = {k.rollout_id: k for k in kept}
    pieces: dict[int, list[tuple[int, int, slice]]] = {k.rollout_id: [] for k in kept}
    prompts: dict[int, IntArray] = {}
    for c, chunk in enumerate(chunks):
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            if rollout_id not in wanted:
                continue
            rows = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            pieces[rollout_id].append((int(chunk.start[i]), c, rows))
            context = chunk.context_ids[chunk.context_offsets[i] : chunk.context_offsets[i + 1]]
            if len(context):
                prompts[rollout_id] = context[: wanted[rollout_id].prompt_length]
    return [_join(k, prompts.get(k.rollout_id), sorted(pieces[k.rollout_id]), chunks, teacher) for k in kept]


def _join(
    kept: KeptRollout,
    prompt: IntArray | None,
    pieces: Sequence[tuple[int, int, slice]],
    chunks: Sequence[RolloutChunk],
    teacher: Sequence[TeacherRows],
) -> TrainRow:
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
    return TrainRow(
        rollout_id=kept.rollout_id,
        prompt_ids=prompt,
        token_ids=np.concatenate([chunks[c].token_ids[s] for c, s in spans]),
        topk_ids=np.concatenate([chunks[c].topk_ids(s) for c, s in spans]),
        teacher_topk=np.concatenate([teacher[c].topk_logprobs[s] for c, s in spans]),
        teacher_tail=np.concatenate([teacher[c].tail_logprobs[s] for c, s in spans]),
        teacher_stop=np.concatenate([teacher[c].stop_logprobs[s] for c, s in spans]),
        sampled_logprobs=np.concatenate([chunks[c].sampled_logprobs[s] for c, s in spans]),
        weights=np.ones(kept.kept, dtype=np.float32) if kept.weights is None else kept.weights,
    )


def check_row_vocabulary(rows: Sequence[TrainRow], vocabulary: int, model: str) -> None:
    """UserError where a row holds an id that `model`, a field and its value, has no token for.

    The model would end in an index error, on a GPU in one that names neither tensor nor row.
    """
    for row in rows:
        for name, ids in (("prompt", row.prompt_ids), ("answer", row.token_ids), ("top k", row.topk_ids)):
            if (foreign := out_of_vocabulary(ids, vocabulary)) is not None:
                raise UserError(out_of_vocabulary_message(row.rollout_id, name, foreign, vocabulary, model))


def micro_batches(rows: Sequence[TrainRow], budget: int) -> list[MicroBatch]:
    """Group rows of similar length so that B x L <= budget tokens, padding included.

    A row longer than the budget is a micro-batch of its own; a row of which no token is kept is in none.
    """
    batches: list[MicroBatch] = []
    group: list[TrainRow] = []
    for row in sorted((r for r in rows if len(r.token_ids)), key=lambda r: (r.inputs, r.rollout_id)):
        if group and (len(group) + 1) * row.inputs > budget:
            batches.append(_pad(group))
            group = []
        group.append(row)
    if group:
        batches.append(_pad(group))
    return batches


def _pad(rows: Sequence[TrainRow]) -> MicroBatch:
    width = max(r.inputs for r in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    positions = []
    for b, row in enumerate(rows):
        input_ids[b, : row.inputs] = np.concatenate([row.prompt_ids, row.token_ids])[:-1]
        mask[b, : row.inputs] = 1
        first = len(row.prompt_ids) - 1
        columns = np.arange(first, first + len(row.token_ids), dtype=np.int64)
        positions.append(np.stack([np.full_like(columns, b), columns], axis=-1))
    return MicroBatch(tuple(rows), input_ids, mask, np.concatenate(positions))
