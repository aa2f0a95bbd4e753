"""The samplers' places, taken by one set of engines at a time: a teacher's, to evaluate it, or the student's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Handle, Ref, remote
from actors.cluster.placement import Placement
from actors.cluster.replica import Replica, start
from actors.cluster.supervisor import Supervisor
from actors.learner.learner import Learner
from actors.learner.settings import LearnerSettings
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import EngineMaker, StudentSampler, vllm_engine
from actors.teacher.scorer import TeacherMaker, make_teacher
from kat_ray.config import Config, ModelConfig, ScorerGroup


@dataclass(frozen=True)
class ModelPaths:
    """What the actors need to know of the models, resolved once by the driver; teachers by their scorers' group."""

    student_dir: str
    teacher_dirs: Mapping[str, str]
    stop_ids: tuple[int, ...]  # of all models: the stop event of the KL
    student_stop_ids: tuple[int, ...]  # those that end a student's rollout: of all models, as far as it has them
    teacher_stop_ids: Mapping[str, tuple[int, ...]]  # those that end its answer when it is evaluated
    vocabulary: int  # the student's
    max_model_len: int  # longest prompt and answer together
    scored_len: int  # the same of what teachers are given


@dataclass(frozen=True)
class Engines:
    """What makes the engines of samplers and scorers, and the learner's class.

    Others than the real ones are for tests and benchmarks.
    """

    sampler: EngineMaker = vllm_engine
    scorer: TeacherMaker = make_teacher
    learner: Callable[[int, LearnerSettings], Learner] = Learner

    @property
    def are_real(self) -> bool:
        """Whether all three compute the models that the configuration names; stand-ins have no model."""
        return self == Engines()


class SamplerGroup(ActorGroup[StudentSampler]):
    """Samplers, and the weights that they hold. Evaluation needs no other actors."""

    def __init__(
        self,
        config: Config,
        paths: ModelPaths,
        supervisor: Supervisor,
        placement: Placement,
        make_engine: EngineMaker = vllm_engine,
    ) -> None:
        super().__init__("sampler", supervisor, placement, self._make_sampler, config.sampler.bounds[0])
        self._config, self._paths, self._make_engine = config, paths, make_engine
        self._model, self._model_dir = config.student, ""  # `_use` says which
        self.stop_ids = paths.student_stop_ids  # those that end what the samplers generate
        self.version = 0
        self.weights: Any = None  # reference to those of this version; None: as the model was given
        # Tells a sampler of its scorers and its monitor.
        self.wiring: Callable[[Replica[StudentSampler]], Ref[None]] | None = None

    def use_student(self) -> None:
        """Put engines of the student in the samplers' places; those that held them end."""
        self.stop_ids = self._paths.student_stop_ids
        self._use(self._config.student, self._paths.student_dir, "")

    def use_teacher(self, group: ScorerGroup) -> None:
        """Put engines of a group's teacher in the samplers' places, until `use_student`."""
        self.stop_ids = self._paths.teacher_stop_ids[group.name]
        self._use(group.model, self._paths.teacher_dirs[group.name], "teacher-sampler")

    def _use(self, model: ModelConfig, model_dir: str, label: str) -> None:
        for replica in self.replicas:
            self._remove(replica)
            ray.kill(replica.handle)
        self._model, self._model_dir, self._label = model, model_dir, label
        self.forget_weights()
        self._numbers = itertools.count()  # none of the old ones is left
        self.start()
        ready = [remote(handle, StudentSampler.ready) for handle in self.handles]
        self.supervisor.wait_for_start(ready, "samplers to load", interruptible=True)
        self.supervisor.watch(self.replicas)

    def forget_weights(self) -> None:
        """Samplers that come back get none until the next are published."""
        self.version, self.weights = 0, None

    def briefing(self, replica: Replica[StudentSampler]) -> list[Ref[Any]]:
        """Tell a new process whom it works with, and hand it the current weights."""
        told: list[Ref[Any]] = [] if self.wiring is None else [self.wiring(replica)]
        if self.weights is not None:
            told.append(remote(replica.handle, StudentSampler.load_weights)(self.weights))
        return told

    def load_weights(self, version: int, weights: Any) -> None:
        """Have every sampler hold these weights. No sampler may be at work."""
        self.version, self.weights = version, weights
        loaded = self.call(
            lambda _, sampler: remote(sampler, StudentSampler.load_weights)(weights), "weights to be published"
        )
        assert all(v == version for v in loaded), f"samplers hold versions {loaded}, published was {version}"

    def _make_sampler(self, name: str, options: Mapping[str, Any]) -> Handle[StudentSampler]:
        settings = SamplerSettings.from_config(
            self._config, self._model, self._model_dir, stop_ids=self.stop_ids,
            vocabulary=self._paths.vocabulary, max_model_len=self._paths.max_model_len,
        )  # fmt: skip
        return start(StudentSampler, options, name, settings, self._make_engine)
