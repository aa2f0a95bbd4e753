"""Families of models as scorers and learners: exact or refused, as docs/models.md says; never wrong."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.driver.preparation import prepare
from kat_ray.errors import ModelError
from kat_ray.models.inspect import check_models
from kat_ray.models.support import check_roles, refusal
from tests.support import verdicts
from tests.support.configs import make_config
from tests.support.families import BY_NAME, FAMILIES, config_of, make_family
from tests.support.tokenizers import make_tokenizer

each = pytest.mark.parametrize(
    "name", [f.name if f.fast else pytest.param(f.name, marks=pytest.mark.nightly) for f in FAMILIES]
)


@pytest.fixture(scope="module")
def page():
    return verdicts.rows_of_page()


def test_the_page_has_every_family_in_its_order(page):
    assert list(page) == [f.name for f in FAMILIES]
    assert len(page) >= 40


@each
def test_a_family_is_computed_as_the_page_says(name, page, tmp_path):
    make_family(BY_NAME[name], tmp_path)
    found = verdicts.tried_cells(BY_NAME[name], tmp_path)
    assert found == {role: page[name][role] for role in verdicts.TRIED}
    assert set(found.values()) <= {verdicts.EXACT, *(c for c in found.values() if c.startswith("refused: "))}


def test_what_is_decided_from_the_configuration_is_on_the_page(page):
    for family in FAMILIES:
        own = page[family.name]
        assert verdicts.other_cells(family) == {r: c for r, c in own.items() if r not in verdicts.TRIED}
        for role in verdicts.TRIED:
            assert (verdicts.decided(family, role) or verdicts.EXACT) == own[role], family.name


def test_what_an_actor_refuses_is_refused_before_a_run_starts(tmp_path):
    """By `check_models`, which `kat-ray doctor` and a run's start ask, with the same words."""
    tokenizer = make_tokenizer()
    for number, family in enumerate(FAMILIES):
        folder, config = tmp_path / str(number), config_of(family)
        config.architectures = ["TinyForCausalLM"]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({"x": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
        longest = {"max_tokens": verdicts.LONGEST - 1}
        padded, packed = (refusal(config, role, verdicts.LONGEST) for role in ("learner", "learner-packed"))
        for batching, own in {"padded": padded, **({"packed": packed} if packed != padded else {})}.items():
            pair = make_config(
                str(folder), str(folder), rollout=longest, sampler={"num_gpus": 1}, learner={"batching": batching}
            )
            found = [own, refusal(config, "scorer-transformers", verdicts.LONGEST)]
            reasons = [r.reason for r in found if r]
            if not reasons:
                check_models(pair)
                continue
            with pytest.raises(ModelError) as error:
                check_models(pair)
            if config.get_text_config().max_position_embeddings > verdicts.LONGEST:  # else refused for that already
                assert str(folder) in str(error.value) and reasons[0] in str(error.value), family.name


def test_lengths_that_only_the_data_tell_are_refused_before_a_run_starts(tmp_path):
    """A prompt of 125 and an answer of 8: beyond an original length of 128, which no field of the run exceeds."""
    folder, config = tmp_path / "model", config_of(BY_NAME["Phi-3, longrope"])
    config.architectures = ["TinyForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file({"x": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    data = tmp_path / "prompts.jsonl"
    pair = make_config(str(folder), str(folder), rollout={"max_tokens": 8}, data={"path": str(data)})
    data.write_text('{"prompt": "%s"}\n' % ("a" * 120))
    assert prepare(pair).paths.max_model_len == 128
    data.write_text('{"prompt": "%s"}\n' % ("a" * 125))
    with pytest.raises(ModelError, match=r"beyond 128 tokens changes .* prompt and answer may have 133"):
        prepare(pair)


def test_a_model_of_linear_layers_only_is_trained(tmp_path):
    """transformers' cache of such a model knows no length, and asking for it is an error."""
    make_family(BY_NAME["Qwen3.5"], tmp_path, layer_types=["linear_attention"] * 3)
    logprobs, gradients = verdicts.learner_errors(tmp_path)
    assert logprobs < 1e-3 and gradients < 1e-3


@each
def test_weights_are_published_as_a_checkpoint_has_them(name, tmp_path):
    family = BY_NAME[name]
    if refusal(config_of(family), "learner", verdicts.LONGEST):
        pytest.skip("refused as a student")
    make_family(family, tmp_path)
    published, saved = verdicts.published(tmp_path), verdicts.on_disk(tmp_path)
    # A tied output layer is published too: without it vLLM keeps its old one.
    assert set(published) - set(saved) <= {n for n in published if n.endswith("lm_head.weight")}
    assert set(saved) <= set(published)
    for key, array in saved.items():
        np.testing.assert_array_equal(published[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral, sliding window", "OPT"])
def test_gradients_with_recomputed_activations(name, tmp_path):
    make_family(BY_NAME[name], tmp_path)
    logprobs, gradients = verdicts.learner_errors(tmp_path, gradient_checkpointing=True)
    assert logprobs < 1e-3 and gradients < 1e-3


def test_positions_that_depend_on_the_batch_are_taken_up_to_the_original_length():
    config = config_of(BY_NAME["Phi-3, longrope"])
    assert refusal(config, "learner", 128) is None and refusal(config, "scorer-transformers", 128) is None
    assert "beyond 128 tokens" in refusal(config, "learner", 129).reason
    assert "and prompt and answer may have 129" in refusal(config, "sampler-gpu", 129).reason
    assert refusal(config, "scorer-vllm", 128) is not None, "vLLM generates a token after what it scores"
    assert refusal(config, "scorer-vllm", 127) is None


def test_experts_are_generated_with_on_gpus_only():
    models = {name: config_of(BY_NAME["Mixtral, sliding window"]) for name in ("student", "teacher")}
    with pytest.raises(ModelError, match=r"student.path = 'a': samplers on CPUs .* mixture of experts.*num_gpus"):
        check_roles(make_config("a", "b"), models, 64)
    check_roles(make_config("a", "b", sampler={"num_gpus": 1}), models, 64)
