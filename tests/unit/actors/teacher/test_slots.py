"""What the slots of a teacher take, and what is refused by name."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from actors.teacher import slot_masks
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from actors.teacher.slot_cache import SlotCache
from actors.teacher.slot_check import refused_by_name
from actors.teacher.slot_groups import group_spans
from actors.teacher.slot_masks import ATTENTION, SlotMask, Span, View
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.errors import UserError
from kat_ray.losses.divergence import LOG_FLOOR
from tests.support.chunks import chunk_of
from tests.support.configs import make_config
from tests.support.families import BY_NAME, make_family
from tests.support.models import make_model

attention = AttentionInterface()[ATTENTION]


def selection_of(*spans):
    cache = SlotCache(1)
    cache.select([Span(*s) for s in spans], torch.device("cpu"))
    return cache._selection


def test_views_of_a_sliding_window_by_hand():
    """Window 3. One token after 5 others sees 3 to 5; two new ones after 4 see 2 to 4, and 3 to 5."""
    one, two, first = SlotMask(sliding_window_causal_mask_function(3)).views(
        selection_of((0, 5, 1), (1, 4, 2), (2, 0, 2))
    )
    assert (one.first, one.end, one.mask, one.is_causal) == (3, 6, None, False)
    assert (two.first, two.end) == (2, 6)
    assert two.mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert first.mask.tolist() == [[True, False], [True, True]]


def test_views_of_a_causal_mask_by_hand():
    one, two, first = SlotMask(causal_mask_function).views(selection_of((0, 5, 1), (1, 1, 2), (2, 0, 2)))
    assert (one.first, one.end, one.mask) == (0, 6, None)
    assert two.mask.tolist() == [[True, True, False], [True, True, True]]
    assert first.mask is None and first.is_causal


@pytest.mark.parametrize(
    "function",
    [causal_mask_function, sliding_window_causal_mask_function(4), chunked_causal_mask_function(4, torch.zeros(1))],
)
def test_views_are_the_mask_of_each_span(function):
    rng = np.random.default_rng(0)
    for _ in range(50):
        spans = [(i, int(rng.integers(0, 12)), int(rng.integers(1, 7))) for i in range(4)]
        zero = torch.zeros(1, 1, dtype=torch.long)
        for (_, past, new), view in zip(spans, SlotMask(function).views(selection_of(*spans)), strict=True):
            q, k = torch.arange(past, past + new)[:, None], torch.arange(past + new)[None]
            expected = function(zero, zero, q, k)
            got = torch.zeros(new, past + new, dtype=torch.bool)
            seen = torch.ones(new, view.end - view.first, dtype=torch.bool) if view.mask is None else view.mask
            got[:, view.first : view.end] = seen.tril() if view.is_causal else seen
            assert torch.equal(got, expected)


def states():
    return torch.randn(1, 2, 3, 4)


def stored():
    """Queries, and keys and values that a cache holds, of one span of three tokens."""
    cache = SlotCache(1)
    cache.take()
    cache.select([Span(0, 0, 3)], torch.device("cpu"))
    return states(), *cache.update(states(), states(), 0)


def test_what_a_model_asks_beyond_is_refused_by_name():
    model, mask = SimpleNamespace(), SlotMask(causal_mask_function)
    query, keys, values = stored()
    attention(model, query, keys, values, mask, position_ids=1, position_bias=None, output_attentions=False)
    for asked in ({"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}, {"alibi": True}):
        with pytest.raises(UserError, match=f"SimpleNamespace asks its attention for {next(iter(asked))}"):
            attention(model, query, keys, values, mask, **asked)
    with pytest.raises(UserError, match="sliding_window = 4 and asks for the mask of full attention"):
        attention(model, query, keys, values, mask, sliding_window=4)
    with pytest.raises(UserError, match="does not take its mask from transformers"):
        attention(model, query, keys, values, None)
    with pytest.raises(UserError, match="changes keys or values after they are stored"):
        attention(model, query, keys * 2, values, mask)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_caps_and_sinks_by_the_formula(cap, sinks):
    query, keys, values = stored()
    got, _ = attention(
        SimpleNamespace(),
        query,
        keys,
        values,
        SlotMask(causal_mask_function),
        scaling=0.7,
        softcap=cap,
        s_aux=sinks,
    )
    scores = 0.7 * torch.einsum("hqd,hkd->hqk", query[0], keys[0])
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = scores.exp().tril()
    extra = 0.0 if sinks is None else sinks.exp()[:, None]
    expected = torch.einsum("hqk,hkd->qhd", weights / (weights.sum(-1) + extra)[..., None], values[0])
    torch.testing.assert_close(got[0], expected)


MASKS = {
    "causal": causal_mask_function,
    "sliding": sliding_window_causal_mask_function(4),
    "chunked": chunked_causal_mask_function(4, torch.zeros(1)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cap, sinks", [(None, False), (2.0, False), (None, True)])
def test_spans_taken_together_are_those_taken_one_by_one(mask, cap, sinks):
    """Ragged spans, whose slots are no neighbours and hold NaN behind what is theirs; key heads that are shared."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    groups = 0
    for _ in range(20):
        slots = rng.permutation(12)[:9].tolist()
        spans = [Span(slot, int(rng.integers(0, 40)), int(rng.integers(1, 6))) for slot in slots]
        spans[0] = Span(slots[0], 0, 30)  # a prompt
        both, tokens = [], sum(span.new for span in spans)
        state = torch.randn(3, 1, 4, tokens, 8, generator=generator)
        past = torch.randn(2, 16, 64, 2, 8, generator=generator)
        for grouped in (False, True):
            cache = SlotCache(1, grouped)
            for _ in slots:
                cache.take()
            cache.select(spans, torch.device("cpu"))
            keys, values = cache.update(state[1][:, :2], state[2][:, :2], 0)
            for stored, content in zip((cache.layers[0].keys, cache.layers[0].values), past, strict=True):
                stored[:] = content[: len(stored)]
                for span in spans:
                    stored[span.slot, span.past + span.new :] = torch.nan
            keys, values = cache.update(state[1][:, :2], state[2][:, :2], 0)
            options = {"softcap": cap, "s_aux": torch.tensor([0.5, -1.0, 0.0, 2.0]) if sinks else None}
            slot_mask = SlotMask(MASKS[mask])
            both.append(attention(SimpleNamespace(), state[0], keys, values, slot_mask, scaling=0.7, **options)[0])
            groups += len(cache._selection.plan(slot_mask).groups)
        assert both[0].isfinite().all()
        torch.testing.assert_close(both[1], both[0], atol=2e-6, rtol=1e-5)
    assert groups >= 20


