"""One step's figures, from the records of its rollouts: the only place that computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from kat_ray.data.accounting import FinishedRollout, kept_rows
from kat_ray.types.records import (
    ChunkRefs,
    FloatArray,
    Reward,
    ScoredChunk,
    ScoredGiven,
    StepStart,
    StopReason,
    array_bytes,
)

_FEATURES = {
    "health/overlap": "overlap",
    "health/teacher_max": "teacher_max",
    "health/teacher_entropy": "teacher_entropy",
    "health/student_entropy": "student_entropy",
    "health/tail_mass": "student_tail",
}

_NO_KL = np.zeros(0, dtype=np.float32)


def rollout_metrics(rollouts: Sequence[FinishedRollout], step_start: StepStart) -> dict[str, float]:
    """Counts and shares of a step's rollouts. Shares of no rollouts are left out."""
    outcomes = [r.outcome for r in rollouts]
    counts = [r.counts for r in rollouts]
    ends = Counter(o.stop_reason for o in outcomes)
    probes = [o for o in outcomes if o.probe]
    minima = [o.minimum for o in outcomes if o.minimum is not None]
    n = len(outcomes)
    figures = {
        "rollout/generated_tokens": sum(c.generated for c in counts),
        "rollout/kept_tokens": sum(c.kept for c in counts),
        "rollout/overshoot_tokens": sum(c.overshoot for c in counts),
        "rollout/cut_back_tokens": sum(c.cut_back for c in counts),
        "rollout/mean_length": sum(c.generated for c in counts) / n,
        "rollout/eos_share": ends[StopReason.EOS] / n,
        "rollout/max_tokens_share": ends[StopReason.MAX_TOKENS] / n,
        "rollout/trapped_share": ends[StopReason.TRAPPED] / n,
        "rollout/failed": ends[StopReason.FAILED],
        "rollout/probes": len(probes),
    }
    if step_start.threshold is not None:
        figures["kat/threshold"] = step_start.threshold
    if step_start.budget is not None:
        figures["rollout/budget"] = step_start.budget
    if minima:
        figures["kat/window_min_mean"] = sum(minima) / len(minima)
    return {k: float(v) for k, v in figures.items()}


def teacher_metrics(
    rollouts: Sequence[FinishedRollout], kl: Mapping[int, FloatArray], step_start: StepStart
) -> dict[str, float]:
    """The figures of each teacher's rollouts, where it had any; `kl` [tokens] by rollout id, nats."""
    figures: dict[str, float] = {}
    for name in dict.fromkeys(r.outcome.teacher for r in rollouts):
        own = [r for r in rollouts if r.outcome.teacher == name]
        scored = [kl.get(r.rollout_id, _NO_KL) for r in own]
        kept = [values[: r.counts.kept] for r, values in zip(own, scored, strict=True)]
        minima = [r.outcome.minimum for r in own if r.outcome.minimum is not None]
        found: dict[str, float | None] = {
            "rollouts": len(own),
            "mean_length": sum(r.counts.generated for r in own) / len(own),
            "kept_tokens": sum(r.counts.kept for r in own),
            "trapped_share": sum(r.outcome.stop_reason is StopReason.TRAPPED for r in own) / len(own),
            "kl_mean": _mean(np.concatenate(scored)),
            "kl_kept_mean": _mean(np.concatenate(kept)),
            "threshold": step_start.of(name).threshold,
            "window_min_mean": sum(minima) / len(minima) if minima else None,
        }
        figures |= {f"teacher/{what}/{name}": float(v) for what, v in found.items() if v is not None}
    return figures


