"""The text model of a causal language model, which is the model itself or a part of a multimodal one."""

from __future__ import annotations

from typing import Any


def text_decoder(model: Any) -> Any:
    """The module that makes last hidden states [B, L, H] of token ids; its `config` is of the text model alone."""
    body = getattr(model, "model", model.base_model)
    return getattr(body, "language_model", body)
