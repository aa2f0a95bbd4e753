"""A simulated stream of rollouts, to see how a threshold behaves when the KL scale moves: no model.

KL values are exponential around a level that falls along a rollout (agreement grows as a rollout goes on), times a
factor per rollout (some agree early, some never) and a scale that the training moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kat_ray.termination.base import Finished, NewTokens
from kat_ray.termination.kat import KatRule, KatTracker
from kat_ray.termination.settings import KatSettings

SHORT_BUFFER = 96  # probe_share x rollouts of a step x 10 steps: how far the threshold may lag


@dataclass(frozen=True)
class Simulated:
    """Per step: the threshold (NaN while inactive), the share of cut rollouts among those that may be cut, and the
    share that the rule would cut under an uncensored calibration (every rollout's whole minimum).
    """

    threshold: np.ndarray
    cut_share: np.ndarray
    uncensored_threshold: np.ndarray
    uncensored_share: np.ndarray


def halved_at(step: int) -> Callable[[int], float]:
    """A KL scale of 1 that falls to one half at a step."""
    return lambda now: 0.5 if now >= step else 1.0


def simulate(
    rule: KatSettings, scale: Callable[[int], float], *, steps: int, rollouts: int, tokens: int, seed: int
) -> Simulated:
    """Run the rule, and beside it the same rule with an uncensored calibration, over the same rollouts."""
    rng = np.random.default_rng(seed)
    real, oracle = KatRule(rule), KatRule(rule)
    columns = np.full((4, steps), np.nan)
    level = np.linspace(1.0, 0.4, tokens)
    for step in range(steps):
        real.start_step(step)
        oracle.start_step(step)
        per_rollout = np.exp(rng.normal(0.0, 0.4, (rollouts, 1)))
        d = rng.exponential(level * per_rollout) * scale(step)
        probes = rng.random(rollouts) < rule.probe_share
        trackers = [KatTracker(rule, real.threshold, bool(p)) for p in probes]
        whole = [KatTracker(rule, oracle.threshold, True) for _ in probes]
        for row, tracker, other in zip(d, trackers, whole, strict=True):
            tracker.observe(NewTokens(row))
            other.observe(NewTokens(row))
        cut = np.array([t.cut is not None for t in trackers])
        columns[0, step] = np.nan if real.threshold is None else real.threshold
        columns[1, step] = cut[~probes].mean()
        columns[2, step] = np.nan if oracle.threshold is None else oracle.threshold
        columns[3, step] = np.mean([t.cut is not None for t in whole])
        real.end_step(
            [Finished(t.minimum, bool(c and not p), bool(p)) for t, c, p in zip(trackers, cut, probes, strict=True)]
        )
        oracle.end_step([Finished(t.minimum, cut=False, probe=True) for t in whole])
    return Simulated(*columns)


def plot(path: str) -> None:
    """Draw threshold and cut share under each `calibrate_on` when the KL scale halves at step 100."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    short = example("probes", buffer=SHORT_BUFFER)
    rules = {name: example(name) for name in ("probes", "all", "finished")}
    rules |= {f"probes, buffer {SHORT_BUFFER} for {rules['probes'].buffer}": short}
    for number, (source, rule) in enumerate(rules.items()):
        result = simulate(rule, halved_at(100), steps=300, rollouts=64, tokens=96, seed=0)
        if number == 0:
            top.plot(result.uncensored_threshold, color="black", linewidth=2.5, alpha=0.35, label="uncensored")
            bottom.plot(*_smooth(result.uncensored_share), color="black", linewidth=2.5, alpha=0.35)
        top.plot(result.threshold, color=f"C{number}", linewidth=1.2, label=source)
        bottom.plot(*_smooth(result.cut_share), color=f"C{number}", linewidth=1.2)
    top.set(ylabel="threshold, nats", title="The KL scale falls to one half at step 100", ylim=(0, None))
    bottom.set(ylabel="rollouts cut, mean of the last 10 steps", xlabel="step", ylim=(0, 1))
    bottom.yaxis.set_major_formatter("{x:.0%}")
    top.legend(title="calibrate_on", fontsize=8)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.axvline(100, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def example(source: str, **changes: int) -> KatSettings:
    """The settings of the plot and of the tests."""
    fields: dict[str, Any] = {"window": 16, "exempt": 16, "buffer": 512, "min_samples": 96, "min_steps": 2}
    fields |= {"probe_share": 0.15, "budget": None}
    return KatSettings.model_validate({**fields, **changes, "calibrate_on": source})


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the ten steps up to each."""
    return np.arange(9, len(values)), np.convolve(values, np.ones(10) / 10, mode="valid")


if __name__ == "__main__":
    import sys

    plot(sys.argv[1])
