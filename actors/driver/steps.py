"""The training loop's verbs: sample, score and monitor; learn; publish; save.

Rollouts are sampled from the weights that the samplers hold when sampling starts. With staleness 0 these are the
learner's; with staleness 1 sampling starts while the learner works, and they are one version older.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import ObjectLostError

from actors.cluster.pools import Pools
from actors.cluster.waiting import LOST
from actors.driver.dispatcher import Sampling
from actors.driver.monitor_group import MonitorShards
from kat_ray.config import Config
from kat_ray.data.accounting import FinishedRollout, join_outcomes, kept_rollouts
from kat_ray.data.batch import assign_ranks
from kat_ray.data.prompts import PromptOrder, rollout_specs
from kat_ray.observability.timeline import Span
from kat_ray.run.batch_dump import StepBatch
from kat_ray.termination import RunFacts, make_rule
from kat_ray.types.records import ChunkRefs, RolloutSpec, SamplerReport, ScoredChunk, StepStart

log = logging.getLogger("kat_ray.trainer")


@dataclass(frozen=True)
class SampledStep:
    """One step's rollouts, each at its end."""

    step: int
    version: int  # of the weights they were sampled from
    specs: Sequence[RolloutSpec]
    step_start: StepStart
    rollouts: list[FinishedRollout]  # in the order of ids
    chunks: list[ChunkRefs]
    scored: list[ScoredChunk]
    reports: list[SamplerReport]
    monitor_seconds: float  # that the monitor was busy
    ended_with: Mapping[str, Any]  # the rule's calibration


class Trainer:
    """Drives one run's actors. It moves references; no token or logit passes through it but for the books."""

    def __init__(self, config: Config, pools: Pools, order: PromptOrder) -> None:
        self._config = config
        self._pools = pools
        self._order = order
        self._attempts = itertools.count(1)
        facts = RunFacts(config.run.seed, config.rollout.max_tokens)
        self._initial = make_rule(config.termination, facts).state()
        self._monitors = MonitorShards(pools, self._initial)

    @property
    def rule_state(self) -> Mapping[str, Any]:
        """The calibration after the last step whose rollouts have ended."""
        return self._monitors.state

    def reset_rule(self, state: Mapping[str, Any] | None) -> None:
        """Go on with this calibration; None: with an empty one."""
        self._monitors.state = self._initial if state is None else state

    def sample(self, step: int) -> SampledStep:
        """Generate, score and monitor the rollouts of one step, each to its end."""
        return self.finish_sampling(self.start_sampling(step, self.rule_state))

    def start_sampling(self, step: int, rule_state: Mapping[str, Any]) -> Sampling:
        """Set the samplers going on the rollouts of one step, which begins with this calibration."""
        specs = rollout_specs(self._order, self._config, step)
        step_start = self._monitors.start_step(step, rule_state)
        specs = [s if s.probe else replace(s, max_tokens=_within(step_start.budget, s.max_tokens)) for s in specs]
        return Sampling(self._pools, step, specs, step_start, rule_state, self._attempts)

    def finish_sampling(self, sampling: Sampling) -> SampledStep:
        """Wait until every rollout of a step has ended and is scored; close its books."""
        done = sampling.finish()
        reports = [d.report for d in done]
        closed = self._monitors.end_step(sampling.step, done, sampling.rule_state)
        chunks = [c for report in reports for c in report.chunks]
        scored: list[ScoredChunk] = self._pools.wait([c.scored for c in chunks], "scores")
        return SampledStep(
            step=sampling.step,
            version=sampling.version,
            specs=sampling.specs,
            step_start=sampling.step_start,
            rollouts=join_outcomes((r for report in reports for r in report.rollouts), closed.outcomes),
            chunks=chunks,
            scored=scored,
            reports=reports,
            monitor_seconds=closed.busy_seconds,
            ended_with=self.rule_state,
        )

    def hand_over(self, sampled: SampledStep) -> float:
        """Bring the step's kept tokens to the learner's ranks; returns their weight in all.

        Nothing is learnt yet: `ObjectLostError` says that records were lost with a node, and the step's rollouts
        must be sampled again.
        """
        kept = kept_rollouts(sampled.rollouts, sampled.specs)
        learners = self._pools.learners
        pending = []
        for learner, share in zip(learners, assign_ranks(kept, len(learners)), strict=True):
            ids = {k.rollout_id for k in share}
            needed = [c for c in sampled.chunks if not ids.isdisjoint(c.rollout_ids)]
            pending.append(learner.collect.remote([c.chunk for c in needed], [c.teacher for c in needed], share))
        self._pools.wait_learners(pending, "the batch to reach the learner")
        return sum(k.weight for k in kept)

    def learn(self, weight: float) -> list[Any]:
        """Start one optimiser step on what was handed over; returns the ranks' pending reports."""
        return [rank.learn.remote(weight, self._pools.version) for rank in self._pools.learners]

    def batch_of(self, sampled: SampledStep) -> StepBatch | None:
        """Fetch all that the learner was given of a step; None if records were lost since."""
        try:
            return StepBatch(
                chunks=self._pools.wait([c.chunk for c in sampled.chunks], "the batch"),
                teacher=self._pools.wait([c.teacher for c in sampled.chunks], "the batch"),
                scored=sampled.scored,
                kept=kept_rollouts(sampled.rollouts, sampled.specs),
                prompt_ids={s.rollout_id: s.prompt_id for s in sampled.specs},
            )
        except ObjectLostError:
            return None

    def spans(self) -> dict[str, tuple[Span, ...]]:
        """What every actor did since this was last asked, by its name; of one that is lost, nothing.

        No actor may be at work.
        """
        refs = {name: actor.spans.remote() for name, actor in self._pools.named().items()}
        drained: dict[str, tuple[Span, ...]] = {}
        for name, ref in refs.items():
            try:
                (drained[name],) = self._pools.wait([ref], "the timeline")
            except LOST:
                continue
        return drained


def _within(budget: int | None, max_tokens: int) -> int:
    return max_tokens if budget is None else max(1, min(budget, max_tokens))
