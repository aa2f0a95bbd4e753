"""The steps of one run: who waits for whom.

    samplers                scorers, monitors        driver                      learner
    rollouts of step k  ->  scores, decisions   ->   wait for all of them
    rollouts of k + 1                                hand over k            ->   collect
    (staleness 1 only)                               record k                    learn k
                                                     wait for k             <-   report
                                                     wait for k + 1
    load weights        <-                           publish k + 1          <-   weights
                                                     resize, guard, log; checkpoint and evaluation where due

After each step everything that the next one depends on is in two places: with the learner, and in `RunState`. A
checkpoint is both. A step's rollouts can be sampled again at any time, since the order of prompts, seeds and probes
are functions of what was taken before it; a step that the learner did not finish never happened.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial

from ray.exceptions import ObjectLostError

from actors.cluster.draining import DrainWatch, draining_nodes
from actors.cluster.object_store import StoreWatch
from actors.cluster.placement import Placement
from actors.cluster.resizing import Resizing
from actors.cluster.run_actors import RunActors
from actors.cluster.samplers import Engines
from actors.cluster.signals import Preempted, StopRequest
from actors.cluster.waiting import LearnersLost
from actors.driver.agreement import AgreementCheck
from actors.driver.dispatcher import RolloutDispatcher
from actors.driver.evaluation import EvaluationSchedule, is_teacher, teacher_key
from actors.driver.history import RunHistory
from actors.driver.prefetch import Prefetch
from actors.driver.preparation import Prepared, make_evaluator
from actors.driver.ray_metrics import RayMetrics
from actors.driver.recorder import StepRecorder
from actors.driver.steps import SampledStep, Steps
from kat_ray.cluster.scaling_policy import StageTimes
from kat_ray.config import Config
from kat_ray.config.load import config_yaml
from kat_ray.data.prompt_order import PromptOrder
from kat_ray.errors import RewardError
from kat_ray.observability.progress import Progress
from kat_ray.observability.timeline import ChromeTrace, Timeline
from kat_ray.observability.trackers import ConsoleTracker, TensorBoardTracker, Tracker, Trackers
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import Loaded
from kat_ray.run.curriculum import Move
from kat_ray.run.directory import RunDirectory
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.reward_functions import make_scorer
from kat_ray.run.step_result import StepResult, StepTimes
from kat_ray.run.summary import run_summary
from kat_ray.tracking.choice import service_trackers


class TrainingRun:
    """One run, from loading the models to the summary. Long, since it is all that a run does, in its order."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        placement: Placement,
        run: RunDirectory,
        progress: Progress,
        stop: StopRequest,
        engines: Engines,
    ) -> None:
        self._config, self._prepared = config, prepared
        self._run, self._progress, self._stop = run, progress, stop
        self._actors = RunActors.make(config, prepared.paths, placement, stop, engines)
        self._trackers = _trackers(config, run, progress)
        order = PromptOrder(prepared.train.drawn, config.run.seed, config.data.shuffle)
        scorer = make_scorer(config, prepared.train)
        sources = {p.prompt_id: p.source for p in prepared.train.prompts if p.source is not None}
        self._recorder = StepRecorder(config, run, prepared.golds.answers, prepared.facts, scorer, sources)
        self._steps = Steps(config, self._actors, order, self._recorder.grader, sources)
        self._prefetch: Prefetch[RolloutDispatcher, SampledStep] = Prefetch(
            self._steps.start_sampling, self._steps.finish_sampling, self._records_lost
        )
        self._resizing = Resizing(config, self._actors, placement, progress.note)
        self._store = StoreWatch(config.cluster.store_share, progress.note, config.rollout.staleness)
        self._evaluator = make_evaluator(config, prepared, self._recorder.grader.pool)
        checks = config.run.check_agreement and engines.are_real
        self._agreement = AgreementCheck(config, prepared, self._actors) if checks else None
        self._evaluation = EvaluationSchedule(
            self._evaluate if self._evaluator else None, config.evaluation, steps=config.run.steps,
            phase=progress.phase, on_result=self._evaluated,
        )  # fmt: skip
        self._history = RunHistory(
            config, prepared, run, progress, self._trackers, self._actors, self._steps, self._evaluation
        )
        self._draining = DrainWatch(partial(draining_nodes, placement))
        self._timeline = Timeline()
        self._trace = ChromeTrace(run.path / "timeline.json") if config.run.profile else None
        self._record_late = config.run.learner_logprobs
        self._furthest = 0  # step that this driver completed
        self._counted_restarts = 0  # in the metrics of a step

    # --- the run on one page ----------------------------------------------------------------------------------

    def run(self, started: float, loaded: Loaded | None) -> None:
        """Load, evaluate, train, evaluate, save, summarise; from a checkpoint where there is one."""
        with self._trackers, closing(self._recorder), self._stop.listening(), self._draining:
            try:
                self._load(started, loaded)
                self._train(loaded)
            except Preempted:
                self._history.save_and_leave()
                raise
            except RewardError:  # no step is half done: the learner holds those that are
                with suppress(LearnersLost):  # then the newest checkpoint has to do
                    self._history.save()
                raise
            self._summarise()

    def _load(self, started: float, loaded: Loaded | None) -> None:
        self._progress.phase("loading models")
        self._store.start()
        self._actors.begin_loading()
        self._history.begin(started, loaded)
        if self._evaluator and self._config.evaluation.teacher:
            self._evaluate_teachers()
        self._actors.samplers.use_student()
        self._actors.wait_until_ready()

    def _train(self, loaded: Loaded | None) -> None:
        history, lost = self._history, None
        while True:
            try:
                if lost is not None:
                    self._roll_back(lost)
                elif loaded is not None:
                    history.resume()
                lost = loaded = None
                self._check_agreement()
                history.begin_records()  # what fails before leaves a run that exists as it was
                self._evaluation.run_if_due(history.done)
                history.save_if_due()
                self._save_if_draining()
                if history.done == self._config.run.steps:
                    history.guards.last_evaluation(history.done)
                    return history.writer.finish()
                self._stop.check()
                self._step(history.done)
            except LearnersLost as error:  # while it goes back, too
                lost = error

    def _check_agreement(self) -> None:
        """Once, before the first step of this process."""
        if (check := self._agreement) is not None:
            self._progress.phase("checking that all engines compute the same models")
            check.run(self._history.done)
            self._progress.note(check.summary())
            self._agreement = None

    def _save_if_draining(self) -> None:
        """Save what would be lost with a node that is about to go: after each step until it has gone."""
        for draining in self._draining.news():
            self._progress.note(f"{draining.words()}: each step is saved from now on")
        if self._draining.is_pressing:
            self._history.save()

    def _roll_back(self, error: LearnersLost) -> None:
        """A learner died: start a new group, and go back to what is saved."""
        self._progress.note(f"the learner was lost after step {self._history.done} ({error}): starting it again")
        self._history.writer.forget_pending()
        self._actors.restart_learners(error)
        if self._prefetch.cancel():
            self._actors.abandon_sampling()
        self._history.roll_back()

    def _step(self, step: int) -> None:
        started = time.monotonic()
        self._progress.training()
        # The learner, whose state is that after the step before, is idle until the rollouts are handed over to it.
        with self._timeline.span("sample"), self._actors.supervisor.meanwhile(self._save_if_draining):
            sampled, weight = self._rollouts(step)
        sampled_at = time.monotonic()
        pending = self._steps.learn(weight)
        store = self._store.sample()
        record, late = partial(self._recorder.record, step, sampled, self._history.totals), self._record_late
        with self._timeline.span("record"):
            recorded = {} if late else record()  # while the learner works
        with self._timeline.span("learn"):
            report, *_ = self._actors.learners.wait(pending, "the learner")
        if late:
            with self._timeline.span("record"):
                recorded = record(self._steps.learner_logprobs())
        learnt_at = time.monotonic()
        with self._timeline.span("sample ahead"):
            goes_on = self._prefetch.wait()
        ready_at = time.monotonic()
        if goes_on:
            with self._timeline.span("publish"):
                self._actors.publish(step + 1)
        ended = time.monotonic()
        if (words := self._stop.too_long(learnt_at - sampled_at)) is not None:
            self._progress.note(words)
        times = StepTimes.of(
            sampled.reports, sampled.scored, sampled.monitor_seconds, step=ended - started,
            sample=sampled_at - started + ready_at - learnt_at, learn=learnt_at - sampled_at,
            publish=ended - ready_at,
        )  # fmt: skip
        result = StepResult(
            done=step + 1, learner=report, times=times, staleness=report.policy_version - sampled.version,
            restarts=self._uncounted_restarts() + sum(r.recovered for batch in sampled.reports for r in batch),
            recorded=recorded, store=store,
        )  # fmt: skip
        self._finish_step(result, sampled, goes_on)
        if not goes_on:
            raise Preempted

    def _rollouts(self, step: int) -> tuple[SampledStep, float]:
        """The step's rollouts, handed over to the learner, and their weight; sampled again if records were lost."""
        while True:
            try:
                sampled = self._prefetch.get(step, self._history.rule_state)
                self._sample_ahead(step + 1, sampled)
                return sampled, self._steps.hand_over(sampled)
            except ObjectLostError as error:
                self._records_lost(step, error)
                if self._prefetch.cancel():
                    self._actors.abandon_sampling()

    def _sample_ahead(self, step: int, sampled: SampledStep) -> None:
        """With staleness 1 the samplers, which hold the weights for it, go on to the next step at once.

        The learner fetches its batch meanwhile, and learns it.
        """
        self._store.sample()
        if self._config.rollout.staleness and step < self._config.run.steps and self._store.has_room:
            self._prefetch.start(step, sampled.ended_with)

    def _finish_step(self, result: StepResult, sampled: SampledStep, goes_on: bool) -> None:
        """Judge, resize, log. The step is done from here on; it may be the last."""
        history = self._history
        history.totals.add_trained(0 if result.learner.skipped else result.learner.tokens)
        metrics = result.to_metrics() | history.guards.check(result)
        if goes_on:
            metrics |= self._resizing.between_steps(self._stage_times(result.times))
        history.writer.finish()
        metrics["time/checkpoint"] = history.writer.take_stall_seconds()
        self._trackers.step(result.done, metrics)
        if self._trace is not None:
            self._trace.add({"driver": self._timeline.drain(), **self._steps.spans()}, result.done)
        history.step_done(result.done, sampled.ended_with)
        self._announce(result.done, sampled.moves)
        if result.done > self._furthest:
            self._furthest = result.done
            self._actors.supervisor.step_done()
        history.guards.end_if_due(partial(self._steps.batch_of, sampled), history.save)

    def _announce(self, done: int, moves: Sequence[Move]) -> None:
        """Families of a curriculum that go to another level."""
        environment = self._config.environment
        for move in moves:
            assert environment is not None and environment.curriculum is not None, "it moves them"
            self._progress.note(move.words(done, environment.curriculum.levels))

    def _stage_times(self, times: StepTimes) -> StageTimes:
        idle = {group.role: 0.0 for group in self._config.scorer_groups}  # where no rollout is theirs
        scoring = {role: stage.busy for role, stage in times.scorers.items()}
        return StageTimes.of(
            step=times.step,
            waited=times.sample,
            sampling=times.sampling,
            busy={"sampler": times.sampler.busy} | idle | scoring,
        )

    def _records_lost(self, step: int, error: BaseException) -> None:
        self._actors.supervisor.count_loss(f"record:{step}", error)

    def _uncounted_restarts(self) -> int:
        """Actors lost since the last call; also between steps and in a step that is taken again."""
        total = self._actors.supervisor.restarts
        new, self._counted_restarts = total - self._counted_restarts, total
        return new

    # --- evaluation -------------------------------------------------------------------------------------------

    def _evaluate(self, k: int) -> EvalResult:
        assert self._evaluator is not None
        return self._evaluator.run(self._actors.samplers, k)

    def _evaluate_teachers(self) -> None:
        """Each checkpoint on all held-out problems, once in a run; what a server has generates nothing."""
        for group in self._config.scorer_groups:
            key = teacher_key(group.name)
            if group.model.is_remote or key in self._evaluation.results:
                continue
            self._actors.samplers.use_teacher(group)
            result = self._evaluation.teacher(self._evaluate, key)
            who = "the teacher" if group.section == "teacher" else group.section
            self._progress.note(f"evaluation of {who}: avg@{result.k} {result.avg_at_k:.1%}")

    def _evaluated(self, done: int, result: EvalResult) -> None:
        """What came out, and what training had cost until then; with staleness 1 not what is sampled ahead."""
        self._history.guards.evaluated(result)
        self._trackers.evaluation(done, result.as_dict() | self._history.totals.token_fields())

    def _summarise(self) -> None:
        parameters = {name: model.parameters for name, model in self._prepared.facts.models.items()}
        results = self._evaluation.results
        names = ("before", "after", "teacher", *(name for name in results if is_teacher(name)))
        evaluations = {f"eval_{name}": results.get(name) for name in names}
        summary = run_summary(self._config, self._history.totals, evaluations, parameters, self._history.seconds())
        self._run.write_summary(summary)
        newest = self._history.writer.newest or self._run.path / "checkpoints"
        self._trackers.finish(summary, self._run.paths(newest))


def _trackers(config: Config, run: RunDirectory, progress: Progress) -> Trackers:
    """Where the run's figures go."""
    own: list[Tracker] = [JsonlTracker(run.path)]
    if "tensorboard" in config.trackers:
        own.append(TensorBoardTracker(run.path / "tensorboard", config_yaml(config)))
    own += service_trackers(config.tracking, config.trackers, run.path, progress.note)
    steps = config.run.steps
    return Trackers([*own, RayMetrics(run.path.name, steps), ConsoleTracker(progress, steps)])
