"""Adapters in the learner with the real DeepSpeed: trained alone, saved alone, published merged, exported."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from kat_ray.config import LoraConfig
from kat_ray.errors import ModelError
from kat_ray.models.adapter_files import read_adapter, write_merged
from kat_ray.models.load import plain_logprobs
from kat_ray.models.lora import merged_weight
from kat_ray.run.checkpoint import CheckpointError
from kat_ray.types.records import WeightUpdate
from tests.cluster.ranks import Group, step_of
from tests.support.chunks import random_rollouts
from tests.support.models import make_model

LORA = {"rank": 4, "alpha": 8}
PAIRS = [([5, 6, 7], [9, 4, 2]), (list(range(100, 140)), [8] * 12), ([3], [1])]
CPU = torch.device("cpu")


def group_of(models, world_size=1, lora=LORA, **learner):
    return Group(models, world_size, lora=lora, lr=1e-2, **learner)


def train(models, world_size=1, **learner):
    with group_of(models, world_size, **learner) as group:
        return group.steps(models, range(3)), group.weights()


def logprobs_of(directory, pairs=PAIRS):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return np.concatenate([plain_logprobs(model, *pair, CPU) for pair in pairs])


def test_adapters_alone_are_trained_and_saved_and_their_model_is_published(models, tmp_path, tokenizer_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = {n: t.numpy() for n, t in models["student"][1].state_dict().items()}
    with group_of(models) as group:
        before = group.weights()
        for name, value in before.items():
            np.testing.assert_array_equal(value, base[name], err_msg="an adapter that is new adds nothing")
        step = step_of(models, random_rollouts(8))
        losses = [group.step(*step).loss for _ in range(5)]
        assert losses[-1] < 0.9 * losses[0]
        trained = group.all("full_state")[0]
        assert trained and all(".lora_A." in n or ".lora_B." in n for n in trained)
        digests = group.save(tmp_path / "step-5", tokenizer_dir)
        weights, plain = group.weights(), np.concatenate(group.all("logprobs", PAIRS, True)[0])
        np.testing.assert_allclose(np.concatenate(group.all("logprobs", PAIRS, False)[0]), plain, atol=1e-5)
    assert {n for n in digests if "token" not in n} == {
        "adapter_config.json", "adapter_model.safetensors", "base_model.json", "generation_config.json",
        "training/learner-0-of-1.safetensors",
    }  # fmt: skip
    adapters = read_adapter(tmp_path / "step-5")
    moved = [n for n in weights if (weights[n] != base[n]).any()]
    assert moved and {n.removesuffix(".weight") for n in moved} == set(adapters)
    for name, adapter in adapters.items():  # from the base as it is on disk: nothing has added up in between
        whole = merged_weight(torch.from_numpy(base[f"{name}.weight"]), adapter)
        np.testing.assert_array_equal(weights[f"{name}.weight"], whole.numpy())
    student = AutoModelForCausalLM.from_pretrained(models["student"][0])
    assert np.abs(np.concatenate([plain_logprobs(student, *p, CPU) for p in PAIRS]) - plain).max() > 0.1
    student.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
    np.testing.assert_allclose(np.concatenate([plain_logprobs(student, *p, CPU) for p in PAIRS]), plain, atol=1e-4)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["student"][0]), str(tmp_path / "step-5")
    )
    own = np.concatenate([plain_logprobs(peft, *pair, CPU) for pair in PAIRS])
    np.testing.assert_allclose(own, plain, atol=1e-5)
    write_merged(tmp_path / "step-5", tmp_path / "model")
    np.testing.assert_allclose(logprobs_of(tmp_path / "model"), plain, atol=1e-4)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [1]


@pytest.fixture(scope="module")
def one_rank(models):
    return {dora: train(models, zero_stage=1, lora=LORA | {"dora": dora}) for dora in (False, True)}


STAGES = [
    pytest.param(2, 3, False, marks=pytest.mark.integration),
    *(
        pytest.param(w, s, d, marks=pytest.mark.nightly)
        for w, s, d in [
            (1, 0, False), (1, 3, False), (2, 0, False), (2, 1, False), (2, 2, False), (2, 2, True), (2, 0, True),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "stage", "dora"), STAGES)
def test_ranks_and_stages_do_what_one_rank_does(one_rank, models, world_size, stage, dora):
    expected_reports, expected = one_rank[dora]
    reports, weights = train(models, world_size, zero_stage=stage, lora=LORA | {"dora": dora})
    moved = max(np.abs(expected[n] - models["student"][1].state_dict()[n].numpy()).max() for n in expected)
    assert moved > 1e-2, "the steps must have moved the weights for this to mean anything"
    for report, other in zip(expected_reports, reports, strict=True):
        assert other["loss"] == pytest.approx(report["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(report["grad_norm"], rel=1e-3)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, atol=5e-4, err_msg=name)


@pytest.mark.integration
def test_packed_rows_give_the_steps_of_padded_batches(one_rank, models):
    expected_reports, expected = one_rank[False]
    reports, weights = train(models, zero_stage=1, lora=LORA, batching="packed", micro_batch_tokens=24)
    for report, other in zip(expected_reports, reports, strict=True):
        assert other["loss"] == pytest.approx(report["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(report["grad_norm"], rel=1e-3)
        assert (other["tokens"], other["dropped_tokens"]) == (report["tokens"], 0)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, atol=5e-4, err_msg=name)


@pytest.mark.nightly
def test_what_stage_3_really_divides(tmp_path):
    """Each parameter of the others is so small that a rank keeps it whole once it was."""
    pair = {}
    for name, seed in (("student", 1), ("teacher", 2)):
        sizes = {"hidden_size": 512, "intermediate_size": 512, "initializer_range": 0.04}
        pair[name] = str(tmp_path / name), make_model(tmp_path / name, seed=seed, **sizes)
    lora, found = {"rank": 256, "alpha": 256}, []
    for world_size, stage in ((1, 1), (2, 3)):
        with group_of(pair, world_size, zero_stage=stage, lora=lora) as group:
            before = np.concatenate(group.all("logprobs", PAIRS, True)[0])
            reports = group.steps(pair, range(2))
            found.append((before, reports, group.weights(), group.all("logprobs", PAIRS, True)[0]))
    (first, reports, weights, after), (other, others, again, then) = found
    np.testing.assert_allclose(other, first, atol=1e-4)
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in reports], rel=1e-4)
    assert np.abs(np.concatenate(after) - first).max() > 0.05
    np.testing.assert_allclose(np.concatenate(then), np.concatenate(after), atol=2e-3)
    for name, value in weights.items():
        np.testing.assert_allclose(again[name], value, atol=5e-3, err_msg=name)


@pytest.mark.integration
def test_activations_are_computed_again_although_no_input_has_a_gradient(one_rank, models):
    reports, weights = train(models, zero_stage=1, gradient_checkpointing=True)
    for report, other in zip(one_rank[False][0], reports, strict=True):
        assert other["grad_norm"] == pytest.approx(report["grad_norm"], rel=1e-5) and report["grad_norm"] > 0.01
    for name, value in one_rank[False][1].items():
        np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("first", "second", "dtype", "dora"),
    [
        pytest.param((2, 3), (2, 3), "float32", False, marks=pytest.mark.integration),
        *(
            pytest.param((w, s), (w, s), t, d, marks=pytest.mark.nightly)
            for w, s, t, d in [
                (1, 0, "bfloat16", False), (1, 1, "float32", True), (2, 2, "bfloat16", False),
                (2, 2, "bfloat16", True), (2, 1, "float32", False),
            ]
        ),
        pytest.param((2, 3), (1, 0), "float32", False, marks=pytest.mark.nightly),
        pytest.param((1, 1), (2, 3), "float32", False, marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_a_resumed_learner_takes_the_steps_of_one_that_was_not_stopped(
    models, tmp_path, tokenizer_dir, first, second, dtype, dora
):
    path, lora = tmp_path / "step-3", LORA | {"dora": dora}
    with group_of(models, first[0], zero_stage=first[1], dtype=dtype, lora=lora) as group:
        group.steps(models, range(3))
        group.save(path, tokenizer_dir)
        at_snapshot, straight, expected = group.weights(), group.steps(models, range(3, 5)), group.weights()
    assert any((expected[n] != at_snapshot[n]).any() for n in expected)
    with group_of(models, second[0], zero_stage=second[1], dtype=dtype, lora=lora) as group:
        group.restore(path)
        again = group.weights()
        assert all((again[n] == at_snapshot[n]).all() for n in again)
        reports, weights = group.steps(models, range(3, 5)), group.weights()
    if first == second:
        assert reports == straight and all((weights[n] == expected[n]).all() for n in weights)
    else:
        assert [r["loss"] for r in reports] == pytest.approx([r["loss"] for r in straight], rel=1e-4)


@pytest.mark.integration
def test_adapters_of_another_student_are_refused(models, tmp_path, tokenizer_dir):
    with group_of(models) as group:
        group.save(tmp_path / "step-0", tokenizer_dir)
        group.all("change_weights", 0.1)
        changed = np.concatenate(group.all("logprobs", PAIRS, True)[0])
        group.all("change_weights", 0.0)
        plain = np.concatenate(group.all("logprobs", PAIRS, True)[0])
        assert np.abs(changed - plain).mean() > 0.05, (
            "adapters that are 0 are changed too, for the check at the start"
        )
    other = models | {"student": (str(tmp_path / "other"), make_model(tmp_path / "other", seed=7))}
    with (
        group_of(other) as group,
        pytest.raises(CheckpointError, match=r"its adapters belong to .*student as it was"),
    ):
        group.restore(tmp_path / "step-0")


# --- vLLM ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """vLLM's engines are in this process, as in an actor's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.nightly
def test_vllm_computes_what_the_learner_does_published_and_exported(models, tmp_path, tokenizer_dir, in_process):
    """Published merged, the merged export, and the adapters beside the base: one distribution."""
    from tests.support.vllm_adapters import answers_with_adapter, engine_of, given_logprobs

    with group_of(models) as group:
        group.steps(models, range(3))
        group.save(tmp_path / "step-3", tokenizer_dir)
        update, _ = group.all("weights", 1)[0]
        plain = np.concatenate(group.all("logprobs", PAIRS, True)[0])
    with engine_of(models["student"][0]) as engine:
        assert np.abs(given_logprobs(engine, PAIRS) - plain).max() > 0.1
        engine.load_weights(update)
        np.testing.assert_allclose(given_logprobs(engine, PAIRS), plain, atol=1e-4)
    write_merged(tmp_path / "step-3", tmp_path / "model")
    with engine_of(str(tmp_path / "model")) as engine:
        np.testing.assert_allclose(given_logprobs(engine, PAIRS), plain, atol=1e-4)
    answered, found = answers_with_adapter(models["student"][0], tmp_path / "step-3", [p for p, _ in PAIRS])
    np.testing.assert_allclose(found, logprobs_of(tmp_path / "model", answered), atol=1e-4)
    assert np.abs(found - logprobs_of(models["student"][0], answered)).max() > 0.1


