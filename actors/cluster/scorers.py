"""The scorers of one checkpoint; where that is the student itself, they hold its weights as samplers do."""

from __future__ import annotations

from typing import Any

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Handle, Ref, remote
from actors.cluster.placement import Placement
from actors.cluster.replica import Replica, start
from actors.cluster.supervisor import Supervisor
from actors.teacher.scorer import TeacherMaker, TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.config import ScorerGroup as GroupConfig


class ScorerActors(ActorGroup[TeacherScorer]):
    """Scorers, and which of the student's weights they hold, if they follow it."""

    def __init__(
        self,
        group: GroupConfig,
        settings: ScorerSettings,
        supervisor: Supervisor,
        placement: Placement,
        make_teacher: TeacherMaker,
    ) -> None:
        def make(name: str, options: dict[str, Any]) -> Handle[TeacherScorer]:
            return start(TeacherScorer, options, name, settings, make_teacher)

        super().__init__(group.role, supervisor, placement, make, group.scorer.bounds[0])
        self.kind = group.model.weights  # of the student's weights, or `given`
        self.follows_student = group.follows_student
        self.version = 0
        self.weights: Any = None  # reference to those of this version; None: as the model was given

    def briefing(self, replica: Replica[TeacherScorer]) -> list[Ref[Any]]:
        """Tell a new process which of the student's weights it has to hold, if any."""
        if not self.follows_student:
            return []
        return [remote(replica.handle, TeacherScorer.follow)(self.version, self.weights)]

    def forget_weights(self) -> None:
        """Scorers that come back get none until the next are published."""
        self.version, self.weights = 0, None

    def follow(self, version: int, weights: Any) -> None:
        """Have every scorer of a group that follows the student hold these weights. No rollout may be scored."""
        self.version, self.weights = version, weights
        self.call(
            lambda _, scorer: remote(scorer, TeacherScorer.follow)(version, weights), "weights to reach the scorers"
        )
