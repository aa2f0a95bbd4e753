"""The ratio of learner to sampler, token by token, of a run that recorded both log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kat_ray.analysis.objective import RecordedStep
from kat_ray.types.records import FloatArray

_SHARES = (0.01, 0.5, 0.99)


def policy_ratios(steps: Sequence[RecordedStep]) -> FloatArray:
    """Of the tokens of the policy's loss, p learner / p sampler [tokens] in float64; empty where not recorded."""
    found = [np.zeros(0)]
    for step in steps:
        sampled = {r.outcome.rollout_id: r.sampled_logprobs for r in step.ended.rollouts}
        for rollout_id, learner in step.learner_logprobs.items():
            credit, own = step.written[rollout_id], sampled[rollout_id]
            if credit.policy_weight > 0 and own is not None:
                tokens = min(credit.policy_tokens, len(learner))
                found.append(np.exp(learner[:tokens].astype(np.float64) - own[:tokens]))
    return np.concatenate(found)


def ratio_words(ratios: FloatArray, clip: tuple[float, float]) -> str:
    """Their distribution in one line, and how many lie beyond `clip` below and above 1."""
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    shown = ", ".join(
        f"{share:.0%} below {value:.4g}" for share, value in zip(_SHARES, np.quantile(ratios, _SHARES), strict=True)
    )
    held = f"below {low:g}: {(ratios < low).mean():.2%}, above {high:g}: {(ratios > high).mean():.2%}"
    return (
        f"ratio of learner to sampler, {len(ratios):,} tokens of the policy's loss: mean {ratios.mean():.6g}, "
        f"{shown}, the largest {ratios.max():.4g}; {held}"
    )
