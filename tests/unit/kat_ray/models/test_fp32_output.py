"""The plain forward pass with its output layer in float32, and who is told of it."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from actors.learner.settings import LearnerSettings
from actors.sampler.settings import SamplerSettings
from actors.teacher.settings import ScorerSettings
from kat_ray.errors import UserError
from kat_ray.models.fp32_output import fp32_output, output_dtypes, require_fp32_output, vllm_arguments
from kat_ray.models.load import plain_logprobs
from kat_ray.models.text_model import text_decoder
from tests.support.configs import make_config

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, initializer_range=1.0,
)  # fmt: skip
PROMPT, ANSWER = [3, 7, 11], [2, 40, 5, 17, 33]
CPU = torch.device("cpu")


def model_of(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).bfloat16().eval()


def exact(model, finish):
    """From the model's own hidden states: products and everything after them in float64."""
    ids = torch.tensor([[*PROMPT, *ANSWER][:-1]])
    with torch.no_grad():
        hidden = text_decoder(model)(input_ids=ids, use_cache=False)[0][0, -len(ANSWER) :].double()
        logits = finish(hidden @ model.get_output_embeddings().weight.double().T)
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ANSWER)[:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    ("name", "changes", "finish"),
    [
        ("Llama", {}, lambda x: x),
        ("Llama", {"tie_word_embeddings": True}, lambda x: x),
        ("Granite", {"logits_scaling": 0.5}, lambda x: x * 2),
        ("Gemma2", {"final_logit_softcapping": 30.0}, lambda x: 30 * torch.tanh(x / 30)),
        ("Phi", {}, None),  # its output layer has a bias
    ],
)
def test_only_the_output_layer_is_wider(name, changes, finish):
    model = model_of(name, **changes)
    if finish is None:
        bias = model.get_output_embeddings().bias
        with torch.no_grad():
            bias.normal_()
        finish = lambda x: x + bias.double()  # noqa: E731
    wanted = exact(model, finish)
    wide = plain_logprobs(model, PROMPT, ANSWER, CPU, wide=True)
    own = plain_logprobs(model, PROMPT, ANSWER, CPU)
    assert abs(wide - wanted).max() < 1e-4 < 1e-2 < abs(own - wanted).max()
    assert "forward" not in vars(model.get_output_embeddings()), "the model is as it was"


def test_an_exception_leaves_the_model_as_it_was():
    model = model_of("Llama")
    with pytest.raises(KeyError), fp32_output(model):
        raise KeyError
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("on", [False, True])
def test_all_three_sides_are_told_or_none(on):
    config = make_config("s", "t", numerics={"fp32_output_layer": on})
    given = dict(stop_ids=(1,), max_model_len=9)
    told = (
        SamplerSettings.from_config(config, config.student, "s", vocabulary=9, **given),
        ScorerSettings.from_config(config, "t", (1,), 9),
        LearnerSettings.from_config(config, "s", (1,)),
    )
    assert [side.fp32_output for side in told] == [on] * 3
    assert not make_config("s", "t").numerics.fp32_output_layer
    assert vllm_arguments(on) == ({"hf_overrides": {"head_dtype": "float32"}} if on else {})


@pytest.mark.parametrize(
    ("types", "told"),
    [
        ([torch.bfloat16], "computes logits in bfloat16"),  # as where a platform has no float32
        ([torch.float32, torch.bfloat16], "computes logits in bfloat16, float32"),
        ([], "does not say how it computes logits"),
    ],
)
def test_an_engine_that_rounds_is_refused(types, told):
    def worker(types):
        layers = [SimpleNamespace(head_dtype=t) for t in types] + [SimpleNamespace()]
        return SimpleNamespace(get_model=lambda: SimpleNamespace(modules=lambda: layers))

    wide = output_dtypes(worker([torch.float32, torch.float32]))
    require_fp32_output([wide, wide], "student.path = 'x'")
    with pytest.raises(UserError, match=f"^numerics.fp32_output_layer = true: vLLM's model of student.* {told};"):
        require_fp32_output([wide, output_dtypes(worker(types))], "student.path = 'x'")
