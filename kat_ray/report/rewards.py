"""What a run learnt from rewards, over its steps: from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kat_ray.report.curves import draw, legend, line
from kat_ray.report.page import Card, Section, png_of
from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import APPLIED, CUT, GREY, KEPT, SCALE, STOPS, WOULD, figure, percent, smooth, stacked

_PARTS = "reward/part/"  # metrics of single reward functions
_PART_COLOURS = (SCALE, WOULD, APPLIED, STOPS["max_tokens"])
_ROUNDING = 1e-9  # a logarithmic axis has no 0
_LITTLE = 0.01  # an axis of shares shows no less
GROUPS = {"all right": STOPS["eos"], "mixed": KEPT, "all wrong": GREY}


def reward_sections(records: RunRecords) -> list[Section]:
    """Pictures with their words; none of a run that had no rewards."""
    if not records.series("reward/mean")[1]:
        return []
    text = (
        "The band is one standard deviation of the rewards within a group, mean over groups. A rollout is held "
        "against the others of its group: nothing is learnt of a group that is all right or all wrong, and nothing "
        "more where the band closes. Wrong answers that grow longer are of a student that fills its limit."
    )
    found = [Section("rewards", "Rewards", text, png=png_of(rewards(records)))]
    if records.series("rl/ratio_mean")[1]:
        text = (
            "The probability of a sampled token under the learner, divided by that under the sampler, is 1 where "
            "both hold the same weights, but for rounding. A mean that leaves 1, or a largest ratio that grows, "
            "says that they are no longer the same model. What the ratio takes away is 1 less the effective share."
        )
        found.append(Section("ratios", "Learner and sampler", text, png=png_of(ratios(records))))
    if drawn := [panel for names, panel in _POLICY.items() if any(records.series(name)[1] for name in names)]:
        text = (
            "A policy whose entropy goes to 0 no longer tries anything else: all rollouts of a group say the same. "
            "The gradient's share is taken at single tokens' logits, weights included: near 0 rewards, near 1 the "
            "teacher could be left out. The cosine of both gradients is above 0 where rewards and teacher want the "
            "same. Weights are drawn where the configuration lets them change."
        )
        found.append(
            Section("entropy", "Entropy, gradient and weights", text, png=png_of(_side_by_side(records, drawn)))
        )
    return found


def reward_cards(records: RunRecords) -> list[Card]:
    """The mean reward of the first and the last tenth of a run's steps."""
    _, values = records.series("reward/mean")
    if not values:
        return []
    width = max(1, len(values) // 10)
    first, last = (sum(part) / width for part in (values[:width], values[-width:]))
    return [Card(f"{first:.2f} → {last:.2f}", "mean reward in training")]


def rewards(records: RunRecords) -> Any:
    """Reward with its spread within groups, pass rates of groups, lengths of answers, whose tokens are learnt."""
    fig, ((reward, groups), (lengths, tokens)) = figure(2, 2)
    _band(reward, records)
    line(reward, records, "reward/mean", "mean", KEPT)
    for name, colour in zip(_parts(records), _PART_COLOURS * 8, strict=False):
        line(reward, records, name, name.removeprefix(_PARTS), colour)
    reward.set(title="Reward")
    legend(reward)
    _groups(groups, records)
    line(lengths, records, "rl/length_right", "right", STOPS["eos"])
    line(lengths, records, "rl/length_wrong", "wrong", GREY)
    lengths.set(title="Mean length of an answer", xlabel="step", ylabel="tokens")
    lengths.set_ylim(bottom=0)
    legend(lengths)
    line(tokens, records, "advantage/zero_share", "advantage 0", GREY)
    line(tokens, records, "rl/cut_share", "of cut rollouts", CUT)
    line(tokens, records, "rl/truncated_share", "of rollouts at their limit", STOPS["max_tokens"])
    tokens.set(title="Of the policy's tokens", xlabel="step", ylim=(0, 1))
    percent(tokens.yaxis)
    legend(tokens)
    return fig


def _parts(records: RunRecords) -> Sequence[str]:
    """The metrics of single reward functions, where there are several."""
    names = sorted({name for step in records.steps for name in step if name.startswith(_PARTS)})
    return names if len(names) > 1 else ()


def _groups(axes: Any, records: RunRecords) -> None:
    stacked(axes, *group_shares(records), GROUPS)
    axes.set(title="Groups, by their answers")
    legend(axes, loc="lower left", ncols=3, facecolor="white", frameon=True)


def _band(axes: Any, records: RunRecords) -> None:
    lines = [s for s in records.steps if s.get("reward/mean") is not None and s.get("group/std") is not None]
    width = max(1, len(lines) // 25)
    mean, spread = (smooth([s[name] for s in lines], width) for name in ("reward/mean", "group/std"))
    low = [m - d for m, d in zip(mean, spread, strict=True)]
    high = [m + d for m, d in zip(mean, spread, strict=True)]
    if lines:
        axes.fill_between([s["step"] for s in lines], low, high, color=KEPT, alpha=0.12, linewidth=0)


def group_shares(records: RunRecords) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and the shares of groups that are all right, mixed and all wrong in each."""
    names = ("group/constant_share", "group/all_wrong_share")
    lines = [line for line in records.steps if all(line.get(name) is not None for name in names)]
    constant, wrong = ([line[name] for line in lines] for name in names)
    right = [c - w for c, w in zip(constant, wrong, strict=True)]
    shares = {"all right": right, "mixed": [1.0 - c for c in constant], "all wrong": wrong}
    return [line["step"] for line in lines], shares


def ratios(records: RunRecords) -> Any:
    """How far learner and sampler are apart, and what of the tokens is held or lost by it."""
    fig, ((ratio, held),) = figure(1, 2)
    for name, label, colour in (("rl/ratio_max", "largest", GREY), ("rl/ratio_mean", "mean", KEPT)):
        steps, values = records.series(name)
        draw(ratio, steps, [max(abs(value - 1.0), _ROUNDING) for value in values], label, colour)
    ratio.set(title="Ratio of learner to sampler: how far from 1", xlabel="step", yscale="log")
    legend(ratio)
    line(held, records, "rl/clip_high_share", "held from above", CUT)
    line(held, records, "rl/clip_low_share", "held from below", SCALE)
    steps, values = records.series("rl/effective_share")
    draw(held, steps, [1.0 - value for value in values], "taken away by the ratio", GREY)
    held.set(title="Of the policy's tokens", xlabel="step")
    held.set_ylim(0, max(_LITTLE, held.get_ylim()[1]))
    percent(held.yaxis)
    legend(held)
    return fig


def _side_by_side(records: RunRecords, drawn: Sequence[Callable[[Any, RunRecords], None]]) -> Any:
    fig, (panels,) = figure(1, len(drawn))
    for axes, draw_on in zip(panels, drawn, strict=True):
        draw_on(axes, records)
    return fig


def _entropy(axes: Any, records: RunRecords) -> None:
    line(axes, records, "rl/entropy", "", KEPT)
    axes.set(title="Entropy of the student, over the policy's tokens", xlabel="step", ylabel="nats")
    axes.set_ylim(bottom=0)


def _gradient(axes: Any, records: RunRecords) -> None:
    line(axes, records, "rl/grad_share", "", KEPT)
    axes.set(title="Share of rewards in the gradient; the rest is the teacher's", xlabel="step", ylim=(0, 1))
    percent(axes.yaxis)


def _cosine(axes: Any, records: RunRecords) -> None:
    line(axes, records, "rl/grad_cosine", "", KEPT)
    axes.set(title="Cosine of the rewards' gradient and the teacher's", xlabel="step", ylim=(-1, 1))


def _weights(axes: Any, records: RunRecords) -> None:
    line(axes, records, "objective/rl_weight", "rewards", KEPT, parts=10**6)
    line(axes, records, "objective/opd_weight", "teacher", SCALE, parts=10**6)
    axes.set(title="Weights of the two losses", xlabel="step")
    axes.set_ylim(bottom=0)
    legend(axes)


_POLICY = {
    ("rl/entropy",): _entropy,
    ("rl/grad_share",): _gradient,
    ("rl/grad_cosine",): _cosine,
    ("objective/rl_weight", "objective/opd_weight"): _weights,
}
