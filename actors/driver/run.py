"""The steps of one run, what is recorded of them, and what happens when something dies.

After each step everything that the next one depends on is in two places: with the learner, and in `_state` here. A
checkpoint is both. A step's rollouts can be sampled again at any time, since the order of prompts, seeds and probes
are functions of the step; a step that the learner did not finish never happened.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError

from actors.cluster.object_store import StoreWatch
from actors.cluster.placement import Placement
from actors.cluster.pools import Pools
from actors.cluster.resizing import ElasticPools
from actors.cluster.sampler_pool import Engines, LearnersLost, ModelPaths
from actors.cluster.waiting import Preempted, StopRequest
from actors.driver.dispatcher import Sampling
from actors.driver.evaluator import Evaluator
from actors.driver.ray_metrics import RayMetrics
from actors.driver.recorder import StepRecorder
from actors.driver.steps import SampledStep, Trainer
from kat_ray.config import Config, RunConfig
from kat_ray.data.prompts import PromptOrder, PromptSet
from kat_ray.errors import UserError
from kat_ray.models.inspect import ModelFacts
from kat_ray.observability.progress import Progress
from kat_ray.observability.timeline import ChromeTrace, Timeline
from kat_ray.observability.trackers import ConsoleTracker, TensorBoardTracker, Tracker, Trackers
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import Checkpoints, Loaded
from kat_ray.run.directory import RunDirectory
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.step_guards import StepWatch
from kat_ray.run.step_result import StepResult, StepTimes
from kat_ray.run.summary import Totals, run_summary

log = logging.getLogger("kat_ray.job")


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads before it starts anything."""

    facts: ModelFacts
    train: PromptSet
    heldout: PromptSet | None
    paths: ModelPaths

    def prompt_sets(self) -> dict[str, PromptSet]:
        """What the run reads prompts from, by the section of the configuration that names it."""
        sets = {"data": self.train, "evaluation.data": self.heldout}
        return {section: prompts for section, prompts in sets.items() if prompts is not None}


def checkpoints_of(run: Path, config: RunConfig) -> Checkpoints:
    """The checkpoints in a run's directory."""
    return Checkpoints(run / "checkpoints", config.keep_checkpoints, config.keep_best)


def make_evaluator(config: Config, prepared: Prepared) -> Evaluator | None:
    """What evaluates on the held-out problems, if there are any."""
    if prepared.heldout is None:
        return None
    paths = prepared.paths
    return Evaluator(config, prepared.heldout.prompts, prepared.facts.tokenizer, paths.student_stop_ids)


