"""What the roles ask of the cluster, and how it is reached: sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

T = TypeVar("T")

# A field, or a section with all its fields, that a resumed run may change: it says where and how a run is carried
# out, or how far it goes. The steps so far would have been the same under any other value.
Resumable = Annotated[T, Field(json_schema_extra={"resumable": True})]


def is_resumable(field: FieldInfo) -> bool:
    """Whether a field of a section is declared as `Resumable`."""
    extra: Any = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("resumable"))


class Section(BaseModel):
    """Base of all sections: frozen, unknown fields refused, field docstrings become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def changed_fields(section: Section) -> dict[str, Any]:
    """The fields of a section that do not have their defaults, with what they have.

    Of settings that have no effect these are refused; a run writes all fields, so defaults are given, too.
    """
    fields = type(section).model_fields
    return {name: value for name, value in section if value != fields[name].default}


class PlacementConfig(Section):
    """What one replica of a role asks of the cluster."""

    num_cpus: Resumable[float] = Field(1.0, ge=0)
    """CPUs a replica reserves in Ray."""
    num_gpus: Resumable[float] = Field(0.0, ge=0)
    """GPUs a replica reserves in Ray."""
    resources: Resumable[dict[str, Annotated[float, Field(gt=0)]]] = {}
    """Further resources that a replica reserves, by the names that the cluster's nodes give them."""
    labels: Resumable[dict[str, str]] = {}
    """Node labels that a replica needs, such as {ray.io/accelerator-type: H100}."""
    threads: Resumable[int | None] = Field(None, ge=1)
    """Threads of a replica's CPU arithmetic. null: on a Ray of its own the machine's cores (or OMP_NUM_THREADS),
    shared with the replicas that work at the same time: samplers and scorers; the learner's ranks with each other,
    and with rollout.staleness = 1 with all of them. On a cluster that is joined, and beside a GPU, `num_cpus`. One
    for a monitor, and for all with run.deterministic."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> PlacementConfig:
        if not (self.num_cpus or self.num_gpus or self.resources):
            raise ValueError("num_cpus = 0: needs num_gpus or resources; Ray places nothing that asks for nothing")
        return self


class PoolConfig(PlacementConfig):
    """A role whose number of replicas can change while a run goes on."""

    replicas: int = Field(1, ge=1)
    """Number at the start; the run begins when all of them are ready."""
    min_replicas: int | None = Field(None, ge=1)
    """Fewest replicas to shrink to; null keeps `replicas`."""
    max_replicas: int | None = Field(None, ge=1)
    """Most replicas to grow to; null keeps `replicas`."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        return self.min_replicas or self.replicas, self.max_replicas or self.replicas

    @model_validator(mode="after")
    def _replicas_within_bounds(self) -> PoolConfig:
        low, high = self.bounds
        if not low <= self.replicas <= high:
            raise ValueError(
                f"replicas = {self.replicas}: must be within min_replicas and max_replicas, {low} to {high}"
            )
        return self


class SamplerConfig(PoolConfig):
    """Student samplers: vLLM engines. The rollouts of a step are dealt out evenly."""

    max_num_seqs: int = Field(256, ge=1)
    """Rollouts an engine generates at the same time."""
    max_num_batched_tokens: int = Field(8192, ge=64)
    """Tokens an engine runs in one step, prompts included."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine, all of one node; without GPUs, processes that share an engine's work on the CPU. Not run
    on a GPU by this project's tests."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes; not used on a CPU."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of an engine on a CPU, GiB; not used on a GPU."""
    enforce_eager: bool | None = None
    """Run without graph capture or compilation; null does so on a CPU only. On a GPU an eager engine starts sooner
    and generates more slowly."""

    @property
    def eager(self) -> bool:
        """Whether engines run without graphs."""
        return not self.num_gpus if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _gpus_of_one_engine(self) -> SamplerConfig:
        if self.tensor_parallel_size > 1 and self.num_gpus not in (0, self.tensor_parallel_size):
            raise ValueError(
                f"tensor_parallel_size = {self.tensor_parallel_size}: needs num_gpus = "
                f"{self.tensor_parallel_size}, not {self.num_gpus:g}; an engine's GPUs are one replica's"
            )
        return self

    @model_validator(mode="after")
    def _batch_holds_seqs(self) -> SamplerConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:  # vLLM refuses to start
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens}: must be >= "
                f"max_num_seqs = {self.max_num_seqs}, one token of each running rollout"
            )
        return self


