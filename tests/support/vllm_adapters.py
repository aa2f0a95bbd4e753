"""What vLLM says of given tokens on a CPU: of a model, and of adapters beside their base (LoRARequest).

Its engines are in this process, as they are in an actor's: `VLLM_ENABLE_V1_MULTIPROCESSING` must be 0.
"""

from contextlib import contextmanager

import numpy as np

from kat_ray.config.cluster import SamplerConfig
from kat_ray.config.sections import ModelConfig
from kat_ray.types.records import SamplingSettings

LENGTH = 128  # of the longest prompt and answer


@contextmanager
def engine_of(directory, lora=None, **more):
    from actors.sampler.vllm_engine import VllmEngine

    sampler = SamplerConfig(kv_cache_gib=0.1, max_num_seqs=16, **more)
    model = ModelConfig(path=directory, dtype="float32")
    engine = VllmEngine(model, sampler, directory, max_model_len=LENGTH, top_k=4, seed=0, lora=lora)
    try:
        yield engine
    finally:
        engine.close()


def given_logprobs(engine, pairs):
    """Of the answers' tokens, all in one array."""
    settings = SamplingSettings(1, 1.0, 1.0, 0, (), prompt_logprobs=True)
    for i, (prompt, answer) in enumerate(pairs):
        engine.add(str(i), [*prompt, *answer], 0, settings)
    found = {}
    while engine.running:
        found |= {int(r.request_id): r.prompt_logprobs for r in engine.step() if r.prompt_logprobs is not None}
    return np.concatenate([found[i][-len(answer) :] for i, (_, answer) in enumerate(pairs)])


def answers_with_adapter(directory, adapter, prompts):
    """Prompts with the answers of vLLM's own front door, which loads the adapters from their directory; their
    log-probabilities, all in one array.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        directory, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=LENGTH,
        kv_cache_memory_bytes=10**8, enable_lora=True, max_lora_rank=8, logprobs_mode="raw_logprobs",
    )  # fmt: skip
    params = SamplingParams(max_tokens=8, logprobs=0, detokenize=False, ignore_eos=True, seed=1)
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    try:
        outputs = llm.generate(inputs, params, use_tqdm=False, lora_request=LoRARequest("student", 1, str(adapter)))
    finally:
        llm.llm_engine.engine_core.shutdown()
    answers = [output.outputs[0] for output in outputs]
    values = [place[token].logprob for a in answers for token, place in zip(a.token_ids, a.logprobs, strict=True)]
    return [(list(p), list(a.token_ids)) for p, a in zip(prompts, answers, strict=True)], np.array(values)
