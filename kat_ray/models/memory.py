"""What a run's models take of the memory, estimated from their sizes before anything is loaded: docs/numbers.md.

Left out: what libraries take beside it on a GPU (contexts, fragments: some GiB in all), and samplers and scorers on
other GPUs than the learner's, whose vLLM takes a share of the memory that is a field of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kat_ray.config import Config, LearnerConfig
from kat_ray.config.teachers import ScorerGroup
from kat_ray.models.inspect import ModelFacts, ModelInfo
from kat_ray.models.lora_targets import adapter_parameters

GIB = 2**30
MAKE_IT_FIT = (
    "lower learner.micro_batch_tokens or learner.logits_chunk_tokens, set learner.gradient_checkpointing, or take "
    "more ranks (learner.world_size, learner.zero_stage), or train adapters (learner.lora)"
)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a parameter in a rank of the learner: its weight and gradient, and what ZeRO divides among the ranks, an
# fp32 master and two Adam moments.
_WHOLE, _DIVIDED = 6, 12
# What autograd keeps of a token in a layer: of the two norms, attention and the residual stream in hidden sizes, of
# a gated MLP in its widths.
_HIDDEN_KEPT, _MLP_KEPT = 11, 4
# float32 logits of a chunk, their gradient in the weights' type, and one more while they are turned into the other.
_LOGITS_KEPT = 3
# What processes take before they hold a model, with vLLM, torch and DeepSpeed: measured with the embedded pair.
_RUN, _SAMPLER, _SCORER, _RANK = 1.2 * GIB, 0.9 * GIB, 0.4 * GIB, 0.7 * GIB  # the first: driver, monitor and Ray
# Copies of the student's weights between learner and samplers: one being collected, one that is published, and the
# one before it, which samplers may still read.
_PUBLISHED = 3


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a rank."""

    tokens: int  # padding included
    bytes: float


def micro_batch(config: Config, student: ModelInfo, longest: int) -> MicroBatch | None:
    """The largest that a step can have, `longest` tokens being prompt and answer; None where sizes are not known.

    `learner.micro_batch_tokens`, more where one rollout is longer, less where a rank's whole step is smaller.
    """
    learner = config.learner
    rollouts = math.ceil(config.rollout.rollouts_per_step / learner.world_size)
    tokens = min(max(learner.micro_batch_tokens, longest), rollouts * longest)
    per_token = _bytes_of_a_token(student, learner)
    if per_token is None:
        return None
    chunk = min(learner.logits_chunk_tokens, tokens)
    return MicroBatch(tokens, tokens * per_token + chunk * student.vocabulary * 4.0 * _LOGITS_KEPT)


def learner_bytes(config: Config, parameters: int) -> float:
    """Weights, gradients and optimiser of one rank."""
    ranks = config.learner.world_size if config.learner.zero_stage else 1
    return parameters * (_WHOLE + _DIVIDED / ranks)


def _rank_bytes(config: Config, facts: ModelFacts, parameters: int) -> float | None:
    """`learner_bytes`, of a student with adapters too; None where their number is not known."""
    learner = config.learner
    if learner.lora is None:
        return learner_bytes(config, parameters)
    if (adapters := adapter_parameters(facts.student.config, learner.lora)) is None:
        return None
    ranks = learner.world_size if learner.zero_stage == 3 else 1
    return parameters * _BYTES[learner.dtype] / ranks + learner_bytes(config, adapters)


def memory_needed(
    config: Config, facts: ModelFacts, longest: int, gpu: int | None
) -> Iterator[tuple[str, float, str]]:
    """(where, bytes, what of): "memory" of the machine, or "GPU memory" of a learner's rank and what is beside it.

    `gpu` is a GPU's memory, None without one. Nothing where the number of parameters is not known.
    """
    student = facts.student.parameters
    loaded = _loaded(config)
    teachers = {group.section: facts.teachers[group.section].parameters for group in loaded}
    if student is None or None in teachers.values():
        return
    batch = micro_batch(config, facts.student, longest)
    if (rank := _rank_bytes(config, facts, student)) is None:
        return
    rank += batch.bytes if batch else 0.0
    words = "" if batch is None else _words(config, batch)
    if config.learner.num_gpus:
        if gpu is not None and not _shares_one_gpu(config):
            yield "GPU memory", rank, f"a rank of the learner{words}"
        elif gpu is not None:
            beside, roles = _beside_the_learner(config, teachers, gpu)
            total = config.learner.world_size * rank + beside
            yield "GPU memory", total, f"the learner{words}, {roles}, which share one GPU,"
        return
    if gpu is not None:  # the machine's memory is then not what the engines use
        return
    adapters = config.learner.published_adapters
    published = student if adapters is None else adapter_parameters(facts.student.config, adapters) or 0
    total = config.learner.world_size * (_RANK + rank) + _beside_on_cpus(config, student, published, teachers)
    yield "memory", total, f"processes, weights, optimiser, KV caches and micro-batches{words}"


