"""The estimate of a run's memory, by hand."""

from dataclasses import replace

import pytest
import torch

from kat_ray.models.inspect import ModelFacts, ModelInfo
from kat_ray.models.memory import GIB, learner_bytes, memory_needed, memory_notes, micro_batch
from kat_ray.models.shape import ModelShape, shape_of
from tests.support.configs import make_config
from tests.support.models import make_model

INFO = ModelInfo("m", "LlamaForCausalLM", 1000, 4096, (1,), True, 10**6, "F32", ModelShape(3, 10, 20))
FACTS = ModelFacts(INFO, {"teacher": replace(INFO, parameters=2 * 10**6)}, None, (1,), ())
TOKEN = 3 * (11 * 10 + 4 * 20) * 4  # bytes: 3 layers, in float32


def shape_of_three_layers():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=1000, hidden_size=10, intermediate_size=20, num_hidden_layers=3, num_attention_heads=1
    )


def a_config(**sections):
    base = {
        "rollout": {"prompts_per_step": 8},
        "learner": {"dtype": "float32", "micro_batch_tokens": 100, "logits_chunk_tokens": 10},
    }
    return make_config("s", "t", **{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def test_a_micro_batch_by_hand():
    found = micro_batch(a_config(), INFO, 40)
    assert (found.tokens, found.bytes) == (100, 100 * TOKEN + 10 * 1000 * 4 * 3)


@pytest.mark.parametrize(
    ("sections", "longest", "tokens"),
    [
        ({}, 150, 150),  # a rollout that is longer has a micro-batch of its own
        ({}, 5, 40),  # 8 rollouts of 5 tokens are less than one micro-batch
        ({"learner": {"world_size": 4}}, 5, 10),
    ],
)
def test_the_largest_that_a_step_can_have(sections, longest, tokens):
    assert micro_batch(a_config(**sections), INFO, longest).tokens == tokens


def test_what_is_kept_less_of():
    half = micro_batch(a_config(learner={"dtype": "bfloat16", "micro_batch_tokens": 100}), INFO, 40)
    assert half.bytes == pytest.approx(100 * TOKEN / 2 + 10 * 1000 * 4 * 3)
    again = micro_batch(a_config(learner={"gradient_checkpointing": True}), INFO, 40)
    assert again.bytes < micro_batch(a_config(), INFO, 40).bytes / 1.2
    assert micro_batch(a_config(), replace(INFO, shape=None), 40) is None


def test_zero_divides_the_optimiser():
    assert learner_bytes(a_config(), 10) == 180
    assert learner_bytes(a_config(learner={"world_size": 4}), 10) == 90
    assert learner_bytes(a_config(learner={"world_size": 4, "zero_stage": 0}), 10) == 180


def test_one_memory_for_all_on_a_cpu():
    config = a_config(sampler={"replicas": 2, "kv_cache_gib": 0.5}, scorer={"replicas": 3})
    ((name, needed, words),) = memory_needed(config, FACTS, 40, None)
    batch = micro_batch(config, INFO, 40).bytes
    assert name == "memory" and "a micro-batch of 100 tokens" in words
    processes = (1.2 + 2 * 0.9 + 3 * 0.4 + 0.7) * GIB
    assert needed == pytest.approx(processes + 18e6 + batch + 3 * 4e6 + 2 * (4e6 + 0.5 * GIB) + 3 * 8e6)
    assert not list(
        memory_needed(config, replace(FACTS, teachers={"teacher": replace(INFO, parameters=None)}), 40, None)
    )


def test_on_a_cpu_each_process_of_a_sampler_counts_and_adapters_alone_are_published():
    ((_, needed, _),) = memory_needed(a_config(), FACTS, 40, None)
    ((_, parallel, _),) = memory_needed(a_config(sampler={"tensor_parallel_size": 2}), FACTS, 40, None)
    assert parallel - needed == pytest.approx(0.9 * GIB)
    facts = replace(FACTS, student=replace(INFO, config=shape_of_three_layers()))
    merged, alone = (
        memory_needed(a_config(learner={"lora": {"rank": 4, "publish": publish}}), facts, 40, None)
        for publish in ("merged", "adapters")
    )
    ((_, whole, _),), ((_, part, _),) = merged, alone
    adapters = 3 * 4 * (4 * (10 + 10) + 3 * (10 + 20))
    assert whole - part == pytest.approx(3 * 4 * (10**6 - adapters))


def test_what_shares_the_learners_gpu_is_added_up():
    """vLLM's part is a share of the memory; a teacher of transformers takes its weights."""
    parts = {
        "learner": {"num_gpus": 0.4},
        "sampler": {"num_gpus": 0.3, "gpu_memory_utilization": 0.25},
        "scorer": {"num_gpus": 0.3, "gpu_memory_utilization": 0.5},
    }
    gpu = 10 * GIB
    ((_, alone, _),) = memory_needed(a_config(learner={"num_gpus": 0.4}), FACTS, 40, gpu)
    ((name, needed, words),) = memory_needed(a_config(**parts), FACTS, 40, gpu)
    assert name == "GPU memory" and needed == pytest.approx(alone + 0.75 * gpu)
    assert "sampler.gpu_memory_utilization = 0.25" in words and "scorers of teacher (" in words
    parts["scorer"]["backend"] = "transformers"
    ((_, needed, _),) = memory_needed(a_config(**parts), FACTS, 40, gpu)
    assert needed == pytest.approx(alone + 0.25 * gpu + 2e6 * 4)
    parts["sampler"]["max_replicas"] = 2  # Ray may give the second one another GPU
    ((_, needed, words),) = memory_needed(a_config(**parts), FACTS, 40, gpu)
    assert needed == pytest.approx(alone) and words.startswith("a rank of the learner")


def test_of_a_student_with_adapters_a_rank_holds_the_weights_and_little_more():
    facts = replace(FACTS, student=replace(INFO, config=shape_of_three_layers()))
    adapters = 3 * 4 * (4 * (10 + 10) + 3 * (10 + 20))  # rank 4 beside four matrices of attention and three others
    for ranks, stage, held in ((1, 1, 4e6), (2, 1, 4e6), (2, 3, 2e6)):
        learner = {"num_gpus": 1, "world_size": ranks, "zero_stage": stage, "lora": {"rank": 4}}
        config = a_config(learner=learner)
        ((_, needed, _),) = memory_needed(config, facts, 40, 10 * GIB)
        batch = micro_batch(config, INFO, 40).bytes
        assert needed == pytest.approx(held + adapters * (6 + 12 / ranks) + batch)


def test_what_does_not_fit_is_said_and_what_to_do():
    (line,) = memory_notes(a_config(), FACTS, 40, 10**6, None)
    assert line.startswith("memory: processes, weights, optimiser, KV caches and micro-batches (")
    assert "will not fit" in line
    assert "learner.micro_batch_tokens = 100)" in line and "lower learner.micro_batch_tokens" in line
    assert not list(memory_notes(a_config(), FACTS, 40, 10 * GIB, None))
    on_gpu = a_config(learner={"num_gpus": 1})
    assert len(list(memory_notes(on_gpu, FACTS, 40, 10 * GIB, 10**6))) == 1
    assert not list(memory_notes(on_gpu, FACTS, 40, 0, 10 * GIB))


def test_sizes_come_from_the_configuration():
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    assert shape_of(LlamaConfig(**sizes)) == (2, 64, 96)
    assert shape_of(Qwen3MoeConfig(**sizes, num_experts_per_tok=4, moe_intermediate_size=24)) == (2, 64, 96)
    assert shape_of(GPT2Config()) is None, "its MLP has no field"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_is_near_what_autograd_keeps(kind, dtype, tmp_path):
    model = make_model(tmp_path, kind).to(getattr(torch, dtype)).train()
    ids = torch.arange(4 * 32).reshape(4, 32)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()  # held in `kept`, so that no other gets its place
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    assert hidden.requires_grad
    info = replace(INFO, vocabulary=0, shape=shape_of(model.config))
    found = micro_batch(a_config(learner={"dtype": dtype, "micro_batch_tokens": ids.numel()}), info, 100)
    assert found.tokens == ids.numel()
    assert 0.9 < sum(s.nbytes() for s in kept.values()) / found.bytes < 1.4
