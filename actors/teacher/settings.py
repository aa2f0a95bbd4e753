"""The settings of a scorer. They import no torch, like those of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kat_ray.config import Config, ModelConfig, RolloutConfig, ScorerConfig, ScorerGroup, TeacherConfig
from kat_ray.termination import RULES


@dataclass(frozen=True)
class ScorerSettings:
    """The same for all scorers of a group."""

    teacher: ModelConfig
    teacher_dir: str  # where the teacher's files are: a directory, or a hub id
    stop_ids: tuple[int, ...]  # of both models
    max_model_len: int  # longest prompt and answer together
    scorer: ScorerConfig
    rollout: RolloutConfig
    student_vocabulary: int = 0  # ids that chunks may hold; 0: those of the teacher
    fp32_output: bool = False  # `numerics.fp32_output_layer`
    top_needed: bool = False  # the rule cannot do without the teacher's most likely ids
    follows_student: bool = False  # it is given the student's weights
    temperature: float = 1.0  # `objective.opd.teacher_temperature`, of the rows that the learner gets
    own_support: bool = False  # `objective.opd.support` is the teacher's top k, also of what was generated
    section: str = "teacher"  # where the configuration names the model
    replica: int = 0  # the number of the scorer among those of its group

    @property
    def remote(self) -> TeacherConfig | None:
        """How the server that has the teacher is asked; None where scorers load it."""
        teacher = self.teacher
        return teacher if isinstance(teacher, TeacherConfig) and teacher.is_remote else None

    @property
    def model_name(self) -> str:
        """The teacher in messages: its field and value."""
        return f"{self.section}.path = {self.teacher.path!r}"

    @classmethod
    def from_config(
        cls,
        config: Config,
        teacher_dir: str,
        stop_ids: Sequence[int],
        max_model_len: int,
        student_vocabulary: int = 0,
        group: ScorerGroup | None = None,
    ) -> ScorerSettings:
        """The settings of a group of scorers; None: of the run's only one."""
        if group is None:
            assert config.scorer_groups, "nobody asks a teacher in this run"
            (group,) = config.scorer_groups
        return cls(
            teacher=group.model,
            teacher_dir=teacher_dir,
            stop_ids=tuple(stop_ids),
            max_model_len=max_model_len,
            scorer=group.scorer,
            rollout=config.rollout,
            student_vocabulary=student_vocabulary,
            fp32_output=config.numerics.fp32_output_layer,
            top_needed=bool({"overlap", "teacher_max"} & {*RULES[config.termination.rule].needs}),
            own_support=config.objective.opd.support == "teacher",
            temperature=config.objective.opd.teacher_temperature,
            section=group.section,
            follows_student=group.follows_student,
        )
