"""A training run from configuration to summary: checks, actors, the loop, the records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from actors.cluster import Placement, ray_session, roles_of
from actors.evaluator import Evaluator
from actors.pools import ModelPaths, Pools, make_samplers, wait
from actors.trainer import SampledStep, Trainer
from kat_ray.accounting import ScoredTokens
from kat_ray.config import Config, DataConfig, ModelConfig
from kat_ray.config_io import config_yaml
from kat_ray.data import PromptOrder, PromptSet, load_prompts
from kat_ray.models import ModelFacts, check_models, resolve_model
from kat_ray.probes import RolloutGrader, is_active, probe_metrics, seen_to_the_end
from kat_ray.progress import Progress, StepLine
from kat_ray.records import RunDirectory
from kat_ray.step_metrics import busy_metrics, decision_metrics, rollout_metrics, score_metrics
from kat_ray.summary import Totals, run_summary
from kat_ray.termination import RunFacts, make_rule
from kat_ray.termination_warnings import RunScale, warnings_of
from kat_ray.timeline import ChromeTrace, Timeline
from kat_ray.traces import TokenFeatures, TraceRow
from kat_ray.verify import EvalResult, check_golds

log = logging.getLogger("kat_ray.run")


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads before it starts anything."""

    facts: ModelFacts
    train: PromptSet
    heldout: PromptSet | None
    paths: ModelPaths


def prepare(config: Config) -> Prepared:
    """Check models and data; `UserError` names what is wrong."""
    facts = check_models(config)
    # A rule that cannot be made says so now, not in the monitor.
    make_rule(config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))

    def prompts(data: DataConfig, max_tokens: int, graded: bool) -> PromptSet:
        return load_prompts(data, facts.tokenizer, facts.max_prompt_tokens(max_tokens), graded=graded)

    train = prompts(config.data, config.rollout.max_tokens, False)
    heldout = None
    longest = train.longest + config.rollout.max_tokens
    if config.evaluation.data is not None:
        heldout = prompts(config.evaluation.data, config.eval_max_tokens, True)
        check_golds(heldout.prompts, config.evaluation.verifier)
        longest = max(longest, heldout.longest + config.eval_max_tokens)
    paths = ModelPaths(
        student_dir=resolve_model(config.student),
        teacher_dir=resolve_model(config.teacher),
        stop_ids=facts.stop_ids,
        student_stop_ids=facts.student.stop_ids,
        vocabulary=facts.student.vocabulary,
        max_model_len=longest,
    )
    return Prepared(facts, train, heldout, paths)


def train(config: Config) -> Path:
    """Run the whole job; returns the run directory."""
    started = time.monotonic()
    prepared = prepare(config)
    run = RunDirectory.create(config.run, config_yaml(config))
    with run, Progress(config.run.steps) as progress:
        for warning in prepared.facts.warnings:
            progress.note(warning)
        for split in (prepared.train, prepared.heldout):
            if split is not None and split.skipped_too_long:
                progress.note(f"{split.source}: {split.skipped_too_long} prompts are too long and were skipped")
        for warning in warnings_of(config.termination, RunScale.of(config)):
            progress.note(f"termination: {warning}")
        log.info("run %s: %d prompts", run.path, len(prepared.train.prompts))
        progress.phase("starting Ray")
        with _placement(config, progress) as placement:
            _Job(config, prepared, placement, run, progress).run_all(started)
    return run.path


def evaluate_model(config: Config, model_dir: str) -> EvalResult:
    """avg@k and pass@k of a model directory on the configuration's held-out problems."""
    config = config.model_copy(update={"student": config.student.model_copy(update={"path": model_dir})})
    prepared = prepare(config)
    evaluator = _evaluator(config, prepared)
    if evaluator is None:
        raise ValueError("evaluation.data is empty: name the held-out problems")
    with ray_session(config) as fixed_size:
        placement = Placement(
            {"sampler": roles_of(config)["sampler"]}, config.cluster.placement_timeout, fixed_size
        )
        try:
            return evaluator.run(
                make_samplers(
                    config, prepared.paths, placement, config.student, prepared.paths.student_dir, "sampler"
                )
            )
        finally:
            placement.remove()


