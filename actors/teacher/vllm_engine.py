"""The vLLM engine of a teacher: its arguments, its start, and what it must be able to do.

`prompt_logprob_token_ids`, vLLM's scores of given ids at given rows of a prompt, are computed by its V2 model
runner alone, which needs a GPU. All that comes before, the engine, its front door, scheduler, KV cache and tensor
parallelism, is the same on a CPU, where tests start it through `start_engine` too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm import EngineArgs, LLMEngine
from vllm.transformers_utils.config import iter_rope_parameters

from actors.teacher.backend import max_ids
from actors.teacher.settings import ScorerSettings
from kat_ray.errors import UserError
from kat_ray.models.fp32_output import require_fp32_output, type_name, vllm_arguments

_MAX_SEQS = 256  # requests that the engine runs at once, as vLLM's own default on most GPUs
_ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"


def engine_args(settings: ScorerSettings, **changes: Any) -> EngineArgs:
    """What vLLM is told for a teacher whose longest rollout has `settings.max_model_len` tokens."""
    model, scorer = settings.teacher, settings.scorer
    arguments: dict[str, Any] = dict(
        model=settings.teacher_dir,
        revision=model.revision,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        skip_tokenizer_init=True,
        max_model_len=settings.max_model_len,
        max_logprobs=max_ids(settings.rollout.top_k_logprobs, settings.stop_ids),
        logprobs_mode="raw_logprobs",
        max_num_batched_tokens=scorer.max_batch_tokens,
        max_num_seqs=min(_MAX_SEQS, scorer.max_batch_tokens),
        gpu_memory_utilization=scorer.gpu_memory_utilization,
        tensor_parallel_size=scorer.tensor_parallel_size,
        # In a placement group vLLM would take Ray for its workers, and refuse a bundle of several GPUs.
        distributed_executor_backend="mp" if scorer.tensor_parallel_size > 1 else None,
        enable_prefix_caching=True,
        block_size=scorer.cache_block,
        disable_log_stats=True,
        **vllm_arguments(settings.fp32_output),
    )
    return EngineArgs(**arguments | changes)


def start_engine(settings: ScorerSettings, **changes: Any) -> LLMEngine:
    """Load the teacher; `changes` are engine arguments. UserError with vLLM's reason where it refuses them.

    vLLM refuses a prompt of its `max_model_len`, as it always generates one token more. The engine is given one
    position more than the longest rollout, which the model may not have and which is never run: the generated token
    ends its request.
    """
    args = engine_args(settings, **changes)
    name = settings.model_name
    try:
        model = args.create_model_config()  # the longest rollout itself must be within the model's limit
        _check_rope(model.hf_config, settings.max_model_len, name)
        with _one_position_more():
            engine = LLMEngine.from_engine_args(replace(args, max_model_len=settings.max_model_len + 1))
    except ValueError as error:  # vLLM's own errors of validation, pydantic's among them
        raise UserError(f"{name}: vLLM cannot start it: {_reason(error)}") from error
    if settings.fp32_output:
        # By what its layers are made from: the engine is a process of its own, which takes no function of ours.
        require_fp32_output([frozenset({type_name(engine.model_config.head_dtype)})], name)
    return engine


def check_runner(engine: LLMEngine) -> None:
    """UserError unless the engine scores given ids."""
    if not engine.vllm_config.use_v2_model_runner:
        raise UserError(
            "scorer.backend: vLLM did not choose its V2 model runner for this teacher; only that one scores "
            "given ids; set VLLM_USE_V2_MODEL_RUNNER=1, or scorer.backend = 'transformers'"
        )


def cache_tokens(engine: LLMEngine) -> int:
    """Tokens that the engine's KV cache holds."""
    cache = engine.vllm_config.cache_config
    return int(getattr(cache, "kv_cache_size_tokens", None) or (cache.num_gpu_blocks or 0) * cache.block_size)


@contextmanager
def _one_position_more() -> Iterator[None]:
    before = os.environ.get(_ALLOW_LONG)
    os.environ[_ALLOW_LONG] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_LONG]
        else:
            os.environ[_ALLOW_LONG] = before


def _check_rope(hf_config: Any, longest: int, name: str) -> None:
    """Refuse the one length at which the position more changes the model.

    vLLM takes longrope's long factors for the whole engine as soon as it may exceed the original length.
    """
    for rope in iter_rope_parameters(hf_config):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(hf_config, "original_max_position_embeddings", None)
        if rope.get("rope_type") == "longrope" and longest == original:
            raise UserError(
                f"{name}: a rollout may be as long as its original context, {original} tokens, where vLLM already "
                f"takes the factors for longer ones; lower rollout.max_tokens by one"
            )


def _reason(error: ValueError) -> str:
    """The message without pydantic's frame, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("Value error, ")]
    return (told or lines or [type(error).__name__])[0].removeprefix("Value error, ").partition(" [type=")[0]
