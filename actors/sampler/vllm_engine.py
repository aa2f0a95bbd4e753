"""A thin wrapper around one vLLM engine: requests in, rows of tokens and log-probabilities out.

It takes the engine core's outputs as they are: numpy arrays of ids and log-probabilities. vLLM's own output
processor turns each of the 64 log-probabilities per token into Python objects, which costs several times what
generating the token does on a small model (docs/log.md). Left out: detokenising, stop strings, statistics.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.v1.engine import EngineCoreOutput, FinishReason

from kat_ray.config import ModelConfig
from kat_ray.config.cluster import SamplerConfig
from kat_ray.types.records import EngineEnd, EngineRows, SamplingSettings, WeightUpdate

_ENDS = {FinishReason.STOP: EngineEnd.EOS, FinishReason.LENGTH: EngineEnd.MAX_TOKENS}


class VllmEngine:
    """One engine in this process, or with tensor parallelism in worker processes that it starts."""

    def __init__(
        self,
        model: ModelConfig,
        sampler: SamplerConfig,
        model_dir: str,
        *,
        max_model_len: int,
        top_k: int,
        seed: int,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": sampler.gpu_memory_utilization}
            if on_gpu
            else {"kv_cache_memory_bytes": int(sampler.kv_cache_gib * 2**30)}
        )
        args = EngineArgs(
            model=model_dir,
            revision=model.revision,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_logprobs=top_k,
            logprobs_mode="raw_logprobs",  # unfiltered, temperature 1: what reverse KL is defined on
            max_num_seqs=sampler.max_num_seqs,
            max_num_batched_tokens=max(sampler.max_num_batched_tokens, max_model_len),
            tensor_parallel_size=sampler.tensor_parallel_size,
            enforce_eager=sampler.enforce_eager,
            disable_log_stats=True,
            seed=seed,
            **memory,
        )
        self._engine = LLMEngine.from_engine_args(args)
        self._core = self._engine.engine_core
        self._tasks = self._engine.get_supported_tasks()
        self._running: set[str] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None:
        """Queue one request. The same seed and prompt draw the same tokens in any batch."""
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            logprobs=settings.logprobs or None,
            prompt_logprobs=0 if settings.prompt_logprobs else None,  # 0 besides the prompt's own token
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=not settings.stop_ids,  # else vLLM ends it at the model's own end of text
            seed=seed,
            detokenize=False,
        )
        request = self._engine.input_processor.process_inputs(
            request_id, tokens_input(prompt_token_ids=list(prompt_ids)), params, supported_tasks=self._tasks
        )
        self._core.add_request(request)
        self._running.add(request_id)

    def step(self) -> list[EngineRows]:
        """Run one engine step; returns the new tokens of the requests that it scheduled."""
        rows = [_rows(output) for output in self._core.get_output().outputs]
        self._running.difference_update(r.request_id for r in rows if r.end is not EngineEnd.RUNNING)
        return rows

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once; they give no further output."""
        live = [r for r in request_ids if r in self._running]
        self._running.difference_update(live)
        self._core.abort_requests(live)

    def load_weights(self, update: WeightUpdate) -> None:
        """Replace the weights in place. No request may be running: its KV cache would be stale."""
        assert not self._running, f"{len(self._running)} requests are running while weights are loaded"
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors_of(update)})
        self.clear_cache()

    def clear_cache(self) -> None:
        """Drop what is cached of prompts. No request may be running."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not clear its prefix cache: it still holds blocks of requests, though none is running; "
                "what is cached would be used under other weights"
            )

    def close(self) -> None:
        self._core.shutdown()
        del self._core, self._engine
        gc.collect()


def _rows(output: EngineCoreOutput) -> EngineRows:
    end = EngineEnd.RUNNING
    if output.finish_reason is not None:
        end = _ENDS.get(output.finish_reason, EngineEnd.FAILED)
    logprobs = output.new_logprobs
    ids, values = (None, None) if logprobs is None else (logprobs.logprob_token_ids, logprobs.logprobs)
    prompt = output.new_prompt_logprobs_tensors
    of_prompt = None if prompt is None else prompt.logprobs[:, 0].numpy()
    return EngineRows(output.request_id, output.new_token_ids, ids, values, end, of_prompt)


def tensors_of(update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an update, sharing memory with its arrays."""
    for name, dtype, array in zip(update.names, update.dtypes, update.arrays, strict=True):
        with warnings.catch_warnings():
            # Arrays from the object store are read-only, which torch cannot express; vLLM only reads them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(array)
        yield name, tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
