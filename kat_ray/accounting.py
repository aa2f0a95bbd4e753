"""From what samplers and monitor report to the books of a step: every rollout once, every token once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.termination.base import Finished
from kat_ray.types import FloatArray, RolloutOutcome, SampledRollout, ScoredChunk, StopReason


@dataclass(frozen=True)
class RolloutBooks:
    """Where the tokens of one rollout went: generated = kept + cut_back + overshoot.

    `cut_back` tokens lie between the cut and the confirmation; `overshoot` was generated after it, while
    the decision was on its way. A failed rollout keeps nothing: all its tokens count as overshoot.
    """

    rollout_id: int
    generated: int
    kept: int
    cut_back: int
    overshoot: int


def keep_books(outcome: RolloutOutcome, generated: int) -> RolloutBooks:
    """Split `generated` tokens of a rollout by its outcome."""
    if outcome.stop_reason is StopReason.FAILED:
        return RolloutBooks(outcome.rollout_id, generated, 0, 0, generated)
    if outcome.cut is None or outcome.confirmed is None:
        assert outcome.scored == generated, (
            f"rollout {outcome.rollout_id} generated {generated} tokens, {outcome.scored} were scored"
        )
        return RolloutBooks(outcome.rollout_id, generated, generated, 0, 0)
    assert outcome.cut <= outcome.confirmed <= generated
    return RolloutBooks(
        outcome.rollout_id,
        generated,
        kept=outcome.cut,
        cut_back=outcome.confirmed - outcome.cut,
        overshoot=generated - outcome.confirmed,
    )


def join_outcomes(
    sampled: Iterable[SampledRollout], outcomes: Sequence[RolloutOutcome]
) -> list[tuple[RolloutOutcome, SampledRollout, RolloutBooks]]:
    """Match samplers' rollouts with the monitor's outcomes, in the order of ids.

    Both must name the same rollouts, each once.
    """
    by_id: dict[int, SampledRollout] = {}
    for rollout in sampled:
        assert rollout.rollout_id not in by_id, f"rollout {rollout.rollout_id} was generated twice"
        by_id[rollout.rollout_id] = rollout
    assert len(by_id) == len(outcomes), f"{len(by_id)} rollouts generated, {len(outcomes)} ended"
    joined = []
    for outcome in outcomes:
        rollout = by_id[outcome.rollout_id]
        joined.append((outcome, rollout, keep_books(outcome, len(rollout.token_ids))))
    return joined


def finished(outcome: RolloutOutcome) -> Finished:
    """What a rule learns from a rollout's end."""
    return Finished(
        outcome.minimum,
        cut=outcome.cut is not None,
        probe=outcome.probe,
        length=outcome.scored,
        full=outcome.stop_reason is StopReason.MAX_TOKENS,
    )


def traces_of(scored: Sequence[ScoredChunk], field: str = "d") -> Mapping[int, FloatArray]:
    """A column of every scored token by rollout, in the order of tokens; `d` is the reverse KL, nats, float32."""
    pieces: dict[int, list[tuple[int, FloatArray]]] = {}
    for chunk in scored:
        column = getattr(chunk, field)
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            rows = column[chunk.offsets[i] : chunk.offsets[i + 1]]
            pieces.setdefault(rollout_id, []).append((int(chunk.start[i]), rows))
    return {rollout_id: _joined(rollout_id, parts) for rollout_id, parts in pieces.items()}


def _joined(rollout_id: int, parts: list[tuple[int, FloatArray]]) -> FloatArray:
    have = 0
    ordered = sorted(parts, key=lambda part: (part[0], len(part[1])))
    for start, rows in ordered:
        assert start == have, f"rollout {rollout_id}: a scored chunk starts at token {start}, expected {have}"
        have += len(rows)
    return np.concatenate([rows for _, rows in ordered])


def kept_rows(scored: Sequence[ScoredChunk], kept: Mapping[int, int]) -> list[np.ndarray]:
    """For each chunk a mask [N] of the rows that belong to kept tokens."""
    masks = []
    for chunk in scored:
        mask = np.zeros(int(chunk.offsets[-1]), dtype=bool)
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            first, last = int(chunk.offsets[i]), int(chunk.offsets[i + 1])
            mask[first : min(last, first + max(0, kept[rollout_id] - int(chunk.start[i])))] = True
        masks.append(mask)
    return masks
