"""What the vLLM teacher runs again, counted by vLLM's own KV cache manager (blocks of 16, no model)."""

from dataclasses import replace

import numpy as np
import pytest

from actors.teacher.settings import ScorerSettings
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.types.records import EngineEnd
from tests.support.configs import make_config
from tests.support.vllm_cache import CacheEngine

pytestmark = pytest.mark.integration  # vLLM takes seconds to import

BLOCK, CHUNK = 16, 16


def teacher_of(engine):
    from actors.teacher.vllm_backend import VllmTeacher

    config = make_config("s", "t", scorer={"num_gpus": 1}, rollout={"top_k_logprobs": 2})
    return VllmTeacher(ScorerSettings.from_config(config, "t", (1,), 4000), engine)


def rollouts_of(prompts, block=BLOCK):
    """Pending rollouts with random prompts of these lengths."""
    rng = np.random.default_rng(0)
    return [
        PendingRollout(i, tuple(rng.integers(2, 99_999, n).tolist()), 0, block=block) for i, n in enumerate(prompts)
    ]


def add(rollout, tokens):
    rows = np.tile(np.array([[4, 5, 6]], np.int32), (len(tokens), 1))
    rollout.add(tokens, rows, np.tile(np.array([[-1.0, -1.0, -2.0]], np.float32), (len(tokens), 1)))


def score_all(teacher, rollouts, tokens, chunk=CHUNK, seed=1):
    """Generate `tokens` random tokens of each and score them as a sampler sends them; tokens run and asked for."""
    rng, before, asked, run = np.random.default_rng(seed), teacher.run_tokens, 0, []
    for step in range(chunk, tokens + chunk, chunk):
        for rollout in rollouts:
            add(rollout, rng.integers(2, 99_999, min(chunk, tokens + chunk - step)).tolist())
            if step >= tokens:
                rollout.end = EngineEnd.MAX_TOKENS
        if news := [r for r in rollouts if r.has_news]:
            sent = build_chunk(news, (), attempt=0, top_k=2, vocabulary=100_000)
            at = teacher.run_tokens
            teacher.score(sent, sent.topk_ids())
            run.append(teacher.run_tokens - at)
            asked += sent.tokens + len(sent.context_ids)
    return teacher.run_tokens - before, asked, run


def test_no_prompt_length_costs_more_than_a_quarter_again():
    """Measured: 1.055 for each of them; the whole generation of 1,280 tokens, prompts of 160 to 175."""
    for length in range(160, 176):
        engine = CacheEngine(blocks=200)
        run, asked, _ = score_all(teacher_of(engine), rollouts_of([length]), 1280)
        assert asked == length + 1280 and engine.refused == 0
        assert asked <= run <= 1.08 * asked, length


@pytest.mark.parametrize("chunk", [1, 5, 24, 64])
def test_nor_does_any_length_of_chunk(chunk):
    engine = CacheEngine(blocks=2000)
    run, asked, _ = score_all(teacher_of(engine), rollouts_of(range(160, 176)), 320, chunk)
    assert engine.refused == 0
    assert run <= 1.08 * asked


def test_chunks_that_do_not_end_where_blocks_do_cost_up_to_twice():
    """Why samplers hold tokens back. Still no cliff: the last token of a request is not the rollout's own."""
    cost = {}
    for length in range(160, 176):
        engine = CacheEngine(blocks=200)
        run, asked, _ = score_all(teacher_of(engine), rollouts_of([length], block=1), 640)
        assert engine.refused == 0
        cost[length % BLOCK] = run / asked
    assert 1.7 < max(cost.values()) <= 2.0 and cost[0] == max(cost.values())
    assert min(cost.values()) <= 1.08 and cost[1] == min(cost.values())


def test_the_rollouts_own_last_token_would_cost_whole_prefills(monkeypatch):
    """The cliff: where a length is a multiple of the block, every chunk's scores are dropped once."""
    from actors.teacher.vllm_backend import _Ask

    monkeypatch.setattr(_Ask, "prompt", property(lambda self: list(self.tokens)))
    engine = CacheEngine(blocks=400)
    teacher = teacher_of(engine)
    teacher._alone = _Never()  # nor a part of the cache of its own
    run, asked, _ = score_all(teacher, rollouts_of([160], block=1), 640)
    assert engine.refused == 39, "every chunk but the first"
    assert run > 10 * asked


class _Never(set):
    def update(self, *others):
        pass


def test_rollouts_that_share_their_first_tokens_are_run_whole_once_more_at_most():
    """Of one prompt, with the same first tokens: the second finds blocks of the first that reach past its rows."""
    engine = CacheEngine(blocks=4000)
    teacher = teacher_of(engine)
    rollouts = [replace(r, rollout_id=i, inserted={}, topk_ids=[], logprobs=[], token_ids=[])
                for i, r in enumerate(rollouts_of([320]) * 8)]  # fmt: skip
    first = np.random.default_rng(3).integers(2, 99_999, 40).tolist()
    for rollout in rollouts:
        add(rollout, first)
    run, asked, _ = score_all(teacher, rollouts, 320)
    assert 0 < engine.refused <= 7
    assert run <= 1.25 * asked


def test_a_cache_that_is_too_small_is_used_and_said(caplog):
    """Half of the live tokens fit. In the order in which they come all would be run again; latest first, less."""
    prompts = [160 + n % BLOCK for n in range(16)]
    blocks = 16 * 50 // 2
    teacher = teacher_of(CacheEngine(blocks))
    with caplog.at_level("WARNING", logger="kat_ray.scorer"):
        _, _, run = score_all(teacher, rollouts_of(prompts), 640)
    said = [r.message for r in caplog.records]
    assert sum("KV cache holds 6,400" in m and "gpu_memory_utilization" in m for m in said) == 1
    assert sum("tokens for each that it was asked for" in m for m in said) == 1
    in_order = teacher_of(CacheEngine(blocks))
    in_order._latest_first = list
    _, _, thrashed = score_all(in_order, rollouts_of(prompts), 640)
    assert run[-2] < 0.75 * thrashed[-2]


def test_a_cache_that_suffices_says_nothing(caplog):
    with caplog.at_level("WARNING", logger="kat_ray.scorer"):
        score_all(teacher_of(CacheEngine(blocks=2000)), rollouts_of(range(160, 176)), 640)
    assert not caplog.records
