"""The configuration: one frozen pydantic tree, read once, passed down in parts.

Every field states its unit and default. Unknown fields are refused. `load_config` turns a YAML file
and dotted overrides into a `Config`; every mistake becomes one `ConfigError` that names the field, the
value and what is allowed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kat_ray.termination import TerminationConfig
from kat_ray.termination.settings import KatSettings

Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of all sections: frozen, unknown fields refused, field docstrings become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where a run's records go and what seeds it."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run directory. `latest` is reserved."""
    dir: str = "runs"
    """Folder that holds run directories; a relative path is relative to the working directory."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds data order, sampling, probes and the learner."""
    steps: int = Field(100, ge=1)
    """Number of optimiser steps."""
    overwrite: bool = False
    """Replace an existing run directory of this name; otherwise a number is appended to the name."""
    tensorboard: bool = True
    """Also write metrics as TensorBoard events."""
    trace_features: bool = True
    """Record, beside the KL of every scored token, the teacher's top token and the health features: about
    14 bytes a token before compression. The report's pictures of phases need them."""
    profile: bool = False
    """Write timeline.json, a Chrome trace of what every actor did in each step."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints in Hugging Face format; 0 writes only the last one."""

    @model_validator(mode="after")
    def _not_latest(self) -> RunConfig:
        if self.name == "latest":
            raise ValueError("name = 'latest': this name is reserved for the link to the newest run")
        return self


class ModelConfig(Section):
    """One causal language model: a Hugging Face directory or hub id."""

    path: str = Field(min_length=1)
    """Directory with config.json and safetensors, or a hub id. A directory is taken when it exists;
    `demo:student` and `demo:teacher` name the embedded models."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the default branch."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights while sampling and scoring."""
    trust_remote_code: bool = False
    """Run Python code that the model directory brings. Off: such models are refused."""
    allow_pickle: bool = False
    """Accept weights that are not safetensors (pickle can run code). Off: they are refused."""


class DataConfig(Section):
    """Prompts of one split."""

    path: str = Field(min_length=1)
    """A .jsonl or .parquet file, a Hugging Face data set id, or `demo:train` / `demo:heldout`."""
    split: str = "train"
    """Split of a Hugging Face data set; not used for files."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages with `chat_template`."""
    answer_column: str | None = "answer"
    """Column with the gold answer; null where answers are not graded."""
    chat_template: bool = False
    """Apply the student tokenizer's chat template (with a generation prompt)."""
    system_prompt: str | None = None
    """System message put before a string prompt; needs `chat_template`."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts; null uses all."""
    too_long: Literal["skip", "refuse"] = "skip"
    """A prompt longer than the model takes is skipped and counted, or the run is refused."""
    shuffle: bool = True
    """Shuffle each epoch with `run.seed`; off keeps the file's order."""

    @model_validator(mode="after")
    def _system_needs_template(self) -> DataConfig:
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("system_prompt: needs chat_template = true")
        return self


class RolloutConfig(Section):
    """What is sampled in a step."""

    prompts_per_step: int = Field(32, ge=1)
    """Prompts of one optimiser step."""
    rollouts_per_prompt: int = Field(1, ge=1)
    """Rollouts of each prompt."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens after which a rollout is ended by the engine."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. KL always uses the unfiltered distributions at temperature 1."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling; 1 samples from the whole distribution."""
    top_k_logprobs: int = Field(64, ge=1)
    """Student tokens whose log-probabilities enter the KL; the rest is one tail event."""
    chunk_tokens: int = Field(16, ge=1)
    """Engine steps between two chunks to the scorers: small reacts sooner, large costs less."""
    max_chunks_ahead: int = Field(2, ge=1)
    """Chunks a sampler may have at each scorer without an answer before it waits; bounds overshoot."""
    staleness: Literal[0, 1] = 0
    """0 samples each step from the weights that the step before it produced. 1 samples it while that step is
    still learnt, from weights one version older; the KL that is learnt from is the newest student's either way."""
    eos: Literal["raw", "merged", "mask"] = "merged"
    """Stop ids in the KL: `merged` sums the stop ids of both models into one event on both sides,
    `raw` compares them id by id, `mask` leaves them out and renormalises."""

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of one optimiser step."""
        return self.prompts_per_step * self.rollouts_per_prompt


class PlacementConfig(Section):
    """What one replica of a role asks of the cluster."""

    num_cpus: float = Field(1.0, ge=0)
    """CPUs a replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs a replica reserves in Ray."""
    threads: int = Field(1, ge=1)
    """Threads of a replica's CPU arithmetic."""


