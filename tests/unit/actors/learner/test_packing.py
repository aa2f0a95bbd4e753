"""Packed rows: what a student computes of sequences in one row is what it computes of each alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from actors.learner import packed_attention
from actors.learner.model import load_student
from actors.learner.packed_attention import ATTENTION, PackedMask, flash_attention
from actors.learner.packing import collator_for, packing_fault
from kat_ray.config import LearnerConfig
from kat_ray.data.collate import PackedCollator, PaddedCollator
from kat_ray.errors import UserError
from kat_ray.models.load import plain_logprobs
from tests.support import verdicts
from tests.support.configs import make_config
from tests.support.families import BY_NAME, make_family
from tests.support.models import make_model

CPU = torch.device("cpu")
# Full attention, windows, soft caps, sinks, learned positions; chunks, compressed keys, heads that split values.
KINDS = (
    *("Qwen3", "Mistral, sliding window", "Gemma 2", "gpt-oss", "OPT"),
    *(pytest.param(name, marks=pytest.mark.integration) for name in ("Llama 4", "DeepSeek-V3", "DiffLlama")),
)


def student_of(path, batching="packed", **changes):
    """A student and its collator, as a learner loads them."""
    model = make_config(str(path), str(path)).student
    learner = LearnerConfig(dtype="float32", batching=batching, micro_batch_tokens=10**6, **changes)
    student = load_student(model, str(path), learner, verdicts.LONGEST)
    return student, collator_for(student, learner, "student.path = 'x'")


def rows(lengths, seed=0):
    """A packed row of random tokens: the arguments of a pass."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(2, 100, (1, sum(lengths))))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_its_sequences_alone_in_value_and_gradient(name, tmp_path):
    """In float64, but for routers and some softmaxes, which stay in float32; several windows long."""
    make_family(BY_NAME[name], tmp_path)
    lengths = (40, 1, 17, 8)
    arguments = rows(lengths)
    packed, plain = student_of(tmp_path)[0], student_of(tmp_path, "padded")[0]
    for student in (packed, plain):
        student.network.double()
        student.network.set_experts_implementation("eager")  # the others take no float64
    hidden = packed.hidden_states(arguments)[0]
    alone = [plain.hidden_states({"input_ids": ids})[0] for ids in arguments["input_ids"].split(lengths, dim=1)]
    expected = torch.cat(alone)
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (hidden * direction).sum().backward()
    (expected * direction).sum().backward()
    own, theirs = ({k: p.grad for k, p in s.trained_parameters() if p.grad is not None} for s in (packed, plain))
    norm = max(float(g.norm()) for g in theirs.values())
    errors = {k: float((own[k] - g).norm()) / norm for k, g in theirs.items()}
    assert set(own) == set(theirs) and norm > 1 and max(errors.values()) < 1e-6, errors


def test_nothing_of_a_sequence_is_in_another_to_the_bit(tmp_path):
    make_family(BY_NAME["Qwen2, sliding window"], tmp_path)
    student, _ = student_of(tmp_path)
    arguments = rows((12, 9, 20))
    before = student.hidden_states(arguments)[0]
    arguments["input_ids"][0, 12:21] = 5
    after = student.hidden_states(arguments)[0]
    changed = (before != after).any(dim=1)
    assert changed[12:21].all() and not changed[:12].any() and not changed[21:].any()


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    make_family(BY_NAME["Gemma 2"], tmp_path)
    for batching in ("padded", "packed"):
        errors = verdicts.learner_errors(tmp_path, gradient_checkpointing=True, batching=batching)
        assert max(errors) < 1e-3


# --- masks ----------------------------------------------------------------------------------------------------


def mask(function, lengths=(7, 3), size=None):
    return PackedMask(function, lengths, size, CPU)


def test_masks_by_hand():
    plain = mask(causal_mask_function)
    assert plain.is_plain and plain.window == 7 and plain.of(7) is None
    window = mask(sliding_window_causal_mask_function(2), size=2)
    assert window.window == 2 and window.of(2) is None
    assert window.of(3).tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    chunks = mask(chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)), size=2)
    assert chunks.window is None and chunks.of(2) is None
    assert chunks.of(3).tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert window.starts.tolist() == [0, 7, 10] and window.starts.dtype == torch.int32


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mask_of_a_size_is_causal_up_to_it_and_a_window_only_if_it_is_one(longest, size, chunked):
    function = (
        chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
        if chunked
        else sliding_window_causal_mask_function(size)
    )
    found, i = mask(function, (longest,), size), torch.arange(longest)
    same = i[:, None] // size == i[None] // size if chunked else i[None] > i[:, None] - size
    expected = same & (i[None] <= i[:, None])
    for length in range(1, longest + 1):
        own = found.of(length)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        assert torch.equal(causal if own is None else own, expected[:length, :length])
    # Chunks of one token are windows of one.
    is_window = not chunked or longest <= size or size == 1
    assert found.window == (min(size, longest) if is_window else None)


# --- the one call of a GPU ------------------------------------------------------------------------------------


def heads(count, tokens, width=16, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, count, width, generator=random).to(dtype).transpose(1, 2)


