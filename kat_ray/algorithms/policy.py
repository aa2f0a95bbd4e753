"""Reinforcement learning, alone or beside distillation: every graded rollout's credit from those of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.algorithms.advantages import advantages, constant_groups
from kat_ray.algorithms.aggregation import token_weights
from kat_ray.algorithms.base import Credit
from kat_ray.algorithms.groups import Ending, Floats, Graded, Members, Treatment, members
from kat_ray.config import PolicyObjective
from kat_ray.data.accounting import FinishedRollout
from kat_ray.types.records import FloatArray, KeptRollout, PolicyCredit, Reward, RolloutSpec, StopReason


@dataclass(frozen=True)
class PolicyOptimization:
    """The policy's part of a rollout ends where a cut was confirmed, the KL's at the cut (docs/rl.md)."""

    objective: PolicyObjective
    longest: int  # tokens of a rollout
    distils: bool = True  # its tokens have a KL, too

    def credit(
        self,
        rollouts: Sequence[FinishedRollout],
        specs: Sequence[RolloutSpec],
        rewards: Mapping[int, Reward],
        probe_share: float,
    ) -> Credit:
        """See `Algorithm`; rollouts without a token are in no group's loss, and in its baseline all the same."""
        by_id = {spec.rollout_id: spec for spec in specs}
        graded = [_graded(r, by_id[r.rollout_id].prompt_id, rewards.get(r.rollout_id)) for r in rollouts]
        rule = self.objective
        weighs = rule.cut_reward == "probe_weighted" and probe_share > 0
        cut = rule.cut_reward if rule.cut_reward != "probe_weighted" or weighs else "exclude"
        found = members(graded, Treatment(cut, rule.truncated, probe_share if weighs else 0.0))
        tokens = np.array([_policy_tokens(r) for r in rollouts], dtype=np.int64)
        advantage = advantages(rule.advantage, found, tokens, rule.min_std)
        weight = token_weights(rule.aggregate, tokens, found.weight, self.longest)
        kept = [
            self._kept(rollout, len(by_id[rollout.rollout_id].prompt_ids), PolicyCredit(float(a), int(t), float(w)))
            for rollout, a, t, w in zip(rollouts, advantage, tokens, weight, strict=True)
        ]
        values = dict(zip(found.rollout_ids, zip(found.reward, found.weight, advantage, strict=True), strict=True))
        return Credit(
            kept=[k for k in kept if k.kept],
            advantages={i: float(a) for i, (_, w, a) in values.items() if w > 0},
            metrics=_metrics(found, advantage, tokens),
        )

    def _kept(self, rollout: FinishedRollout, prompt_length: int, policy: PolicyCredit) -> KeptRollout:
        """The tokens of both losses; those past the cut have no KL, and none has where there is no teacher."""
        with_kl = rollout.counts.kept if self.distils else 0
        count = max(with_kl, policy.tokens if policy.weight else 0)
        weights: FloatArray | None = None
        if rollout.outcome.weights is not None or count > with_kl:
            weights = np.zeros(count, dtype=np.float32)
            own = rollout.outcome.weights
            weights[:with_kl] = 1.0 if own is None else own[:with_kl]
        return KeptRollout(rollout.rollout_id, prompt_length, count, weights, policy if policy.weight else None)


def _graded(rollout: FinishedRollout, prompt_id: str, reward: Reward | None) -> Graded:
    outcome = rollout.outcome
    if outcome.stop_reason is StopReason.FAILED:
        ending = Ending.FAILED
    elif outcome.cut is not None:
        ending = Ending.CUT
    elif outcome.stop_reason is StopReason.MAX_TOKENS:
        ending = Ending.TRUNCATED
    else:
        ending = Ending.ANSWERED
    value = None if reward is None else reward.value
    return Graded(rollout.rollout_id, prompt_id, ending, value, outcome.would_cut is not None)


def _policy_tokens(rollout: FinishedRollout) -> int:
    """Up to where the rule knew: what was generated later is not the policy's choice that made it act."""
    if rollout.outcome.stop_reason is StopReason.FAILED:
        return 0
    confirmed = rollout.outcome.confirmed
    return rollout.counts.generated if confirmed is None or rollout.outcome.cut is None else confirmed


def _metrics(found: Members, advantage: Floats, tokens: np.ndarray) -> dict[str, float]:
    """What a step's rewards and advantages were."""
    counts = found.weight > 0
    figures = {f"reward/left_out_{why.replace(' ', '_')}": float(n) for why, n in found.left_out.items()}
    if not counts.any():
        return figures
    constant = constant_groups(found)
    mean = np.bincount(found.group[counts], found.reward[counts], found.groups)
    return figures | {
        "reward/mean": float(found.reward[counts].mean()),
        "reward/std": float(found.reward[counts].std()),
        "group/constant_share": float(constant.mean()),
        "group/all_wrong_share": float((constant & (mean <= 0)).mean()),
        "group/size_min": float(np.bincount(found.group[counts], minlength=found.groups).min()),
        "advantage/abs_mean": float(np.abs(advantage[counts]).mean()),
        "advantage/max": float(np.abs(advantage[counts]).max()),
        "advantage/zero_share": float((tokens * counts * (advantage == 0)).sum() / max(1, (tokens * counts).sum())),
    }
