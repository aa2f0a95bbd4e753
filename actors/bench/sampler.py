"""The sampler against bare vLLM: what top-64 log-probabilities, chunks and a seed per request cost.

Ours is the loop of actors/sampler/student_sampler.py without the cluster: engine steps, rows into PendingRollouts,
a chunk every `rollout.chunk_tokens` steps. The other side is `vllm.LLM.generate` of the same prompts to the same
lengths, without log-probabilities, seeds and detokenising. Both engines have the same settings and threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.bench.child import alternate, pair_main, ratio, run_child
from actors.bench.figure import Figure
from actors.bench.pairs import MAX_POSITIONS, Pair, make_pair

REQUESTS = 256
GOAL = 0.85
_SHARE = 0.4  # of a GPU, for each of the two engines
_TOKENS = {"tiny": 208, "large": 16}
_TURNS = {"tiny": 5, "large": 2}


def figures(folder: Path, threads: int = 1) -> list[Figure]:
    """Throughput of the sampler over that of bare generation, for each pair."""
    found = []
    for name in ("tiny", "large"):
        make_pair(name, folder)
        owed = [Figure("sampler", f"{name}: tokens/s, ours over bare vLLM", None, GOAL)]
        found += run_child(__name__, [folder, name, threads], threads, owed, timeout=240)
    return found


def measure(pair: Pair, threads: int, num_gpus: float = 0.0) -> list[Figure]:
    """The figure of one pair, in this process."""
    from kat_ray.config import RolloutConfig
    from kat_ray.config.cluster import SamplerConfig

    rollout, sampler = (
        RolloutConfig(),
        SamplerConfig(max_num_seqs=REQUESTS, num_gpus=num_gpus, gpu_memory_utilization=_SHARE),
    )
    prompts = _prompts(pair)
    ours = _ours(pair, sampler, rollout, prompts, _TOKENS[pair.name])
    lengths = ours()  # also warms up
    bare = _bare(pair, sampler, rollout, prompts, lengths)
    bare()
    own, other = alternate([ours, bare], _TURNS[pair.name])
    tokens = sum(lengths)
    return [
        Figure(
            group="sampler",
            name=f"{pair.name}: tokens/s, ours over bare vLLM",
            value=ratio(other.wall, own.wall),
            goal=GOAL,
            detail={
                "requests": REQUESTS,
                "tokens": tokens,
                "threads": threads,
                "top_k_logprobs": rollout.top_k_logprobs,
                "ours_tokens_per_s": round(tokens / min(own.wall)),
                "bare_tokens_per_s": round(tokens / min(other.wall)),
                "ratio_cpu": round(ratio(other.cpu, own.cpu), 3),
                **own.detail("ours"),
                **other.detail("bare"),
            },
        )
    ]


def _prompts(pair: Pair) -> list[list[int]]:
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    with pair.prompts.open(encoding="utf-8") as file:
        texts = [json.loads(next(file))["prompt"] for _ in range(REQUESTS)]
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    return ids


def _ours(pair: Pair, sampler: Any, rollout: Any, prompts: list[list[int]], tokens: int) -> Callable[[], list[int]]:
    """A function that generates all rollouts and returns their lengths."""
    from actors.sampler.vllm_engine import VllmEngine
    from kat_ray.config import ModelConfig
    from kat_ray.data.chunks import PendingRollout, build_chunk
    from kat_ray.types.records import SamplingSettings

    model = ModelConfig(path=str(pair.student), dtype="float32")
    engine = VllmEngine(
        model, sampler, str(pair.student), max_model_len=MAX_POSITIONS, top_k=rollout.top_k_logprobs, seed=0
    )
    settings = SamplingSettings(tokens, rollout.temperature, rollout.top_p, rollout.top_k_logprobs, (1,))

    def generate() -> list[int]:
        pending = {str(i): PendingRollout(i, tuple(p), scorer=0) for i, p in enumerate(prompts)}
        for name, own in pending.items():
            engine.add(name, own.prompt_ids, own.rollout_id, settings)
        steps = 0
        while engine.running:
            for rows in engine.step():
                own = pending[rows.request_id]
                assert rows.topk_ids is not None and rows.logprobs is not None
                own.add(rows.token_ids, rows.topk_ids, rows.logprobs)
                own.end = rows.end
            steps += 1
            if steps % rollout.chunk_tokens == 0 or not engine.running:
                build_chunk(
                    [r for r in pending.values() if r.has_news], (), attempt=0,
                    top_k=rollout.top_k_logprobs, vocabulary=2**15,
                )  # fmt: skip
        return [len(r.token_ids) for r in pending.values()]

    return generate


def _bare(
    pair: Pair, sampler: Any, rollout: Any, prompts: list[list[int]], lengths: list[int]
) -> Callable[[], object]:
    """A function that generates the same lengths as a plain user of vLLM would."""
    from vllm import LLM, SamplingParams

    memory: dict[str, Any] = (
        {"gpu_memory_utilization": sampler.gpu_memory_utilization}
        if sampler.num_gpus
        else {"kv_cache_memory_bytes": int(sampler.kv_cache_gib * 2**30)}
    )
    llm = LLM(
        model=str(pair.student),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=MAX_POSITIONS,
        max_num_seqs=sampler.max_num_seqs,
        max_num_batched_tokens=sampler.max_num_batched_tokens,
        enforce_eager=sampler.eager,
        disable_log_stats=True,
        seed=0,
        **memory,
    )
    inputs: Any = [{"prompt_token_ids": p} for p in prompts]
    params = [
        SamplingParams(
            temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=n, ignore_eos=True, detokenize=False
        )
        for n in lengths
    ]

    def generate() -> None:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == lengths

    return generate


if __name__ == "__main__":
    pair_main(measure)