def ragged_attention(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation: [T, heads, width], window (left, right)."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert longest == int(starts.diff().max()) and starts.dtype == torch.int32
    left, right = window_size
    parts = []
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (
            t[a:b].transpose(0, 1).repeat_interleave(query.shape[1] // t.shape[1], 0) for t in (query, key, value)
        )
        i = torch.arange(b - a)
        seen = i[None] <= i[:, None] + right
        if left >= 0:
            seen &= i[None] >= i[:, None] - left
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("size", [None, 1, 4, 100])
@pytest.mark.parametrize("sharers", [1, 3])
def test_one_call_for_all_sequences_is_the_loop_over_them(monkeypatch, size, sharers):
    """With a stand-in that is written after torch's documentation: what a GPU computes, the check of one shows."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", ragged_attention)
    lengths = (9, 1, 14)
    function = causal_mask_function if size is None else sliding_window_causal_mask_function(size)
    states = heads(2 * sharers, 24), heads(2, 24, seed=1), heads(2, 24, seed=2)
    one = flash_attention(*states, mask(function, lengths, size), 0.3)
    loop = packed_attention._by_sequence(*states, mask(function, lengths, size), 0.3, None, None)
    assert one.shape == loop.shape == (1, 24, 2 * sharers, 16)
    torch.testing.assert_close(one, loop, rtol=1e-5, atol=1e-5)


def test_torch_takes_the_call_and_its_gradient():
    """Shapes and types of the real function, forward and backward; without a GPU nothing is computed."""
    with FakeTensorMode():
        states = [
            torch.empty(1, 24, n, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for n in (6, 2, 2)
        ]
        result = flash_attention(*states, mask(causal_mask_function, (9, 1, 14)), None)
        assert result.shape == (1, 24, 6, 64) and result.dtype == torch.bfloat16
        result.sum().backward()
        assert [s.grad.shape for s in states] == [s.shape for s in states]


# --- which students are packed --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Falcon", "Mamba 2", "Doge"])
def test_a_student_that_cannot_is_refused_padded_or_found_by_trying(name, tmp_path):
    make_family(BY_NAME[name], tmp_path)
    with pytest.raises(UserError, match=r"student.path = .*packed rows \(learner.batching\): .* to auto or padded"):
        student_of(tmp_path)
    student, collator = student_of(tmp_path, "auto")
    assert isinstance(collator, PaddedCollator)
    errors = verdicts.learner_errors(tmp_path, batching="auto")
    assert max(errors) < 1e-3, "as ever"
    student.pack()
    assert packing_fault(student) is not None, "what a configuration does not tell is tried"


@pytest.mark.parametrize("window", [8, 20])
def test_a_window_that_is_not_kept_to_is_found(window, tmp_path, monkeypatch):
    """Of 8 tokens: most tokens of short sequences have no fault. Of 20, which short ones do not reach."""
    family = BY_NAME["Qwen2, sliding window"]
    make_family(replace(family, changes=family.changes | {"sliding_window": window}), tmp_path)
    assert isinstance(student_of(tmp_path, "auto")[1], PackedCollator)
    monkeypatch.setattr(PackedMask, "_causal_up_to", 10**6)
    with pytest.raises(UserError, match="its hidden states in a packed row differ from those of sequences alone"):
        student_of(tmp_path)
    assert isinstance(student_of(tmp_path, "auto")[1], PaddedCollator)


def test_what_was_tried_in_vain_leaves_the_student_as_it_was(tmp_path, monkeypatch):
    make_model(tmp_path)
    monkeypatch.setattr("actors.learner.packing.packing_fault", lambda student: "it is not itself")
    with pytest.raises(UserError, match=r"student.path = 'x': learner.batching = 'packed': it is not it"):
        student_of(tmp_path)
    student, collator = student_of(tmp_path, "auto")
    assert isinstance(collator, PaddedCollator)
    assert student.network.config._attn_implementation == "sdpa"
    student.hidden_states({"input_ids": torch.tensor([[3, 4]])})


def test_a_plain_pass_of_a_packed_student_is_the_models_own_to_the_bit(tmp_path):
    make_family(BY_NAME["Gemma 2"], tmp_path)
    padded, _ = student_of(tmp_path, "padded")
    student, collator = student_of(tmp_path, "auto")
    assert isinstance(collator, PackedCollator)
    expected = plain_logprobs(padded.network, [3, 4, 5], [6, 7], CPU)
    with student.plain_attention():
        np.testing.assert_array_equal(plain_logprobs(student.network, [3, 4, 5], [6, 7], CPU), expected)
    student.hidden_states(rows((3, 4)))


def test_a_checkpoint_does_not_know_of_packed_rows(tmp_path):
    make_model(tmp_path / "model")
    student, _ = student_of(tmp_path / "model")
    student.copy_for_saving(lambda _, tensor: tensor, torch.float32, (1,))(tmp_path / "saved")
    text = (tmp_path / "saved/config.json").read_text()
    assert ATTENTION not in text and json.loads(text)["model_type"] == "qwen3"
