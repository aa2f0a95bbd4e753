"""What is recorded of a step's rollouts: traces, totals, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from actors.driver.steps import SampledStep
from kat_ray.config import Config
from kat_ray.data.accounting import ScoredTokens
from kat_ray.data.prompts import PromptSet
from kat_ray.models.inspect import ModelFacts
from kat_ray.records.traces import TokenFeatures, TraceRow
from kat_ray.run.directory import RunDirectory
from kat_ray.run.probes import RolloutGrader, is_active, probe_metrics, seen_to_the_end
from kat_ray.run.step_metrics import rollout_metrics, score_metrics
from kat_ray.run.summary import Totals
from kat_ray.termination import RULES, Effect


class StepRecorder:
    """Writes the records of steps."""

    def __init__(self, config: Config, run: RunDirectory, prompts: PromptSet, facts: ModelFacts) -> None:
        self._config, self._run = config, run
        self._grader = RolloutGrader(
            prompts.prompts,
            lambda ids: str(facts.tokenizer.decode(ids, skip_special_tokens=True)),
            config.evaluation.verifier,
        )

    def record(self, step: int, sampled: SampledStep, totals: Totals) -> dict[str, float]:
        """Write the traces of a step, add to the totals, and return its metrics."""
        kept = {b.rollout_id: b.kept for _, _, b in sampled.joined}
        tokens = ScoredTokens(sampled.scored)
        traces = tokens.column("d")
        features = self._features(tokens)
        prompt_ids = {s.rollout_id: s.prompt_id for s in sampled.specs}
        active = is_active(self._config.termination, sampled.step_start.threshold)
        effect = RULES[self._config.termination.rule].effect
        untouched = seen_to_the_end(sampled.joined, cuts=effect is not Effect.NOTHING)
        correct = self._grader.grade(
            {r.rollout_id: (prompt_ids[r.rollout_id], r.token_ids.tolist()) for r in untouched}
        )
        rows = [
            TraceRow(
                rollout_id=outcome.rollout_id,
                prompt_id=prompt_ids[outcome.rollout_id],
                step=step,
                policy_version=sampled.version,
                token_ids=rollout.token_ids,
                d=traces[outcome.rollout_id],
                stop_reason=outcome.stop_reason,
                cut=outcome.cut,
                confirmed=outcome.confirmed,
                threshold=outcome.threshold,
                probe=outcome.probe,
                minimum=outcome.minimum,
                would_cut=outcome.would_cut,
                correct=correct.get(outcome.rollout_id),
                weights=outcome.weights,
                features=features(outcome.rollout_id),
            )
            for outcome, rollout, _ in sampled.joined
        ]
        self._run.write_traces(step, rows)
        totals.add_step(
            started=len(sampled.specs),
            ended=[o.stop_reason for o, _, _ in sampled.joined],
            books=[b for _, _, b in sampled.joined],
            scored_tokens=sum(int(c.offsets[-1]) for c in sampled.scored),
            prompt_tokens=sum(len(s.prompt_ids) for s in sampled.specs),
        )
        return (
            {"policy_version": float(sampled.version)}
            | rollout_metrics(sampled.joined, sampled.step_start)
            | score_metrics(sampled.scored, kept)
            | probe_metrics([o for o, _, _ in sampled.joined], traces, correct, active)
        )

    def _features(self, tokens: ScoredTokens) -> Callable[[int], TokenFeatures | None]:
        """What is recorded of a rollout's tokens beside their KL."""
        if not self._config.run.trace_features:
            return lambda rollout_id: None
        columns: dict[str, Mapping[int, Any]] = {f.name: tokens.column(f.name) for f in fields(TokenFeatures)}
        return lambda rollout_id: TokenFeatures(**{name: column[rollout_id] for name, column in columns.items()})
