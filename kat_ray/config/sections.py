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
    PoolConfig,
    PoolsConfig,
    Resumable,
    SamplerConfig,
    ScorerConfig,
    Section,
)
from kat_ray.config.data import DataConfig, EvaluationConfig
from kat_ray.config.environment import EnvironmentConfig, check_environment, is_environment
from kat_ray.config.guards import GuardsConfig
from kat_ray.config.local_paths import LocalPath, RunPath
from kat_ray.config.numerics import NumericsConfig
from kat_ray.config.objective import ObjectiveConfig
from kat_ray.config.off_policy import check_off_policy
from kat_ray.config.reward import RewardConfig
from kat_ray.config.teachers import (
    ModelConfig,
    NamedTeacherConfig,
    ScorerGroup,
    TeacherConfig,
    average_decay_of,
    check_column,
    check_names,
    check_servers,
    check_student_as_teacher,
    groups_of,
    with_common_scorer,
)
from kat_ray.config.tracking import TrackerName, TrackingConfig
from kat_ray.rewards.extraction import Reading
from kat_ray.termination import RULES, TerminationConfig
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import DEFAULT_TEACHER

# Features of tokens (`NewTokens`) that vLLM's scores of given ids do not contain.
_NOT_FROM_VLLM = ("teacher_entropy",)


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
    """The whole configuration of a training run. Long, since what two sections have to agree on is checked here."""

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
    def _teacher_where_it_is_needed(self) -> Config:
        check_names(self.teachers)
        weight, rule = self.objective.opd.weight, self.termination.rule
        needs = [f"objective.opd.weight = {weight:g}"] * bool(weight)
        needs += [f"termination.rule = {rule!r}"] * (rule != "none")
        if needs and self.teacher is None and not self.teachers:
            who = " and ".join(needs)
            raise ValueError(
                f"teacher is missing: {who} need{'s' * (len(needs) == 1)} one; name it with teacher.path. Rewards "
                "alone need none: objective.opd.weight = 0 with termination.rule = none"
            )
        for name, data in (("data", self.data), ("evaluation.data", self.evaluation.data)):
            if data is None or data.chat_template != "teacher":
                continue
            if not needs:
                raise ValueError(
                    f"{name}.chat_template = 'teacher': no teacher is read with objective.opd.weight = 0 and "
                    "termination.rule = 'none'; use student, or the path of a template"
                )
            if self.teacher is None:
                raise ValueError(
                    f"{name}.chat_template = 'teacher': is that of the section `teacher`, and there is none; use "
                    "student, or the path of a template"
                )
        return self

    @model_validator(mode="after")
    def _teacher_renders_chats(self) -> Config:
        for name, teacher in self.all_teachers.items():
            if teacher.chat_template == "data":
                continue
            if name != DEFAULT_TEACHER:
                raise ValueError(
                    f"teachers.{name}.chat_template = 'own': is of the section `teacher` only; use data"
                )
            if self.data.chat_template in (False, "teacher"):
                raise ValueError(
                    "teacher.chat_template = 'own': needs data.chat_template = student, or the path of a template, "
                    "which the student has instead"
                )
        return self

    @model_validator(mode="after")
    def _prompts_name_their_teachers(self) -> Config:
        heldout = self.evaluation.data
        check_column(self.teachers, self.data.teacher_column, None if heldout is None else heldout.teacher_column)
        for group in groups_of(self.all_teachers, self.scorer):
            for name in group.teachers:
                check_student_as_teacher(
                    name, self.all_teachers[name], self.student, group.scorer, self.learner.lora
                )
        average_decay_of(self.all_teachers)
        check_servers(groups_of(self.all_teachers, self.scorer), self.cluster.hang_timeout)
        return self

    @model_validator(mode="after")
    def _environment_where_it_is_named(self) -> Config:
        evaluation = self.evaluation
        heldout = None if evaluation.data is None else evaluation.data.path
        check_environment(self.environment, evaluation.verifier, self.data.path, heldout)
        if not is_environment(self.data.path):
            return self
        if self.data.source_column is not None:
            raise ValueError(
                f"data.source_column = {self.data.source_column!r}: problems of the environment are told apart "
                "by their family; leave it out"
            )
        if self.environment is not None and self.environment.curriculum and not self.objective.rl.weight:
            raise ValueError(
                "environment.curriculum: needs objective.rl.weight > 0: without rewards not all rollouts are "
                "graded before the next step is sampled; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _work_for_every_rank(self) -> Config:
        if self.learner.world_size > self.rollout.rollouts_per_step:
            raise ValueError(
                f"learner.world_size = {self.learner.world_size}: must be <= {self.rollout.rollouts_per_step}, the "
                "rollouts of a step (rollout.prompts_per_step x rollout.rollouts_per_prompt)"
            )
        return self

    @model_validator(mode="after")
    def _deterministic_is_on_policy(self) -> Config:
        if self.run.deterministic and self.rollout.staleness:
            raise ValueError(
                "run.deterministic = true: needs rollout.staleness = 0; sampling ahead races with the learner"
            )
        pools: dict[str, PoolConfig] = {"samplers": self.sampler}
        for group in self.scorer_groups:
            words = "scorers" if group.name == DEFAULT_TEACHER else f"scorers of {group.section}"
            pools[words] = group.scorer
        elastic = [name for name, pool in pools.items() if len({*pool.bounds}) > 1]
        if self.run.deterministic and elastic:
            raise ValueError(
                f"run.deterministic = true: needs a fixed number of {' and '.join(elastic)}; leave min_replicas "
                "and max_replicas out"
            )
        return self

    @model_validator(mode="after")
    def _rewards_can_teach(self) -> Config:
        if not self.objective.rl.weight:
            if self.run.learner_logprobs:
                raise ValueError("run.learner_logprobs = true: needs objective.rl.weight > 0, as the sampler's do")
            return self
        rollout, needs = self.rollout, f"objective.rl.weight = {self.objective.rl.weight:g}: needs "
        if rollout.rollouts_per_prompt < 2:
            raise ValueError(
                f"{needs}rollout.rollouts_per_prompt >= 2 (it is 1): a reward is held against those of the other "
                "rollouts of its prompt; 8 are usual"
            )
        for name, value in (("temperature", rollout.temperature), ("top_p", rollout.top_p)):
            if value != 1:
                raise ValueError(
                    f"{needs}rollout.{name} = 1 (it is {value:g}): the policy that samples would be another one "
                    "than the policy whose probabilities the loss takes, and no metric would show it"
                )
        rl = self.objective.rl
        if rollout.staleness and rl.loss == "reinforce" and rl.correction == "none":
            raise ValueError(
                f"{needs}a ratio of learner to sampler with rollout.staleness = 1: objective.rl.loss = 'clip', "
                "'cispo' or 'gspo', or objective.rl.correction = 'truncate'"
            )
        if rl.overlong.buffer > rollout.max_tokens:
            raise ValueError(
                f"objective.rl.overlong.buffer = {rl.overlong.buffer}: must be <= rollout.max_tokens = "
                f"{rollout.max_tokens}, whose last tokens it is"
            )
        if rl.max_num_gen_batches > 1 and self.objective.opd.weight:
            raise ValueError(
                f"objective.rl.max_num_gen_batches = {rl.max_num_gen_batches}: needs objective.opd.weight = 0 (it "
                f"is {self.objective.opd.weight:g}): where a teacher teaches, groups of one reward have their KL, "
                "and no other prompts are needed for them; set one of the two"
            )
        self._check_reward(needs)
        share = getattr(self.termination, "probe_share", 0.0)
        if rl.cut_reward == "probe_weighted" and len(self.used_teachers) > 1 and self._probes_vary:
            raise ValueError(
                f"objective.rl.cut_reward = {rl.cut_reward!r}: with termination.budget each teacher has a share of "
                "probes of its own, and a rollout would be weighed by another's; use 'failure' or 'probe_mean', or "
                "termination.budget = null"
            )
        if rl.cut_reward.startswith("probe") and self.termination.rule != "none" and not share:
            raise ValueError(f"objective.rl.cut_reward = {rl.cut_reward!r}: needs termination.probe_share > 0")
        return self

    @property
    def _probes_vary(self) -> bool:
        """Whether the rule may ask for fewer probes than `termination.probe_share`."""
        return getattr(self.termination, "budget", None) is not None

    def _check_reward(self, needs: str) -> None:
        """What grades rollouts has what it needs."""
        verifiers, own = self.reward.verifiers, self.evaluation.verifier
        if self.data.answer_column is None and (verifiers or not self.reward.functions):
            raise ValueError(
                f"{needs}gold answers to grade rollouts by: name a column with data.answer_column, or functions of "
                "your own with reward.functions"
            )
        if verifiers and verifiers != [own]:
            raise ValueError(
                f"reward.functions: {' and '.join(verifiers)}: must be {own}, as evaluation.verifier is; an answer "
                "is judged in one way"
            )

    @model_validator(mode="after")
    def _work_for_every_monitor(self) -> Config:
        samplers = self.sampler.bounds[0]
        if self.monitor.shards > samplers:
            raise ValueError(
                f"monitor.shards = {self.monitor.shards}: must be <= {samplers}, the fewest samplers; "
                "a sampler's rollouts belong to one monitor"
            )
        return self

    @model_validator(mode="after")
    def _rule_gets_what_it_needs(self) -> Config:
        lacking = [name for name in RULES[self.termination.rule].needs if name in _NOT_FROM_VLLM]
        for group in self.scorer_groups if lacking else ():
            if group.engine == "vllm":
                raise ValueError(
                    f"termination.rule = {self.termination.rule!r}: it needs {', '.join(lacking)} of every token, "
                    f"which a teacher on vLLM does not report; set {group.scorer_section}.backend = "
                    "'transformers', or take another rule"
                )
        return self

    @model_validator(mode="after")
    def _completions_are_there(self) -> Config:
        heldout = self.evaluation.data
        check_off_policy(
            self.objective.off_policy, self.rollout.prompts_per_step, self.data.completion_column,
            None if heldout is None else heldout.completion_column, bool(self.used_teachers),
            self.objective.rl.max_num_gen_batches if self.objective.rl.weight else 1,
        )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _teachers_give_what_is_learnt(self) -> Config:
        temperature = self.objective.opd.teacher_temperature
        self._check_servers(temperature)
        for group in self.scorer_groups if temperature != 1 else ():
            if group.scorer.engine == "vllm":
                raise ValueError(
                    f"objective.opd.teacher_temperature = {temperature:g}: takes the teacher's whole distribution, "
                    f"and vLLM gives log-probabilities of single ids at temperature 1; set "
                    f"{group.scorer_section}.backend = 'transformers', or leave the temperature at 1"
                )
        return self

    def _check_servers(self, temperature: float) -> None:
        """Teachers behind HTTP are asked for their log-probabilities at the student's ids, and at no others."""
        off_policy = self.objective.off_policy
        for what, asked in (
            (f"objective.opd.teacher_temperature = {temperature:g}", temperature != 1),
            ("objective.opd.support = 'teacher'", self.objective.opd.support == "teacher"),
            ("objective.off_policy.loss = 'distillation'", off_policy.share and off_policy.loss == "distillation"),
        ):
            for group in self.scorer_groups if asked else ():
                if group.model.is_remote:
                    raise ValueError(
                        f"{what}: needs a teacher that scorers load, and {group.section}.type = 'http'; a server "
                        "is asked about the student's own ids at temperature 1"
                    )

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
    def teacher_renders(self) -> bool:
        """Whether the teacher of the section `teacher` is given chats by its own template."""
        teacher = self.used_teachers.get(DEFAULT_TEACHER)
        return teacher is not None and teacher.chat_template == "own"

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