@pytest.mark.nightly
@pytest.mark.parametrize(("world_size", "stage", "processes"), [(1, 1, 1), (2, 3, 1), (1, 1, 2)])
def test_adapters_published_alone_are_what_vllm_computes_with(
    models, in_process, monkeypatch, world_size, stage, processes
):
    """As loaded, after a publication, after another one that replaces it, and after an older one.

    Each of an engine's processes holds a part of every layer, and takes its own part of the adapters.
    """
    from tests.support.vllm_adapters import engine_of, given_logprobs

    lora = LORA | {"rank": 3, "publish": "adapters"}  # vLLM has room for 8
    with group_of(models, world_size, zero_stage=stage, lora=lora) as group:
        found = [np.concatenate(group.all("logprobs", PAIRS, True)[0])]
        updates = [group.all("weights", 0)[0][0]]
        for steps in ([0, 1], [2, 3]):
            group.steps(models, steps)
            updates.append(group.all("weights", 1)[0][0])
            found.append(np.concatenate(group.all("logprobs", PAIRS, True)[0]))
    whole = sum(t.numel() for t in models["student"][1].parameters())
    assert sum(a.size for a in updates[1].arrays) < 0.2 * whole and len({len(u.names) for u in updates}) == 1
    assert all(np.abs(a - b).max() > 0.05 for a, b in pairwise(found))
    parallel = {}
    if processes > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        parallel = {"tensor_parallel_size": processes, "num_cpus": processes}
    with engine_of(models["student"][0], LoraConfig(**lora), **parallel) as engine:
        np.testing.assert_allclose(given_logprobs(engine, PAIRS), found[0], atol=1e-4)
        for update, plain in [*zip(updates, found, strict=True), (updates[1], found[1])]:
            engine.load_weights(update)
            np.testing.assert_allclose(given_logprobs(engine, PAIRS), plain, atol=1e-4)
        named = dict(zip(updates[1].names, updates[1].arrays, strict=True))
        other = {n.replace("layers.0.mlp", "layers.7.mlp"): a for n, a in named.items()}
        wrong = WeightUpdate(2, tuple(other), ("float32",) * len(other), tuple(other.values()))
        with pytest.raises(ModelError, match=r"it passed over model\.layers\.7\.mlp\.down_proj"):
            engine.load_weights(wrong)
