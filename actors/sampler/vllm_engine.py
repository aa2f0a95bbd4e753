"""A thin wrapper around one vLLM engine: requests in, rows of tokens and log-probabilities out.

It takes the engine core's outputs as they are: numpy arrays of ids and log-probabilities. vLLM's own output
processor turns each of the 64 log-probabilities per token into Python objects, which costs several times what
generating the token does on a small model (docs/log.md). Left out: detokenising, stop strings, statistics.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.v1.engine import EngineCoreOutput, FinishReason

from actors.sampler import adapter_loading, weight_loading
from actors.sampler.weight_loading import LoadReport, shared
from kat_ray.cluster.devices import device_of
from kat_ray.config import LoraConfig, ModelConfig
from kat_ray.config.cluster import SamplerConfig
from kat_ray.errors import ModelError, UserError
from kat_ray.models.fp32_output import output_dtypes, require_fp32_output, vllm_arguments
from kat_ray.models.weight_updates import tensors_of
from kat_ray.types.records import EngineEnd, EngineRows, SamplingSettings, WeightUpdate

_ENDS = {FinishReason.STOP: EngineEnd.EOS, FinishReason.LENGTH: EngineEnd.MAX_TOKENS}

Loader = Callable[..., LoadReport]

_STEPS_UNDER_WAY = 4  # more than vLLM has at once: two, or one for each stage of a pipeline, which this has not


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
        fp32_output: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        """With `lora`, `load_weights` is given adapters, and not the whole model."""
        device = device_of(sampler.num_gpus, "sampler").type
        check_build(device)
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
            tensor_parallel_size=sampler.tensor_parallel_size,
            # Left to choose, vLLM would ask the placement group that this actor is in for a bundle to each worker.
            distributed_executor_backend="mp" if sampler.tensor_parallel_size > 1 else "uni",
            enforce_eager=sampler.eager,
            disable_log_stats=True,
            seed=seed,
            **_memory(sampler, max_model_len, device),
            **vllm_arguments(fp32_output),
            **adapter_loading.engine_arguments(lora, model, model_dir),
        )
        if device == "cpu" and args.create_model_config().has_inner_state:
            args.enable_prefix_caching = False  # states are cached at a block's end, where vLLM splits prompts
        self._model_path = model.path
        self._lora = lora
        self._adapters: Any = None  # what requests say of adapters, once there are any
        self._engine = LLMEngine.from_engine_args(args)
        self._core = self._engine.engine_core
        if fp32_output:
            require_fp32_output(self._engine.collective_rpc(output_dtypes), f"{model.path!r}")
        self._tasks = self._engine.get_supported_tasks()
        self._names: dict[str, str] = {}  # of the requests that run: the caller's by vLLM's
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        return len(self._names)

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None:
        """Queue one request. The same seed and prompt draw the same tokens in any batch."""
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            logprobs=settings.logprobs,
            prompt_logprobs=0 if settings.prompt_logprobs else None,  # 0 besides the prompt's own token
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=not settings.stop_ids,  # else vLLM ends it at the model's own end of text
            seed=seed,
            detokenize=False,
        )
        # A name of its own each time: vLLM knows requests by name alone, and what is under way for one that ended
        # would be taken for another of the same name.
        own = f"{request_id}#{next(self._numbers)}"
        request = self._engine.input_processor.process_inputs(
            own, tokens_input(prompt_token_ids=list(prompt_ids)), params, supported_tasks=self._tasks,
            lora_request=self._adapters,
        )  # fmt: skip
        self._names[own] = request_id  # before: what fails half-way can be aborted
        self._core.add_request(request)

    def step(self) -> list[EngineRows]:
        """Run one engine step; returns the new tokens of the requests that it scheduled."""
        outputs = self._core.get_output().outputs
        if late := [output.request_id for output in outputs if output.request_id not in self._names]:
            raise RuntimeError(
                f"vLLM gave tokens of requests that were aborted or had ended: {', '.join(late)}; what they hold "
                "of its KV cache is not known any more"
            )
        rows = [_rows(output, self._names[output.request_id]) for output in outputs]
        for output in outputs:
            if output.finish_reason is not None:
                del self._names[output.request_id]
        return rows

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once; they give no further output."""
        wanted = set(request_ids)
        live = [own for own, name in self._names.items() if name in wanted]
        for own in live:
            del self._names[own]
        self._core.abort_requests(live)

    def load_weights(self, update: WeightUpdate) -> None:
        """Replace the weights in place. No request may be running: its KV cache would be stale.

        `ModelError` names what vLLM's model did not take, or did not get.
        """
        assert not self._names, f"{len(self._names)} requests are running while weights are loaded"
        self._drain()
        load, load_shared, more = self._loaders()
        if self._engine.vllm_config.parallel_config.world_size == 1:
            reports = self._engine.collective_rpc(load, args=(tensors_of(update), *more))
        else:
            with shared(update) as weights:  # its workers are processes, which have no access to Ray's objects
                reports = self._engine.collective_rpc(load_shared, args=(weights, *more))
        self.clear_cache()
        check_taken(LoadReport.of_all(reports), self._model_path, update.policy_version)

    def _loaders(self) -> tuple[Loader, Loader, tuple[Any, ...]]:
        """What puts an update into a worker in this process, and into one in another, with further arguments."""
        if self._lora is None:
            return weight_loading.load, weight_loading.load_shared, ()
        self._adapters = adapter_loading.request()
        return adapter_loading.load_adapters, adapter_loading.load_shared_adapters, (self._lora,)

    def clear_cache(self) -> None:
        """Drop what is cached of prompts. No request may be running."""
        assert not self._names, f"{len(self._names)} requests are running while the cache is cleared"
        self._drain()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not clear its prefix cache: it still holds blocks of requests, though none is running; "
                "what is cached would be used under other weights"
            )

    def _drain(self) -> None:
        """Take what is under way for requests that have ended.

        On a GPU vLLM schedules a step before it has the tokens of the one before; the last is for nobody.
        """
        for _ in range(_STEPS_UNDER_WAY):
            self.step()

    def close(self) -> None:
        self._core.shutdown()
        del self._core, self._engine
        gc.collect()


