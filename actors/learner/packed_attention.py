"""Attention over a packed micro-batch: sequences one after another in one row, none of which sees another.

Everything else in a layer treats tokens alone, so only attention has to know where a sequence begins. It is
registered with transformers under `ATTENTION`. Which keys a token sees within its sequence is what the model asks
transformers' mask interface for, as a function of positions (causal, sliding, chunked); what it asks of its
attention beyond that is done, or refused by name.

A mask over the whole row would cost the square of its length. Here attention runs sequence by sequence, and on a
GPU in 16 bits, where the mask is causal or a window, as one call of flash attention for ragged sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from kat_ray.errors import UserError
from kat_ray.models.attention import attention_by_steps, own_mask

ATTENTION = "kat_ray_packed"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths of the packed sequences", default=None)
# What torch's flash attention takes: widths of heads up to this, and multiples of that; GPUs from Ampere on.
_WIDEST_HEAD, _HEAD_STEP, _OLDEST_GPU = 256, 8, (8, 0)


@contextmanager
def packed_pass(position_ids: Tensor) -> Iterator[None]:
    """A forward pass over `position_ids` [1, T]: a sequence begins wherever a position is 0."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], position_ids.shape[1]]
    token = _LENGTHS.set(tuple(end - start for start, end in zip(starts, ends, strict=True)))
    try:
        yield
    finally:
        _LENGTHS.reset(token)


class PackedMask:
    """What the layers of a model get in place of a mask's tensor; lives for one pass, recomputation included."""

    def __init__(
        self, function: MaskFunction, lengths: Sequence[int], size: int | None, device: torch.device
    ) -> None:
        """`size` is what the model names as its window's or chunk's."""
        self._function, self._size, self._device = function, size, device
        self.lengths, self.longest = list(lengths), max(lengths)

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all tokens of its sequence up to itself, whatever its length."""
        return self._function is causal_mask_function

    def of(self, length: int) -> Tensor | None:
        """Bool [length, length], which keys the tokens of a sequence see; None where that is causal."""
        return None if length <= self._causal_up_to else self._table[:length, :length]

    @cached_property
    def window(self) -> int | None:
        """How many keys a token sees, itself included and the last ones; None where that does not say it all.

        The longest sequence where all are seen.
        """
        if self.is_plain or self._size is None:
            return self.longest if self.is_plain else None
        query_N = torch.arange(self.longest, device=self._device)
        first_N = query_N - self._size + 1
        sees_first = self._seen(query_N, first_N)[first_N >= 0]
        sees_before = self._seen(query_N, first_N - 1)[first_N > 0]
        is_window = bool(sees_first.all()) and not bool(sees_before.any())
        return min(self._size, self.longest) if is_window else None

    @cached_property
    def starts(self) -> Tensor:
        """Int32 [sequences + 1]: where each begins in the row, and the end of the last."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self._device)

    @cached_property
    def _causal_up_to(self) -> int:
        """The longest sequence whose mask is causal."""
        if self.window is not None:
            return self.window
        hidden_N = (self._table != torch.ones_like(self._table).tril()).any(dim=1).nonzero()
        return int(hidden_N[0]) if len(hidden_N) else self.longest

    @cached_property
    def _table(self) -> Tensor:
        """Bool [N, N] of the longest sequence: its upper left corner is that of a shorter one."""
        position_N = torch.arange(self.longest, device=self._device)
        return self._seen(position_N[:, None], position_N[None])

    def _seen(self, query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=self._device)
        return self._function(zero, zero, query, key).expand(torch.broadcast_shapes(query.shape, key.shape))


def _packed_mask(
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device,
    **_: Any,
) -> PackedMask:
    """As transformers' mask functions."""
    lengths = _LENGTHS.get()
    assert lengths is not None, "outside of `packed_pass`"
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError("it masks tokens of its own")
    if use_vmap:
        raise UserError("its mask depends on more than the positions of query and key")
    return PackedMask(mask_function, lengths, local_size, device)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions. UserError names a keyword of a model that is not known here."""
    mask = own_mask(
        attention_mask, PackedMask, module, "packed sequences",
        dropout=dropout, sliding_window=sliding_window, is_causal=is_causal, others=others,
    )  # fmt: skip
    if softcap is None and s_aux is None and flash_takes(query, key, value) and mask.window is not None:
        return flash_attention(query, key, value, mask, scaling), None
    return _by_sequence(query, key, value, mask, scaling, softcap, s_aux), None


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Of [1, heads, T, width], one sequence after another; [1, T, heads, width]."""
    heads = key.shape[1]
    # Query heads that share a key head are adjacent: [key heads, sharers, T, width] of all three.
    queries = query[0].unflatten(0, (heads, -1))
    keys, values = (states[0][:, None].expand(-1, queries.shape[1], -1, -1) for states in (key, value))
    if sinks is not None:
        sinks = sinks.reshape(heads, -1, 1, 1)
    parts = []
    # Split, not sliced: the gradient of a slice is an array for the whole row.
    split = (states.split(mask.lengths, dim=2) for states in (queries, keys, values))
    for length, q, k, v in zip(mask.lengths, *split, strict=True):
        seen = mask.of(length)
        if cap is None and sinks is None:
            part = scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale)
        else:
            if seen is None:
                seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            part = attention_by_steps(q, k, v, seen, scale, cap, sinks)
        parts.append(part.permute(2, 0, 1, 3))
    return torch.cat(parts).flatten(1, 2)[None]


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's flash attention for ragged sequences has a kernel for these."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == key.shape[-1] == value.shape[-1]
        and width <= _WIDEST_HEAD
        and width % _HEAD_STEP == 0
        and torch.cuda.get_device_capability(query.device) >= _OLDEST_GPU
    )


def flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
    """As `_by_sequence`, in one call; the mask has a `window`."""
    from torch.nn.attention.varlen import varlen_attn

    assert mask.window is not None
    past = -1 if mask.window >= mask.longest else mask.window - 1
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    result = varlen_attn(
        q, k, v, mask.starts, mask.starts, mask.longest, mask.longest,
        scale=scale, window_size=(past, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(result, Tensor)  # and not a pair: nothing else was asked for
    return result[None]


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, _packed_mask)
