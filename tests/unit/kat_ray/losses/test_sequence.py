"""The ratio of a whole rollout, from those of its tokens."""

import pytest
import torch

from kat_ray.losses.sequence import rollout_log_ratios

LOG = torch.tensor([1.0, 3.0, -2.0, 0.5, 0.25, torch.nan])
COUNTS = torch.tensor([True, True, True, True, True, False])


@pytest.mark.parametrize(
    ("kind", "expected"), [("mean", [2, 2, -2, 0.375, 0.375, 0.375]), ("sum", [4, 4, -2, 0.75, 0.75, 0.75])]
)
def test_over_the_tokens_that_count(kind, expected):
    assert rollout_log_ratios(kind, LOG, COUNTS, [2, 1, 3]).tolist() == expected


def test_of_nothing():
    assert rollout_log_ratios("mean", LOG[:2], COUNTS[:2] & False, [1, 1]).tolist() == [0, 0]
    assert rollout_log_ratios("sum", LOG[:0], COUNTS[:0], []).tolist() == []