def check_build(device: str) -> None:
    """`UserError` if the installed vLLM cannot compute on a `cpu` or `cuda` device: it is built for one of them."""
    from vllm.platforms import current_platform

    built_for = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda_alike() else None
    if built_for == device:
        return
    found = f"is built for {built_for}" if built_for else "finds no platform that it is built for"
    raise UserError(
        f"sampler.num_gpus asks for an engine on {device}, and the vLLM that is installed {found}: "
        + ("set sampler.num_gpus = 1, or install vLLM's CPU build" if device == "cpu" else "install vLLM for CUDA")
    )


def _memory(sampler: SamplerConfig, max_model_len: int, device: str) -> dict[str, Any]:
    """Arguments of the engine for its KV cache and for the tokens of one step."""
    if device != "cpu":
        return {
            "gpu_memory_utilization": sampler.gpu_memory_utilization,
            "max_num_batched_tokens": max(sampler.max_num_batched_tokens, max_model_len),
        }
    return {
        "kv_cache_memory_bytes": int(sampler.kv_cache_gib * 2**30),
        # vLLM takes back the draw that a piece of a prompt makes for nothing, which a CPU's generator cannot. So no
        # prompt is split, and the longest has room beside a token of everything that runs.
        "max_num_batched_tokens": max(sampler.max_num_batched_tokens, max_model_len + sampler.max_num_seqs),
        "enable_chunked_prefill": False,
    }


def check_taken(report: LoadReport, model: str, version: int) -> None:
    """`ModelError` names what a publication left out; vLLM itself only warns."""
    if not (report.ignored or report.missing):
        return
    parts = [f"it passed over {_some(report.ignored)}"] if report.ignored else []
    parts += [f"it got no new values for {_some(report.missing)}"] if report.missing else []
    raise ModelError(
        f"student.path = {model!r}: vLLM did not take version {version} of the weights: {'; '.join(parts)}. Its "
        "model of this architecture has other names than transformers'; the sampler would go on with old weights"
    )


def _some(names: frozenset[str], shown: int = 8) -> str:
    first = sorted(names)[:shown]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(first) + more


def _rows(output: EngineCoreOutput, name: str) -> EngineRows:
    end = EngineEnd.RUNNING
    if output.finish_reason is not None:
        end = _ENDS.get(output.finish_reason, EngineEnd.FAILED)
    logprobs = output.new_logprobs
    ids, values = (None, None) if logprobs is None else (logprobs.logprob_token_ids, logprobs.logprobs)
    prompt = output.new_prompt_logprobs_tensors
    of_prompt = None if prompt is None else prompt.logprobs[:, 0].numpy()
    return EngineRows(name, output.new_token_ids, ids, values, end, of_prompt)
