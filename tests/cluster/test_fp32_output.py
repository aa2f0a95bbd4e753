"""The output layer of vLLM in float32, on its CPU build, beside a bfloat16 body: `numerics.fp32_output_layer`.

What the bodies of two engines round differently would hide what the output layer does. So the models here have
layers that write nothing into the residual stream: hidden states are normed embeddings, the same in every engine.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.cluster.placement import environments
from actors.teacher.agreement import chunked_logprobs
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.cluster.threads import threads_of
from kat_ray.config import LearnerConfig, ModelConfig
from kat_ray.models.load import plain_logprobs
from kat_ray.types.records import SamplingSettings
from tests.support.configs import make_config
from tests.support.families import BY_NAME, VOCABULARY, make_family
from tests.support.vllm_scores import on_cpu, patch_scores, patch_v2_flag

pytestmark = pytest.mark.nightly  # vLLM takes seconds to import, and to start each of its engines
LONGEST = 64
WIDE = dict(hidden_size=128, head_dim=32, num_attention_heads=4)  # vLLM's attention on a CPU takes no smaller heads
CPU = torch.device("cpu")


@pytest.fixture
def student(tmp_path):
    """A bfloat16 student as the learner holds it, saved in its directory."""
    from actors.learner.model import load_student

    make_family(BY_NAME["Qwen3"], tmp_path, **WIDE)
    model = ModelConfig(path=str(tmp_path), dtype="bfloat16")
    loaded = load_student(model, str(tmp_path), LearnerConfig(dtype="bfloat16"), LONGEST)
    with torch.no_grad():
        for name, parameter in loaded.trained_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    loaded.network.save_pretrained(tmp_path)
    return loaded


def engine_of(path, monkeypatch, fp32_output):
    from actors.sampler.vllm_engine import VllmEngine

    config = make_config(str(path), str(path))
    for name, value in environments(config, threads_of(config, 1))["sampler"].items():
        monkeypatch.setenv(name, value)
    sampler = config.sampler.model_copy(update={"kv_cache_gib": 0.1})
    model, given = ModelConfig(path=str(path), dtype="bfloat16"), dict(max_model_len=LONGEST, top_k=8, seed=0)
    return VllmEngine(model, sampler, str(path), **given, fp32_output=fp32_output)


def errors(engine, network):
    """Mean distance of the log-probabilities that it samples with from plain passes, of both output layers."""
    rng = np.random.default_rng(3)
    prompts = {str(i): rng.integers(2, VOCABULARY, n).tolist() for i, n in enumerate((3, 7, 11, 19, 30))}
    settings = SamplingSettings(max_tokens=30, temperature=1.0, top_p=1.0, logprobs=8, stop_ids=())
    for i, prompt in prompts.items():
        engine.add(i, prompt, seed=int(i), settings=settings)
    tokens, own = {i: [] for i in prompts}, {i: [] for i in prompts}
    while engine.running:
        for row in engine.step():
            tokens[row.request_id] += row.token_ids
            own[row.request_id] += row.logprobs[:, 0].tolist()

    def mean(wide):
        plain = {i: plain_logprobs(network, p, tokens[i], CPU, wide) for i, p in prompts.items()}
        return float(np.concatenate([np.abs(plain[i] - own[i]) for i in prompts]).mean())

    return {"float32": mean(True), "bfloat16": mean(False)}


@pytest.mark.parametrize("fp32_output", [False, True])
def test_a_sampler_has_the_output_layer_that_was_asked_for(fp32_output, student, tmp_path, monkeypatch):
    engine = engine_of(tmp_path, monkeypatch, fp32_output)
    own, other = ("float32", "bfloat16") if fp32_output else ("bfloat16", "float32")
    try:
        loaded = errors(engine, student.network)
        with torch.no_grad():
            for _, parameter in student.trained_parameters():
                parameter.mul_(0.9)
        engine.load_weights(student.weight_update(1, torch.bfloat16))
        published = errors(engine, student.network)
    finally:
        engine.close()
    for found in (loaded, published):
        assert found[own] < 1e-5 < 1e-3 < found[other]


@pytest.mark.parametrize("fp32_output", [False, True])
def test_a_teacher_on_vllm_agrees_with_one_on_transformers_where_both_are_float32(
    fp32_output, student, tmp_path, monkeypatch
):
    """The latter's output layer is float32 in any case."""
    patch_scores(monkeypatch)
    from actors.teacher.vllm_backend import VllmTeacher
    from actors.teacher.vllm_engine import start_engine

    config = make_config(
        str(tmp_path), str(tmp_path), numerics={"fp32_output_layer": fp32_output}, rollout={"top_k_logprobs": 8},
        scorer={"num_gpus": 1, "cache_block": 32, "max_batch_tokens": 128},
    )  # fmt: skip
    settings = on_cpu(ScorerSettings.from_config(config, str(tmp_path), (1,), LONGEST))
    settings = replace(settings, teacher=settings.teacher.model_copy(update={"dtype": "bfloat16"}))
    engine = start_engine(settings, kv_cache_memory_bytes=2**25, enforce_eager=True)
    patch_v2_flag(monkeypatch)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(2, VOCABULARY, n).tolist(), rng.integers(2, VOCABULARY, 20).tolist()) for n in (5, 31)]
    ours, theirs = (
        chunked_logprobs(t, pairs, 8) for t in (VllmTeacher(settings, engine), TransformersTeacher(settings))
    )
    engine.engine_core.shutdown()
    gap = np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean()
    assert gap < 1e-5 if fp32_output else gap > 1e-3
    for own, plain in zip(theirs, TransformersTeacher(settings).plain_logprobs(pairs), strict=True):
        assert (np.abs(own - plain).mean() < 1e-5) == fp32_output, "the plain pass is told as well"
