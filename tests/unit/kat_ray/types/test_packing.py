"""Narrow records: ids come back exactly, log-probabilities as distributions, and KL keeps its laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.losses.divergence import (
    LOG_FLOOR,
    dequantise,
    event_logprobs,
    is_stop,
    reverse_kl,
    tail_and_stop,
)
from kat_ray.types.token_ids import pack_ids, unpack_ids


@given(st.sampled_from([2, 200, 2**16, 2**16 + 1, 151_936, 2**18, 2**18 + 1, 2**24]), st.integers(0, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_ids_come_back(vocabulary, rows, data):
    k = data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = rng.integers(0, vocabulary, (rows, k))
    ids[rng.random((rows, k)) < 0.3] = vocabulary - 1
    low, high = pack_ids(ids.astype(np.int32), vocabulary)
    np.testing.assert_array_equal(unpack_ids(low, high), ids)
    part = slice(1, 3)
    np.testing.assert_array_equal(unpack_ids(low[part], high[part]), ids[part])


@pytest.mark.parametrize(
    ("vocabulary", "bytes_per_token"), [(2**16, 128), (2**16 + 1, 144), (2**18, 144), (2**18 + 1, 192)]
)
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocabulary, bytes_per_token):
    low, high = pack_ids(np.zeros((3, 64), np.int32), vocabulary)
    assert low.nbytes + high.nbytes == 3 * bytes_per_token


def test_a_vocabulary_that_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="16777217 ids"):
        pack_ids(np.zeros((1, 1), np.int32), 2**24 + 1)


def pair(rows=200, vocabulary=300, k=64, scale=3.0, apart=1.0, seed=0):
    """Log-probabilities of two models, `apart` from each other, and the first one's top-k ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    other = logits + apart * torch.randn(rows, vocabulary, generator=generator)
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    return p, q, p.topk(k, -1).indices


def kl_of(p, q, ids, eos, narrow_student=False, narrow_teacher=False, stop_ids=(1, 5)):
    stops = is_stop(ids, stop_ids)
    student, teacher = ((x.gather(-1, ids), *tail_and_stop(x, ids, stop_ids)) for x in (p, q))
    if narrow_student:
        student = dequantise(student[0].half(), *student[1:])
    if narrow_teacher:
        teacher = dequantise(teacher[0].half(), *teacher[1:])
    return reverse_kl(event_logprobs(*student, stops, eos), event_logprobs(*teacher, stops, eos))


@pytest.mark.parametrize("eos", ["raw", "merged"])
@pytest.mark.parametrize("apart", [0.0, 0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("side", ["narrow_student", "narrow_teacher"])
def test_the_error_of_kl_shrinks_with_the_kl(eos, apart, side):
    p, q, ids = pair(apart=apart)
    exact = kl_of(p.double(), q.double(), ids, eos)
    got = kl_of(p, q, ids, eos, **{side: True})
    # |error| <= sum_v |p_v - q_v| |delta_v| + O(delta^2), delta_v <= 2^-11 |log p_v|; Pinsker: sum |p - q| <=
    # sqrt(2 KL). Log-probabilities that weigh are above -10 here.
    bound = 2.0**-11 * 10 * torch.sqrt(2 * exact.clamp_min(0)) + 1e-5
    assert ((got - exact).abs() <= bound).all()
    assert (got >= -1e-5).all(), "a KL of distributions is not negative"


def test_what_lies_outside_the_top_k_of_the_stop_mass_is_not_drowned_by_rounding():
    # Stop id 1 has 1/3 and is in the top 2, stop id 5 has 1e-4 and is not: narrowing moves log(1/3) by up to 2^-13,
    # a mass of 4e-5. The tail holds 2e-4 in all.
    q = torch.log(torch.tensor([[2 / 3 - 2e-4, 1 / 3, 1e-4, 0.0, 0.0, 1e-4]]).clamp_min(1e-12))
    ids = torch.tensor([[0, 1]])
    stops = is_stop(ids, (1, 5))
    topk, tail, stop = dequantise(q.gather(-1, ids).half(), *tail_and_stop(q, ids, (1, 5)))
    events = event_logprobs(topk, tail, stop, stops, "merged")[0].exp()
    assert events[-1].item() == pytest.approx(1e-4, rel=0.02), "the tail without stop id 5"
    assert events[-2].item() == pytest.approx(1 / 3 + 1e-4, rel=1e-3)


def test_no_rows_and_rows_without_a_value():
    assert dequantise(torch.zeros(0, 4).half(), torch.zeros(0), torch.zeros(0))[2].shape == (0,)
    topk = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.25]]))
    topk[1, 0] = torch.nan
    wide, tail = dequantise(topk.half(), torch.log(torch.tensor([0.25, 0.25])))
    assert torch.isnan(wide[1]).all() and torch.isfinite(wide[0]).all()
    assert (wide[0].exp().sum() + tail[0].exp()).item() == pytest.approx(1.0, abs=1e-6)
    assert LOG_FLOOR < -16