@contextmanager
def _placement(config: Config, progress: Progress) -> Iterator[Placement]:
    with ray_session(config) as fixed_size:
        progress.phase("placing actors")
        placement = Placement(roles_of(config), config.cluster.placement_timeout, fixed_size)
        try:
            yield placement
        finally:
            placement.remove()


def _evaluator(config: Config, prepared: Prepared) -> Evaluator | None:
    if prepared.heldout is None:
        return None
    paths = prepared.paths
    return Evaluator(config, prepared.heldout.prompts, prepared.facts.tokenizer, paths.student_stop_ids)


class _Job:
    """The steps of one run and what is recorded of them."""

    def __init__(
        self, config: Config, prepared: Prepared, placement: Placement, run: RunDirectory, progress: Progress
    ) -> None:
        self._config, self._prepared, self._placement = config, prepared, placement
        self._run, self._progress = run, progress
        self._pools = Pools(config, prepared.paths, placement)
        order = PromptOrder(prepared.train.prompts, config.run.seed, config.data.shuffle)
        self._trainer = Trainer(config, self._pools, order)
        self._evaluator = _evaluator(config, prepared)
        tokenizer = prepared.facts.tokenizer
        self._grader = RolloutGrader(
            prepared.train.prompts,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            config.evaluation.verifier,
        )
        self._totals = Totals()
        self._ahead: SampledStep | None = None  # the next step's rollouts, with staleness 1
        self._timeline = Timeline()
        self._trace = ChromeTrace(run.path / "timeline.json") if config.run.profile else None

    def run_all(self, started: float) -> None:
        """Load, evaluate, train, evaluate, save, summarise."""
        config = self._config
        self._progress.phase("loading models")
        self._pools.start()
        teacher = self._evaluate_teacher()
        self._load_samplers(config.student, self._prepared.paths.student_dir, "sampler")
        self._pools.join()
        before = self._evaluate("before training", 0)
        after = before
        for step in range(config.run.steps):
            self._step(step)
            done = step + 1
            last = done == config.run.steps
            if last or (config.evaluation.every and done % config.evaluation.every == 0):
                after = self._evaluate("after training" if last else f"after step {done}", done)
            if not last and config.run.checkpoint_every and done % config.run.checkpoint_every == 0:
                self._save(done)
        checkpoint = self._save(config.run.steps)
        evaluations = {"eval_before": before, "eval_after": after, "eval_teacher": teacher}
        facts = self._prepared.facts
        parameters = {"student": facts.student.parameters, "teacher": facts.teacher.parameters}
        summary = run_summary(config, self._totals, evaluations, parameters, time.monotonic() - started)
        self._run.write_summary(summary)
        self._progress.finish(summary, self._run.paths(checkpoint))

    def _load_samplers(self, model: ModelConfig, model_dir: str, label: str) -> None:
        self._pools.use_samplers(
            make_samplers(self._config, self._prepared.paths, self._placement, model, model_dir, label)
        )

    def _evaluate(self, when: str, step: int) -> EvalResult | None:
        if self._evaluator is None:
            return None
        self._progress.phase(f"evaluating {when}")
        result = self._evaluator.run(self._pools.samplers)
        figures = asdict(result)
        self._run.log_evaluation(step, figures)
        self._run.log_metrics(
            step, {f"eval/{name}": figures[name] for name in ("avg_at_k", "pass_at_k", "mean_length")}
        )
        self._progress.note(
            f"evaluation {when}: avg@{result.k} {result.avg_at_k:.1%}, pass@{result.k} {result.pass_at_k:.1%}, "
            f"mean length {result.mean_length:.0f}"
        )
        return result

    def _evaluate_teacher(self) -> EvalResult | None:
        """The teacher's own score: a wrong template or grader shows there. Its sampler is gone afterwards."""
        if self._evaluator is None or not self._config.evaluation.teacher:
            return None
        self._load_samplers(self._config.teacher, self._prepared.paths.teacher_dir, "teacher-sampler")
        self._progress.phase("evaluating the teacher")
        result = self._evaluator.run(self._pools.samplers)
        self._progress.note(f"evaluation of the teacher: avg@{result.k} {result.avg_at_k:.1%}")
        return result

    def _step(self, step: int) -> None:
        started = time.monotonic()
        self._progress.training()
        trainer, is_last = self._trainer, step + 1 == self._config.run.steps
        with self._timeline.span("sample"):
            sampled = self._ahead or trainer.sample(step)
        self._ahead = None
        sampled_at = time.monotonic()
        pending = trainer.learn(sampled)
        ahead = trainer.start_sampling(step + 1) if self._config.rollout.staleness and not is_last else None
        with self._timeline.span("record"):
            metrics = self._record(step, sampled)  # while the learner works
        with self._timeline.span("learn"):
            report, *_ = wait(pending, None, "the learner")
        learnt_at = time.monotonic()
        if ahead is not None:
            with self._timeline.span("sample ahead"):
                self._ahead = trainer.finish_sampling(ahead)
        ready_at = time.monotonic()
        with self._timeline.span("publish"):
            trainer.publish()
        ended = time.monotonic()
        self._totals.add_trained(report.tokens)
        metrics |= {f"learner/{name}": float(value) for name, value in asdict(report).items()}
        del metrics["learner/policy_version"]
        metrics |= {
            "rollout/staleness": float(report.policy_version - sampled.version),
            "time/step": ended - started,
            "time/sample": sampled_at - started + ready_at - learnt_at,
            "time/control": max(r.control_seconds for r in sampled.reports),
            **decision_metrics(sampled.reports),
            "time/learn": learnt_at - sampled_at,
            "time/publish": ended - ready_at,
        }
        metrics |= busy_metrics(sampled.reports, sampled.scored, sampled.monitor_seconds, metrics)
        self._finish_step(step, metrics, sampled.begun.threshold)

    def _finish_step(self, step: int, metrics: dict[str, float], threshold: float | None) -> None:
        self._run.log_metrics(step + 1, metrics)
        if self._trace is not None:
            self._trace.add({"driver": self._timeline.drain(), **self._trainer.spans()}, step + 1)
        self._progress.step(
            StepLine(
                step=step + 1,
                kl=metrics.get("kl/mean"),
                generated_tokens=int(metrics["rollout/generated_tokens"]),
                trapped_share=metrics["rollout/trapped_share"],
                threshold=threshold,
                tokens_per_second=metrics["throughput/tokens_per_second"],
            )
        )

    def _record(self, step: int, sampled: SampledStep) -> dict[str, float]:
        kept = {b.rollout_id: b.kept for _, _, b in sampled.joined}
        tokens = ScoredTokens(sampled.scored)
        traces = tokens.column("d")
        features = self._features(tokens)
        prompt_ids = {s.rollout_id: s.prompt_id for s in sampled.specs}
        active = is_active(self._config.termination, sampled.begun.threshold)
        untouched = seen_to_the_end(sampled.joined, cuts=self._config.termination.rule != "none")
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
        self._totals.add_step(
            started=len(sampled.specs),
            ended=[o.stop_reason for o, _, _ in sampled.joined],
            books=[b for _, _, b in sampled.joined],
            scored_tokens=sum(int(c.offsets[-1]) for c in sampled.scored),
            prompt_tokens=sum(len(s.prompt_ids) for s in sampled.specs),
        )
        return (
            {"policy_version": float(sampled.version)}
            | rollout_metrics(sampled.joined, sampled.begun)
            | score_metrics(sampled.scored, kept)
            | probe_metrics([o for o, _, _ in sampled.joined], traces, correct, active)
        )

    def _features(self, tokens: ScoredTokens) -> Callable[[int], TokenFeatures | None]:
        """What is recorded of a rollout's tokens beside their KL."""
        if not self._config.run.trace_features:
            return lambda rollout_id: None
        columns: dict[str, Mapping[int, Any]] = {f.name: tokens.column(f.name) for f in fields(TokenFeatures)}
        return lambda rollout_id: TokenFeatures(**{name: column[rollout_id] for name, column in columns.items()})

    def _save(self, step: int) -> Path:
        self._progress.phase(f"saving the checkpoint of step {step}")
        path = self._run.path / "checkpoints" / f"step-{step}"
        path.parent.mkdir(exist_ok=True)
        self._trainer.save(path, self._prepared.paths.student_dir)
        return path
