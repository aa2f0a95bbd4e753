"""How a model is tried in another layout: the length, and the distance that counts."""

import math

import pytest
import torch
from transformers import Gemma3TextConfig, Llama4TextConfig, MistralConfig, Phi3Config, Qwen3Config, Qwen3MoeConfig

from kat_ray.models.trial import trial_length, worst_difference

LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (Qwen3Config(max_position_embeddings=4096), 40),
        (Qwen3Config(max_position_embeddings=16), 16),
        (MistralConfig(max_position_embeddings=512, sliding_window=32), 64),
        (MistralConfig(max_position_embeddings=40, sliding_window=32), 40),
        (Gemma3TextConfig(max_position_embeddings=4096, sliding_window=200), 256),
        (MistralConfig(max_position_embeddings=8192, sliding_window=4096), 40),
        (Llama4TextConfig(max_position_embeddings=512, attention_chunk_size=64), 128),
        (
            Phi3Config(
                hidden_size=128, num_attention_heads=4, max_position_embeddings=512, rope_scaling=LONG,
                original_max_position_embeddings=64, sliding_window=48,
            ),
            64,
        ),
    ],
)  # fmt: skip
def test_a_sequence_goes_beyond_the_window_where_that_is_near(config, length):
    """And never beyond the length from which on its positions would be others."""
    assert trial_length(config, 256) == length


def states(*wrong, tokens=40, dtype=torch.float32):
    """Expected hidden states of norm 2, and found ones that are off by half of it at some tokens."""
    expected = torch.ones(tokens, 4, dtype=dtype)
    found = expected.clone()
    found[list(wrong)] = 1.5
    return found, expected


def test_one_token_that_is_off_counts_where_nothing_explains_it():
    dense, experts = Qwen3Config(), Qwen3MoeConfig(num_experts=4)
    assert worst_difference(*states(), dense) == 0
    assert worst_difference(*states(17), dense) == pytest.approx(0.5)
    found, expected = states(17)
    found[17] = math.nan
    assert math.isnan(worst_difference(found, expected, dense))
    for one, two in ((experts, torch.float32), (dense, torch.bfloat16)):
        assert worst_difference(*states(3, 17, dtype=two), one) == 0, "an outlier"
        assert worst_difference(*states(*range(34, 40), dtype=two), one) == pytest.approx(0.5), "the last stretch"
        assert worst_difference(*states(*range(36, 42), tokens=42, dtype=two), one) == pytest.approx(0.5)