class ScorerConfig(PoolConfig):
    """Teacher scorers. A rollout stays with one of them."""

    backend: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` takes vLLM where scorers have GPUs (num_gpus), transformers elsewhere."""
    max_batch_tokens: int = Field(4096, ge=16)
    """Tokens, padding included, that one teacher forward takes."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes (backend vllm)."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one teacher (backend vllm), all of one node. Not run on a GPU by this project's tests."""
    cache_block: int = Field(16, ge=1)
    """Tokens of a block of vLLM's prefix cache (backend vllm). A chunk of a rollout that goes on ends where a block
    does, so that no block is run twice. Attention kernels take 16 and more; some need 32, 64 or 128."""

    @property
    def engine(self) -> Literal["transformers", "vllm"]:
        """The backend that `auto` stands for."""
        if self.backend == "auto":
            return "vllm" if self.num_gpus else "transformers"
        return self.backend

    @property
    def chunk_block(self) -> int:
        """Tokens of a rollout that its chunks end at a multiple of; 1 where the engine keeps single tokens."""
        return self.cache_block if self.engine == "vllm" else 1

    @model_validator(mode="after")
    def _gpus_of_one_engine(self) -> ScorerConfig:
        size = self.tensor_parallel_size
        if size > 1 and self.num_gpus != size:
            raise ValueError(
                f"tensor_parallel_size = {size}: needs num_gpus = {size}, not {self.num_gpus:g}; a teacher's GPUs "
                "are one replica's"
            )
        if size > 1 and self.engine != "vllm":
            raise ValueError(
                f"tensor_parallel_size = {size}: needs backend = 'vllm', not {self.backend!r}; the transformers "
                "teacher runs on one GPU"
            )
        return self


class MonitorConfig(PlacementConfig):
    """Trap monitors."""

    num_cpus: float = Field(0.1, ge=0)
    """CPUs a monitor reserves in Ray: it must not take a core from an engine."""

    shards: int = Field(1, ge=1)
    """Monitors that share the samplers' rollouts under one calibration; results do not depend on it.
    One suffices up to some hundred GPUs (docs/scaling.md)."""


MOST_LORA_RANKS = 512  # of adapters that vLLM holds beside a model


class LoraConfig(Section):
    """Low-rank adapters (LoRA, peft): docs/lora.md."""

    rank: int = Field(16, ge=1)
    """Rows of an adapter's first matrix, columns of its second: it adds rank x (inputs + outputs) parameters to a
    layer."""
    alpha: int = Field(32, ge=1)
    """What an adapter adds is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = (
        "all-linear"
    )
    """Linear layers that get an adapter, by the last parts of their names, such as [q_proj, v_proj];
    `all-linear` is every one of the language model but its output layer."""
    dora: bool = False
    """Also learn the length of each row of the adapted weights (DoRA); not with ZeRO 3. vLLM takes such a student
    merged only."""
    publish: Literal["merged", "adapters"] = "merged"
    """What samplers are given after a step: `merged`, the whole model with the adapters added to its weights;
    `adapters`, these alone, which vLLM applies beside the weights."""

    @model_validator(mode="after")
    def _as_vllm_takes_it(self) -> LoraConfig:
        if self.publish == "adapters" and self.dora:
            raise ValueError("publish = 'adapters': needs dora = false, which vLLM does not have; publish merged")
        if self.publish == "adapters" and self.rank > MOST_LORA_RANKS:
            raise ValueError(
                f"rank = {self.rank}: must be <= {MOST_LORA_RANKS} with publish = 'adapters', as vLLM takes no more"
            )
        return self


class LearnerConfig(PlacementConfig):
    """The student's trainer: DeepSpeed, one actor per rank."""

    world_size: Resumable[int] = Field(1, ge=1)
    """Number of ranks."""
    zero_stage: Resumable[Literal[0, 1, 2, 3]] = 1
    """DeepSpeed ZeRO stage."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the forward and backward pass; the optimiser keeps fp32 master weights."""
    reduce_dtype: Resumable[Literal["model", "float32"]] = "model"
    """In which gradients of a bfloat16 student are summed over ranks at ZeRO 2 and 3, after every micro-batch.
    `float32` sends twice the bytes, and rounds nothing. ZeRO 0 sums in float32 anyway, ZeRO 1 in bfloat16, once a
    step (docs/numbers.md)."""
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
    micro_batch_tokens: Resumable[int] = Field(16384, ge=16)
    """Tokens of one micro-batch, prompt and padding included."""
    batching: Resumable[Literal["padded", "packed", "auto"]] = "padded"
    """How a micro-batch is laid out. `padded`: a row for each rollout, as long as the longest. `packed`: all in
    one row, without padding, for students that can (docs/models.md). `auto`: packed where the student can, else
    padded."""
    logits_chunk_tokens: Resumable[int] = Field(1024, ge=1)
    """Tokens whose vocabulary log-softmax exists at once."""
    gradient_checkpointing: Resumable[bool] = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora: LoraConfig | None = None
    """Train adapters beside the student's weights, which stay as they are; null trains the weights themselves."""
    max_skipped_steps: Resumable[int] = Field(5, ge=1)
    """Steps in a row whose loss or gradient is not finite, each of them skipped, after which the run stops and
    writes the last one's batch to `dumps/`."""

    @model_validator(mode="after")
    def _sums_what_is_rounded(self) -> LearnerConfig:
        if self.reduce_dtype == "float32" and (self.dtype != "bfloat16" or self.zero_stage < 2):
            where = f"dtype is {self.dtype!r}" if self.dtype != "bfloat16" else f"zero_stage is {self.zero_stage}"
            raise ValueError(
                f"reduce_dtype = 'float32': changes sums of bfloat16 at ZeRO 2 and 3, and {where}; leave it at "
                "'model', or take dtype = 'bfloat16' with zero_stage = 2 or 3"
            )
        return self

    @model_validator(mode="after")
    def _dora_has_whole_weights(self) -> LearnerConfig:
        if self.zero_stage == 3 and self.lora is not None and self.lora.dora:
            raise ValueError(
                "zero_stage = 3: needs lora.dora = false; peft's DoRA reads weights that stage 3 holds in pieces. "
                "Take stage 2, or LoRA"
            )
        return self

    @property
    def published_adapters(self) -> LoraConfig | None:
        """Those that samplers are given alone; None where they are given the whole model."""
        return self.lora if self.lora is not None and self.lora.publish == "adapters" else None


class PoolsConfig(Section):
    """When pools of samplers and scorers grow and shrink; only where `max_replicas` or `min_replicas` lets them."""

    waiting_share: float = Field(0.3, gt=0, lt=1)
    """Share of the step that the learner must wait for rollouts before samplers or scorers are added."""
    busy_share: float = Field(0.8, gt=0, le=1)
    """Share of the sampling time that a pool must be at work before it grows, as the busier of the two."""
    idle_share: float = Field(0.5, gt=0, lt=1)
    """A pool shrinks where what is left of it would be at work for less than this share of the sampling time, or
    where the learner would still wait less than half of `waiting_share`."""
    grow_after: int = Field(2, ge=1)
    """Steps in a row with the same evidence before a pool grows by one."""
    shrink_after: int = Field(5, ge=1)
    """Steps in a row with the same evidence before a pool shrinks by one."""


class ClusterConfig(Section):
    """How Ray is reached."""

    address: str | None = None
    """Ray address (`auto` joins the cluster of this machine or job); null starts a local one, unless
    the environment names one in RAY_ADDRESS."""
    by_role: bool = False
    """Place each role on the nodes made for it: labelled `kat.ray/role: ROLE`, with one unit of a resource of that
    name for each replica; the monitor on the head, labelled `head`, where it takes no CPU but a hundredth of the
    resource `head`. Clusters of this project's chart are made so."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a local Ray; null takes what the roles ask for, at least the machine's cores."""
    object_store_gib: float | None = Field(None, gt=0)
    """Object store of a local Ray, GiB; null lets Ray choose."""
    placement_timeout: float = Field(120.0, gt=0)
    """Seconds that a start waits until all roles are placed; past it, it ends and names what is missing."""
    replacement_timeout: float = Field(120.0, gt=0)
    """Seconds that a pool which may be smaller (`min_replicas`) waits for a place for a replica that was lost; past
    it, the run does without it. A pool of a fixed size waits on, as it needs the replica."""
    start_timeout: float = Field(900.0, gt=0)
    """Seconds that loading models and starting DeepSpeed may take, at the start and after an actor's death."""
    store_share: float = Field(0.7, gt=0, le=1)
    """Share of the object store that a run keeps below: a warning is given above it, and no step is sampled ahead
    (rollout.staleness = 1) where its records, taken to be as many as those that are held, would exceed it."""
    step_timeout: float = Field(7200.0, gt=0)
    """Seconds that any one stage of a step may take: sampling, learning, publishing, an evaluation, a
    checkpoint.
    """
    hang_timeout: float = Field(300.0, gt=0)
    """Seconds without progress (an engine step, a scored chunk, a micro-batch) after which an actor is killed and
    replaced. Must exceed the longest of those."""
    max_restarts: int = Field(5, ge=0)
    """How often any one actor may be lost within one step; past it the run stops."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray (on loopback)."""
    bind: Literal["loopback", "all"] = "loopback"
    """Interfaces on which a local Ray listens. `all` opens its ports to the network, and is refused unless
    RAY_AUTH_MODE is `token`, which the command line sets."""
