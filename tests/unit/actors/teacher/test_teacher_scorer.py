"""The scorer on real tiny models: incremental = whole, each token once, nothing held for the ended."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.teacher.scorer import TeacherScorer, make_teacher
from actors.teacher.settings import ScorerSettings
from kat_ray.config import ScorerConfig
from kat_ray.errors import StateLost
from kat_ray.losses.divergence import full_reverse_kl
from kat_ray.types.records import EngineEnd
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config
from tests.support.models import make_model


def scorer_of(models, teacher="teacher", **sections):
    config = make_config(models["student"][0], models[teacher][0], **sections)
    return TeacherScorer("scorer:0", ScorerSettings.from_config(config, models[teacher][0], (1,), 64))


def score_in_pieces(scorer, student, rollouts, size):
    """Score all rollouts `size` tokens at a time; returns d by rollout and the number of chunks."""
    got = {i: [] for i in rollouts}
    at = 0
    while live := {i: r for i, r in rollouts.items() if at < len(r[1])}:
        end = {i: min(at + size, len(r[1])) for i, r in live.items()}
        ended = {i: EngineEnd.EOS for i in live if end[i] == len(live[i][1])}
        chunk = chunk_of(student, live, start=dict.fromkeys(live, at), end=end, ended=ended)
        scored, _ = scorer.score(chunk)
        for j, i in enumerate(scored.rollout_ids.tolist()):
            got[i].append(scored.d[scored.offsets[j] : scored.offsets[j + 1]])
        at += size
    return {i: np.concatenate(parts) for i, parts in got.items()}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_incremental_scores_equal_one_full_forward_of_both_models(models, size, together, monkeypatch):
    """Also where rollouts are taken together, as on a GPU."""
    monkeypatch.setattr("actors.teacher.transformers_backend.takes_together", lambda _: together)
    scorer = scorer_of(models, scorer={"max_batch_tokens": 64})
    student, teacher = models["student"][1], models["teacher"][1]
    rollouts = random_rollouts(7)
    d = score_in_pieces(scorer, student, rollouts, size)
    for i, (prompt, tokens) in rollouts.items():
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens]])
            rows = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
            full = full_reverse_kl(student(ids).logits[0, rows], teacher(ids).logits[0, rows]).numpy()
        assert (d[i] <= full + 1e-4).all(), "a coarser partition has no larger KL"
        assert (d[i] >= 0.2 * full).all() and (d[i] > 0.05).all(), "64 of 200 tokens carry most of it"
    # Every token but the last of a rollout was run once: nothing twice, nothing left out.
    run = sum(len(p) + len(t) - 1 for p, t in rollouts.values())
    assert scorer.stats()["run_tokens"] == run
    assert scorer.stats()["scored_tokens"] == sum(len(t) for _, t in rollouts.values())
    assert scorer.stats()["states"] == 0


def test_any_split_gives_the_same_scores(models):
    rollouts = random_rollouts(9, seed=3)
    whole, *others = (
        score_in_pieces(scorer_of(models, scorer={"max_batch_tokens": b}), models["student"][1], rollouts, size)
        for size, b in ((1000, 4096), (1, 16), (2, 4096), (5, 100))
    )
    for other in others:
        for i in rollouts:
            np.testing.assert_allclose(other[i], whole[i], atol=1e-5)


def test_d_equals_a_computation_by_hand(models):
    student, teacher = models["student"][1], models["teacher"][1]
    prompt, tokens = [5, 6, 7], [9, 4]
    chunk = chunk_of(student, {0: (prompt, tokens)}, logprob_dtype=np.float32)
    scored, rows = scorer_of(models).score(chunk)
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *tokens]])
        p = torch.softmax(student(ids).logits[0, 2:4].double(), -1)
        q = torch.softmax(teacher(ids).logits[0, 2:4].double(), -1)
    for t in range(2):
        top = p[t].topk(64).indices
        keep = [i for i in top.tolist() if i != 1]
        kl = sum(float(p[t, i] * (p[t, i].log() - q[t, i].log())) for i in keep)
        rest_p, rest_q = 1 - float(p[t, keep].sum()), 1 - float(q[t, keep].sum())
        if 1 in top.tolist():  # merged: the stop id is an event of its own, apart from the tail
            kl += float(p[t, 1] * (p[t, 1].log() - q[t, 1].log()))
            rest_p, rest_q = rest_p - float(p[t, 1]), rest_q - float(q[t, 1])
        kl += rest_p * (np.log(rest_p) - np.log(rest_q))
        assert scored.d[t] == pytest.approx(kl, rel=1e-4)
        np.testing.assert_allclose(rows.topk_logprobs[t], q[t, top].log(), rtol=2**-11)
        assert rows.stop_logprobs[t] == pytest.approx(float(q[t, 1].log()), abs=1e-4)


def test_teacher_equal_to_student_gives_zero(models):
    scorer = scorer_of(models, teacher="student")
    d = score_in_pieces(scorer, models["student"][1], random_rollouts(5), 4)
    assert max(np.abs(v).max() for v in d.values()) < 1e-5


def test_a_chunk_may_mix_new_continued_taken_over_and_silent_rollouts(models):
    student = models["student"][1]
    rollouts = random_rollouts(4, seed=5, tokens=(10, 20))
    whole = score_in_pieces(scorer_of(models), student, rollouts, 1000)
    scorer = scorer_of(models)
    scorer.score(chunk_of(student, {0: rollouts[0], 3: rollouts[3]}, end={0: 4, 3: 6}))
    prompt, tokens = rollouts[2]
    mixed = chunk_of(
        student, rollouts, start={0: 4, 1: 0, 2: 6, 3: 6}, end={0: 9, 1: 5, 2: 8, 3: 6},
        context={1: rollouts[1][0], 2: [*prompt, *tokens[:6]]}, ended={3: EngineEnd.MAX_TOKENS},
    )  # fmt: skip
    scored, _ = scorer.score(mixed)
    pieces = [scored.d[scored.offsets[j] : scored.offsets[j + 1]] for j in range(4)]
    for i, (a, b) in {0: (4, 9), 1: (0, 5), 2: (6, 8), 3: (6, 6)}.items():
        np.testing.assert_allclose(pieces[i], whole[i][a:b], atol=1e-5)
    assert scorer.stats()["states"] == 3  # rollout 3 has ended


def test_tokens_inserted_between_turns_are_run_and_give_no_rows(models):
    """The rows of both turns are those of one plain forward over the whole sequence, whoever scored them."""
    student, teacher = models["student"][1], models["teacher"][1]
    prompt, first, answer, second = [5, 6, 7], [9, 4, 8], [60, 61, 62, 63], [11, 12, 13]
    other = ([20, 21], [30, 31, 32])
    one, two = {0: (prompt, first), 1: other}, {0: ([*prompt, *first, *answer], second), 1: other}
    with torch.no_grad():
        whole = torch.tensor([[*prompt, *first, *answer, *second]])
        q = torch.log_softmax(teacher(whole).logits[0].float(), -1)

    def chunk_two(context, inserted, **changes):
        chunk = chunk_of(student, two, start={1: 1}, end={1: 2}, context=context, inserted=inserted, **changes)
        return replace(chunk, start=np.array([3, 1], dtype=np.int32))

    def check(scorer, chunk, tokens, at):
        _, rows = scorer.score(chunk)
        ids = torch.from_numpy(chunk.topk_ids()[: len(tokens)].astype("int64"))
        expected = q[at : at + len(tokens)].gather(-1, ids)
        np.testing.assert_allclose(rows.topk_logprobs[: len(tokens)], expected, rtol=2**-10, atol=1e-4)

    scorer = scorer_of(models)
    check(scorer, chunk_of(student, one, end={1: 1}), first, len(prompt) - 1)
    check(scorer, chunk_two({0: answer}, (0,), ended={0: EngineEnd.EOS}), second, len(prompt) + 6)
    assert scorer.stats()["run_tokens"] == whole.shape[1] - 1 + len(other[0]) + 1, "each token once"
    past = {0: [*prompt, *first, *answer], 1: [*other[0], other[1][0]]}
    check(scorer_of(models), chunk_two(past, ()), second, len(prompt) + 6)
    with pytest.raises(StateLost, match=r"the past of rollouts \[0, 1\] is not held"):
        scorer_of(models).score(chunk_two({0: answer}, (0,)))


def test_an_insertion_without_new_tokens_is_not_lost(models):
    """A chunk that brings context and no row, and one that brings the rows."""
    student, scorer = models["student"][1], scorer_of(models)
    scorer.score(chunk_of(student, {0: ([5, 6], [9, 4])}))
    longer = {0: ([5, 6, 9, 4, 60, 61], [7, 8])}
    scorer.score(chunk_of(student, longer, end={0: 0}, context={0: [60, 61]}, inserted=(0,)))
    scored, _ = scorer.score(chunk_of(student, longer, context={0: []}))
    expected, _ = scorer_of(models).score(chunk_of(student, longer))
    np.testing.assert_allclose(scored.d, expected.d, atol=1e-5)


def test_the_past_of_an_unknown_rollout_is_asked_for(models):
    student = models["student"][1]
    chunk = chunk_of(student, {7: ([5, 6], [8, 9, 10])}, start={7: 1})
    with pytest.raises(StateLost, match=r"the past of rollouts \[7\] is not held"):
        scorer_of(models).score(chunk)


def test_slots_are_used_again_and_memory_stays(models):
    scorer, student = scorer_of(models), models["student"][1]
    for wave in range(5):
        rollouts = {wave * 10 + i: r for i, r in random_rollouts(6, seed=wave).items()}
        scorer.score(chunk_of(student, rollouts))
        if wave == 0:
            first = scorer.stats()["cache_bytes"]
        if wave % 2:
            scorer.release(list(rollouts))
        else:
            scorer.score(chunk_of(student, {999: ([5], [6])}, released=list(rollouts)))
            scorer.release([999])
        assert scorer.stats()["states"] == 0
    assert scorer.stats()["cache_bytes"] == first


def test_a_teacher_without_finite_values_gives_nan_in_that_row_only(models):
    scorer, student = scorer_of(models), models["student"][1]
    genuine = scorer._teacher.logprobs

    def broken(hidden):  # fmt: skip
        values = genuine(hidden).clone()
        values[1] = torch.nan
        return values

    scorer._teacher.logprobs = broken  # fmt: skip
    scored, _ = scorer.score(chunk_of(student, {0: ([5], [6, 7, 8])}))
    assert np.isnan(scored.d).tolist() == [False, True, False]


def test_llama_scores_like_its_full_forward(models, tmp_path):
    teacher = make_model(tmp_path / "llama", kind="llama", seed=4, tied=False)
    config = make_config(models["student"][0], str(tmp_path / "llama"))
    scorer = TeacherScorer("scorer:0", ScorerSettings.from_config(config, str(tmp_path / "llama"), (1,), 64))
    student, rollouts = models["student"][1], random_rollouts(3, seed=8)
    _scored, rows = scorer.score(chunk_of(student, rollouts))
    chunk = chunk_of(student, rollouts)
    for j, (prompt, tokens) in enumerate(rollouts.values()):
        with torch.no_grad():
            full = torch.log_softmax(teacher(torch.tensor([[*prompt, *tokens]])).logits[0], -1)
        part = slice(chunk.offsets[j], chunk.offsets[j + 1])
        expected = full[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(chunk.topk_ids(part).astype(np.int64)))
        np.testing.assert_allclose(rows.topk_logprobs[part], expected, rtol=2**-11, atol=1e-4)


def test_a_sliding_window_without_layer_types_is_kept_past_its_length(models, tmp_path):
    """As of Mistral, whose configuration names no kinds of layers; scored whole, and one token at a time."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(2)
    sizes = models["teacher"][1].config.to_dict()
    sizes = {k: sizes[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads", "num_key_value_heads", "head_dim")}  # fmt: skip
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=5, initializer_range=0.3)).save_pretrained(tmp_path)
    teacher = MistralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    config = make_config(models["student"][0], str(tmp_path))
    scorer = TeacherScorer("scorer:0", ScorerSettings.from_config(config, str(tmp_path), (1,), 64))
    student, rollouts = models["student"][1], random_rollouts(3, seed=8, tokens=(20, 30))
    d = [score_in_pieces(scorer, student, rollouts, size) for size in (1000, 1)]
    teacher_without = MistralForCausalLM.from_pretrained(tmp_path, sliding_window=None).eval()
    for i, (prompt, tokens) in rollouts.items():
        np.testing.assert_allclose(d[0][i], d[1][i], atol=1e-4)
        chunk = chunk_of(student, {i: (prompt, tokens)})
        _, rows = scorer.score(chunk)
        ids = torch.from_numpy(chunk.topk_ids().astype(np.int64))
        with torch.no_grad():
            whole = torch.tensor([[*prompt, *tokens]])
            expected, other = (
                torch.log_softmax(m(whole).logits[0], -1)[len(prompt) - 1 : -1].gather(-1, ids)
                for m in (teacher, teacher_without)
            )
        np.testing.assert_allclose(rows.topk_logprobs, expected, rtol=2**-10, atol=1e-3)
        assert (other - expected).abs().max() > 0.3, "the window matters here"


