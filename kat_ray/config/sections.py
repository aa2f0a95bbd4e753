"""The configuration: one frozen pydantic tree, read once, passed down in parts.

Every field states its unit and default. Unknown fields are refused. `load_config` turns a YAML file
and dotted overrides into a `Config`; every mistake becomes one `ConfigError` that names the field, the
value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import (
    ClusterConfig,
    LearnerConfig,
    MonitorConfig,
    PoolsConfig,
    Resumable,
    SamplerConfig,
    ScorerConfig,
    Section,
)
from kat_ray.config.cross_checks import CHECKS
from kat_ray.config.data import DataConfig, EvaluationConfig
from kat_ray.config.environment import EnvironmentConfig
from kat_ray.config.guards import GuardsConfig
from kat_ray.config.local_paths import LocalPath, RunPath
from kat_ray.config.numerics import NumericsConfig
from kat_ray.config.objective import ObjectiveConfig
from kat_ray.config.reward import RewardConfig
from kat_ray.config.teachers import (
    ModelConfig,
    NamedTeacherConfig,
    ScorerGroup,
    TeacherConfig,
    average_decay_of,
    groups_of,
    with_common_scorer,
)
from kat_ray.config.tracking import TrackerName, TrackingConfig
from kat_ray.rewards.extraction import Reading
from kat_ray.termination import TerminationConfig
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import DEFAULT_TEACHER


class RunConfig(Section):
    """Where a run's records go and what seeds it."""

    name: Resumable[str] = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run directory. `latest` is reserved."""
    dir: Resumable[RunPath] = "runs"
    """Folder that holds run directories; a relative path is relative to the working directory. Or a bucket:
    s3://BUCKET/FOLDER, gs:// or az:// (docs/recovery.md, A run in a bucket)."""
    local_dir: Resumable[LocalPath | None] = None
    """Of a run in a bucket: the folder of each node that holds what is not uploaded yet, and what was downloaded;
    null: one of the user's below the system's temporary folder."""
    store_timeout: Resumable[float] = Field(300.0, gt=0)
    """Of a run in a bucket: seconds for which a request is tried again while the store gives no good answer; then
    the run ends, and what is whole in the bucket stays."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds data order, sampling, probes and the learner."""
    steps: Resumable[int] = Field(100, ge=1)
    """Number of optimiser steps."""
    overwrite: Resumable[bool] = False
    """Replace an existing run directory of this name; otherwise a number is appended to the name."""
    tensorboard: Resumable[bool] = True
    """false leaves TensorBoard out of `tracking`; the older way to say it."""
    trace_features: bool = True
    """Record, beside the KL of every scored token, the teacher's top token and the health features: about
    14 bytes a token before compression. The report's pictures of phases need them."""
    learner_logprobs: bool = False
    """With rewards: record the learner's log-probabilities of the sampled tokens beside the sampler's, 4 bytes a
    token, of which `kat-ray replay --objective` shows the ratio. Traces are then written after a step is learnt."""
    deterministic: bool = False
    """Decisions of the rule take hold at fixed tokens instead of as soon as they arrive: on the same machine,
    without a GPU, the same command then gives the same bits. Costs waiting and overshoot; needs rollout.staleness =
    0."""
    check_agreement: Resumable[bool] = True
    """Before the first step, also of a resumed run, check that samplers, learner and scorers give the
    log-probabilities of plain forward passes of the two models; a run whose engines disagree ends
    (docs/numbers.md). Takes seconds, and more where prompts are long on a CPU."""
    profile: Resumable[bool] = False
    """Write timeline.json, a Chrome trace of what every actor did in each step."""
    grace_seconds: Resumable[float] = Field(60.0, gt=0)
    """Seconds in which a run that is told to end (SIGTERM, Ctrl-C) finishes what cannot be interrupted and writes a
    checkpoint."""
    resume: Resumable[Literal["auto", "never"]] = "auto"
    """`auto`: inside a Ray job, an unfinished run of the same name and configuration is resumed, as after a
    retry of the job; elsewhere, and with `never`, a run is always a new one unless `--resume` names it."""
    checkpoint_every: Resumable[int] = Field(10, ge=0)
    """Steps between checkpoints, each with all that a resume needs; 0 writes only the last one."""
    keep_checkpoints: Resumable[int] = Field(3, ge=1)
    """Checkpoints that are kept, the newest ones; older ones are removed when the next is complete."""
    keep_best: Resumable[bool] = True
    """Also keep the checkpoint with the highest eval/avg_at_k."""

    @model_validator(mode="after")
    def _not_latest(self) -> RunConfig:
        if self.name == "latest":
            raise ValueError("name = 'latest': this name is reserved for the link to the newest run")
        return self


