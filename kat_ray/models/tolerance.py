"""How far two engines' log-probabilities of the same tokens may lie apart: rounding, by the pair of data types.

Both compute the same model from the same weights, so what remains is the order of sums and the data type. What was
measured, and how the bounds follow from it: docs/numbers.md.
"""

from __future__ import annotations

from typing import NamedTuple


class LogprobDifference(NamedTuple):
    """|log p - log p'| of sampled tokens, in nats."""

    mean: float
    max: float


# The largest that was measured between a sampler and a learner, by the coarser of the two types and the finer. That
# of float16 is an eighth of bfloat16's, which has three bits less; bfloat16 on both is taken as on one side. For
# these the check itself gave means of a quarter to a fifth of the bounds that follow (docs/numbers.md).
_MEASURED = {
    ("float32", "float32"): LogprobDifference(1.7e-5, 4.9e-5),
    ("float16", "float32"): LogprobDifference(0.007, 0.064),
    ("float16", "float16"): LogprobDifference(0.007, 0.064),
    ("bfloat16", "float32"): LogprobDifference(0.054, 0.51),
    ("bfloat16", "float16"): LogprobDifference(0.054, 0.51),
    ("bfloat16", "bfloat16"): LogprobDifference(0.054, 0.51),
}
# Longer answers, deeper models and other kernels round more; another model differs by far more than this.
_ROOM = 5.0
# Rounding below this changes nothing that is learnt, whatever the engine.
_LEAST = LogprobDifference(1e-3, 1e-2)
_COARSEST_FIRST = ("bfloat16", "float16", "float32")


def measured_difference(sampler_dtype: str, learner_dtype: str) -> LogprobDifference:
    """The largest that was measured with these two types, either way round."""
    first, second = sorted((sampler_dtype, learner_dtype), key=_COARSEST_FIRST.index)
    return _MEASURED[first, second]


def logprob_tolerance(sampler_dtype: str, learner_dtype: str) -> LogprobDifference:
    """Bounds on the mean and on the largest difference between two engines of the same weights, either way round.

    Types are "float32", "bfloat16" and "float16"; of a scorer and a plain pass of the teacher they are the same.
    """
    measured = measured_difference(sampler_dtype, learner_dtype)
    return LogprobDifference(
        max(_ROOM * measured.mean, _LEAST.mean),
        max(_ROOM * measured.max, _LEAST.max),
    )


def dtype_note(sampler_dtype: str, learner_dtype: str) -> str | None:
    """What it costs that student.dtype, the sampler's, and learner.dtype differ; None where they do not."""
    if sampler_dtype == learner_dtype:
        return None
    apart, same = measured_difference(sampler_dtype, learner_dtype), measured_difference("float32", "float32")
    return (
        f"student.dtype = {sampler_dtype} (sampling) and learner.dtype = {learner_dtype} differ: rounding alone "
        f"puts log-probabilities of sampled tokens {apart.mean:g} nats apart on average and {apart.max:g} at most "
        f"(measured on SmolLM2-135M; float32 on both: {same.mean:g} and {same.max:g})"
    )
