"""What a run has done so far: what a checkpoint holds of it, and going back to one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from actors.cluster.handles import remote
from actors.cluster.run_actors import RunActors
from actors.cluster.waiting import LearnersLost
from actors.driver.checkpointing import CheckpointWriter
from actors.driver.evaluation import EvaluationSchedule
from actors.driver.preparation import Prepared, checkpoints_of
from actors.driver.steps import Steps
from actors.learner.learner import Learner
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.observability.progress import Progress
from kat_ray.observability.trackers import Trackers
from kat_ray.run.checkpoint import FileDigest, Loaded
from kat_ray.run.directory import RunDirectory
from kat_ray.run.state import RunState
from kat_ray.run.step_guards import StepGuards
from kat_ray.run.summary import Totals
from kat_ray.storage.address import Place


class RunHistory:
    """Steps done, and everything that the next one depends on but the learner's own state."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        run: RunDirectory,
        progress: Progress,
        trackers: Trackers,
        actors: RunActors,
        steps: Steps,
        evaluation: EvaluationSchedule,
    ) -> None:
        self._config, self._prepared = config, prepared
        self._run, self._progress, self._trackers = run, progress, trackers
        self._actors, self._steps, self._evaluation = actors, steps, evaluation
        self._checkpoints = run.checkpoints or checkpoints_of(run.path, config.run)
        self.writer = CheckpointWriter(
            self._checkpoints, config.run, self._snapshot, self._written, trackers.checkpoint
        )
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of earlier processes of this run
        self._positions: Mapping[str, int] = {}  # of the records, when the steps that are done were
        self._take(RunState())

    def step_done(self, done: int, rule_state: Mapping[str, Any]) -> None:
        """`done` steps are; the rule's calibration after them."""
        self.done, self.rule_state = done, rule_state

    def seconds(self) -> float:
        """That the run has taken so far, all its processes together."""
        return self._seconds_before + time.monotonic() - self._started

    def begin(self, started: float, loaded: Loaded | None) -> None:
        """Everything here as the checkpoint holds it; None: as before the first step. Writes nothing."""
        self._started = started
        self._go_back(loaded)

    def begin_records(self) -> None:
        """Begin to write the run's records, with what was recorded until the steps that are done."""
        if not self._run.has_begun:
            self._run.begin()
            self._rewind()

    def resume(self) -> None:
        """Have the learner, which holds the student as given, take the newest checkpoint that is whole.

        That is the one that `begin` took, unless the ranks find it damaged. The samplers get its weights.
        """
        at = self.done
        loaded = self._newest()
        if (loaded.step if loaded else 0) != at:
            self._progress.note(f"going on from step {loaded.step if loaded else 0} instead of {at}")
            self._go_back(loaded)
        if loaded is not None:
            self._restore(loaded)

    def roll_back(self) -> None:
        """To the newest checkpoint, with a learner that has just started: the steps since then are taken again."""
        loaded = self._newest()
        seconds = self.seconds()
        self._go_back(loaded)
        self._started, self._seconds_before = time.monotonic(), seconds
        if loaded is not None:
            self._restore(loaded)
        else:
            self._actors.publish(0)
        self._progress.note(f"going on from step {self.done}")

    def _newest(self) -> Loaded | None:
        self._progress.phase("verifying checkpoints")
        loaded, notes = self._checkpoints.newest(self._actors.learners.find_damage)
        for note in notes:
            self._progress.note(note)
        return loaded

    def _restore(self, loaded: Loaded) -> None:
        """Have the learner take the checkpoint, and the samplers its weights."""
        self._progress.phase(f"restoring step {self.done}")
        self.writer.go_back(self.done, loaded.path)
        path = str(loaded.path)
        what = f"the checkpoint {path} to be loaded"
        self._actors.learners.on_all(lambda rank: remote(rank, Learner.restore)(path), what)
        self._actors.publish(self.done)

    def save_if_due(self) -> None:
        """Begin a checkpoint where one is due; it is written while the next step goes on."""
        if self.writer.is_due(self.done):
            self._begin_checkpoint()

    def save(self) -> None:
        """A checkpoint of the steps done, if there is none, and until it is written."""
        if self._is_unsaved:
            self._begin_checkpoint()
        self.writer.finish()

    def save_and_leave(self) -> None:
        """Told to end: what was learnt since the newest checkpoint goes into another one."""
        self._progress.note(f"told to end: saving step {self.done}" if self._is_unsaved else "told to end")
        try:
            self.save()
        except LearnersLost as error:
            raise UserError(
                f"told to end, and the learner died meanwhile ({error}); the newest checkpoint is intact"
            ) from error

    @property
    def _is_unsaved(self) -> bool:
        return bool(self.done) and self.writer.saved != self.done

    def _state(self) -> RunState:
        carried = self._steps.carried(self.done)
        return RunState(
            done=self.done,
            rule=dict(self.rule_state),
            probe_rewards=list(carried.probe_rewards),
            prompts_taken=carried.prompts,
            curriculum=dict(carried.curriculum),
            totals=self.totals.state(),
            evaluations=self._evaluation.results,
            evaluated=self._evaluation.evaluated,
            positions=self._run.positions(),
            watch=self.guards.state(),
            seconds=self.seconds(),
            prompts={section: prompts.digest for section, prompts in self._prepared.prompt_sets().items()},
            reward_files=dict(self._prepared.reward_files),
        )

    def _go_back(self, loaded: Loaded | None) -> None:
        state = RunState.of(loaded)
        self._take(state)
        self._positions = state.positions
        if self._run.has_begun:
            self._rewind()

    def _rewind(self) -> None:
        self._run.rewind(self.done, self._positions)
        self._trackers.start(self.done)

    def _take(self, state: RunState) -> None:
        self.done = state.done
        self.totals = Totals.from_state(state.totals.model_dump(mode="json"))
        self._seconds_before = state.seconds
        self._steps.reset_rule(state.rule)
        self._steps.reset_carried(state.done, state.carried(self._config.rollout.prompts_per_step))
        self.rule_state = self._steps.rule_state
        self._evaluation.go_back(state.evaluations, state.evaluated)
        self.writer.go_back(state.done, None)
        self.guards = StepGuards(self._config, self._run.path, self._progress.note)
        self.guards.load_state(state.watch.model_dump())

    def _begin_checkpoint(self) -> None:
        self.writer.begin(self.done, self._state().to_json(), self._evaluation.metric(self.done))

    def _snapshot(self, folder: Place) -> None:
        tokenizer = self._prepared.paths.student_dir
        what = "a copy of the learner's state"
        self._actors.learners.on_all(lambda rank: remote(rank, Learner.snapshot)(str(folder), tokenizer), what)

    def _written(self, step: int) -> dict[str, FileDigest]:
        what = f"the checkpoint of step {step} to be written"
        parts = self._actors.learners.on_all(lambda rank: remote(rank, Learner.written)(), what)
        return {name: digest for part in parts for name, digest in part.items()}
