"""The token counts of a step, from the reports of samplers and monitor: each rollout and each token once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.termination.base import Finished
from kat_ray.types.records import (
    FloatArray,
    IntArray,
    KeptRollout,
    RolloutOutcome,
    RolloutSpec,
    SampledRollout,
    ScoredChunk,
    StopReason,
)


@dataclass(frozen=True)
class TokenCounts:
    """Where the tokens of one rollout went: generated = kept + cut_back + overshoot.

    `cut_back` tokens lie between the cut and the confirmation; `overshoot` was generated after it, before the
    decision arrived. A failed rollout keeps nothing: all its tokens count as overshoot.
    """

    generated: int
    kept: int
    cut_back: int
    overshoot: int


@dataclass(frozen=True)
class FinishedRollout:
    """A rollout that has ended: the monitor's outcome, the engine's tokens, and their counts."""

    outcome: RolloutOutcome
    token_ids: IntArray  # [T] int32, every token the engine generated, overshoot included
    counts: TokenCounts
    sampled_logprobs: FloatArray | None = None  # [T] float32, where they are recorded

    @property
    def rollout_id(self) -> int:
        return self.outcome.rollout_id


def count_tokens(outcome: RolloutOutcome, generated: int) -> TokenCounts:
    """Split `generated` tokens of a rollout by its outcome."""
    if outcome.stop_reason is StopReason.FAILED:
        return TokenCounts(generated, kept=0, cut_back=0, overshoot=generated)
    if outcome.cut is None or outcome.confirmed is None:
        assert outcome.scored in (None, generated), (
            f"rollout {outcome.rollout_id} generated {generated} tokens, {outcome.scored} were scored"
        )
        return TokenCounts(generated, kept=generated, cut_back=0, overshoot=0)
    assert outcome.cut <= outcome.confirmed <= generated
    return TokenCounts(
        generated,
        kept=outcome.cut,
        cut_back=outcome.confirmed - outcome.cut,
        overshoot=generated - outcome.confirmed,
    )


def join_outcomes(sampled: Iterable[SampledRollout], outcomes: Sequence[RolloutOutcome]) -> list[FinishedRollout]:
    """Match samplers' rollouts with the monitor's outcomes, in the order of ids.

    Both must name the same rollouts, each once.
    """
    by_id: dict[int, SampledRollout] = {}
    for rollout in sampled:
        assert rollout.rollout_id not in by_id, f"rollout {rollout.rollout_id} was generated twice"
        by_id[rollout.rollout_id] = rollout
    assert len(by_id) == len(outcomes), f"{len(by_id)} rollouts generated, {len(outcomes)} ended"
    own = [by_id[outcome.rollout_id] for outcome in outcomes]
    return [
        FinishedRollout(o, s.token_ids, count_tokens(o, len(s.token_ids)), s.sampled_logprobs)
        for o, s in zip(outcomes, own, strict=True)
    ]


def kept_rollouts(
    rollouts: Sequence[FinishedRollout], specs: Iterable[RolloutSpec], scales: Mapping[str, float] | None = None
) -> list[KeptRollout]:
    """The rollouts of a step that are trained on, those with at least one kept token, by id.

    `scales` are the weights of teachers by name, of those that have another than 1.
    """
    made_from = {s.rollout_id: s for s in specs}
    kept = []
    for rollout in rollouts:
        count, weights = rollout.counts.kept, rollout.outcome.weights
        if count:
            weights = None if weights is None else weights[:count]
            scale = (scales or {}).get(rollout.outcome.teacher, 1.0)
            kept.append(KeptRollout.of(made_from[rollout.rollout_id], count, weights=weights, scale=scale))
    return kept


def finished(outcome: RolloutOutcome) -> Finished:
    """The outcome in the form that a rule's calibration takes."""
    return Finished(
        outcome.minimum,
        cut=outcome.cut is not None,
        probe=outcome.probe,
        length=outcome.scored or 0,
        full=outcome.stop_reason is StopReason.MAX_TOKENS,
        evidence=outcome.evidence,
        teacher=outcome.teacher,
    )


class ScoredTokens:
    """All scored tokens of a step by rollout, in order. Sorted once for all columns."""

    def __init__(self, scored: Sequence[ScoredChunk]) -> None:
        self._scored = scored
        counts = _flat([np.diff(c.offsets) for c in scored])
        starts = _flat([c.start for c in scored])
        rollouts = _flat([c.rollout_ids for c in scored])
        sizes = [int(c.offsets[-1]) for c in scored]
        bases = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = _flat([c.offsets[:-1] + base for c, base in zip(scored, bases[:-1], strict=True)])
        order = np.lexsort((counts, starts, rollouts))  # a rollout's piece without tokens comes before its next
        counts, starts, rollouts, rows = counts[order], starts[order], rollouts[order], rows[order]
        ends = np.cumsum(counts)
        self._ids, first = np.unique(rollouts, return_index=True)
        self._bounds = (ends - counts)[first]
        have = ends - counts - np.repeat(self._bounds, np.diff([*first, len(order)]))
        wrong = np.flatnonzero(starts != have)
        assert not len(wrong), (
            f"rollout {rollouts[wrong[0]]}: a scored chunk starts at token {starts[wrong[0]]}, "
            f"expected {have[wrong[0]]}"
        )
        self._index = np.repeat(rows - (ends - counts), counts) + np.arange(int(counts.sum()))

    def column(self, field: str) -> Mapping[int, FloatArray]:
        """A field of ScoredChunk by rollout id, [T] each."""
        if not len(self._ids):
            return {}
        values = np.concatenate([getattr(c, field) for c in self._scored])[self._index]
        return dict(zip(self._ids.tolist(), np.split(values, self._bounds[1:]), strict=True))


def _flat(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def traces_of(scored: Sequence[ScoredChunk], field: str = "d") -> Mapping[int, FloatArray]:
    """A field of ScoredChunk by rollout id, [T] each; `d` is the reverse KL in nats, float32."""
    return ScoredTokens(scored).column(field)


def kept_rows(scored: Sequence[ScoredChunk], kept: Mapping[int, int]) -> list[np.ndarray]:
    """For each chunk a mask [N] of the rows of kept tokens. `kept` is the number of kept tokens by rollout id."""
    masks = []
    for chunk in scored:
        mask = np.zeros(int(chunk.offsets[-1]), dtype=bool)
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            first, last = int(chunk.offsets[i]), int(chunk.offsets[i + 1])
            mask[first : min(last, first + max(0, kept[rollout_id] - int(chunk.start[i])))] = True
        masks.append(mask)
    return masks
