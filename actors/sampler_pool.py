"""Samplers: made, watched, and brought back when they die. Evaluation needs no more; a run has `actors.pools`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.cluster import Placement
from actors.learner import Learner
from actors.student_sampler import EngineMaker, StudentSampler, vllm_engine
from actors.teacher_scorer import TeacherMaker, make_teacher
from actors.watch import LOST, StopRequest, Watch, get, remote_class, slices, started
from kat_ray.config import Config, ModelConfig
from kat_ray.errors import UserError

log = logging.getLogger("kat_ray.pools")


@dataclass(frozen=True)
class ModelPaths:
    """What the actors need to know of the two models, resolved once by the driver."""

    student_dir: str
    teacher_dir: str
    stop_ids: tuple[int, ...]  # of both models: the stop event of the KL
    student_stop_ids: tuple[int, ...]  # those that end a student's rollout
    vocabulary: int  # the student's
    max_model_len: int  # longest prompt and answer together


@dataclass(frozen=True)
class Engines:
    """What samplers, scorers and learners work with. Others than the real ones are for tests and benchmarks."""

    sampler: EngineMaker = vllm_engine
    scorer: TeacherMaker = make_teacher
    learner: Callable[..., Any] = Learner  # the actor's class


class LearnersLost(Exception):
    """A learner's rank died, and with it the group: what it learnt since the newest checkpoint is gone."""