def test_which_spans_are_taken_together():
    def views(*keys):
        return [View(0, 0, n, None, False) for n in keys]

    assert group_spans(views(100, 90, 60), [4, 4, 4]) == ([[0, 1, 2]], [])
    assert group_spans(views(5, 100, 90), [4, 4, 4]) == ([[1, 2]], [0])  # 1,200 scores where 780 are asked for
    assert group_spans(views(100, 100), [100, 4]) == ([], [0, 1])
    assert group_spans(views(3000, 3000), [1000, 1000]) == ([], [0, 1])  # 6 million scores: large enough alone
    assert group_spans(views(50_000, 50_000, 50_000), [1, 1, 1]) == ([[0, 1]], [2])  # keys that are copied
    assert group_spans([], []) == ([], [])


def test_a_model_that_looks_elsewhere_is_found_when_it_is_loaded(models, monkeypatch):
    """As one whose attention would not use what the cache holds: no traceback, the model's name."""
    monkeypatch.setattr(
        "actors.teacher.slot_cache._SlotLayer.attend", lambda self, query, *_: query.transpose(1, 2)
    )
    with pytest.raises(UserError, match=r"teacher.path = .*Qwen3ForCausalLM.*hidden states differ from a plain"):
        teacher_of(models["teacher"][0])
    monkeypatch.setattr("actors.teacher.slot_cache._SlotLayer.attend", lambda *_: {}["cache"])
    with pytest.raises(UserError, match=r"teacher.path = .*Qwen3ForCausalLM cannot be scored.*'cache'"):
        teacher_of(models["teacher"][0])


@pytest.mark.parametrize("window", [8, 20])
def test_a_window_that_is_not_kept_to_is_found(window, tmp_path, monkeypatch):
    """Of 8 tokens: most tokens of short rollouts have no fault. Of 20, which short ones do not reach."""
    family = BY_NAME["Qwen2, sliding window"]
    make_family(replace(family, changes=family.changes | {"sliding_window": window}), tmp_path)
    teacher_of(str(tmp_path))
    monkeypatch.setattr(SlotMask, "views", lambda _, selection: slot_masks._causal(selection))
    with pytest.raises(UserError, match=r"scored in pieces, its hidden states differ from a plain forward pass"):
        teacher_of(str(tmp_path))


