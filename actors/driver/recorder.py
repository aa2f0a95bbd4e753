"""What is recorded of a step's rollouts: traces, totals, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from actors.driver.given import GivenStep
from actors.driver.steps import SampledStep
from kat_ray.config import Config
from kat_ray.data.accounting import FinishedRollout, ScoredTokens
from kat_ray.data.prompt_order import probe_share
from kat_ray.models.inspect import ModelFacts
from kat_ray.records.traces import PolicyTrace, TokenFeatures, TraceRow
from kat_ray.rewards.scoring import RewardScorer
from kat_ray.run.directory import RunDirectory
from kat_ray.run.probes import (
    Graded,
    RolloutGrader,
    grading_metrics,
    is_active,
    probe_metrics,
    seen_to_the_end,
)
from kat_ray.run.step_metrics import (
    answer_metrics,
    rollout_metrics,
    score_metrics,
    source_metrics,
    teacher_metrics,
    transfer_metrics,
)
from kat_ray.run.summary import Totals
from kat_ray.termination import RULES, Effect
from kat_ray.types.records import DEFAULT_TEACHER, FloatArray, Reward

_UNSCORED = np.zeros(0, dtype=np.float32)  # the KL of a rollout that no teacher saw


class StepRecorder:
    """Writes the records of steps."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        golds: Mapping[str, str],
        facts: ModelFacts,
        scorer: RewardScorer | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """`golds` and `sources` by prompt id; `scorer` rewards rollouts, where functions do."""
        self._config, self._run, self._sources = config, run, sources or {}
        self._asks_servers = any(teacher.is_remote for teacher in config.used_teachers.values())
        self._has_levels = config.environment is not None and config.environment.curriculum is not None
        self._grader = RolloutGrader(
            golds,
            lambda ids: str(facts.tokenizer.decode(ids, skip_special_tokens=True)),
            config.evaluation.verifier,
            config.evaluation.grading_limits,
            scorer,
            config.reward.max_error_share if config.objective.rl.weight else None,
        )

    @property
    def grader(self) -> RolloutGrader:
        """Grades the rollouts of a step."""
        return self._grader

    def close(self) -> None:
        """Nothing more is recorded."""
        self._grader.close()

    def record(
        self, step: int, sampled: SampledStep, totals: Totals, learner: Mapping[int, FloatArray] | None = None
    ) -> dict[str, float]:
        """Write the traces of a step, add to the totals, and return its metrics.

        `learner` are the learner's log-probabilities, by rollout id, where they are recorded.
        """
        tokens, kept = ScoredTokens(sampled.scored), {r.rollout_id: r.counts.kept for r in sampled.rollouts}
        traces = tokens.column("d")
        active = {
            name: is_active(self._config.termination, sampled.step_start.of(name).threshold)
            for name in self._config.used_teachers or (DEFAULT_TEACHER,)
        }
        graded = self._graded(sampled)
        self._run.write_traces(step, self._rows(step, sampled, tokens, graded, learner or {}))
        self._count(sampled, totals)
        return (
            {"policy_version": float(sampled.version)}
            | rollout_metrics(sampled.rollouts, sampled.step_start)
            | score_metrics(sampled.scored, kept)
            | self._transfer_metrics(sampled)
            | (teacher_metrics(sampled.rollouts, traces, sampled.step_start) if self._names_teachers else {})
            | probe_metrics(
                [r.outcome for r in sampled.rollouts if active[r.outcome.teacher]], traces, graded.correct, True
            )
            | grading_metrics(graded)
            | self._source_metrics(sampled, graded)
            | self._policy_metrics(sampled, graded)
            | _given_metrics(sampled.given, self._config.rollout.max_tokens)
        )

    def _transfer_metrics(self, sampled: SampledStep) -> dict[str, float]:
        """Bytes of a step's records."""
        given = sampled.given
        chunks, scored = ([*given.chunks], [*given.scored]) if given else ([], [])
        return transfer_metrics([*sampled.chunks, *chunks], sampled.scored, self._asks_servers, scored)

    def _source_metrics(self, sampled: SampledStep, graded: Graded) -> dict[str, float]:
        """Of each source, where prompts say what they are from."""
        if not self._sources:
            return {}
        sources = {s.rollout_id: self._sources[s.prompt_id] for s in sampled.specs}
        levels = {f"source/level/{n}": float(sampled.levels.get(n, 0)) for n in {*sources.values()}}
        return source_metrics(sampled.rollouts, sources, graded.correct, graded.rewards, graded.ungraded) | (
            levels if self._has_levels else {}
        )

    def _graded(self, sampled: SampledStep) -> Graded:
        """The verdicts on a step: those that were waited for, or on the rollouts that were seen to their end."""
        if sampled.graded:
            return sampled.graded
        effect = RULES[self._config.termination.rule].effect
        prompt_ids = {s.rollout_id: s.prompt_id for s in sampled.specs}
        untouched = seen_to_the_end(sampled.rollouts, cuts=effect is not Effect.NOTHING)
        graded = self._grader.grade(
            {r.rollout_id: (prompt_ids[r.rollout_id], r.token_ids.tolist()) for r in untouched}
        )
        self._grader.check_failures(graded)
        return graded

    def _rows(
        self,
        step: int,
        sampled: SampledStep,
        tokens: ScoredTokens,
        graded: Graded,
        learner: Mapping[int, FloatArray],
    ) -> list[TraceRow]:
        """A step's rows of the traces."""
        traces = tokens.column("d")
        features = self._features(tokens) if sampled.scored else lambda rollout_id: None
        policy = _policy(self._config, sampled, learner)
        prompt_ids = {s.rollout_id: s.prompt_id for s in sampled.specs}
        return [
            TraceRow(
                rollout_id=rollout.rollout_id,
                prompt_id=prompt_ids[rollout.rollout_id],
                step=step,
                policy_version=sampled.version,
                token_ids=rollout.token_ids,
                d=traces.get(rollout.rollout_id, _UNSCORED),
                stop_reason=rollout.outcome.stop_reason,
                cut=rollout.outcome.cut,
                confirmed=rollout.outcome.confirmed,
                threshold=rollout.outcome.threshold,
                probe=rollout.outcome.probe,
                minimum=rollout.outcome.minimum,
                would_cut=rollout.outcome.would_cut,
                correct=graded.correct.get(rollout.rollout_id),
                weights=rollout.outcome.weights,
                features=features(rollout.rollout_id),
                policy=policy(rollout),
                teacher=rollout.outcome.teacher if self._names_teachers else None,
            )
            for rollout in sampled.rollouts
        ]

    def _count(self, sampled: SampledStep, totals: Totals) -> None:
        """Add a step to the totals of its run."""
        totals.add_step(
            started=len(sampled.specs),
            ended=[r.outcome.stop_reason for r in sampled.rollouts],
            books=[r.counts for r in sampled.rollouts],
            scored_tokens=sum(int(c.offsets[-1]) for c in sampled.scored),
            prompt_tokens=sum(len(s.prompt_ids) for s in sampled.specs),
            learnt_tokens=sum(k.kept for k in sampled.credit.kept),
            teacher_tokens=self._teacher_tokens(sampled),
        )
        if (given := sampled.given) is not None:
            totals.add_given(given.prompt_tokens, given.tokens, sum(given.scored_tokens.values()))

    @property
    def _names_teachers(self) -> bool:
        """Whether records say who scored a rollout."""
        return bool(self._config.used_teachers.keys() - {DEFAULT_TEACHER})

    def _teacher_tokens(self, sampled: SampledStep) -> dict[str, int]:
        """Prompt and scored tokens that each group of scorers was given, by the section that names its model."""
        if not self._names_teachers:
            return {}
        prompts = {s.rollout_id: len(s.prompt_ids) for s in sampled.specs}
        sections = {name: group.section for group in self._config.scorer_groups for name in group.teachers}
        counts = dict.fromkeys(sections.values(), 0)
        for rollout in sampled.rollouts:
            counts[sections[rollout.outcome.teacher]] += prompts[rollout.rollout_id] + (rollout.outcome.scored or 0)
        for name, tokens in (sampled.given.scored_tokens if sampled.given else {}).items():
            counts[sections[name]] += tokens
        return counts

    def _policy_metrics(self, sampled: SampledStep, graded: Graded) -> dict[str, float]:
        """What a step's rewards came to; nothing where none are learnt from."""
        credit = sampled.credit.by_rollout()
        if not credit:
            return {}
        tokens = {i: own.policy_tokens for i, own in credit.items()}
        worth = {i: r.value for i, r in graded.rewards.items() if r.value is not None}
        rewarded = {i: value > 0 for i, value in worth.items()}
        return (
            ({"reward/min": min(worth.values())} if worth else {})
            | answer_metrics(sampled.rollouts, rewarded | dict(graded.correct), tokens)
            | dict(sampled.credit.metrics)
            | self._refill_metrics(sampled)
        )

    def _refill_metrics(self, sampled: SampledStep) -> dict[str, float]:
        """How a step came to its groups, where others are drawn for those that tell nothing."""
        if self._config.objective.rl.max_num_gen_batches == 1:
            return {}
        missing = self._config.rollout.prompts_per_step - (sampled.credit.groups or 0)
        prompts = len(sampled.specs) // self._config.rollout.rollouts_per_prompt
        return {
            "group/gen_batches": float(len(sampled.reports)),
            "group/prompts": float(prompts),
            "group/missing": float(max(0, missing)),
        }

    def _features(self, tokens: ScoredTokens) -> Callable[[int], TokenFeatures | None]:
        """What is recorded of a rollout's tokens beside their KL."""
        if not self._config.run.trace_features:
            return lambda rollout_id: None
        columns: dict[str, Mapping[int, Any]] = {f.name: tokens.column(f.name) for f in fields(TokenFeatures)}
        return lambda rollout_id: TokenFeatures(**{name: column[rollout_id] for name, column in columns.items()})