def test_the_vllm_teacher_needs_a_gpu(models):
    """A run is told so before it starts; `kat-ray serve-teacher`, which has no whole configuration, here."""
    with pytest.raises(ValueError, match=r"scorer.backend = 'vllm': needs a GPU"):
        scorer_of(models, scorer={"backend": "vllm"})
    teacher = models["teacher"][0]
    settings = ScorerSettings.from_config(make_config(models["student"][0], teacher), teacher, (1,), 64)
    with pytest.raises(ValueError, match=r"scorer.backend = 'vllm'.*needs a GPU"):
        make_teacher(replace(settings, scorer=ScorerConfig(backend="vllm")))


def test_the_tail_from_the_top_k_alone_is_that_of_the_whole_vocabulary():
    """The two backends differ in where the tail comes from: same result to 1e-5 in probability."""
    from actors.teacher.backend import columns_of
    from kat_ray.losses.divergence import tail_and_stop_of_ids

    logprobs = torch.log_softmax(torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 3, -1)
    ids = logprobs.topk(64, dim=-1).indices
    columns = columns_of(logprobs, ids, (1, 5))
    tail, stop = tail_and_stop_of_ids(columns.topk, ids, logprobs[:, [1, 5]], (1, 5))
    np.testing.assert_allclose(tail.exp(), columns.tail.exp(), atol=1e-5)
    assert columns.overlap.tolist() == [1.0] * 50
    torch.testing.assert_close(columns.stop, stop)
    assert torch.isneginf(stop).any() and torch.isfinite(stop).any()
