"""Reinforcement learning, alone or beside distillation: every graded rollout's credit from those of its prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kat_ray.algorithms.advantages import advantages, constant_groups, deviations, without_constant_groups
from kat_ray.algorithms.aggregation import token_weights
from kat_ray.algorithms.base import Credit, EndedStep
from kat_ray.algorithms.groups import Ending, Floats, Graded, Members, Treatment, members
from kat_ray.algorithms.shaping import overlong_penalty
from kat_ray.config import PolicyObjective
from kat_ray.data.accounting import FinishedRollout
from kat_ray.types.records import FloatArray, KeptRollout, PolicyCredit, Reward, RolloutSpec, StopReason


@dataclass(frozen=True)
class PolicyOptimization:
    """The policy's part of a rollout ends where a cut was confirmed, the KL's at the cut (docs/rl.md)."""

    objective: PolicyObjective
    longest: int  # tokens of a rollout
    distils: bool = True  # its tokens have a KL, too
    teacher_weights: Mapping[str, float] = field(default_factory=dict)  # by name, of those with another than 1

    def credit(self, ended: EndedStep) -> Credit:
        """See `Algorithm`; rollouts without a token are in no group's loss, and in its baseline all the same."""
        rollouts, by_id = ended.rollouts, {spec.rollout_id: spec for spec in ended.specs}
        rule, penalty = self.objective, self._penalties(rollouts)
        graded = [
            _graded(r, by_id[r.rollout_id].prompt_id, ended.rewards.get(r.rollout_id), float(p))
            for r, p in zip(rollouts, penalty, strict=True)
        ]
        treatment = self._treatment(ended)
        graded_ones = members(graded, treatment)
        found = without_constant_groups(graded_ones) if rule.filter_constant_groups else graded_ones
        tokens = np.array([_policy_tokens(r) for r in rollouts], dtype=np.int64)
        advantage = advantages(rule.advantage, found, tokens, rule.min_std)
        if rule.advantage_clip is not None:
            advantage = advantage.clip(-rule.advantage_clip, rule.advantage_clip)
        weight = token_weights(rule.aggregate, tokens, found.weight, self.longest, found.stood_for)
        kept = [
            self._kept(rollout, by_id[rollout.rollout_id], PolicyCredit(float(a), int(t), float(w)))
            for rollout, a, t, w in zip(rollouts, advantage, tokens, weight, strict=True)
        ]
        values = dict(zip(found.rollout_ids, zip(found.reward, found.weight, advantage, strict=True), strict=True))
        return Credit(
            kept=[k for k in kept if k.kept],
            advantages={i: float(a) for i, (_, w, a) in values.items() if w > 0},
            metrics=_reward_metrics(graded_ones, found.left_out)
            | _advantage_metrics(found, advantage, tokens)
            | ({} if treatment.probe_mean is None else {"probe/q": treatment.probe_mean}),
            probe_rewards=self._newest((*ended.probe_rewards, *_would_cut(graded, graded_ones))),
            reward_weights={i: float(w) for i, (_, w, _) in values.items()},
            groups=int((~constant_groups(graded_ones)).sum()),
        )

    def _treatment(self, ended: EndedStep) -> Treatment:
        """What becomes of this step's cut rollouts; without probes there are none that could stand for them."""
        rule, known = self.objective, len(ended.probe_rewards) >= self.objective.probe_min
        if rule.cut_reward == "probe_weighted" and not ended.probe_share > 0:
            return Treatment("exclude", rule.truncated)
        share = ended.probe_share if rule.cut_reward == "probe_weighted" else 0.0
        q = _mean(ended.probe_rewards) if rule.cut_reward == "probe_mean" and known else None
        return Treatment(rule.cut_reward, rule.truncated, share, q)

    def _kept(self, rollout: FinishedRollout, spec: RolloutSpec, policy: PolicyCredit) -> KeptRollout:
        """The tokens of both losses; those past the cut have no KL, and none has where there is no teacher."""
        with_kl = rollout.counts.kept if self.distils else 0
        count = max(with_kl, policy.tokens if policy.weight else 0)
        weights: FloatArray | None = None
        if rollout.outcome.weights is not None or count > with_kl:
            weights = np.zeros(count, dtype=np.float32)
            own = rollout.outcome.weights
            weights[:with_kl] = 1.0 if own is None else own[:with_kl]
        credit, scale = policy if policy.weight else None, self.teacher_weights.get(rollout.outcome.teacher, 1.0)
        return KeptRollout.of(spec, count, weights=weights, policy=credit, scale=scale)

    def _newest(self, rewards: tuple[float, ...]) -> tuple[float, ...]:
        """Those whose mean the next step's cut rollouts are given; none where they are given something else."""
        return rewards[-self.objective.probe_buffer :] if self.objective.cut_reward == "probe_mean" else ()

    def _penalties(self, rollouts: Sequence[FinishedRollout]) -> Floats:
        """What each rollout's reward loses by its length."""
        lengths = np.array([r.counts.generated for r in rollouts], dtype=np.int64)
        overlong = self.objective.overlong
        if not overlong.buffer:
            return np.zeros(len(lengths))
        return overlong_penalty(lengths, self.longest, overlong.buffer, overlong.factor)


