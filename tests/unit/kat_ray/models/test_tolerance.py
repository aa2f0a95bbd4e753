"""Bounds on the difference of two engines, by their data types."""

import itertools
from typing import get_args

import pytest

from kat_ray.config import Dtype
from kat_ray.models.tolerance import dtype_note, logprob_tolerance, measured_difference

TYPES = get_args(Dtype)


@pytest.mark.parametrize(("sampler", "learner"), itertools.product(TYPES, repeat=2))
def test_every_pair_has_a_bound_above_what_was_measured(sampler, learner):
    bound, measured = logprob_tolerance(sampler, learner), measured_difference(sampler, learner)
    assert bound == logprob_tolerance(learner, sampler)
    assert measured.mean < bound.mean < bound.max and measured.max < bound.max
    assert bound.mean < 0.5, "another model is not far from this: its mean difference would be taken for rounding"


def test_coarser_types_have_wider_bounds():
    bounds = [logprob_tolerance(t, t) for t in ("float32", "float16", "bfloat16")]
    assert bounds == sorted(bounds) and bounds[0].mean < bounds[1].mean / 10


def test_types_that_differ_are_told_with_what_it_costs():
    assert dtype_note("float32", "float32") is None and dtype_note("bfloat16", "bfloat16") is None
    note, measured = dtype_note("float32", "bfloat16"), measured_difference("float32", "bfloat16")
    assert note.startswith("student.dtype = float32 (sampling) and learner.dtype = bfloat16 differ: ")
    assert f"{measured.mean:g} nats apart on average and {measured.max:g} at most" in note and "\n" not in note
