"""The actors of a run in their groups, and what they know of one another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Actor, Handle, Ref, remote
from actors.cluster.learners import LearnerGroup
from actors.cluster.placement import Placement
from actors.cluster.replica import Replica, start
from actors.cluster.samplers import Engines, ModelPaths, SamplerGroup
from actors.cluster.scorers import ScorerActors
from actors.cluster.signals import StopRequest
from actors.cluster.supervisor import Supervisor
from actors.cluster.waiting import SLICE, LearnersLost
from actors.learner.learner import Learner
from actors.learner.settings import LearnerSettings
from actors.monitor.trap_monitor import TrapMonitor
from actors.sampler.student_sampler import StudentSampler
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.config import Config, ScorerGroup
from kat_ray.termination import RunFacts
from kat_ray.types.records import GenerateRequest


def shard_of(sampler: int, shards: int) -> int | None:
    """The monitor that all rollouts of the `sampler`-th sampler belong to; None where there are none."""
    return sampler % shards if shards else None


@dataclass
class RunActors:
    """Samplers send chunks to scorers and scores to their monitor; learners hand weights to samplers.

    Where no teacher is asked there are neither scorers nor monitors.
    """

    supervisor: Supervisor
    samplers: SamplerGroup
    teachers: Mapping[str, ScorerActors]  # scorers, by the name of their group
    monitors: ActorGroup[TrapMonitor]
    learners: LearnerGroup

    def __post_init__(self) -> None:
        self._loading: list[Ref[dict[str, Any]]] = []  # learners that begin

    @classmethod
    def make(
        cls, config: Config, paths: ModelPaths, placement: Placement, stop: StopRequest, engines: Engines
    ) -> RunActors:
        """Start the actors but for the samplers, which `samplers.use_student` starts."""
        supervisor = Supervisor(config.cluster, stop)
        facts = RunFacts(config.run.seed, config.rollout.max_tokens)
        ranks = LearnerSettings.from_config(config, paths.student_dir, paths.stop_ids, paths.max_model_len)

        def scorers(group: ScorerGroup) -> ScorerActors:
            settings = ScorerSettings.from_config(
                config, paths.teacher_dirs[group.name], paths.stop_ids, paths.scored_len, paths.vocabulary, group
            )

            return ScorerActors(group, settings, supervisor, placement, engines.scorer)

        def monitor(name: str, options: dict[str, Any]) -> Handle[TrapMonitor]:
            return start(TrapMonitor, options, config.termination, facts, tuple(config.used_teachers))

        def learner(name: str, options: dict[str, Any]) -> Handle[Learner]:
            return start(engines.learner, options, int(name.partition(":")[2]), ranks)

        actors = cls(
            supervisor,
            SamplerGroup(config, paths, supervisor, placement, engines.sampler),
            {group.name: scorers(group) for group in config.scorer_groups},
            ActorGroup("monitor", supervisor, placement, monitor),
            LearnerGroup("learner", supervisor, placement, learner),
        )
        first: list[ActorGroup[Any]] = [actors.monitors, actors.learners, *actors.teachers.values()]
        for group in first:
            group.start()
        return actors

    @property
    def groups(self) -> tuple[ActorGroup[Any], ...]:
        """All of them."""
        return self.samplers, *self.teachers.values(), self.monitors, self.learners

    @property
    def scorers(self) -> list[Handle[TeacherScorer]]:
        """The scorers of all teachers."""
        return [scorer for group in self.teachers.values() for scorer in group.handles]

    def by_name(self) -> dict[str, Handle[Actor]]:
        """All actors, as `sampler:0`."""
        return {replica.name: replica.handle for group in self.groups for replica in group.replicas}

    # --- before the first step --------------------------------------------------------------------------------

    def begin_loading(self) -> None:
        """Begin to load the models of scorers and learners."""
        self.supervisor.watch(self.learners.replicas)
        self._loading = self.learners.begin_start()
        for scorer in self.scorers:
            remote(scorer, TeacherScorer.ready)()

    def wait_until_ready(self) -> None:
        """Wait until every model is loaded, and wire samplers, scorers and monitors."""
        ready = [remote(scorer, TeacherScorer.ready) for scorer in self.scorers]
        self.supervisor.wait_for_start(ready, "scorers to load", interruptible=True)
        try:
            self.learners.wait(self._loading, "the learner to start", interruptible=True, limit="start_timeout")
        except LearnersLost as error:
            self.restart_learners(error)
        for group in self.teachers.values():
            if group.follows_student:
                group.follow(0, None)
        self.wire()
        self.supervisor.watch(replica for group in self.groups for replica in group.replicas)

    def wire(self) -> None:
        """Tell every sampler of its scorers and its monitor."""
        self.samplers.wiring = self._wire_one
        wired: tuple[Replica[StudentSampler], ...] = ()
        while wired != self.samplers.replicas:  # one that is lost meanwhile may be dropped: the others move up
            wired = self.samplers.replicas
            self.samplers.call(lambda _, sampler: self._wire(sampler), "samplers to be wired")

    def _wire_one(self, replica: Replica[StudentSampler]) -> Ref[None]:
        return self._wire(replica.handle)

    def _wire(self, sampler: Handle[StudentSampler]) -> Ref[None]:
        index, samplers = self.samplers.handles.index(sampler), len(self.samplers.replicas)
        monitors = self.monitors.handles
        shard = shard_of(index, len(monitors))
        return remote(sampler, StudentSampler.connect)(
            {name: group.handles for name, group in self.teachers.items()},
            None if shard is None else monitors[shard],
            index,
            samplers,
        )

    # --- weights ----------------------------------------------------------------------------------------------

    @property
    def teacher_weights(self) -> dict[str, Any]:
        """References to the weights of the groups that follow the student, by their names; None: as given."""
        return {name: group.weights for name, group in self.teachers.items() if group.follows_student}

    def publish(self, version: int) -> None:
        """Give samplers, and scorers whose teacher is the student, the learner's weights under this version."""
        weights = {"live": self.learners.weights(version)}
        if any(group.kind == "average" for group in self.teachers.values()):
            weights["average"] = self.learners.weights(version, average=True)
        try:
            self.samplers.load_weights(version, weights["live"])
            for group in self.teachers.values():
                if group.follows_student:
                    group.follow(version, weights[group.kind])
        except ObjectLostError as error:
            raise LearnersLost("the weights were lost with the node that held them") from error

    # --- when something is lost -------------------------------------------------------------------------------

    def abandon(self, request: GenerateRequest) -> None:
        """Have the scorers forget a request whose sampler was lost, before its rollouts are given out again."""
        ids = [spec.rollout_id for spec in request.specs]
        left = [remote(scorer, TeacherScorer.abandon)(request.attempt, ids) for scorer in self.scorers]
        limit = self.supervisor.limits.hang_timeout  # a scorer that is lost has forgotten it too
        deadline = time.monotonic() + limit
        while left and time.monotonic() < deadline:
            _, left = ray.wait(left, num_returns=len(left), timeout=min(SLICE, limit))
            self.supervisor.check(interruptible=True)

    def abandon_sampling(self) -> None:
        """End whatever the samplers are at, by ending them; they come back with the current weights."""
        for handle in self.samplers.handles:
            ray.kill(handle, no_restart=False)
        for replica in self.samplers.replicas:
            if not self.samplers.revive(replica):
                self.samplers.drop([replica])

    def restart_learners(self, error: LearnersLost) -> None:
        """A new group of ranks, which holds the student as it was given.

        The weights last published may be gone with the old one: who comes back is given none until the next are.
        """
        self.samplers.forget_weights()
        for group in self.teachers.values():
            group.forget_weights()
        self.learners.restart(error)
