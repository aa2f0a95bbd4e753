"""Attention that models ask of transformers' interface for, beyond what torch's own function does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Keywords of transformers' attention functions that change no output: positions are in the keys already, lengths
# are known otherwise, and what is asked to be returned beside the output is not used.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "output_router_logits", "deterministic"}
)  # fmt: skip


def requests_beyond(others: Mapping[str, Any], dropout: float, is_causal: bool | None) -> str:
    """What a model asks its attention for that nobody here does, as part of a sentence; or nothing."""
    asked = {k: v for k, v in others.items() if k not in _HARMLESS and v is not None and v is not False}
    if dropout:
        asked["dropout"] = dropout
    if is_causal is False:
        asked["is_causal"] = is_causal
    return ", ".join(f"{k} ({type(v).__name__})" for k, v in sorted(asked.items()))


def attention_by_steps(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention [..., n, width] with a soft cap on scores (arXiv 2408.00118) or sinks (arXiv 2309.17453).

    `mask` is bool, True where a query sees a key. A sink is a score that takes its share of the softmax and has no
    value; `sinks` is shaped as the scores are, or can be expanded to it, with one column.
    """
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    shares = scores.softmax(dim=-1)[..., : keys.shape[-2]]
    return shares.to(values.dtype) @ values