class SamplerPool:
    """The samplers' places, taken by one set of engines at a time: the teacher's, to evaluate it, or the
    student's.
    """

    def __init__(
        self,
        config: Config,
        paths: ModelPaths,
        placement: Placement,
        stop: StopRequest,
        engines: Engines | None = None,
    ) -> None:
        self._config, self._paths, self.placement = config, paths, placement
        self._stop, self._engines = stop, engines or Engines()
        self.limits = config.cluster
        self._watch = Watch(config.cluster, stop)
        self.samplers: list[Any] = []
        self.version = 0
        self._update: Any = None  # reference to the weights of this version; None: as the student was given
        self.restarts: Counter[str] = Counter()  # by role, since the run began
        self._lately: Counter[tuple[str, int]] = Counter()  # by actor, since a step was last completed

    def named(self) -> dict[str, Any]:
        """All actors that are watched, by name."""
        return {f"sampler:{i}": actor for i, actor in enumerate(self.samplers)}

    def introduce(self, index: int) -> list[Any]:
        """Tell a new sampler whom it works with; pending answers."""
        return []

    def use_samplers(self, model: ModelConfig, model_dir: str, label: str) -> None:
        """Put engines of this model in the samplers' places; those that held them end."""
        for sampler in self.samplers:
            ray.kill(sampler)
        self.samplers = make_samplers(
            self._config, self._paths, self.placement, model, model_dir, label, self._engines.sampler
        )
        self.version, self._update = 0, None
        self.started([s.ready.remote for s in self.samplers], "samplers to load", interruptible=True)
        self.remember(self.named())

    def started(self, calls: Sequence[Callable[[], Any]], what: str, interruptible: bool = False) -> list[Any]:
        """Results of calls on actors that are being started, within `cluster.start_timeout`."""
        timeout, check = self.limits.start_timeout, partial(self._stop.check, interruptible)
        return started(calls, timeout, f"{what} (cluster.start_timeout)", check)

    def remember(self, actors: Mapping[str, Any]) -> None:
        """Note the processes of actors, before the run's first step: another one under the same name has to be
        told everything.
        """
        beats = self.started([a.health.remote for a in actors.values()], "actors to answer", interruptible=True)
        self._watch.pids |= {name: beat.pid for name, beat in zip(actors, beats, strict=True)}

    def tick(self, interruptible: bool) -> None:
        """What has to be looked at while anything is waited for."""
        self._stop.check(interruptible)
        if self._watch.pids:
            self._watch.check({name: actor for name, actor in self.named().items() if name in self._watch.pids})

    def wait(
        self, refs: Sequence[Any], what: str, interruptible: bool = False, limit: str = "step_timeout"
    ) -> list[Any]:
        """Results, within `cluster.<limit>`. What tells of lost actors or records passes through."""
        left = list(refs)
        for seconds in slices(getattr(self.limits, limit), what, limit):
            _, left = ray.wait(left, num_returns=len(left), timeout=seconds) if left else ([], left)
            if not left:
                return get(refs, what)
            self.tick(interruptible)
        raise AssertionError  # slices end by raising

    def on_samplers(self, call: Callable[[int, Any], Any], what: str, interruptible: bool = False) -> list[Any]:
        """`call(i, sampler)` on each sampler, again on one that was lost and has come back."""
        results: dict[int, Any] = {}
        holders = list(self.samplers)  # of the parts; another one's where a sampler is done without
        refs = {i: call(i, s) for i, s in enumerate(holders)}
        while refs:
            failed = []
            for i, ref in refs.items():
                try:
                    (results[i],) = self.wait([ref], what, interruptible)
                except LOST as error:
                    self.note_loss("sampler", i, error)
                    failed.append(i)
            for i in failed:
                if holders[i] in self.samplers:
                    self.revive_or_drop(holders[i], interruptible)
                if holders[i] not in self.samplers:
                    holders[i] = self.samplers[0]
            refs = {i: call(i, holders[i]) for i in failed}
        return [results[i] for i in range(len(holders))]

    def note_loss(self, role: str, index: int, error: BaseException) -> None:
        """Count a death; `UserError` if there are too many of one actor within one step."""
        self.restarts[role] += 1
        self._lately[role, index] += 1
        words = str(error).splitlines()[-1] if str(error) else type(error).__name__
        log.warning("%s:%d was lost (%s)", role, index, words)
        times = self._lately[role, index]
        if times > self.limits.max_restarts:
            raise UserError(
                f"{role}:{index} was lost {times} times in one step (cluster.max_restarts = "
                f"{self.limits.max_restarts}), last: {words}. Its output is in Ray's session logs "
                "(/tmp/ray/session_latest/logs/worker-*)."
            ) from error

    def step_done(self) -> None:
        """A step was completed for the first time: deaths before it do not count against the next."""
        self._lately.clear()

    def spare_lost(self, role: str) -> list[int]:
        """Replicas gone for longer than `cluster.replacement_timeout`, as far as the pool can do without them."""
        return []

    def drop(self, role: str, indices: Sequence[int]) -> None:
        """Do without replicas that are lost. No sampler may be at work."""
        raise AssertionError("a pool of a fixed size")

    def revive_or_drop(self, sampler: Any, interruptible: bool = False) -> None:
        """`revive_sampler` while no sampler is at work: it is done without where the pool allows that and it
        finds no place for `cluster.replacement_timeout` seconds.
        """
        index = self.samplers.index(sampler)

        def needless() -> bool:
            return index in self.spare_lost("sampler")

        if not self.revive_sampler(index, needless, interruptible) and sampler in self.samplers:
            self.drop("sampler", [index])

    def revive_sampler(
        self, index: int, unless: Callable[[], bool] = lambda: False, interruptible: bool = False
    ) -> bool:
        """Wait until a lost sampler is back, and give it what it must know; False if `unless` says to stop."""
        sampler, name = self.samplers[index], f"sampler:{index}"
        while self._watch.until_new(name, sampler, unless, interruptible):
            told = self.introduce(index)
            if self._update is not None:
                told.append(sampler.load_weights.remote(self._update))
            try:
                return self._settle(name, told, unless, interruptible)
            except LOST as error:
                self.note_loss("sampler", index, error)
        return False

    def _settle(self, name: str, told: list[Any], unless: Callable[[], bool], interruptible: bool) -> bool:
        """Wait until a sampler that came back has taken all that it was told."""
        try:
            for seconds in slices(self.limits.start_timeout, f"{name} to take its weights", "start_timeout"):
                if unless():
                    return False
                done, _ = ray.wait(told, num_returns=len(told), timeout=seconds) if told else (told, [])
                if len(done) == len(told):
                    get(told, "its weights")
                    return True
                self._stop.check(interruptible)
        except ObjectLostError as error:
            raise LearnersLost("the weights were lost with the node that held them") from error
        raise AssertionError  # slices end by raising


def make_samplers(
    config: Config,
    paths: ModelPaths,
    placement: Placement,
    model: ModelConfig,
    model_dir: str,
    label: str,
    make_engine: EngineMaker = vllm_engine,
) -> list[Any]:
    """Sampler actors that hold `model`; `label` names them on the dashboard."""

    def make(i: int) -> Any:
        options = placement.options("sampler", i) | {"name": f"kat:{label}:{i}"}
        return new_sampler(config, paths, model, model_dir, f"{label}:{i}", make_engine, options)

    return [make(i) for i in range(config.sampler.replicas)]


def new_sampler(
    config: Config,
    paths: ModelPaths,
    model: ModelConfig,
    model_dir: str,
    name: str,
    make_engine: EngineMaker,
    options: Mapping[str, Any],
) -> Any:
    """One sampler actor."""
    return (
        remote_class(StudentSampler)
        .options(**options)
        .remote(
            name, config, model, model_dir, stop_ids=paths.student_stop_ids, vocabulary=paths.vocabulary,
            max_model_len=paths.max_model_len, make_engine=make_engine,
        )
    )  # fmt: skip
