"""The real sampler: vLLM's engine in an actor, beside a plain forward of the model that it was given."""

import numpy as np
import pytest
import ray
import torch

from actors.cluster.placement import environments
from actors.cluster.replica import remote_class
from actors.learner.model import StudentModel
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from tests.support.configs import make_config
from tests.support.models import make_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

PROMPTS = [[5, 6, 7], [9] * 40, list(range(100, 117)), [3]]
TOLERANCE = 1e-4  # nats, float32 on both sides


def start_sampler(model_dir, options=None, **sampler):
    """A sampler of its own process, with the environment that placement gives it."""
    config = make_config(model_dir, model_dir, sampler={"kv_cache_gib": 0.1, **sampler})
    settings = SamplerSettings.from_config(
        config, config.student, model_dir, stop_ids=(1,), vocabulary=200, max_model_len=128
    )
    options = {"runtime_env": {"env_vars": environments(config)["sampler"]}} | (options or {})
    return remote_class(StudentSampler).options(num_cpus=1, **options).remote("sampler:0", settings)


@pytest.fixture(scope="module")
def sampler(models):
    """One of the student, which holds its weights as version 0."""
    actor = start_sampler(models["student"][0])
    ray.get(actor.ready.remote(), timeout=120)
    yield actor
    ray.kill(actor)


@torch.no_grad()
def plain(model, tokens):
    """Log-probability of each token but the first, by transformers."""
    logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    return logprobs[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0].numpy()


def assert_is(model, sampler, tokens=12, seed=3):
    """What the sampler says of prompts and of its own tokens is what `model` says."""
    checks = ray.get(sampler.check.remote(PROMPTS, tokens, seed), timeout=60)
    for prompt, check in zip(PROMPTS, checks, strict=True):
        assert len(check.token_ids) == len(check.logprobs) == tokens
        expected = plain(model, prompt + check.token_ids.tolist())
        np.testing.assert_allclose([*check.prompt_logprobs, *check.logprobs], expected, atol=TOLERANCE)
    return checks


def test_a_check_agrees_with_a_plain_forward_and_leaves_nothing_behind(models, sampler):
    first = assert_is(models["student"][1], sampler)
    again = assert_is(models["student"][1], sampler)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_a_check_sees_published_weights(models, sampler):
    model = make_model(models["student"][0] + "-changed", seed=7)
    ray.get(sampler.load_weights.remote(StudentModel(model).weight_update(1, torch.float32)), timeout=60)
    assert_is(model, sampler)
    ray.get(
        sampler.load_weights.remote(StudentModel(models["student"][1]).weight_update(2, torch.float32)), timeout=60
    )
    assert_is(models["student"][1], sampler)
