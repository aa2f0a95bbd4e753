"""Attention that models ask of transformers' interface for, beyond what torch's own function does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from kat_ray.errors import UserError

# Keywords of transformers' attention functions that change no output: positions are in the keys already, lengths
# are known otherwise, and what is asked to be returned beside the output is not used.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "output_router_logits", "deterministic"}
)  # fmt: skip


def _requests_beyond(others: Mapping[str, Any], dropout: float, is_causal: bool | None) -> str:
    """What a model asks its attention for that nobody here does, as part of a sentence; or nothing."""
    asked = {k: v for k, v in others.items() if k not in _HARMLESS and v is not None and v is not False}
    if dropout:
        asked["dropout"] = dropout
    if is_causal is False:
        asked["is_causal"] = is_causal
    return ", ".join(f"{k} ({type(v).__name__})" for k, v in sorted(asked.items()))


class Mask(Protocol):
    """A mask that attention of our own gives transformers' mask interface, and gets back in each layer."""

    @property
    def is_plain(self) -> bool:
        """Whether it is that of full causal attention."""


M = TypeVar("M", bound=Mask)


def own_mask(
    mask: object,
    kind: type[M],
    module: object,
    over: str,
    *,
    dropout: float,
    sliding_window: int | None,
    is_causal: bool | None,
    others: Mapping[str, Any],
) -> M:
    """The mask, if attention of ours, which sees by masks of this kind, computes what the layer asks for.

    `over` names the attention: what it runs over. `others` are the keywords that it does not know. UserError says
    what the layer asks for beyond it.
    """
    name = type(module).__name__
    if asked := _requests_beyond(others, dropout, is_causal):
        raise UserError(f"{name} asks its attention for {asked}, which attention over {over} does not do")
    if not isinstance(mask, kind):
        raise UserError(f"{name} does not take its mask from transformers' mask interface")
    if sliding_window is not None and mask.is_plain:
        raise UserError(f"{name} names sliding_window = {sliding_window} and asks for the mask of full attention")
    return mask


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
