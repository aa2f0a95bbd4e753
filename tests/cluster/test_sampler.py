"""The real sampler: vLLM's engine in an actor, beside a plain forward of the model that it was given."""

import numpy as np
import pytest
import ray
import torch

from actors.cluster.placement import Placement, environments
from actors.cluster.replica import remote_class
from actors.learner.model import StudentModel
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from kat_ray.cluster.threads import threads_of
from kat_ray.errors import ModelError, UserError
from kat_ray.types.records import SamplingSettings, WeightUpdate
from tests.support.configs import make_config
from tests.support.models import make_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

PROMPTS = [[5, 6, 7], [9] * 40, list(range(100, 117)), [3]]
TOLERANCE = 1e-4  # nats, float32 on both sides


class Opened(StudentSampler):
    """A sampler whose engine can be mishandled."""

    def _add(self, prompts):
        for i, prompt in enumerate(prompts):
            self._engine.add(str(i), prompt, i, SamplingSettings(8, 1.0, 1.0, 0, ()))
        self._engine.step()

    def abort_some(self, prompts, names):
        """Abort requests after a step: those of them that give rows afterwards, and all others that do."""
        self._add(prompts)
        self._engine.abort(names)
        given = set()
        while self._engine.running:
            given |= {rows.request_id for rows in self._engine.step()}
        return sorted(given & {*names}), given - {*names}

    def forget_one(self, prompts, name):
        """Drop a request here which vLLM goes on with."""
        self._add(prompts)
        (own,) = [own for own, given in self._engine._names.items() if given == name]
        del self._engine._names[own]
        try:
            self._engine.step()
        finally:
            self._engine._names[own] = name
            self._engine.abort([str(i) for i in range(len(prompts))])

    def fail_while_added(self, prompt):
        """A request that vLLM took before its call failed; what is left of it after an abort, here and there."""
        core, add = self._engine._core, self._engine._core.add_request

        def fails(request):
            add(request)
            raise ConnectionError("the engine's socket is closed")

        core.add_request = fails
        try:
            self._engine.add("0", prompt, 0, SamplingSettings(8, 1.0, 1.0, 0, ()))
        except ConnectionError:
            self._engine.abort(["0"])
        finally:
            core.add_request = add
        return self._engine.running, core.engine_core.scheduler.get_request_counts()

    def check_build(self, device):
        from actors.sampler.vllm_engine import check_build

        check_build(device)

    def clear_while_running(self, prompt):
        """As where vLLM still holds a request that is not known here."""
        self._add([prompt])
        names, drain = self._engine._names, self._engine._drain
        self._engine._names, self._engine._drain = {}, lambda: None
        try:
            self._engine.clear_cache()
        finally:
            self._engine._names, self._engine._drain = names, drain
            self._engine.abort(["0"])


def start_sampler(model_dir, options=None, **sampler):
    """A sampler of its own process, with the environment that placement gives it."""
    config = make_config(
        model_dir, model_dir, sampler={"kv_cache_gib": 0.1, "max_num_batched_tokens": 256, **sampler}
    )
    settings = SamplerSettings.from_config(
        config, config.student, model_dir, stop_ids=(1,), vocabulary=200, max_model_len=128
    )
    env = environments(config, threads_of(config, 1))["sampler"]
    options = {"runtime_env": {"env_vars": env}} | (options or {})
    return remote_class(Opened).options(**{"num_cpus": 1} | options).remote("sampler:0", settings)


@pytest.fixture(scope="module")
def sampler(models):
    """One of the student, which holds its weights as version 0."""
    actor = start_sampler(models["student"][0])
    ray.get(actor.ready.remote(), timeout=400)
    yield actor
    ray.kill(actor)


@torch.no_grad()
def plain(model, tokens):
    """Log-probability of each token but the first, by transformers."""
    logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    return logprobs[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0].numpy()


def assert_is(model, sampler, tokens=12, seed=3):
    """What the sampler says of prompts and of its own tokens is what `model` says."""
    checks = ray.get(sampler.check.remote(PROMPTS, tokens, seed, True), timeout=200)
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


def update_of(model, version, drop=(), **more):
    """The model's weights as the learner publishes them, without some and with others."""
    update = StudentModel(model).weight_update(version, torch.float32)
    tensors = dict(zip(update.names, update.arrays, strict=True))
    tensors = {name: array for name, array in (tensors | more).items() if name not in drop}
    return WeightUpdate(version, tuple(tensors), ("float32",) * len(tensors), tuple(tensors.values()))


def test_published_weights_are_those_that_it_samples_from(models, sampler):
    model = make_model(models["student"][0] + "-changed", seed=7)
    for version, published in ((1, model), (2, models["student"][1])):
        assert ray.get(sampler.load_weights.remote(update_of(published, version)), timeout=200) == version
        assert_is(published, sampler)