class Job:
    """One run, from loading the models to the summary."""

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
        self._pools = Pools(config, prepared.paths, placement, stop, engines)
        order = PromptOrder(prepared.train.prompts, config.run.seed, config.data.shuffle)
        self._trainer = Trainer(config, self._pools, order)
        self._evaluator = make_evaluator(config, prepared)
        self._recorder = StepRecorder(config, run, prepared.train, prepared.facts)
        self._checkpoints = checkpoints_of(run.path, config.run)
        self._pending: tuple[int, dict[str, Any], float | None] | None = None  # a checkpoint being written
        self._saved: int | None = None  # the step of the newest one
        self._newest = run.path / "checkpoints"
        self._sampling: Sampling | None = None  # under way
        self._ahead: SampledStep | None = None  # the next step's rollouts, with staleness 1
        self._timeline = Timeline()
        self._trace = ChromeTrace(run.path / "timeline.json") if config.run.profile else None
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of earlier processes of this run
        self._stood_still = 0.0  # seconds of the step that a checkpoint took
        self._done = 0  # steps
        self._furthest = 0  # step that this driver completed
        self._counted_restarts = 0  # in the metrics of a step
        self._rule_state = self._trainer.rule_state  # after those steps
        self._totals = Totals()
        self._step_watch = StepWatch(config, run.path, progress.note)
        self._elastic = ElasticPools(config, self._pools, progress.note)
        self._store = StoreWatch(config.cluster.store_share, progress.note, config.rollout.staleness)
        own: list[Tracker] = [JsonlTracker(run.path)]
        if config.run.tensorboard:
            own.append(TensorBoardTracker(run.path / "tensorboard"))
        gauges, console = RayMetrics(run.path.name, config.run.steps), ConsoleTracker(progress, config.run.steps)
        self._trackers = Trackers([*own, gauges, console])
        self._evaluations: dict[str, EvalResult] = {}
        self._evaluated: int | None = None  # after how many steps it was last evaluated

    # --- the run -------------------------------------------------------------------------------------------

    def run_all(self, started: float, loaded: Loaded | None) -> None:
        """Load, evaluate, train, evaluate, save, summarise; from a checkpoint where there is one."""
        self._started = started
        with self._trackers, self._stop.listening():
            try:
                self._load(loaded)
                self._steps(loaded)
            except Preempted:
                self._save_and_leave()
                raise
            facts = self._prepared.facts
            parameters = {"student": facts.student.parameters, "teacher": facts.teacher.parameters}
            evaluations = {f"eval_{name}": self._evaluations.get(name) for name in ("before", "after", "teacher")}
            summary = run_summary(self._config, self._totals, evaluations, parameters, self._seconds())
            self._run.write_summary(summary)
            self._trackers.finish(summary, self._run.paths(self._newest))

    def _load(self, loaded: Loaded | None) -> None:
        self._progress.phase("loading models")
        self._store.start()
        self._pools.start()
        self._load_state(loaded.state if loaded else None)
        self._evaluate_teacher()
        self._pools.use_samplers(self._config.student, self._prepared.paths.student_dir, "sampler")
        self._pools.join()

    def _steps(self, loaded: Loaded | None) -> None:
        lost: LearnersLost | None = None
        while True:
            try:
                if lost is not None:
                    self._roll_back(lost)
                elif loaded is not None:
                    self._restore(loaded)
                lost = loaded = None
                self._evaluate_if_due()
                self._checkpoint_if_due()
                if self._done == self._config.run.steps:
                    self._finish_checkpoint()
                    return
                self._stop.check()
                self._step(self._done)
            except LearnersLost as error:  # while it goes back, too
                lost = error

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _evaluate_if_due(self) -> None:
        done, every = self._done, self._config.evaluation.every
        last = done == self._config.run.steps
        due = done == 0 or last or (every and done % every == 0)
        if self._evaluator is None or not due or self._evaluated == done:
            return
        when = "after training" if last else f"after step {done}" if done else "before training"
        self._progress.phase(f"evaluating {when}")
        result = self._evaluator.run(self._pools)
        self._evaluations["after"] = result
        if done == 0:
            self._evaluations["before"] = result
        self._evaluated = done
        self._trackers.evaluation(done, asdict(result))

    def _evaluate_teacher(self) -> None:
        """The teacher's own score: a wrong template or grader shows there. Its sampler is gone afterwards."""
        if self._evaluator is None or not self._config.evaluation.teacher or "teacher" in self._evaluations:
            return
        self._pools.use_samplers(self._config.teacher, self._prepared.paths.teacher_dir, "teacher-sampler")
        self._progress.phase("evaluating the teacher")
        result = self._evaluator.run(self._pools)
        self._evaluations["teacher"] = result
        self._progress.note(f"evaluation of the teacher: avg@{result.k} {result.avg_at_k:.1%}")

    # --- one step ------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        started = time.monotonic()
        self._progress.training()
        with self._timeline.span("sample"):
            sampled, weight = self._sample(step)
        sampled_at = time.monotonic()
        pending = self._trainer.learn(weight)
        store = self._store.look()
        if self._config.rollout.staleness and step + 1 < self._config.run.steps and self._store.has_room:
            self._sampling = self._trainer.start_sampling(step + 1, sampled.ended_with)
        with self._timeline.span("record"):
            recorded = self._recorder.record(step, sampled, self._totals)  # while the learner works
        with self._timeline.span("learn"):
            report, *_ = self._pools.wait_learners(pending, "the learner")
        learnt_at = time.monotonic()
        stopping = not self._finish_ahead()
        ready_at = time.monotonic()
        if not stopping:
            with self._timeline.span("publish"):
                self._pools.publish(step + 1)
        ended = time.monotonic()
        self._totals.add_trained(0 if report.skipped else report.tokens)
        result = StepResult(
            done=step + 1,
            learner=report,
            times=StepTimes.of(
                sampled.reports,
                sampled.scored,
                sampled.monitor_seconds,
                step=ended - started,
                sample=sampled_at - started + ready_at - learnt_at,
                learn=learnt_at - sampled_at,
                publish=ended - ready_at,
            ),
            staleness=report.policy_version - sampled.version,
            restarts=self._uncounted_restarts() + sum(r.recovered for r in sampled.reports),
            recorded=recorded,
            store=store,
        )
        metrics = result.to_metrics() | self._step_watch.check(result)
        if not stopping:
            metrics |= self._elastic.between_steps(metrics)
        self._finish_step(step, metrics, sampled)
        self._step_watch.end_if_due(partial(self._trainer.batch_of, sampled), self._save)
        if stopping:
            raise Preempted

    def _uncounted_restarts(self) -> int:
        """Actors lost since the last call; also between steps and in a step that is taken again."""
        total = sum(self._pools.restarts.values())
        new, self._counted_restarts = total - self._counted_restarts, total
        return new

    def _sample(self, step: int) -> tuple[SampledStep, float]:
        """The step's rollouts, handed over to the learner; sampled again if their records were lost."""
        while True:
            sampled, self._ahead = self._ahead, None
            if sampled is None:
                self._sampling = self._trainer.start_sampling(step, self._rule_state)
            try:
                if sampled is None:
                    assert self._sampling is not None
                    sampled = self._trainer.finish_sampling(self._sampling)
                    self._sampling = None
                return sampled, self._trainer.hand_over(sampled)
            except ObjectLostError as error:
                self._pools.note_loss("record", step, error)
                self._sampling = None

    def _finish_ahead(self) -> bool:
        """Wait for the rollouts that are sampled ahead; False if the run is to stop instead."""
        if self._sampling is None:
            return True
        with self._timeline.span("sample ahead"):
            try:
                self._ahead = self._trainer.finish_sampling(self._sampling)
            except ObjectLostError as error:  # they are sampled when their turn comes
                self._pools.note_loss("record", self._done + 1, error)
            except Preempted:
                return False
        self._sampling = None
        return True

    def _finish_step(self, step: int, metrics: dict[str, float], sampled: SampledStep) -> None:
        self._finish_checkpoint()
        metrics["time/checkpoint"] = self._stood_still
        self._trackers.step(step + 1, metrics)
        if self._trace is not None:
            self._trace.add({"driver": self._timeline.drain(), **self._trainer.spans()}, step + 1)
        self._done, self._rule_state = step + 1, sampled.ended_with
        self._stood_still = 0.0
        if step >= self._furthest:
            self._furthest = step + 1
            self._pools.step_done()

    # --- checkpoints and what they are good for ----------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "done": self._done,
            "rule": self._rule_state,
            "totals": self._totals.state(),
            "evaluations": {
                name: asdict(result) | {"right": list(result.right)} for name, result in self._evaluations.items()
            },
            "evaluated": self._evaluated,
            "positions": self._run.positions(),
            "watch": self._step_watch.state(),
            "seconds": self._seconds(),
            "prompts": {section: prompts.digest for section, prompts in self._prepared.prompt_sets().items()},
        }

    def _load_state(self, state: Mapping[str, Any] | None) -> None:
        """Everything here as after that many steps; None: as before the first."""
        state = state or {}
        self._done = state.get("done", 0)
        self._totals = Totals.from_state(state["totals"]) if "totals" in state else Totals()
        self._evaluations = {
            name: EvalResult(**result | {"right": tuple(result["right"])})
            for name, result in state.get("evaluations", {}).items()
        }
        self._evaluated = state.get("evaluated")
        self._seconds_before = state.get("seconds", 0.0)
        self._trainer.reset_rule(state.get("rule"))
        self._rule_state = self._trainer.rule_state
        self._saved = self._done or None
        self._step_watch = StepWatch(self._config, self._run.path, self._progress.note)
        if "watch" in state:
            self._step_watch.load_state(state["watch"])
        self._run.rewind(self._done, state.get("positions", {}))
        self._trackers.start(self._done)

    def _restore(self, loaded: Loaded) -> None:
        self._progress.phase(f"restoring step {self._done}")
        self._newest = loaded.path
        refs = [rank.restore.remote(str(loaded.path)) for rank in self._pools.learners]
        self._pools.wait_learners(refs, f"the checkpoint {loaded.path} to be loaded")
        self._pools.publish(self._done)

    def _roll_back(self, error: LearnersLost) -> None:
        """A learner died: a new group takes the newest checkpoint, and the steps since then are taken again."""
        self._progress.note(f"the learner was lost after step {self._done} ({error}): starting it again")
        self._pending = None
        self._pools.restart_learners(error)
        if self._sampling is not None:
            self._pools.abandon_sampling()
        self._sampling = self._ahead = None
        loaded, notes = self._checkpoints.newest()
        for note in notes:
            self._progress.note(note)
        seconds = self._seconds()
        self._load_state(loaded.state if loaded else None)
        self._started, self._seconds_before = time.monotonic(), seconds
        if loaded is not None:
            self._restore(loaded)
        else:
            self._pools.publish(0)
        self._progress.note(f"going on from step {self._done}")

    def _checkpoint_if_due(self) -> None:
        done, run = self._done, self._config.run
        due = done == run.steps or (run.checkpoint_every and done % run.checkpoint_every == 0)
        if done and due and self._saved != done:
            self._begin_checkpoint()

    def _begin_checkpoint(self) -> None:
        """Copy the learner's state; it is written while the next step goes on."""
        started = time.monotonic()
        self._finish_checkpoint()
        folder = self._checkpoints.begin(self._done)
        tokenizer = self._prepared.paths.student_dir
        refs = [rank.snapshot.remote(str(folder), tokenizer) for rank in self._pools.learners]
        self._pools.wait_learners(refs, "a copy of the learner's state")
        result = self._evaluations.get("after") if self._evaluated == self._done else None
        # A copy: it is written a step later, and what it was taken from has gone on by then.
        state = copy.deepcopy(self._state())
        self._pending = (self._done, state, None if result is None else result.avg_at_k)
        self._saved = self._done
        self._stood_still += time.monotonic() - started

    def _finish_checkpoint(self) -> None:
        if self._pending is None:
            return
        started = time.monotonic()
        (step, state, metric), self._pending = self._pending, None
        refs = [rank.written.remote() for rank in self._pools.learners]
        parts = self._pools.wait_learners(refs, f"the checkpoint of step {step} to be written")
        files = {name: digest for part in parts for name, digest in part.items()}
        self._newest = self._checkpoints.commit(step, state, files, metric)
        self._trackers.checkpoint(step, self._newest)
        self._stood_still += time.monotonic() - started

    def _save(self) -> None:
        """A checkpoint of the steps done, if there is none, and until it is written."""
        if self._done and self._saved != self._done:
            self._begin_checkpoint()
        self._finish_checkpoint()

    def _save_and_leave(self) -> None:
        """Told to end: what was learnt since the newest checkpoint goes into another one."""
        due = self._done and self._saved != self._done
        self._progress.note(f"told to end: saving step {self._done}" if due else "told to end")
        try:
            self._save()
        except LearnersLost as error:
            raise UserError(
                f"told to end, and the learner died meanwhile ({error}); the newest checkpoint is intact"
            ) from error