def _beside_on_cpus(config: Config, student: int, published: int, teachers: Mapping[str, int | None]) -> float:
    """Bytes of all but the learner's ranks, where they share the machine's memory with them.

    `student` and `published` are numbers of parameters: of a whole student, and of what samplers are given.
    """
    size, sampler = _BYTES[config.student.dtype], config.sampler
    engine = _SAMPLER * sampler.tensor_parallel_size + student * size + sampler.kv_cache_gib * GIB
    total = _RUN + _PUBLISHED * published * size + sampler.bounds[1] * engine
    for group in _loaded(config):
        held = (teachers[group.section] or 0) * _BYTES[group.model.dtype]
        total += group.scorer.bounds[1] * (_SCORER + held)
    return total


def _loaded(config: Config) -> list[ScorerGroup]:
    return [group for group in config.scorer_groups if group.engine != "http"]


def _shares_one_gpu(config: Config) -> bool:
    """Whether all that has a GPU has parts of the same one."""
    pools = [config.sampler, *(group.scorer for group in _loaded(config))]
    beside = sum(pool.bounds[1] * pool.num_gpus for pool in pools)
    return beside > 0 and config.learner.world_size * config.learner.num_gpus + beside <= 1 + 1e-9


def _beside_the_learner(config: Config, teachers: Mapping[str, int | None], gpu: int) -> tuple[float, str]:
    """Bytes of what shares the learner's GPU, and its name with the fields that set them."""
    taken, names = 0.0, []
    if config.sampler.num_gpus:
        taken += config.sampler.bounds[1] * config.sampler.gpu_memory_utilization * gpu
        names.append(f"samplers (sampler.gpu_memory_utilization = {config.sampler.gpu_memory_utilization:g})")
    for group in _loaded(config):
        scorer = group.scorer
        if not scorer.num_gpus:
            continue
        vllm = scorer.engine == "vllm"
        weights = (teachers[group.section] or 0) * _BYTES[group.model.dtype]
        taken += scorer.bounds[1] * (scorer.gpu_memory_utilization * gpu if vllm else weights)
        share = f" (gpu_memory_utilization = {scorer.gpu_memory_utilization:g})" if vllm else ""
        names.append(f"scorers of {group.section}{share}")
    return taken, " and ".join(names)


def memory_notes(config: Config, facts: ModelFacts, longest: int, free: int, gpu: int | None) -> Iterator[str]:
    """A line for each memory that is too small."""
    have = free if gpu is None else gpu
    for _, needed, what in memory_needed(config, facts, longest, gpu):
        if needed > have:
            yield f"memory: {memory_text(needed, what, have)}: it will not fit; {MAKE_IT_FIT}"


def gpu_memory() -> int | None:
    """Bytes of this machine's first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def memory_text(needed: float, what: str, free: int) -> str:
    """One line, whether or not it fits."""
    return f"{what} take about {needed / GIB:.1f} of {free / GIB:.1f} GiB"


def _words(config: Config, batch: MicroBatch) -> str:
    return (
        f" ({batch.bytes / GIB:.1f} GiB of it a micro-batch of {batch.tokens} tokens; learner.micro_batch_tokens = "
        f"{config.learner.micro_batch_tokens})"
    )


def _bytes_of_a_token(student: ModelInfo, learner: LearnerConfig) -> float | None:
    shape = student.shape
    if shape is None:
        return None
    size = _BYTES[learner.dtype]
    layer = (_HIDDEN_KEPT * shape.hidden + _MLP_KEPT * shape.mlp) * size
    if learner.gradient_checkpointing:  # each layer's input, and one layer at a time
        return shape.layers * shape.hidden * size + layer
    return float(shape.layers * layer)