@pytest.mark.parametrize(
    "drop, more, message",
    [
        ("model.layers.1.self_attn.k_proj.weight", {}, r"new values for model\.layers\.1\.self_attn\.qkv_proj \("),
        ("model.norm.weight", {}, r"no new values for model\.norm\.weight"),
        ("", {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)},
         r"passed over model\.layers\.0\.self_attn\.rotary_emb\.inv_freq"),
    ],
)  # fmt: skip
def test_what_vllm_did_not_take_is_an_error_that_names_it(models, sampler, drop, more, message):
    """vLLM itself would go on, with a warning in its log for some of these."""
    model = models["student"][1]
    with pytest.raises(ModelError, match=message):
        ray.get(sampler.load_weights.remote(update_of(model, 3, [drop], **more)), timeout=200)
    ray.get(sampler.load_weights.remote(update_of(model, 0)), timeout=200)
    assert_is(model, sampler)


def test_prompts_that_exceed_a_batch_together_are_not_split(models, sampler):
    """vLLM's CPU build cannot run a piece of a prompt whose request has a seed of its own; 1,000 tokens > 384."""
    prompts = tuple(tuple(range(3 + i, 103 + i)) for i in range(10))
    seeds, settings = tuple(range(10)), SamplingSettings(6, 1.0, 1.0, 0, (1,))
    together = ray.get(sampler.complete.remote(prompts, seeds, settings, 0), timeout=200)
    for i in (0, 6, 9):
        assert ray.get(sampler.complete.remote(prompts[i : i + 1], seeds[i : i + 1], settings, 0)) == [together[i]]
    checks = ray.get(sampler.check.remote(prompts, 4, 5, True), timeout=200)
    for prompt, check in zip(prompts, checks, strict=True):
        expected = plain(models["student"][1], [*prompt, *check.token_ids.tolist()])
        np.testing.assert_allclose([*check.prompt_logprobs, *check.logprobs], expected, atol=TOLERANCE)


def test_aborted_requests_give_nothing_more(models, sampler):
    """As vLLM has it: a rollout that is aborted half-way has no row in any later step, and the engine goes on."""
    late, left = ray.get(sampler.abort_some.remote([*PROMPTS, [8, 9]], ("0", "3")), timeout=200)
    assert (late, left) == ([], {"1", "2", "4"})
    assert_is(models["student"][1], sampler)


def test_tokens_after_an_abort_are_an_error(sampler):
    with pytest.raises(RuntimeError, match=r"tokens of requests that were aborted or had ended: 2#\d+;"):
        ray.get(sampler.forget_one.remote(PROMPTS, "2"), timeout=200)


def test_a_request_that_failed_while_it_was_added_can_be_aborted(sampler):
    assert ray.get(sampler.fail_while_added.remote(PROMPTS[1]), timeout=200) == (0, (0, 0))


def test_a_cache_that_is_not_cleared_is_an_error(sampler):
    """vLLM answers False and goes on."""
    with pytest.raises(RuntimeError, match="did not clear its prefix cache"):
        ray.get(sampler.clear_while_running.remote(PROMPTS[1]), timeout=200)


def test_a_vllm_that_is_built_for_cpus_is_no_engine_on_a_gpu(sampler):
    with pytest.raises(UserError, match=r"sampler\.num_gpus asks for an engine on cuda, and .* is built for cpu"):
        ray.get(sampler.check_build.remote("cuda"), timeout=200)


@pytest.mark.nightly
def test_two_processes_of_an_engine_hold_what_is_published(models):
    """In a placement group, as a run places its samplers: vLLM must not ask Ray for a bundle of each worker."""
    size = {"tensor_parallel_size": 2, "num_cpus": 2}
    config = make_config(models["student"][0], models["student"][0], sampler=size)
    placement = Placement(config, fixed_size=False, run="tp", only=["sampler"])
    try:
        options = placement.options("sampler", 0, placement.places("sampler")[0])
        actor = start_sampler(models["student"][0], options, **size)
        ray.get(actor.ready.remote(), timeout=400)
        assert_is(models["student"][1], actor)
        model = make_model(models["student"][0] + "-parallel", seed=8)
        ray.get(actor.load_weights.remote(update_of(model, 1)), timeout=200)
        assert_is(model, actor)
        with pytest.raises(ModelError, match=r"no new values for model\.layers\.0\.mlp\.gate_up_proj \("):
            ray.get(
                actor.load_weights.remote(update_of(model, 2, ["model.layers.0.mlp.up_proj.weight"])), timeout=200
            )
    finally:
        placement.remove()
