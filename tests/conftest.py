"""Environment of all tests: loopback, no hub, one thread per process; and tiny real models."""

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import ray
import torch

from kat_ray.types.records import EngineEnd, RolloutChunk
from kat_ray.types.token_ids import pack_ids


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup`: files that share one Ray, or start their own, stay together (tests/lanes.py)."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.lanes import Lanes

    return Lanes(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def own_ray():
    """No Ray of this process: the agent of a machine's first Ray holds the port on which jobs are taken."""
    ray.shutdown()


def make_model(path, kind="qwen3", seed=0, vocabulary=200, tied=True, **changes):
    """A random model of two layers, saved to `path`; big weights, so that its distributions differ."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ) | changes  # fmt: skip
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.eval().save_pretrained(path)
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories of a random student and a random teacher, and the models."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: (str(root / name), make_model(root / name, seed=seed))
        for name, seed in (("student", 1), ("teacher", 2))
    }


@torch.no_grad()
def chunk_of(
    student,
    rollouts,
    *,
    top_k=64,
    start=None,
    end=None,
    context=None,
    inserted=(),
    ended=None,
    released=(),
    logprob_dtype=np.float16,
):
    """A RolloutChunk as a sampler would send it: rows of the real student for tokens start..end.

    `rollouts` maps ids to (prompt, tokens); `start`, `end`, `ended` map ids to token indices or EngineEnd.
    """
    start, end, ended = start or {}, end or {}, ended or {}
    rows, contexts, ids, logprobs, sampled, tails = [], [], [], [], [], []
    for i, (prompt, tokens) in rollouts.items():
        a, b = start.get(i, 0), end.get(i, len(tokens))
        full = torch.log_softmax(student(torch.tensor([[*prompt, *tokens]])).logits[0].float(), dim=-1)
        lp = full[len(prompt) - 1 + a : len(prompt) - 1 + b]
        best, best_ids = lp.topk(top_k)
        new = torch.tensor(tokens[a:b], dtype=torch.long)
        rows.append(tokens[a:b])
        sampled.append(lp.gather(-1, new[:, None])[:, 0])
        ids.append(best_ids)
        logprobs.append(best)
        tails.append(torch.log((1 - best.double().exp().sum(-1)).clamp_min(2.0**-24)))
        contexts.append((context or {}).get(i, prompt if a == 0 else []))
    low, high = pack_ids(torch.cat(ids).numpy(), vocabulary=200)
    offsets = lambda parts: np.cumsum([0, *map(len, parts)]).astype(np.int32)  # noqa: E731
    flat = lambda parts, dtype: np.array([x for p in parts for x in p], dtype=dtype)  # noqa: E731
    return RolloutChunk(
        attempt=0,
        rollout_ids=np.array(list(rollouts), dtype=np.int64),
        start=np.array([start.get(i, 0) for i in rollouts], dtype=np.int32),
        offsets=offsets(rows),
        token_ids=flat(rows, np.int32),
        sampled_logprobs=torch.cat(sampled).numpy().astype(np.float32),
        topk_ids_low=low,
        topk_ids_high=high,
        topk_logprobs=torch.cat(logprobs).numpy().astype(logprob_dtype),
        tail_logprobs=torch.cat(tails).numpy().astype(np.float32),
        context_offsets=offsets(contexts),
        context_ids=flat(contexts, np.int32),
        inserted=np.array([i in inserted for i in rollouts], dtype=bool),
        ended=np.array([ended.get(i, EngineEnd.RUNNING) for i in rollouts], dtype=np.int8),
        released=np.array(released, dtype=np.int64),
    )


def random_rollouts(count, *, seed=0, vocabulary=200, prompt=(2, 9), tokens=(5, 30)):
    """Random prompts and tokens by rollout id."""
    rng = np.random.default_rng(seed)
    draw = lambda bounds: rng.integers(2, vocabulary, rng.integers(*bounds)).tolist()  # noqa: E731
    return {i: (draw(prompt), draw(tokens)) for i in range(count)}


def make_config(student, teacher, **sections):
    """A Config for two model directories."""
    from kat_ray.config import Config

    base = {
        "student": {"path": student, "dtype": "float32"},
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {"path": "unused.jsonl"},
        "termination": {"rule": "none"},
        "learner": {"dtype": "float32"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)