class SamplerConfig(PlacementConfig):
    """Student samplers: vLLM engines."""

    replicas: int = Field(1, ge=1)
    """Number of samplers; the rollouts of a step are dealt out evenly."""
    max_num_seqs: int = Field(256, ge=1)
    """Rollouts an engine generates at the same time."""
    max_num_batched_tokens: int = Field(8192, ge=64)
    """Tokens an engine runs in one step, prompts included."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine. Not run on a GPU by this project's tests."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes; not used on a CPU."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of an engine on a CPU, GiB; not used on a GPU."""
    enforce_eager: bool = True
    """Run without graph capture or compilation; on a GPU, false is faster after a longer start."""

    @model_validator(mode="after")
    def _batch_holds_seqs(self) -> SamplerConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:  # vLLM refuses to start
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens}: must be >= "
                f"max_num_seqs = {self.max_num_seqs}, one token of each running rollout"
            )
        return self


class ScorerConfig(PlacementConfig):
    """Teacher scorers."""

    replicas: int = Field(1, ge=1)
    """Number of scorers; a rollout stays with one of them."""
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` takes vLLM where its V2 runner is available (a GPU), transformers elsewhere."""
    max_batch_tokens: int = Field(4096, ge=16)
    """Tokens, padding included, that one teacher forward takes."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes (backend vllm)."""


class MonitorConfig(Section):
    """Trap monitors."""

    shards: int = Field(1, ge=1)
    """Monitors that share the samplers' rollouts under one calibration; results do not depend on it.
    One suffices up to some hundred GPUs (docs/scaling.md)."""


class LearnerConfig(PlacementConfig):
    """The student's trainer: DeepSpeed, one actor per rank."""

    world_size: int = Field(1, ge=1)
    """Number of ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the forward and backward pass; the optimiser keeps fp32 master weights."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps with linear warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW betas."""
    clip: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    micro_batch_tokens: int = Field(16384, ge=16)
    """Tokens of one micro-batch, prompt and padding included."""
    logits_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose vocabulary log-softmax exists at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


class EvaluationConfig(Section):
    """avg@k and pass@k on held-out problems, through the same samplers."""

    data: DataConfig | None = None
    """Held-out problems; null switches evaluation off."""
    verifier: Literal["integer", "math"] = "integer"
    """`integer`: the last `answer N` or integer of the text, exactly; `math`: math-verify (LaTeX)."""
    k: int = Field(4, ge=1)
    """Samples per problem."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates only before and after."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of an answer; null takes `rollout.max_tokens`."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    teacher: bool = True
    """Also evaluate the teacher before training: a wrong template or grader shows there."""

    @model_validator(mode="after")
    def _answers_are_graded(self) -> EvaluationConfig:
        if self.data is not None and self.data.answer_column is None:
            raise ValueError("data.answer_column = null: held-out problems need a column with the gold answer")
        return self


class ClusterConfig(Section):
    """How Ray is reached."""

    address: str | None = None
    """Ray address (`auto` joins the cluster of this machine or job); null starts a local one, unless
    the environment names one in RAY_ADDRESS."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a local Ray; null takes what the roles ask for, at least the machine's cores."""
    object_store_gib: float | None = Field(None, gt=0)
    """Object store of a local Ray, GiB; null lets Ray choose."""
    placement_timeout: float = Field(120.0, gt=0)
    """Seconds to wait until all actors are placed and their models loaded past which the missing
    resource is named."""
    start_timeout: float = Field(900.0, gt=0)
    """Seconds that loading models and starting DeepSpeed may take."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray (on loopback)."""


class Config(Section):
    """The whole configuration of a training run."""

    run: RunConfig = RunConfig()
    student: ModelConfig
    teacher: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    termination: TerminationConfig = KatSettings()
    sampler: SamplerConfig = SamplerConfig()
    scorer: ScorerConfig = ScorerConfig()
    monitor: MonitorConfig = MonitorConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _work_for_every_rank(self) -> Config:
        if self.learner.world_size > self.rollout.rollouts_per_step:
            raise ValueError(
                f"learner.world_size = {self.learner.world_size}: must be <= {self.rollout.rollouts_per_step}, the "
                "rollouts of a step (rollout.prompts_per_step x rollout.rollouts_per_prompt)"
            )
        return self

    @model_validator(mode="after")
    def _work_for_every_monitor(self) -> Config:
        if self.monitor.shards > self.sampler.replicas:
            raise ValueError(
                f"monitor.shards = {self.monitor.shards}: must be <= sampler.replicas = {self.sampler.replicas}; "
                "a sampler's rollouts belong to one monitor"
            )
        return self

    @property
    def eval_max_tokens(self) -> int:
        """Tokens of an evaluation answer."""
        return self.evaluation.max_tokens or self.rollout.max_tokens
