"""The settings of a scorer. They import no torch, like those of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kat_ray.config import Config, ModelConfig, RolloutConfig, ScorerConfig
from kat_ray.termination import RULES


@dataclass(frozen=True)
class ScorerSettings:
    """The same for all scorers."""

    teacher: ModelConfig
    teacher_dir: str  # where the teacher's files are: a directory, or a hub id
    stop_ids: tuple[int, ...]  # of both models
    max_model_len: int  # longest prompt and answer together
    scorer: ScorerConfig
    rollout: RolloutConfig
    student_vocabulary: int = 0  # ids that chunks may hold; 0: those of the teacher
    fp32_output: bool = False  # `numerics.fp32_output_layer`
    top_needed: bool = False  # the rule cannot do without the teacher's most likely ids

    @classmethod
    def from_config(
        cls,
        config: Config,
        teacher_dir: str,
        stop_ids: Sequence[int],
        max_model_len: int,
        student_vocabulary: int = 0,
    ) -> ScorerSettings:
        assert config.used_teacher is not None, "nobody asks a teacher in this run"
        return cls(
            teacher=config.used_teacher,
            teacher_dir=teacher_dir,
            stop_ids=tuple(stop_ids),
            max_model_len=max_model_len,
            scorer=config.scorer,
            rollout=config.rollout,
            student_vocabulary=student_vocabulary,
            fp32_output=config.numerics.fp32_output_layer,
            top_needed=bool({"overlap", "teacher_max"} & {*RULES[config.termination.rule].needs}),
        )
