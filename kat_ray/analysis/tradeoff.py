"""What a setting of a rule saves and costs on rollouts that were seen to their end, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kat_ray.analysis.replay import Replayed, Traces
from kat_ray.errors import UserError
from kat_ray.termination.settings import RuleSettings
from kat_ray.types.records import FloatArray, IntArray


@dataclass(frozen=True)
class Tradeoff:
    """What one setting does to the rollouts that it was active for."""

    rule: RuleSettings
    rollouts: int
    cut_share: float  # rollouts cut
    kept_tokens: float  # share of tokens before the cut
    generated_tokens: float  # share of tokens until the decision; what the engine still has to do
    kept_kl: float  # share of the summed KL that lies before the cut: the signal that stays
    lost_share: float  # mean over rollouts of the share of a rollout's KL that lies after the cut
    lost_bound: float  # the same of every second rollout, with the price of their number; see `recommend`
    lost_check: float  # the same of the others, without it
    false_cut_share: float | None  # graded rollouts that were cut and went on to a right answer
    right_share: float | None  # graded rollouts with a right answer, cut or not


def weigh(traces: Traces, rule: RuleSettings, active: IntArray, replayed: Replayed) -> Tradeoff:
    """Shares over the rollouts for which the rule was active, a mask [R]."""
    lengths = traces.lengths
    is_cut = active & (replayed.cut >= 0)
    kept = np.where(is_cut, replayed.cut, lengths)
    seen = np.where(is_cut, replayed.confirmed, lengths)
    finite = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(traces.d), traces.d, 0.0))])
    kl_all = finite[traces.offsets[1:]] - finite[traces.offsets[:-1]]
    kl_kept = finite[traces.offsets[:-1] + kept] - finite[traces.offsets[:-1]]
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = np.where(kl_all > 0, 1.0 - kl_kept / kl_all, 0.0)[active]
    graded = active & (traces.correct >= 0)
    right = graded & (traces.correct == 1)
    n = int(graded.sum())
    return Tradeoff(
        rule=rule,
        rollouts=int(active.sum()),
        cut_share=_share(is_cut.sum(), active.sum()),
        kept_tokens=_share(kept[active].sum(), lengths[active].sum()),
        generated_tokens=_share(seen[active].sum(), lengths[active].sum()),
        kept_kl=_share(kl_kept[active].sum(), kl_all[active].sum()),
        lost_share=_mean(lost),
        lost_bound=_bound(lost[::2]),
        lost_check=_mean(lost[1::2]),
        false_cut_share=_share((right & is_cut).sum(), n) if n else None,
        right_share=_share(right.sum(), n) if n else None,
    )


def recommend(results: Sequence[Tradeoff], budget: float) -> tuple[Tradeoff, str]:
    """The setting that generates the fewest tokens within the budget, and why.

    Among many settings the best on few rollouts is partly luck. So every second rollout chooses, by the bound of
    `calibration.ShareBuffer`, and the others, which had no say, tell what the choice costs.
    """
    acting = [r for r in results if r.rollouts]
    if not acting:
        raise UserError(
            "no setting became active on these traces: too few rollouts for its min_samples and min_steps"
        )
    enough = [r for r in acting if r.lost_bound <= budget]
    if not enough:
        best = min(acting, key=lambda r: r.lost_bound)
        return best, (
            f"no setting stays within {budget:.1%} of a rollout's KL; this one loses the least: "
            f"{best.lost_check:.1%}, {best.lost_bound:.1%} with the price of {best.rollouts:,} rollouts"
        )
    best = min(enough, key=lambda r: r.generated_tokens)
    return best, (
        f"of {len(enough)} settings whose cuts lose at most {budget:.1%} of a rollout's KL on average it generates "
        f"the fewest tokens: {best.generated_tokens:.0%}; on the half of the rollouts that had no say in it, it "
        f"loses {best.lost_check:.1%}"
    )


def frontier(results: Sequence[Tradeoff]) -> list[Tradeoff]:
    """The settings that no other beats in both tokens and KL, by rising tokens."""
    best, found = float("-inf"), []
    for result in sorted((r for r in results if r.rollouts), key=lambda r: (r.generated_tokens, -r.kept_kl)):
        if result.kept_kl > best:
            found.append(result)
            best = result.kept_kl
    return found


def _bound(lost: FloatArray) -> float:
    return float((lost.sum() + 1.0) / (len(lost) + 1))


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0
