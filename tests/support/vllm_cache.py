"""vLLM's own KV cache manager behind the interface of an engine, without a model: it counts tokens."""

from types import SimpleNamespace

import torch


class CacheEngine:
    """Takes the teacher's requests; all that fit are held at once, as the scheduler holds them in one batch.

    A request whose cached prefix covers its first row gets no scores, as the V2 runner gives none. Scores are 0.
    """

    def __init__(self, blocks, block=16, longest=4096):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self._cache = KVCacheManager(config, longest, block, block, enable_caching=True)
        self._hasher = get_request_block_hasher(block, sha256)
        self._waiting = []
        cache = SimpleNamespace(
            block_size=block, enable_prefix_caching=True, num_gpu_blocks=blocks, kv_cache_size_tokens=None
        )
        self.vllm_config = SimpleNamespace(use_v2_model_runner=True, cache_config=cache)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 100_000)
        self.input_processor = self.engine_core = self
        self.refused = 0

    def get_supported_tasks(self):
        return ("generate",)

    def process_inputs(self, name, prompt, params, supported_tasks):
        return SimpleNamespace(request_id=name, prompt=prompt, params=params)

    def add_request(self, request):
        self._waiting.append(request)

    def get_output(self):
        outputs, held = [], []
        while self._waiting:
            done = self._run(self._waiting[0])
            if done is None:
                break
            held.append(done[0])
            outputs.append(done[1])
            self._waiting.pop(0)
        assert held, "one request does not fit"
        for request in held:
            self._cache.free(request)
        return SimpleNamespace(outputs=outputs)

    def _run(self, asked):
        from vllm.v1.request import Request

        request = Request(
            asked.request_id, asked.prompt["prompt_token_ids"], asked.params, None,
            cache_salt=asked.prompt.get("cache_salt"), block_hasher=self._hasher,
        )  # fmt: skip
        blocks, hit, _ = self._cache.get_computed_blocks(request)
        new = request.num_tokens - hit
        if self._cache.allocate_slots(request, new, hit, blocks) is None:
            return None
        scores = None
        if hit <= asked.params.prompt_logprob_start:
            scores = torch.zeros(asked.params.prompt_logprob_token_ids.shape)
        else:
            self.refused += 1
        output = SimpleNamespace(
            request_id=asked.request_id, prompt_token_id_logprobs=scores, new_prompt_logprobs_tensors=None,
            finish_reason=1, prefill_stats=SimpleNamespace(num_computed_tokens=new),
        )  # fmt: skip
        return request, output
