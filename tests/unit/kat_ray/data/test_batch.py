"""Chunks to samples to micro-batches: nothing lost, nothing past the cut, padding by length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.data.batch import assign_ranks, collect_samples
from kat_ray.data.chunks import PendingRollout, build_chunk, tail_logprobs, with_context
from kat_ray.data.collate import PackedCollator, PaddedCollator
from kat_ray.types.records import EngineEnd, KeptRollout, TeacherRows
from tests.support.chunks import K, stream

rollout = st.tuples(
    st.lists(st.integers(2, 400), min_size=1, max_size=6), st.lists(st.integers(2, 400), min_size=1, max_size=12)
)


@given(st.lists(rollout, min_size=1, max_size=6), st.integers(1, 14), st.data())
@settings(max_examples=150, deadline=None)
def test_samples_hold_the_kept_tokens_and_their_targets_whatever_the_chunks(rollouts, size, data):
    rollouts = dict(enumerate(rollouts))
    chunks, teacher = stream(rollouts, size)
    kept = [
        KeptRollout(i, len(p), data.draw(st.integers(1, len(t)), label=f"kept of {i}"))
        for i, (p, t) in rollouts.items()
    ]
    samples = collect_samples(chunks, teacher, kept)
    for k, sample in zip(kept, samples, strict=True):
        prompt, tokens = rollouts[k.rollout_id]
        expected = tokens[: k.kept]
        assert sample.prompt_ids.tolist() == prompt and sample.token_ids.tolist() == expected
        assert sample.topk_ids[:, 0].tolist() == [t + 1 for t in expected]
        assert sample.teacher_topk[:, -1].tolist() == expected
        assert sample.teacher_tail.tolist() == [t + 0.25 for t in expected]
        np.testing.assert_allclose(sample.sampled_logprobs, -np.array(expected) / 10, rtol=1e-6)
    for collator in (kind(budget) for kind in (PaddedCollator, PackedCollator) for budget in (1, 20, 1000)):
        batches, budget = collator.micro_batches(samples), collator.max_tokens
        assert sorted(s.rollout_id for b in batches for s in b.samples) == sorted(rollouts)
        for batch in batches:
            ids, inputs = batch.inputs.input_ids, batch.inputs
            assert ids.size <= budget or len(batch.samples) == 1
            assert inputs.attention_mask.sum() == sum(s.input_length for s in batch.samples)
            at = [int(ids[b, c]) for b, c in inputs.positions]
            before = [
                x
                for s in batch.samples
                for x in [*s.prompt_ids.tolist(), *s.token_ids.tolist()][len(s.prompt_ids) - 1 : -1]
            ]
            assert at == before, "a position is the one before the token it predicts"


def test_a_token_equal_to_the_padding_is_not_padding():
    chunks, teacher = stream({0: ([0, 0], [0, 0, 0]), 1: ([5], [6])}, 2)
    samples = collect_samples(chunks, teacher, [KeptRollout(0, 2, 3), KeptRollout(1, 1, 1)])
    (batch,) = PaddedCollator(1000).micro_batches(samples)
    assert batch.inputs.attention_mask.sum(axis=1).tolist() == [1, 4]


def test_a_packed_row_by_hand():
    # The longest first: inputs of 5 and 3 tokens fill a row of 8, which leaves that of 4 for another.
    rollouts = {0: ([7, 8], [1, 2]), 1: ([5], [6, 7, 8, 9, 4]), 2: ([0, 0, 0], [3, 2])}
    chunks, teacher = stream(rollouts, 2)
    samples = collect_samples(chunks, teacher, [KeptRollout(i, len(p), len(t)) for i, (p, t) in rollouts.items()])
    first, second = PackedCollator(8).micro_batches(samples)
    assert [s.rollout_id for s in first.samples] == [1, 0] and [s.rollout_id for s in second.samples] == [2]
    given = {name: array.tolist() for name, array in first.inputs.arguments().items()}
    assert given == {
        "input_ids": [[5, 6, 7, 8, 9, 7, 8, 1]],
        "attention_mask": [[1] * 8],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
    }
    assert first.inputs.positions.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 6], [0, 7]]


def test_missing_rows_are_refused():
    chunks, teacher = stream({0: ([5], list(range(10, 20)))}, 4)
    with pytest.raises(ValueError, match="starts at token 8, expected 4"):
        collect_samples([chunks[0], chunks[2]], [teacher[0], teacher[2]], [KeptRollout(0, 1, 9)])
    with pytest.raises(ValueError, match="9 tokens are kept, the chunks hold 4"):
        collect_samples(chunks[:1], teacher[:1], [KeptRollout(0, 1, 9)])


def test_a_take_over_context_is_not_taken_for_the_prompt():
    chunks, teacher = stream({0: ([5, 6], [10, 11, 12])}, 2)
    second = chunks[1]
    context = np.array([5, 6, 10, 11], dtype=np.int32)
    taken_over = type(second)(
        **{**second.__dict__, "context_ids": context, "context_offsets": np.array([0, 4], np.int32)}
    )
    (sample,) = collect_samples([chunks[0], taken_over], teacher, [KeptRollout(0, 2, 3)])
    assert sample.prompt_ids.tolist() == [5, 6]


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 5))
def test_ranks_share_all_rollouts_evenly(lengths, world):
    kept = [KeptRollout(i, 3, n) for i, n in enumerate(lengths)]
    shares = assign_ranks(kept, world)
    assert sorted(k.rollout_id for s in shares for k in s) == list(range(len(lengths)))
    loads = [sum(3 + k.kept for k in s) for s in shares]
    assert max(loads) - min(loads) <= max([0, *(3 + n for n in lengths)])


def test_ranks_are_balanced_by_tokens_not_by_rollouts():
    # 100 tokens on one rank against 4 x 20 on the other; by count it would be 140 against 40.
    kept = [KeptRollout(i, 3, n) for i, n in enumerate([17, 17, 97, 17, 17])]
    assert [[k.rollout_id for k in s] for s in assign_ranks(kept, 2)] == [[2], [0, 1, 3, 4]]


def test_a_prompt_of_another_length_is_refused():
    chunks, teacher = stream({0: ([5, 6], [10, 11])}, 2)
    with pytest.raises(ValueError, match="its prompt has 3 tokens, the chunks hold 2"):
        collect_samples(chunks, teacher, [KeptRollout(0, 3, 1)])


def test_a_rollout_of_which_nothing_is_kept_is_in_no_micro_batch():
    chunks, teacher = stream({0: ([5], [6]), 1: ([7], [8])}, 2)
    samples = collect_samples(chunks, teacher, [KeptRollout(0, 1, 0), KeptRollout(1, 1, 1)])
    assert [s.rollout_id for b in PaddedCollator(1000).micro_batches(samples) for s in b.samples] == [1]
    assert PaddedCollator(1000).micro_batches(samples[:1]) == []


def test_an_end_without_tokens_is_news_once():
    pending = PendingRollout(1, (5,), scorer=0)
    pending.add([7], np.zeros((1, K + 1), np.int32), np.zeros((1, K + 1), np.float32))
    arguments = dict(attempt=0, top_k=K, vocabulary=500)
    build_chunk([pending], [], **arguments)
    assert not pending.has_news
    pending.end = EngineEnd.MAX_TOKENS
    assert pending.has_news
    chunk = build_chunk([pending], [3], **arguments)
    assert (chunk.tokens, chunk.ended.tolist(), chunk.released.tolist()) == (0, [2], [3])
    assert not pending.has_news


def generated(rollout, *tokens):
    for token in tokens:
        rollout.add([token], np.full((1, K + 1), token, np.int32), np.full((1, K + 1), -1.0, np.float32))


def turns():
    """Chunks of a rollout of two turns, 7 8 and 9, with 40 41 between them; a third has no tokens."""
    rollout, arguments = PendingRollout(1, (5, 6), scorer=0), dict(attempt=0, top_k=K, vocabulary=500)
    chunks = []
    for tokens, after in (((7, 8), (40, 41)), ((9,), (42,)), ((), ())):
        generated(rollout, *tokens)
        rollout.end = EngineEnd.RUNNING if tokens else EngineEnd.EOS
        chunks.append(build_chunk([rollout], [], **arguments))
        rollout.insert(after)
    return rollout, chunks


def contexts(chunks):
    return [(c.start[0], c.context(0).tolist(), bool(c.inserted[0]), bool(c.whole_past[0])) for c in chunks]


def test_inserted_tokens_are_context_of_the_next_chunk_and_no_rows():
    _, chunks = turns()
    assert [c.token_ids.tolist() for c in chunks] == [[7, 8], [9], []]
    assert contexts(chunks) == [(0, [5, 6], False, True), (2, [40, 41], True, False), (3, [42], True, False)]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_chunk_that_comes_again_has_what_was_inserted_before_it(first):
    rollout, chunks = turns()
    rollout.known = False
    again = contexts([with_context(chunk, {1: rollout}) for chunk in chunks[first:]])
    past = [[5, 6], [5, 6, 7, 8, 40, 41], [5, 6, 7, 8, 40, 41, 9, 42]][first]
    assert again == [(first and first + 1, past, False, True), *contexts(chunks)[first + 1 :]]


@pytest.mark.parametrize("prompt", range(1, 9))
def test_chunks_of_a_running_rollout_end_one_token_after_a_block(prompt):
    """Blocks of 4, three tokens at a time; the held ones go with the next chunk, and all of them with the end."""
    rollout = PendingRollout(1, tuple(range(100, 100 + prompt)), scorer=0, block=4)
    chunks = []
    for first in range(1, 24, 3):
        generated(rollout, *range(first, first + 3))
        if rollout.has_news:
            chunks.append(build_chunk([rollout], [], attempt=0, top_k=K, vocabulary=500))
            assert (prompt + rollout.sent - 1) % 4 == 0 and chunks[-1].tokens == rollout.sent - chunks[-1].start[0]
        assert rollout.unsent == (prompt + first + 2 - 1) % 4 or rollout.sent == 0
    generated(rollout, 25)
    rollout.end = EngineEnd.EOS
    chunks.append(build_chunk([rollout], [], attempt=0, top_k=K, vocabulary=500))
    assert [t for c in chunks for t in c.token_ids.tolist()] == list(range(1, 26))
    assert [t for c in chunks for t in c.topk_ids()[:, 0].tolist()] == list(range(1, 26)), "each with its own row"
    assert chunks[0].context(0).tolist() == list(range(100, 100 + prompt)) and not rollout.has_news


def test_tokens_are_inserted_after_those_that_were_sent_only():
    rollout = PendingRollout(1, (5,), scorer=0)
    generated(rollout, 7, 8)
    with pytest.raises(ValueError, match="rollout 1: 2 generated tokens are not sent yet"):
        rollout.insert([40])


def test_kept_tokens_after_inserted_ones_are_refused():
    rollout, chunks = turns()
    teacher = [TeacherRows(np.zeros((c.tokens, K)), np.zeros(c.tokens), np.zeros(c.tokens)) for c in chunks]
    (sample,) = collect_samples(chunks, teacher, [KeptRollout(1, 2, 2)])  # a cut before them
    assert (sample.prompt_ids.tolist(), sample.token_ids.tolist()) == ([5, 6], [7, 8])
    with pytest.raises(ValueError, match="rollout 1: 2 tokens were inserted among its 3 kept ones"):
        collect_samples(chunks, teacher, [KeptRollout(1, 2, 3)])
    rollout.known = False  # the second chunk was scored by another scorer
    chunks[1] = with_context(chunks[1], {1: rollout})
    with pytest.raises(ValueError, match="rollout 1: 2 tokens were inserted among its 3 kept ones"):
        collect_samples(chunks, teacher, [KeptRollout(1, 2, 3)])


@pytest.mark.parametrize(("mass", "tail"), [([0.5, 0.25], 0.25), ([1.0, 0.0], 2.0**-24), ([0.5, 0.5 - 1e-5], 1e-5)])
def test_the_tail_is_what_the_top_k_leave(mass, tail):
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([mass]))
    assert tail_logprobs(logprobs)[0] == pytest.approx(np.log(tail), abs=1e-5)
    assert np.isnan(tail_logprobs(np.array([[np.nan, -1.0]]))).all() and tail_logprobs(np.zeros((0, 2))).size == 0


def test_without_a_teacher_a_sample_has_its_tokens_and_one_event():
    """A rollout that nobody scores is one chunk, made when it has ended, without a top k."""
    rollout = PendingRollout(7, (5, 6), scorer=0, block=100)
    for i, token in enumerate((9, 4, 2)):
        assert not rollout.has_news, "nothing is sent before its end"
        rollout.add([token], np.array([[token]], np.int32), np.array([[-0.5 - i]], np.float32))
    rollout.end = EngineEnd.EOS
    chunk = build_chunk([rollout], (), attempt=1, top_k=0, vocabulary=2**17)
    assert chunk.tokens == 3 and chunk.topk_ids().shape == (3, 0) and (chunk.tail_logprobs == 0).all()
    (sample,) = collect_samples([chunk], [], [KeptRollout(7, 2, 2)])
    assert sample.prompt_ids.tolist() == [5, 6] and sample.token_ids.tolist() == [9, 4]
    assert sample.sampled_logprobs.tolist() == [-0.5, -1.5]
    assert sample.teacher_topk.shape == sample.topk_ids.shape == (2, 0)
    assert np.exp(sample.teacher_tail).tolist() == [1, 1] and np.exp(sample.teacher_stop).tolist() == [0, 0]


def test_a_chunk_that_was_to_be_scored_is_not_learnt_without_its_scores():
    chunks, _ = stream({0: ([5], [6])}, 2)
    with pytest.raises(AssertionError, match="sampled to be scored"):
        collect_samples(chunks, [], [KeptRollout(0, 1, 1)])