def settings_of(path, student_vocabulary=0):
    config = make_config(path, path, rollout={"top_k_logprobs": 16})
    return ScorerSettings.from_config(config, path, (1,), 64, student_vocabulary)


def teacher_of(path, student_vocabulary=0):
    return TransformersTeacher(settings_of(path, student_vocabulary))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Teachers with 100 and with 120 rows that agree on the first 100, and a student with 120."""
    root = tmp_path_factory.mktemp("padded")
    wide = make_model(root / "wide", seed=3, vocabulary=120, tied=False)
    student = make_model(root / "student", seed=4, vocabulary=120, tied=False)
    narrow = make_model(root / "narrow", seed=3, vocabulary=100, tied=False)
    with torch.no_grad():
        wide.lm_head.weight[100:] = 0
        student.lm_head.weight[100:] *= 0.8  # in the top k now and then
        narrow.load_state_dict({k: v[:100] if v.shape[0] == 120 else v for k, v in wide.state_dict().items()})
    for name, model in (("wide", wide), ("student", student), ("narrow", narrow)):
        model.save_pretrained(root / name)
    return root, student, narrow


ROLLOUT = {0: ([5, 6, 7], [9, 40, 99, 30, 31])}


def test_a_teacher_without_the_students_rows_of_padding(padded):
    root, student, narrow = padded
    chunk = chunk_of(student, ROLLOUT, top_k=16)
    ids = torch.from_numpy(chunk.topk_ids().astype(np.int64))
    beyond = ids >= 100
    assert beyond.any() and not beyond.all()
    columns = teacher_of(str(root / "narrow"), 120).score(chunk, chunk.topk_ids())
    with torch.no_grad():
        q = torch.log_softmax(narrow(torch.tensor([[5, 6, 7, 9, 40, 99, 30]])).logits[0, 2:], -1)
    expected = q.gather(-1, ids.clamp(max=99))
    torch.testing.assert_close(columns.topk[~beyond], expected[~beyond], atol=1e-4, rtol=0)
    assert (columns.topk[beyond] == LOG_FLOOR).all()
    rest = 1 - torch.where(beyond, 0.0, expected.exp()).sum(-1)
    torch.testing.assert_close(columns.tail.exp() + columns.stop.exp(), rest, atol=1e-5, rtol=0)
    scored, _ = TeacherScorer("scorer:0", settings_of(str(root / "narrow"), 120)).score(chunk)
    assert np.isfinite(scored.d).all() and (scored.d > 0).all()


def test_what_follows_an_id_of_padding_is_not_finite_and_counted(padded):
    """The teacher knows no distribution there: d is NaN, the row leaves by mask; other rollouts are untouched."""
    root, student, _ = padded
    rollouts = {0: ([5, 6, 7], [9, 110, 99, 30, 31]), 1: ROLLOUT[0]}
    scorer = TeacherScorer("scorer:0", settings_of(str(root / "narrow"), 120))
    first, _ = scorer.score(chunk_of(student, rollouts, top_k=16, end={0: 2, 1: 2}))
    second, _ = scorer.score(chunk_of(student, rollouts, top_k=16, start={0: 2, 1: 2}))
    assert np.isfinite(first.d).all()  # the id is a choice of the student's; the row before it is known
    assert np.isnan(second.d).tolist() == [True] * 3 + [False] * 3
    again, _ = scorer.score(chunk_of(student, {0: ROLLOUT[0]}, top_k=16))  # the rollout begins anew
    assert np.isfinite(again.d).all()


def test_a_teacher_with_rows_of_padding_beyond_the_students(padded):
    root, *_ = padded
    narrow = make_model(root / "small", seed=4, vocabulary=100, tied=False)
    chunk = chunk_of(narrow, ROLLOUT, top_k=16)
    scored, _ = TeacherScorer("scorer:0", settings_of(str(root / "wide"), 100)).score(chunk)
    assert np.isfinite(scored.d).all()


def test_without_a_larger_student_an_id_beyond_the_teachers_is_refused(padded):
    root, student, _ = padded
    with pytest.raises(UserError, match="has a vocabulary of 100 ids"):
        TeacherScorer("scorer:0", settings_of(str(root / "narrow"))).score(chunk_of(student, ROLLOUT, top_k=16))


def test_a_fault_of_the_device_is_not_said_of_the_model():
    with pytest.raises(torch.OutOfMemoryError), refused_by_name("teacher.path = 'x'", "Qwen3ForCausalLM"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="CUDA error"), refused_by_name("teacher.path = 'x'", "Qwen3ForCausalLM"):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
