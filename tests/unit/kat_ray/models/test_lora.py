"""Adapters: what they add by hand, which layers take them, and what a directory of them makes of its base."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kat_ray.config import LearnerConfig, LoraConfig, ModelConfig
from kat_ray.errors import ModelError, UserError
from kat_ray.models.adapter_files import BaseModelFacts, read_adapter, write_adapter, write_merged
from kat_ray.models.inspect import inspect_model
from kat_ray.models.load import load_causal_lm
from kat_ray.models.lora import (
    Adapter,
    adapted_layers,
    adapter_of,
    add_adapters,
    base_digest,
    merged_weight,
)
from kat_ray.models.lora_targets import adapter_parameters, check_targets, target_layers
from tests.support.models import make_model


def test_a_merged_weight_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    adapter = Adapter(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.5]]), 0.5)
    assert merged_weight(weight, adapter).tolist() == [[2.0, 1.0], [3.25, 3.75]]
    # Rows of length 5 and sqrt(3.25^2 + 3.75^2) = 4.9624, given the lengths 5 and 1.
    long = adapter._replace(magnitude=torch.tensor([np.sqrt(5.0), 1.0]))
    expected = [[2.0, 1.0], [3.25 / 4.962358, 3.75 / 4.962358]]
    np.testing.assert_allclose(merged_weight(weight, long).numpy(), expected, rtol=1e-6)
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.0]], "the base is not touched"


def test_a_merged_weight_is_not_rounded_on_the_way():
    weight = torch.full((1, 1), 256.0, dtype=torch.bfloat16)  # the next number up is 258
    step = Adapter(torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 0.5, dtype=torch.bfloat16), 1.0)
    assert merged_weight(weight, step).dtype == torch.float32 and merged_weight(weight, step).item() == 256.5


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**31 - 1))
def test_a_merged_layer_computes_what_pefts_layer_does(rank, alpha, dora, seed):
    torch.manual_seed(seed)
    network = tiny()
    add_adapters(network, LoraConfig(rank=rank, alpha=alpha, dora=dora), "student", seed)
    for name, layer in adapted_layers(network):
        with torch.no_grad():
            adapter_of(layer).b.normal_()
        x = torch.randn(3, layer.in_features)
        weight = merged_weight(layer.get_base_layer().weight, adapter_of(layer))
        torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-3, atol=1e-4, msg=name)


def tiny(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    ) | changes  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", 14),
        (["q_proj", "mlp.up_proj"], 4),
        (["model.layers.1.self_attn.v_proj"], 1),
    ],
)
def test_targets_are_the_last_parts_of_names(targets, layers):
    network, lora = tiny(), LoraConfig(rank=3, targets=targets)
    before = base_digest(network)
    chosen = target_layers(network, lora, "student")
    assert len(chosen) == layers and "lm_head" not in chosen
    sizes = sum(3 * (m.in_features + m.out_features) for m in chosen.values())
    assert adapter_parameters(network.config, lora) == sizes
    add_adapters(network, lora, "student", 0)
    assert [n for n, _ in adapted_layers(network)] == list(chosen)
    assert sum(p.numel() for n, p in network.named_parameters() if "lora_" in n) == sizes
    assert base_digest(tiny()) != before, "random weights"


@pytest.mark.parametrize(
    ("target", "tied", "says"),
    [
        (
            "c_attn",
            True,
            "is no layer of student.path = 'x', whose linear layers are q_proj, k_proj, v_proj",
        ),
        ("lm_head", True, "it is tied in student.path = 'x': one matrix is embedding and output layer"),
        ("embed_tokens", True, "it is tied"),
        ("lm_head", False, "the loss takes the output layer as one matrix"),
        ("norm", True, "'norm' is a LlamaRMSNorm in student.path = 'x'; take linear layers: q_proj"),
    ],
)
def test_what_takes_no_adapter_is_refused_with_what_does(target, tied, says):
    config = tiny(tie_word_embeddings=tied).config
    with pytest.raises(ModelError) as error:
        check_targets(config, LoraConfig(targets=["q_proj", target]), "student.path = 'x'")
    assert says in str(error.value) and str(error.value).startswith("learner.lora.targets: ")
    assert "down_proj" in str(error.value)


def test_the_first_matrices_come_from_the_seed_alone():
    def first(seed, drawn):
        network = tiny()
        torch.manual_seed(drawn)
        add_adapters(network, LoraConfig(), "student", seed)
        left = torch.rand(1).item()
        return next(adapter_of(layer).a for _, layer in adapted_layers(network)), left

    (a, left), (b, other), (c, _) = first(1, 5), first(1, 6), first(2, 5)
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(5)
    assert left == torch.rand(1).item() != other, "who else draws numbers gets the same ones"


def test_without_peft_a_run_with_adapters_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"learner.lora: needs peft.*pip install 'kat-ray\[lora\]'"):
        add_adapters(tiny(), LoraConfig(), "student", 0)


@pytest.fixture
def adapted(tmp_path):
    """A directory of adapters that are not 0, its base, and the network that holds both."""
    from peft.utils import get_peft_model_state_dict

    make_model(tmp_path / "base", seed=3)
    model = ModelConfig(path=str(tmp_path / "base"))
    network = load_causal_lm(model, model.path, "float32", "student")
    facts = BaseModelFacts(path=model.path, revision=None, dtype="float32", digest=base_digest(network))
    config = add_adapters(network, LoraConfig(rank=4, alpha=8), "student", 0)
    for _, layer in adapted_layers(network):
        with torch.no_grad():
            adapter_of(layer).b.normal_(std=0.05)
    path = tmp_path / "step-1"
    path.mkdir()
    tensors = get_peft_model_state_dict(network, adapter_name="default")
    write_adapter(path, config, {f"base_model.model.{n}": t for n, t in tensors.items()}, facts)
    return SimpleNamespace(path=path, base=tmp_path / "base", network=network)


IDS = torch.tensor([[5, 7, 2, 90, 4, 4, 120]])


def logprobs(network):
    with torch.no_grad():
        return network(input_ids=IDS).logits.log_softmax(-1)


def test_adapters_and_merged_model_load_as_anybody_loads_them(adapted, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert json.loads((adapted.path / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    wanted = logprobs(adapted.network)
    base = AutoModelForCausalLM.from_pretrained(adapted.base)
    assert (logprobs(base) - wanted).abs().max() > 0.1, "the adapters must matter for this to mean anything"
    peft = PeftModel.from_pretrained(base, str(adapted.path))
    torch.testing.assert_close(logprobs(peft), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logprobs(AutoModelForCausalLM.from_pretrained(adapted.path)), wanted, rtol=0, atol=1e-5
    )
    write_merged(adapted.path, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logprobs(merged), wanted, rtol=0, atol=1e-4)
    assert merged.config.use_cache and not (tmp_path / "out" / "adapter_config.json").exists()
    write_merged(adapted.path, tmp_path / "half", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name].to(torch.bfloat16)), name


def test_the_base_may_have_moved_but_not_changed(adapted, tmp_path):
    moved = adapted.base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="base: no such directory"):
        write_merged(adapted.path, tmp_path / "out")
    write_merged(adapted.path, tmp_path / "out", base=str(moved))
    with pytest.raises(ModelError, match="out: is there already"):
        write_merged(adapted.path, tmp_path / "out", base=str(moved))
    make_model(tmp_path / "other", seed=4)
    with pytest.raises(ModelError, match=r"other: its weights are not those .* with --base"):
        write_merged(adapted.path, tmp_path / "new", base=str(tmp_path / "other"))
    assert not (tmp_path / "new").exists()


def test_adapters_are_no_model(adapted):
    with pytest.raises(ModelError, match=r"holds adapters, not a model: .* kat-ray export"):
        inspect_model(ModelConfig(path=str(adapted.path)))
    with pytest.raises(UserError, match="holds adapters, not a model"):
        load_causal_lm(ModelConfig(path=str(adapted.path)), str(adapted.path), "float32", "student")


def test_a_damaged_directory_is_named(adapted, tmp_path):
    weights = adapted.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="its adapters cannot be read"):
        read_adapter(adapted.path)
    (adapted.path / "base_model.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base_model.json: is damaged"):
        write_merged(adapted.path, tmp_path / "out")
    (adapted.path / "base_model.json").unlink()
    with pytest.raises(ModelError, match=r"base_model.json: .* only kat-ray's checkpoints have it"):
        write_merged(adapted.path, tmp_path / "out")


def test_export_and_eval_make_a_model_of_a_runs_adapters(adapted, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from kat_ray.cli import main as cli
    from kat_ray.cli.export import whole_model

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{student: {path: s}, teacher: {path: t}, data: {path: d}}")
    checkpoint = adapted.path.rename(run / "checkpoints" / "step-1")
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "training").mkdir()
    wanted = logprobs(adapted.network)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: the model of {checkpoint}" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "training").exists()
    torch.testing.assert_close(
        logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted, rtol=0, atol=1e-4
    )
    with whole_model(str(checkpoint)) as merged:
        torch.testing.assert_close(
            logprobs(AutoModelForCausalLM.from_pretrained(merged)), wanted, rtol=0, atol=1e-4
        )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-1"], "nothing is left of it"
    with whole_model("org/model") as same:
        assert same == "org/model"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"publish": "adapters", "dora": True}, "publish = 'adapters': needs dora = false"),
        ({"publish": "adapters", "rank": 600}, "rank = 600: must be <= 512 with publish = 'adapters'"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"targets": []}, "at least 1 item"),
        ({"targets": "q_proj"}, "all-linear"),
        ({"dropout": 0.1}, "Extra inputs"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        LoraConfig(**fields)


def test_dora_needs_whole_weights():
    assert LearnerConfig(zero_stage=3, lora=LoraConfig()) and LearnerConfig(
        zero_stage=2, lora=LoraConfig(dora=True)
    )
    with pytest.raises(ValidationError, match=r"zero_stage = 3: needs lora.dora = false"):
        LearnerConfig(zero_stage=3, lora=LoraConfig(dora=True))


def test_adapters_are_exported_as_they_are_and_name_the_base_that_they_are_told(adapted, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM

    from kat_ray.cli import main as cli

    out, moved = tmp_path / "out", adapted.base.rename(tmp_path / "moved")
    arguments = ["export", str(adapted.path), "--to", str(out), "--adapter"]
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 2
    assert "adapters stay in the learner's type" in capsys.readouterr().err and not out.exists()
    assert cli.main([*arguments, "--base", str(moved)]) == 0
    assert "AutoPeftModelForCausalLM" in (out / "README.md").read_text()
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (adapted.path / name).read_bytes()
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("base_model.json", "path")):
        assert json.loads((out / file).read_text())[key] == str(moved)
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logprobs(loaded), logprobs(adapted.network), rtol=0, atol=1e-5)
    assert cli.main(["export", str(out), "--to", str(tmp_path / "whole")]) == 0, "its base is found again"