class RolloutConfig(Section):
    """What is sampled in a step."""

    prompts_per_step: int = Field(32, ge=1)
    """Prompts of one optimiser step."""
    rollouts_per_prompt: int = Field(1, ge=1)
    """Rollouts of each prompt."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens after which a rollout is ended by the engine."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature; vLLM takes none above 2. KL always uses the unfiltered distributions at temperature
    1."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling; 1 samples from the whole distribution."""
    top_k_logprobs: int = Field(64, ge=1)
    """Student tokens whose log-probabilities enter the KL; the rest is one tail event."""
    chunk_tokens: int = Field(16, ge=1)
    """Engine steps between two chunks to the scorers: small reacts sooner, large costs less."""
    max_chunks_ahead: Resumable[int] = Field(2, ge=1)
    """Chunks a sampler may have at each scorer without an answer before it waits; bounds overshoot."""
    staleness: Literal[0, 1] = 0
    """0 samples each step from the weights that the step before it produced. 1 samples it while that step is
    still learnt, from weights one version older; the KL that is learnt from is the newest student's either way."""
    eos: Literal["raw", "merged", "mask"] = "merged"
    """Stop ids in the KL: `merged` sums the stop ids of both models into one event on both sides,
    `raw` compares them id by id, `mask` leaves them out and renormalises. Each of them ends a rollout."""

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of one optimiser step."""
        return self.prompts_per_step * self.rollouts_per_prompt


class Config(Section):
    """The whole configuration of a training run. What two sections have to agree on is in `cross_checks`."""

    run: RunConfig = RunConfig()
    student: ModelConfig
    teacher: TeacherConfig | None = None
    """May be left out, and is not read, where neither loss nor rule has a use for it: objective.opd.weight = 0 and
    termination.rule = none. Beside `teachers` it is optional, and scores the rollouts of rows that name nobody."""
    teachers: dict[str, NamedTeacherConfig] = Field({})
    """Teachers by name, for prompts that name one in `data.teacher_column` (docs/teachers.md)."""
    data: DataConfig
    environment: EnvironmentConfig | None = None
    """May be left out: only data that is named environment:... needs it."""
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    termination: TerminationConfig = KatSettings()
    sampler: Resumable[SamplerConfig] = SamplerConfig()
    scorer: Resumable[ScorerConfig] = ScorerConfig()
    monitor: Resumable[MonitorConfig] = MonitorConfig()
    pools: Resumable[PoolsConfig] = PoolsConfig()
    learner: LearnerConfig = LearnerConfig()
    numerics: NumericsConfig = NumericsConfig()
    guards: Resumable[GuardsConfig] = GuardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: Resumable[ClusterConfig] = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _scorers_of_named_teachers(cls, tree: Any) -> Any:
        return with_common_scorer(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        for check in CHECKS:
            check(self)
        return self

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name, whether or not anybody asks them; that of the section `teacher` first."""
        own = {} if self.teacher is None else {DEFAULT_TEACHER: self.teacher}
        return {**own, **self.teachers}

    @property
    def used_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that rollouts are scored by; none where neither loss nor rule asks one."""
        asks = self.objective.opd.weight > 0 or self.termination.rule != "none"
        return self.all_teachers if asks else {}

    @property
    def teacher_contexts(self) -> dict[str, str | None]:
        """What each teacher that is asked is told in place of the prompt, by its name.

        With a template of its own it is told the prompt, rendered as it knows it.
        """
        return {
            name: teacher.context or ("{prompt}" if teacher.chat_template == "own" else None)
            for name, teacher in self.used_teachers.items()
        }

    @property
    def own_templates(self) -> tuple[str, ...]:
        """The names of the teachers that are given chats by a template of their own."""
        return tuple(name for name, teacher in self.used_teachers.items() if teacher.chat_template == "own")

    @property
    def average_decay(self) -> float | None:
        """Of the student's average that some teacher has; None where none has it."""
        return average_decay_of(self.used_teachers)

    @property
    def scorer_groups(self) -> tuple[ScorerGroup, ...]:
        """The teachers that rollouts are scored by, those of one checkpoint together."""
        return groups_of(self.used_teachers, self.scorer)

    @property
    def reading(self) -> Reading:
        """Where an environment's answer stands in a text."""
        return "stated" if self.environment is None else self.environment.answer

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """Where metrics go beside the run's own records."""
        return tuple(name for name in self.tracking.to if name != "tensorboard" or self.run.tensorboard)

    @property
    def compared_tokens(self) -> int:
        """Student tokens whose log-probabilities enter a KL; 0 where there is no teacher to compare them with."""
        return self.rollout.top_k_logprobs if self.used_teachers else 0

    @property
    def eval_max_tokens(self) -> int:
        """Tokens of an evaluation answer."""
        return self.evaluation.max_tokens or self.rollout.max_tokens