def _graded(rollout: FinishedRollout, prompt_id: str, reward: Reward | None, penalty: float) -> Graded:
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
    return Graded(rollout.rollout_id, prompt_id, ending, value, outcome.would_cut is not None, penalty)


def _would_cut(graded: Sequence[Graded], found: Members) -> list[float]:
    """Rewards, before penalties for length, of probes that the rule would have cut."""
    answers = (found.reward - found.penalty).tolist()
    rows = zip(graded, found.weight > 0, answers, strict=True)
    return [float(answer) for row, counts, answer in rows if row.would_cut and counts]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _policy_tokens(rollout: FinishedRollout) -> int:
    """Up to where the rule knew: what was generated later is not the policy's choice that made it act."""
    if rollout.outcome.stop_reason is StopReason.FAILED:
        return 0
    confirmed = rollout.outcome.confirmed
    return rollout.counts.generated if confirmed is None or rollout.outcome.cut is None else confirmed


def _reward_metrics(found: Members, left_out: Mapping[str, int]) -> dict[str, float]:
    """What a step's rewards were, before groups are filtered."""
    counts = found.weight > 0
    figures = {f"reward/left_out_{why.replace(' ', '_')}": float(n) for why, n in left_out.items()}
    if not counts.any():
        return figures
    there = np.unique(found.group[counts])  # groups in which somebody counts
    constant = constant_groups(found)[there]
    best = np.full(found.groups, -np.inf)
    np.maximum.at(best, found.group[counts], (found.reward - found.penalty)[counts])
    return figures | {
        "reward/overlong": float(found.penalty[counts].mean()),
        "reward/mean": float(found.reward[counts].mean()),
        "reward/std": float(found.reward[counts].std()),
        "group/constant_share": float(constant.mean()),
        "group/all_wrong_share": float((constant & (best[there] <= 0)).mean()),
        "group/std": float(deviations(found)[there].mean()),
        "group/size_min": float(np.bincount(found.group[counts], minlength=found.groups)[there].min()),
    }


def _advantage_metrics(found: Members, advantage: Floats, tokens: np.ndarray) -> dict[str, float]:
    """What became of them."""
    counts = found.weight > 0
    if not counts.any():
        return {}
    return {
        "advantage/abs_mean": float(np.abs(advantage[counts]).mean()),
        "advantage/max": float(np.abs(advantage[counts]).max()),
        "advantage/zero_share": float((tokens * counts * (advantage == 0)).sum() / max(1, (tokens * counts).sum())),
    }
