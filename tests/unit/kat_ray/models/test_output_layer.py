"""What a model's own code does around its output layer: found by asking it, or refused by name."""

import pytest
import torch
import transformers

from kat_ray.errors import UserError
from kat_ray.models.load import check_output_layer
from kat_ray.models.output_layer import output_layer, text_decoder

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}


def model_of(name, seed=0, **changes):
    """A random model whose logits are large enough that scales and caps show."""
    config = getattr(transformers, f"{name.removesuffix('LMHeadModel')}Config")(**(SIZES | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, name if name.endswith("Model") else f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


FAMILIES = [
    ("Llama", {}, (1, 1, None)),
    ("Cohere", {"logit_scale": 0.0625}, (1, 0.0625, None)),
    ("Cohere2", {"logit_scale": 0.3, "head_dim": 16}, (1, 0.3, None)),
    ("Granite", {"logits_scaling": 13.0}, (1, 1 / 13, None)),
    ("GraniteMoe", {"logits_scaling": 8.0, "num_local_experts": 2}, (1, 1 / 8, None)),
    ("MiniCPM3", {"dim_model_base": 8, **LATENT}, (8 / 32, 1, None)),
    ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 16}, (1, 1, 3)),
    ("VaultGemma", {"final_logit_softcapping": 30.0, "head_dim": 16}, (1, 1, 30)),
    ("NanoChat", {"final_logit_softcapping": 15.0}, (1, 1, 15)),
    ("RecurrentGemma", {"logits_soft_cap": 4.0, "lru_width": 32}, (1, 1, 4)),
    ("GPT2LMHeadModel", GPT2, (1, 1, None)),
    ("GPTNeoX", {}, (1, 1, None)),
    ("GPTJ", GPT2 | {"rotary_dim": 8}, (1, 1, None)),
    ("Falcon", {}, (1, 1, None)),
    ("Bloom", {"n_layer": 1, "n_head": 2}, (1, 1, None)),
    ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}, (1, 1, None)),
    ("Phi", {}, (1, 1, None)),
]


@pytest.mark.parametrize(("name", "changes", "expected"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_logits_are_the_models_own(name, changes, expected):
    model = model_of(name, **changes)
    check_output_layer(model, "student")
    layer = output_layer(model)
    *scales, cap = expected
    assert (layer.hidden_scale, layer.scale) == pytest.approx(scales, rel=1e-6) and layer.cap == cap
    ids = torch.arange(2, 30)[None]
    own = layer.logits(text_decoder(model)(input_ids=ids, use_cache=False)[0][0])
    theirs = model(input_ids=ids, use_cache=False).logits[0]
    assert layer.vocabulary == theirs.shape[-1] and theirs.std() > 0.05
    torch.testing.assert_close(own, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Granite", "Gemma2"])
def test_in_half_precision_the_scale_is_exact(name, dtype):
    changes = {"Granite": {"logits_scaling": 13.0}, "Gemma2": {"final_logit_softcapping": 3.0}}.get(name, {})
    model = model_of(name, **changes).to(dtype)
    check_output_layer(model, "student")
    assert output_layer(model).scale == pytest.approx(1 / changes.get("logits_scaling", 1.0), rel=1e-6)


class Altered(transformers.LlamaForCausalLM):
    """A model whose own code changes what lies behind its output layer, as code of a model directory may."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.clamp(-5, 5), "something else than a scale and a soft cap"),
        (lambda x: x + 1, "something else than a scale and a soft cap"),
        (lambda x: x.masked_fill(torch.arange(x.shape[-1]) > 50, -1e9), "something else than a scale"),
        (lambda x: x[..., :-2], "does not take its logits from its output layer as they are"),
    ],
)
def test_what_is_not_a_scale_and_a_cap_is_refused(change, message):
    model = Altered(transformers.LlamaConfig(**SIZES)).eval()
    model.change = change
    with pytest.raises(UserError, match=f"^student.path = 'x': Altered .*{message}"):
        check_output_layer(model, "student.path = 'x'")


def test_a_layer_between_body_and_output_layer_is_refused():
    with pytest.raises(UserError, match="ElectraForCausalLM does more between body and output layer"):
        output_layer(model_of("Electra", is_decoder=True, embedding_size=32))


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(UserError, match="LlamaModel has no single linear output layer"):
        output_layer(transformers.LlamaModel(transformers.LlamaConfig(**SIZES)))