def source_metrics(
    rollouts: Sequence[FinishedRollout],
    sources: Mapping[int, str],
    correct: Mapping[int, bool],
    rewards: Mapping[int, Reward],
    ungraded: Collection[int] = (),
) -> dict[str, float]:
    """The figures of each source's rollouts, where it had any; all mappings are by rollout id.

    A rate is of the rollouts that have a verdict, a mean of those that have a reward. `ungraded` should have a
    verdict, and have none; they are counted where there are any.
    """
    figures: dict[str, float] = {}
    for name in sorted({*sources.values()}):
        own = [r for r in rollouts if sources.get(r.rollout_id) == name]
        right = [correct[r.rollout_id] for r in own if r.rollout_id in correct]
        values = [rewards[r.rollout_id].value for r in own if r.rollout_id in rewards]
        worth = [value for value in values if value is not None]
        found: dict[str, float | None] = {
            "rollouts": len(own),
            "tokens": sum(r.counts.generated for r in own),
            "mean_length": sum(r.counts.generated for r in own) / len(own),
            "pass_rate": sum(right) / len(right) if right else None,
            "reward": sum(worth) / len(worth) if worth else None,
            "ungraded": sum(r.rollout_id in ungraded for r in own) or None,
        }
        figures |= {f"source/{what}/{name}": float(v) for what, v in found.items() if v is not None}
    return figures


def answer_metrics(
    rollouts: Sequence[FinishedRollout], correct: Mapping[int, bool], policy_tokens: Mapping[int, int]
) -> dict[str, float]:
    """Lengths of right and wrong answers, and whose tokens the policy's loss has; both mappings by rollout id."""
    figures = {}
    for name, verdict in (("right", True), ("wrong", False)):
        lengths = [r.counts.generated for r in rollouts if correct.get(r.rollout_id) is verdict]
        if lengths:
            figures[f"rl/length_{name}"] = sum(lengths) / len(lengths)
    if total := sum(policy_tokens.values()):
        ends: Counter[StopReason] = Counter()
        for rollout in rollouts:
            ends[rollout.outcome.stop_reason] += policy_tokens.get(rollout.rollout_id, 0)
        figures["rl/cut_share"] = ends[StopReason.TRAPPED] / total
        figures["rl/truncated_share"] = ends[StopReason.MAX_TOKENS] / total
    return figures


def score_metrics(scored: Sequence[ScoredChunk], kept: Mapping[int, int]) -> dict[str, float]:
    """Means over scored tokens: KL of all and of the kept ones, the health features, and what scorers ran.

    `kept` maps rollout ids to the number of kept tokens. Tokens without a finite value do not enter a mean.
    """
    if not scored:
        return {}
    mask = np.concatenate(kept_rows(scored, kept))
    kl = np.concatenate([c.d for c in scored])
    figures = {"kl/mean": _mean(kl), "kl/kept_mean": _mean(kl[mask])}
    for name, field in _FEATURES.items():
        figures[name] = _mean(np.concatenate([getattr(c, field) for c in scored])[mask])
    if asked := sum(c.asked_tokens for c in scored):
        figures["scorer/run_per_token"] = sum(c.run_tokens for c in scored) / asked
    figures["scorer/row_bytes_per_token"] = sum(c.row_bytes for c in scored) / max(1, len(kl))
    return {k: v for k, v in figures.items() if v is not None}


def transfer_metrics(
    chunks: Sequence[ChunkRefs],
    scored: Sequence[ScoredChunk],
    asks_servers: bool,
    given: Sequence[ScoredGiven] = (),
) -> dict[str, float]:
    """Bytes of a step's records, each counted once, and of requests to teachers' servers if any.

    `chunks` are of its rollouts and of completions of the data; `scored` and `given` what teachers said of either.
    """
    figures = {"transfer/chunk_bytes": sum(c.chunk_bytes for c in chunks)}
    both: list[ScoredChunk | ScoredGiven] = [*scored, *given]
    if scored:
        figures["transfer/score_bytes"] = sum(map(array_bytes, scored))
    if both:
        figures["transfer/row_bytes"] = sum(c.row_bytes for c in both)
    if both and asks_servers:
        figures["transfer/http_sent_bytes"] = sum(c.http_sent for c in both)
        figures["transfer/http_received_bytes"] = sum(c.http_received for c in both)
    return {k: float(v) for k, v in figures.items()}


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if finite.size else None
