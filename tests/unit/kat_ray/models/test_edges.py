"""Lengths at which a model's attention or positions change, from transformers' own configurations."""

import pytest
from transformers import (
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from kat_ray.models.edges import edges_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "edges"),
    [
        (Qwen3Config(max_position_embeddings=512), {}),
        (MistralConfig(max_position_embeddings=512, sliding_window=32), {"the sliding window": 32}),
        (MistralConfig(max_position_embeddings=512, sliding_window=None), {}),
        (MistralConfig(max_position_embeddings=512, sliding_window=4096), {}),
        (Qwen2Config(max_position_embeddings=512, sliding_window=32, use_sliding_window=False), {}),
        (
            Qwen2Config(
                max_position_embeddings=512, sliding_window=32, use_sliding_window=True, max_window_layers=0
            ),
            {"the sliding window": 32},
        ),
        (Gemma3TextConfig(max_position_embeddings=512, sliding_window=16), {"the sliding window": 16}),
        (LlamaConfig(max_position_embeddings=512, rope_scaling=YARN), {"the original rope length": 128}),
        (
            Phi3Config(
                hidden_size=128, num_attention_heads=4, max_position_embeddings=512, rope_scaling=LONG,
                original_max_position_embeddings=64, sliding_window=None,
            ),
            {"the original rope length": 64},
        ),
        (
            Llama4TextConfig(max_position_embeddings=512, attention_chunk_size=64),
            {"an attention chunk": 64},
        ),
    ],
)  # fmt: skip
def test_edges(config, edges):
    assert edges_of(config) == edges