def _given_metrics(given: GivenStep | None, longest: int) -> dict[str, float]:
    """Counts of a step's given completions; one with as many tokens as a rollout may have was maybe longer."""
    if given is None:
        return {}
    return {
        "offpolicy/completions": float(len(given.completions)),
        "offpolicy/cut_off": float(sum(len(c.token_ids) >= longest for c in given.completions)),
    }


def _policy(
    config: Config, sampled: SampledStep, learner: Mapping[int, FloatArray]
) -> Callable[[FinishedRollout], PolicyTrace | None]:
    """What is recorded of a rollout that was learnt from by its reward."""
    credit = sampled.credit.by_rollout()
    rewards = {} if sampled.graded is None else sampled.graded.rewards

    def trace(rollout: FinishedRollout) -> PolicyTrace | None:
        own, reward = credit.get(rollout.rollout_id), rewards.get(rollout.rollout_id, Reward(None))
        if own is None:
            return None
        assert rollout.sampled_logprobs is not None, f"rollout {rollout.rollout_id}: no log-probabilities"
        return PolicyTrace(
            reward=reward.value,
            rewards=reward.parts,
            reward_error=reward.error or None,
            probe_share=probe_share(config, sampled.step_start.of(rollout.outcome.teacher)),
            sampled_logprobs=rollout.sampled_logprobs,
            learner_logprobs=learner.get(rollout.rollout_id),
            **own._asdict(),
        )

    return trace
