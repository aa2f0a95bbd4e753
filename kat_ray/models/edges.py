"""Lengths at which a model computes something else than before: where engines are known to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def edges_of(text_config: Any) -> dict[str, int]:
    """Lengths in tokens at which a model computes something else than before, by what it is.

    `text_config` is transformers' configuration of the language model. A window that is switched off
    (`use_sliding_window`), or wider than the model's positions, is none.
    """
    found: dict[str, int] = {}
    longest = getattr(text_config, "max_position_embeddings", None)
    window = getattr(text_config, "sliding_window", None)
    chunk = getattr(text_config, "attention_chunk_size", None)
    if getattr(text_config, "use_sliding_window", None) is not False and isinstance(window, int) and window > 0:
        found["the sliding window"] = window
    if isinstance(chunk, int) and chunk > 0:
        found["an attention chunk"] = chunk
    if original := _original_length(text_config):
        found["the original rope length"] = original
    return {name: edge for name, edge in found.items() if longest is None or edge < longest}


def _original_length(text_config: Any) -> int | None:
    """Positions that a stretched rope was trained on; None where it is not stretched."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    lengths = [part.get("original_max_position_embeddings") for part in kinds]
    lengths.append(getattr(text_config, "original_max_position_embeddings", None))
    return max((int(n) for n in lengths if isinstance(n, int | float)), default=None)
