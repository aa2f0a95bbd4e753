"""Advantages of rollouts from the rewards of their groups. numpy in float64, whatever the models compute in.

In float32 eight equal rewards of 0.35 have a standard deviation of rounding noise, and divided by it an advantage
of 0.9. Here a group whose rewards span at most `SAME` has advantage 0 exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kat_ray.algorithms.groups import Floats, Members

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl"]
SAME = 1e-6  # rewards of a group that differ by no more are equal
_WHITENED = ("reinforce_pp", "reinforce_pp_baseline")


def advantages(kind: Advantage, members: Members, tokens: NDArray[np.int64], min_std: float = 1e-6) -> Floats:
    """The advantage of every rollout [N], the same for all its tokens; 0 where it counts nothing.

    With r a reward and m the mean over the group:

        grpo                   (r - m) / (s + min_std), s the sample standard deviation (arXiv 2402.03300)
        dr_grpo                r - m (arXiv 2503.20783)
        rloo                   r - the mean of the others (arXiv 2402.14740)
        reinforce_pp           r, whitened over the batch's tokens (arXiv 2501.03262)
        reinforce_pp_baseline  r - m, whitened likewise
        max_rl                 (r - m) / m, 0 where m <= 0

    `tokens` [N] are those in the loss: whitening weighs by them. A rollout whose group has no other that counts has
    advantage 0 wherever a group is looked at. Where probes stand for cut rollouts (`Members.stood_for`) only
    `dr_grpo` and `rloo` are there (`_of_weighted`), else ValueError. The weights are not in the result: they
    multiply the loss.
    """
    reward, weight = members.reward, members.weight
    if members.stood_for is not None:
        if kind not in ("dr_grpo", "rloo"):
            raise ValueError(f"{kind}: is no sum of rewards, which is all that weighted probes can give")
        return _of_weighted(members, reward) * (_share_of_others(members) if kind == "dr_grpo" else 1.0)
    if kind == "reinforce_pp":
        return _whitened(reward, weight * tokens) * (weight > 0)
    total = _by_group(weight, members)
    mean = _by_group(weight * reward, members) / np.where(total > 0, total, 1.0)
    centred = np.where(_tells(members, reward), reward - mean, 0.0)
    match kind:
        case "grpo":
            scale = _deviation(centred, total, members) + min_std
            return centred / np.where(scale > 0, scale, 1.0)
        case "dr_grpo":
            return centred
        case "rloo":
            return centred * total / np.where(total > weight, total - weight, 1.0)
        case "max_rl":
            return np.where(mean > 0, centred / np.where(mean > 0, mean, 1.0), 0.0)
        case _:
            return _whitened(centred, weight * tokens) * (weight > 0)


def _of_weighted(members: Members, reward: Floats) -> Floats:
    """Rewards [N] less the weighted mean of the others of their group, which is 0 where no other counts.

    Times weight and score, summed, and divided by the number of all rollouts, this is on average the gradient of
    the expected reward: the others are independent of a rollout, and its weight times its score is 0 on average. A
    mean that the rollout is part of moves with its weight.
    """
    others = _by_group(members.weight, members) - members.weight
    rewards = _by_group(members.weight * reward, members) - members.weight * reward
    credit = reward - np.where(others > 0, rewards / np.where(others > 0, others, 1.0), 0.0)
    tells = (members.weight > 0) & (_share_of_others(members) > 0) & (np.abs(credit) > SAME)
    return np.where(tells, credit, 0.0)


def _share_of_others(members: Members) -> Floats:
    """(n - 1) / n of n rollouts of a group [N] that count or are stood for: what `dr_grpo` has of `rloo`."""
    there = members.weight > 0 if members.stood_for is None else (members.weight > 0) | members.stood_for
    n = np.maximum(_by_group(there.astype(np.float64), members), 1.0)
    share: Floats = (n - 1.0) / n
    return share


def deviations(members: Members) -> Floats:
    """The sample standard deviation of each group's rewards [G], by weight; 0 where fewer than two count."""
    total = _by_group(members.weight, members)
    mean = _by_group(members.weight * members.reward, members) / np.where(total > 0, total, 1.0)
    by_group: Floats = np.zeros(members.groups)
    by_group[members.group] = _deviation(members.reward - mean, total, members)
    return by_group


def constant_groups(members: Members) -> NDArray[np.bool_]:
    """Whether the rewards of a group [G] that count, less what is for their length, are all the same.

    With weighted probes: whether none of them has an advantage. One that is right among cut ones has.
    """
    constant = np.ones(members.groups, dtype=bool)
    answers = members.reward - members.penalty
    weighted = members.stood_for is not None
    tells = _of_weighted(members, answers) != 0 if weighted else _tells(members, answers)
    constant[members.group[tells]] = False
    return constant


def without_constant_groups(members: Members) -> Members:
    """`members` with a weight of 0 in groups whose answers are all alike (dynamic sampling, DAPO)."""
    filtered = constant_groups(members)[members.group] & (members.weight > 0)
    left_out = dict(members.left_out) | {"constant group": int(filtered.sum())}
    return replace(members, weight=np.where(filtered, 0.0, members.weight), left_out=left_out)


def _tells(members: Members, reward: Floats) -> NDArray[np.bool_]:
    """Rollouts that count in a group whose rewards differ."""
    counts = members.weight > 0
    low, high = np.full(members.groups, np.inf), np.full(members.groups, -np.inf)
    np.minimum.at(low, members.group[counts], reward[counts])
    np.maximum.at(high, members.group[counts], reward[counts])
    return counts & ((high - low) > SAME)[members.group]


def _by_group(values: Floats, members: Members) -> Floats:
    """Sums over groups, given back to each of their rows."""
    sums: Floats = np.zeros(members.groups)
    np.add.at(sums, members.group, values)
    return sums[members.group]


def _deviation(centred: Floats, total: Floats, members: Members) -> Floats:
    """The sample standard deviation of each row's group, by weight."""
    counts = members.weight > 0
    n = _by_group(counts.astype(np.float64), members)
    variance = _by_group(members.weight * centred**2, members) / np.where(total > 0, total, 1.0)
    deviation: Floats = np.sqrt(variance * n / np.maximum(n - 1.0, 1.0))
    return deviation


def _whitened(values: Floats, mass: Floats) -> Floats:
    """Less their mean, by their population standard deviation; 0 where they are all the same."""
    counts = mass > 0
    if not counts.any() or np.ptp(values[counts]) <= SAME:
        return np.zeros_like(values)
    mean = (mass * values).sum() / mass.sum()
    variance = (mass * (values - mean) ** 2).sum() / mass.sum()
    white: Floats = (values - mean) / np.sqrt(variance)
    return white
