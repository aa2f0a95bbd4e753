"""What a learner rank is told of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kat_ray.config import Config, LearnerConfig, ModelConfig, ObjectiveConfig
from kat_ray.losses.eos import EosMode
from kat_ray.run.checkpoint_parts import CheckpointParts


@dataclass(frozen=True)
class LearnerSettings:
    """The same for all ranks of a learner."""

    learner: LearnerConfig
    student: ModelConfig
    student_dir: str  # where the student's files are: a directory, or a hub id
    stop_ids: tuple[int, ...]  # of all models
    eos: EosMode
    top_k: int  # `Config.compared_tokens`: 0 without a teacher
    seed: int
    steps: int  # of the whole run: the learning rate goes by them
    objective: ObjectiveConfig
    max_model_len: int | None = None  # longest prompt and answer together
    fp32_output: bool = False  # `numerics.fp32_output_layer`: of the plain pass; the loss has it in any case
    record_logprobs: bool = False  # `run.learner_logprobs`
    average_decay: float | None = None  # of the average that a teacher has; None: none is kept
    parts: CheckpointParts = field(
        default_factory=CheckpointParts
    )  # how checkpoints are written and read on this rank's node

    @classmethod
    def from_config(
        cls, config: Config, student_dir: str, stop_ids: Sequence[int], max_model_len: int | None = None
    ) -> LearnerSettings:
        """The sections of `config` that concern a rank."""
        return cls(
            learner=config.learner,
            student=config.student,
            student_dir=student_dir,
            stop_ids=tuple(stop_ids),
            eos=config.rollout.eos,
            top_k=config.compared_tokens,
            seed=config.run.seed,
            steps=config.run.steps,
            max_model_len=max_model_len,
            fp32_output=config.numerics.fp32_output_layer,
            record_logprobs=config.run.learner_logprobs,
            objective=config.objective,
            average_decay=config.average_decay,
            parts=CheckpointParts(config.run.local_dir, config.run.store_timeout),
        )
