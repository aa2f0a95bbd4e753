"""Families as students of real samplers: vLLM on a CPU, as loaded and after weights were published to it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from actors.cluster.placement import environments
from actors.learner.model import load_student
from kat_ray.cluster.threads import threads_of
from kat_ray.config import LearnerConfig
from kat_ray.types.records import EngineEnd, SamplingSettings
from tests.support.configs import make_config
from tests.support.families import BY_NAME, FAMILIES, VOCABULARY, WINDOW, make_family
from tests.support.verdicts import plain, plain_logprobs

pytestmark = pytest.mark.nightly
LONGEST = 64
WIDE = dict(hidden_size=128, head_dim=32, num_attention_heads=4)  # vLLM's attention on a CPU takes no smaller heads


@pytest.fixture
def engine_of(monkeypatch):
    """Makes engines, in the environment that placement gives a sampler; ends them."""
    from actors.sampler.vllm_engine import VllmEngine  # here: all tiers collect this file, and vLLM imports slowly

    made = []

    def make(path):
        config = make_config(str(path), str(path))
        for name, value in environments(config, threads_of(config, 1))["sampler"].items():
            monkeypatch.setenv(name, value)
        student = config.student.model_copy(update={"dtype": "float32"})
        sampler = config.sampler.model_copy(update={"kv_cache_gib": 0.1})
        made.append(VllmEngine(student, sampler, str(path), max_model_len=LONGEST, top_k=8, seed=0))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def expected_of(path, asked):
    """Log-probabilities of these ids at the tokens of each answer, by a plain pass of the model at `path`."""
    model = plain(path)
    with torch.no_grad():
        return [
            plain_logprobs(model, prompt, tokens).gather(-1, torch.from_numpy(ids)).numpy()
            for prompt, tokens, ids in asked
        ]


def error_of(engine, path):
    """Largest difference of the log-probabilities that an engine samples with, from those of a plain pass.

    The pass is another process's: for families that vLLM has no code for it changes the classes of transformers.
    """
    rng = np.random.default_rng(3)
    prompts = {str(i): rng.integers(2, VOCABULARY - 8, n).tolist() for i, n in enumerate((3, 5 * WINDOW))}
    settings = SamplingSettings(max_tokens=20, temperature=1.0, top_p=1.0, logprobs=8, stop_ids=())
    for i, prompt in prompts.items():
        engine.add(i, prompt, seed=int(i), settings=settings)
    rows = {i: [] for i in prompts}
    while engine.running:
        for row in engine.step():
            assert row.end is not EngineEnd.FAILED
            rows[row.request_id].append(row)
    asked, own = [], []
    for i, prompt in prompts.items():
        tokens = [t for row in rows[i] for t in row.token_ids]
        asked.append((prompt, tokens, np.concatenate([row.topk_ids for row in rows[i]]).astype(np.int64)))
        own.append(np.concatenate([row.logprobs for row in rows[i]]))
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        expected = other.submit(expected_of, path, asked).result()
    return max(float(np.abs(a - b).max()) for a, b in zip(own, expected, strict=True))


def published_other_weights(path):
    """The same family with other weights, as the learner publishes them, and where a model has them."""
    config = make_config(str(path), str(path))
    student = load_student(config.student, str(path), LearnerConfig(dtype="float32"), LONGEST)
    with torch.no_grad():
        for _, parameter in student.trained_parameters():
            parameter.mul_(0.9)
    student.network.save_pretrained(path / "other")
    return student.weight_update(1, torch.float32), path / "other"


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.sampled])
def test_a_sampler_computes_what_was_loaded_and_what_is_published(name, engine_of, tmp_path):
    make_family(BY_NAME[name], tmp_path, **WIDE)
    update, other = published_other_weights(tmp_path)  # before vLLM changes the classes of this process
    engine = engine_of(tmp_path)
    assert error_of(engine, tmp_path) < 1e-3
    engine.load_weights(update)
    assert error_of(engine, other) < 1e-3


def test_why_experts_are_refused_on_a_cpu(engine_of, tmp_path):
    """vLLM's reload leaves them in another layout than its kernel reads. Where this fails, lift the refusal."""
    make_family(BY_NAME["Qwen3-MoE"], tmp_path, **WIDE)
    update, other = published_other_weights(tmp_path)
    engine = engine_of(tmp_path)
    assert error_of(engine, tmp_path) < 1e-3
    try:
        engine.load_weights(update)
    except RuntimeError as error:
        assert "must match the size of tensor" in str(error), "these sizes do not even fit"
    else:
        assert error_of(engine, other) > 0.1
