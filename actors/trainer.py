"""The training loop's verbs: sample, score and monitor; learn; publish; save.

Rollouts are sampled from the weights that the samplers hold when sampling starts. With staleness 0 these are the
learner's; with staleness 1 sampling starts while the learner works, and they are one version older.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.monitor_shards import MonitorShards
from actors.pools import Pools, wait
from kat_ray.accounting import RolloutBooks, join_outcomes
from kat_ray.batch import assign_ranks
from kat_ray.config import Config
from kat_ray.data import PromptOrder, rollout_specs
from kat_ray.timeline import Span
from kat_ray.types import (
    ChunkRefs,
    FloatArray,
    KeptRollout,
    RolloutOutcome,
    RolloutSpec,
    SampledRollout,
    SamplerReport,
    ScoredChunk,
    StepStart,
)

log = logging.getLogger("kat_ray.trainer")


@dataclass(frozen=True)
class Sampling:
    """A step's rollouts while they are generated."""

    specs: Sequence[RolloutSpec]
    begun: StepStart
    version: int  # of the weights they are sampled from
    reports: list[Any]  # references to the samplers' reports


@dataclass(frozen=True)
class SampledStep:
    """One step's rollouts, ended and booked."""

    version: int  # of the weights they were sampled from
    specs: Sequence[RolloutSpec]
    begun: StepStart
    joined: list[tuple[RolloutOutcome, SampledRollout, RolloutBooks]]
    chunks: list[ChunkRefs]
    scored: list[ScoredChunk]
    reports: list[SamplerReport]
    monitor_seconds: float  # that the monitor was busy


class Trainer:
    """Drives one run's actors. It moves references; no token or logit passes through it but for the books."""

    def __init__(self, config: Config, pools: Pools, order: PromptOrder) -> None:
        self._config = config
        self._pools = pools
        self._order = order
        self.policy_version = 0

    def sample(self, step: int) -> SampledStep:
        """Generate, score and monitor the rollouts of one step, each to its end."""
        return self.finish_sampling(self.start_sampling(step))

    def start_sampling(self, step: int) -> Sampling:
        """Set the samplers going on the rollouts of one step."""
        specs = rollout_specs(self._order, self._config, step)
        monitor, samplers = MonitorShards(self._pools.monitors), self._pools.samplers
        begun = monitor.start_step(step, specs, len(samplers))
        specs = [s if s.probe else replace(s, max_tokens=_within(begun.budget, s.max_tokens)) for s in specs]
        n = len(samplers)
        reports = [s.generate.remote(specs[i::n]) for i, s in enumerate(samplers)]
        return Sampling(specs, begun, self.policy_version, reports)

    def finish_sampling(self, sampling: Sampling) -> SampledStep:
        """Wait until every rollout of a step has ended and is scored; close its books."""
        reports: list[SamplerReport] = wait(sampling.reports, None, "rollouts")
        odd = [r.sampler for r in reports if r.policy_version != sampling.version]
        assert not odd, f"{odd} sampled from other weights than version {sampling.version}"
        closed = MonitorShards(self._pools.monitors).end_step()
        chunks = [c for report in reports for c in report.chunks]
        scored: list[ScoredChunk] = ray.get([c.scored for c in chunks])
        joined = join_outcomes((r for report in reports for r in report.rollouts), closed.outcomes)
        busy = closed.busy_seconds
        return SampledStep(sampling.version, sampling.specs, sampling.begun, joined, chunks, scored, reports, busy)

    def learn(self, sampled: SampledStep) -> list[Any]:
        """Start one optimiser step on the kept tokens; returns the ranks' pending reports."""
        prompt_lengths = {s.rollout_id: len(s.prompt_ids) for s in sampled.specs}
        kept = [
            KeptRollout(b.rollout_id, prompt_lengths[b.rollout_id], b.kept, _first(o.weights, b.kept))
            for o, _, b in sampled.joined
            if b.kept
        ]
        weight = sum(k.weight for k in kept)
        learners = self._pools.learners
        pending = []
        for learner, share in zip(learners, assign_ranks(kept, len(learners)), strict=True):
            ids = {k.rollout_id for k in share}
            needed = [c for c in sampled.chunks if not ids.isdisjoint(c.rollout_ids)]
            pending.append(
                learner.train_step.remote(
                    [c.chunk for c in needed],
                    [c.teacher for c in needed],
                    share,
                    weight,
                    self.policy_version,
                )
            )
        return pending

    def publish(self) -> int:
        """Give every sampler the learner's weights under the next policy version."""
        version = self.policy_version + 1
        updates = [learner.weights.remote(version) for learner in self._pools.learners]
        loaded = wait(
            [s.load_weights.remote(updates[0]) for s in self._pools.samplers] + updates[1:],
            None,
            "weights to be published",
        )[: len(self._pools.samplers)]
        assert all(v == version for v in loaded), f"samplers hold versions {loaded}, published was {version}"
        self.policy_version = version
        return version

    def spans(self) -> dict[str, tuple[Span, ...]]:
        """What every actor did since this was last asked, by its name. No actor may be at work."""
        pools = self._pools
        actors = {
            **{f"sampler:{i}": a for i, a in enumerate(pools.samplers)},
            **{f"scorer:{i}": a for i, a in enumerate(pools.scorers)},
            **{f"monitor:{i}": a for i, a in enumerate(pools.monitors)},
            **{f"learner:{i}": a for i, a in enumerate(pools.learners)},
        }
        drained = wait([a.spans.remote() for a in actors.values()], None, "the timeline")
        return dict(zip(actors, drained, strict=True))

    def save(self, path: Path, tokenizer_dir: str) -> None:
        """Write the student in Hugging Face format; under ZeRO 3 every rank takes part."""
        wait(
            [rank.save_pretrained.remote(str(path), tokenizer_dir) for rank in self._pools.learners],
            None,
            f"the checkpoint {path}",
        )


def _within(budget: int | None, max_tokens: int) -> int:
    return max_tokens if budget is None else max(1, min(budget, max_tokens))


def _first(weights: FloatArray | None, count: int) -> FloatArray | None:
    return None if weights is None else weights[:count]
