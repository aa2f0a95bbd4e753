"""The settings of a sampler. They import no torch, which a process with a stub engine does not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kat_ray.config import ClusterConfig, Config, LoraConfig, ModelConfig, RolloutConfig, SamplerConfig


@dataclass(frozen=True)
class ScoredBy:
    """Which group's scorers a rollout goes to, and the tokens of a block of their prefix caches."""

    group: str
    cache_block: int


@dataclass(frozen=True)
class SamplerSettings:
    """The same for all samplers that hold one model: the student, or the teacher while it is evaluated."""

    model: ModelConfig
    model_dir: str  # where its files are: a directory, or a hub id
    stop_ids: tuple[int, ...]  # those that end a rollout
    vocabulary: int  # the student's
    max_model_len: int  # longest prompt and answer together
    sampler: SamplerConfig
    rollout: RolloutConfig
    cluster: ClusterConfig
    deterministic: bool
    seed: int
    scored_by: Mapping[str, ScoredBy] = field(default_factory=dict)  # of the rollouts of each teacher, by its name
    fp32_output: bool = False  # `numerics.fp32_output_layer`
    record_logprobs: bool = False  # every rollout comes with the log-probabilities of its tokens
    lora: LoraConfig | None = None  # of adapters, which are published then, and not the whole model

    @classmethod
    def from_config(
        cls,
        config: Config,
        model: ModelConfig,
        model_dir: str,
        *,
        stop_ids: Sequence[int],
        vocabulary: int,
        max_model_len: int,
    ) -> SamplerSettings:
        return cls(
            model=model,
            model_dir=model_dir,
            stop_ids=tuple(stop_ids),
            vocabulary=vocabulary,
            max_model_len=max_model_len,
            sampler=config.sampler,
            rollout=config.rollout,
            cluster=config.cluster,
            deterministic=config.run.deterministic,
            seed=config.run.seed,
            scored_by={
                name: ScoredBy(group.name, group.chunk_block)
                for group in config.scorer_groups
                for name in group.teachers
            },
            fp32_output=config.numerics.fp32_output_layer,
            record_logprobs=config.objective.rl.weight > 0,
            lora=config.learner.published_adapters if model == config.student else None,
        )
