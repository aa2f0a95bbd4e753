"""Settings of a termination rule that are allowed, but silently do nothing, or not what they seem to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kat_ray.config import Config
from kat_ray.termination.fixed_prefix import FixedPrefixSettings
from kat_ray.termination.progressive import ProgressiveSettings
from kat_ray.termination.prune_opd import PruneSettings
from kat_ray.termination.repetition import RepetitionSettings
from kat_ray.termination.settings import KatParameters, RuleSettings

_LONG_LAG = 100  # steps; the embedded task's KL scale falls by half within 20


@dataclass(frozen=True)
class RunScale:
    """What a rule's settings are held against."""

    steps: int
    max_tokens: int
    rollouts_per_step: int

    @classmethod
    def of(cls, config: Config) -> RunScale:
        """Of a configuration."""
        return cls(config.run.steps, config.rollout.max_tokens, config.rollout.rollouts_per_step)


def warnings_of(rule: RuleSettings, run: RunScale) -> Iterator[str]:
    """One line each, with field, value and what to do; a rule from outside is not looked at."""
    match rule:
        case KatParameters():
            yield from _kat(rule, run)
        case FixedPrefixSettings() if rule.n >= run.max_tokens:
            yield f"n = {rule.n} >= rollout.max_tokens = {run.max_tokens}: nothing will be cut"
        case ProgressiveSettings():
            yield from _progressive(rule, run)
        case PruneSettings() if rule.start is not None and rule.start > run.max_tokens:
            yield f"start = {rule.start} > rollout.max_tokens = {run.max_tokens}: the budget starts at the latter"
        case RepetitionSettings() if rule.min_period * rule.repeats > run.max_tokens:
            yield (
                f"min_period x repeats = {rule.min_period * rule.repeats} tokens > rollout.max_tokens = "
                f"{run.max_tokens}: no loop is ever complete, nothing will be cut"
            )


def _progressive(rule: ProgressiveSettings, run: RunScale) -> Iterator[str]:
    end = f"rollout.max_tokens = {run.max_tokens}" if rule.end is None else f"end = {rule.end}"
    if rule.start > (rule.end or run.max_tokens):
        yield f"start = {rule.start} > {end}: the horizon falls instead of growing"
    if rule.start >= run.max_tokens:
        yield f"start = {rule.start} >= rollout.max_tokens = {run.max_tokens}: the first steps have no horizon"


def _kat(rule: KatParameters, run: RunScale) -> Iterator[str]:
    first = rule.exempt + rule.window + (rule.consecutive - 1) * rule.stride
    if first > run.max_tokens:
        yield (
            f"the rule can confirm a trap after {first} tokens at the earliest (exempt + window + "
            f"(consecutive - 1) x stride), rollouts end at rollout.max_tokens = {run.max_tokens}: "
            "nothing will be cut"
        )
    if rule.window > run.max_tokens:
        yield f"window = {rule.window} > rollout.max_tokens: no window is ever full"
    if rule.min_steps >= run.steps or rule.min_samples > run.steps * run.rollouts_per_step:
        yield "the run ends before the rule becomes active (min_steps, min_samples)"
    probes = rule.probe_share * run.rollouts_per_step
    if rule.calibrate_on == "probes" and rule.buffer / probes > _LONG_LAG:
        yield (
            f"buffer = {rule.buffer} holds the probes of {rule.buffer / probes:.0f} steps ({probes:.3g} a step): "
            "so long the threshold lags behind the KL. docs/termination.md advises buffer = probe_share x rollouts "
            f"per step x 10 = {max(1, round(10 * probes))}, with min_samples <= buffer; or raise probe_share"
        )
