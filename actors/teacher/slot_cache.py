"""Keys and values of live rollouts in slots, and ragged attention over them, without padding or copies.

A forward pass takes the new tokens of some slots, one after the other, as one row of T tokens with their positions.
All layers but attention treat tokens independently. The cache layer stores new keys and values in the slots; the
attention, registered with transformers under `ATTENTION`, then runs rollout by rollout on views of the slots: to
gather and pad the pasts of all rollouts took half of the scoring time of a small model (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "kat_ray_slots"
_FIRST_CAPACITY = 64


class Span(NamedTuple):
    """The part of a pass that belongs to one slot: `new` tokens after the `past` that it holds."""

    slot: int
    past: int
    new: int


class _Selection:
    """The state that all layers share: the size of the slots, and the spans of the current pass."""

    def __init__(self) -> None:
        self.slots = 0
        self.capacity = _FIRST_CAPACITY
        self.spans: Sequence[Span] = ()
        self.counts: list[int] = []
        self.rows_T = torch.zeros(0, dtype=torch.long)  # of each token, in [slots x capacity]
        self.mask_NC: Tensor | None = None

    def mask(self, span: Span) -> Tensor | None:
        """Added to a span's attention scores [new, past + new]; None if nothing is masked."""
        if span.new == 1:
            return None
        assert self.mask_NC is not None
        first = self.mask_NC.shape[1] - self.mask_NC.shape[0] - span.past
        return self.mask_NC[: span.new, first : first + span.past + span.new]


class _SlotLayer(CacheLayerMixin):
    """One layer of all slots: keys and values, [slots, capacity, heads, head_dim] each."""

    is_sliding = False

    def __init__(self, shared: _Selection) -> None:
        super().__init__()
        self._shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first pass, when heads and width are known."""
        size = (self._shared.slots, self._shared.capacity)
        self.keys = key_states.new_zeros((*size, key_states.shape[1], key_states.shape[3]))
        self.values = value_states.new_zeros((*size, value_states.shape[1], value_states.shape[3]))
        self.is_initialized = True

    def fit(self) -> None:
        """Grow to the number and capacity of slots that are needed."""
        if not self.is_initialized:
            return
        slots, capacity = self._shared.slots, self._shared.capacity
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old.shape[:2] != (slots, capacity):
                new = old.new_zeros((slots, capacity, *old.shape[2:]))
                new[: old.shape[0], : old.shape[1]] = old
                setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store [1, heads, T, width] in the slots; returns itself instead of keys, for `_slot_attention`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_T = self._shared.rows_T
        self.keys.flatten(0, 1).index_copy_(0, rows_T, key_states[0].transpose(0, 1))
        self.values.flatten(0, 1).index_copy_(0, rows_T, value_states[0].transpose(0, 1))
        return self, self

    def attend(self, query: Tensor, scale: float | None) -> Tensor:
        """Causal attention of queries [1, heads, T, width] over each span's own slot; [1, T, heads, width]."""
        shared = self._shared
        heads = self.keys.shape[2]
        parts = []
        # Query heads that share a key head are adjacent: [key heads, sharers, T, width].
        queries = query[0].unflatten(0, (heads, -1))
        for span, own in zip(shared.spans, queries.split(shared.counts, dim=2), strict=True):
            keys = self._view(self.keys, span, own.shape[1])
            values = self._view(self.values, span, own.shape[1])
            parts.append(
                scaled_dot_product_attention(own, keys, values, shared.mask(span), scale=scale)
                if span.past
                else scaled_dot_product_attention(own, keys, values, is_causal=True, scale=scale)
            )
        return torch.cat(parts, dim=2).flatten(0, 1).transpose(0, 1)[None]

    @staticmethod
    def _view(stored: Tensor, span: Span, sharers: int) -> Tensor:
        """[heads, sharers, past + new, width] of one slot, without a copy."""
        slot, position, head, width = stored.stride()
        size = (stored.shape[2], sharers, span.past + span.new, stored.shape[3])
        return stored.as_strided(size, (head, 0, position, width), span.slot * slot)

    def get_seq_length(self) -> int:
        """Not used: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Not used: transformers builds no mask for this attention."""
        return int(query_length), 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


def _slot_attention(
    _module: Any,
    query: Tensor,
    layer: _SlotLayer,
    _values: Any,
    _mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    return layer.attend(query, scaling), None


AttentionInterface.register(ATTENTION, _slot_attention)


class SlotCache(Cache):
    """Slots for rollouts: taken, written by forward passes, freed."""

    def __init__(self, layers: int) -> None:
        self._selection = _Selection()
        super().__init__(layers=[_SlotLayer(self._selection) for _ in range(layers)])
        self._free: list[int] = []

    def take(self) -> int:
        if not self._free:
            old = self._selection.slots
            self._selection.slots = max(8, old * 2)
            self._free.extend(range(self._selection.slots - 1, old - 1, -1))
            self._fit()
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Free a slot; the next rollout overwrites its content."""
        self._free.append(slot)

    def select(self, spans: Sequence[Span], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Prepare a pass over these spans, in order; returns the positions [T] of its tokens."""
        s = self._selection
        longest = max(span.past + span.new for span in spans)
        if longest > s.capacity:
            while s.capacity < longest:
                s.capacity *= 2
            self._fit()
        s.spans, s.counts = spans, [span.new for span in spans]
        slots, pasts, counts = torch.tensor(spans, dtype=torch.long).unbind(1)
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions_T = pasts.repeat_interleave(counts) + within
        s.rows_T = (slots.repeat_interleave(counts) * s.capacity + positions_T).to(device)
        s.mask_NC = _band(spans, dtype, device)
        return positions_T.to(device)

    def _fit(self) -> None:
        for layer in self.layers:
            layer.fit()

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(
            2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers if layer.is_initialized
        )


def _band(spans: Sequence[Span], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """One mask that contains every span's as a part: the i-th new token sees the past and i + 1 new tokens."""
    wide = [span for span in spans if span.past and span.new > 1]
    if not wide:
        return None
    width, past = max(span.new for span in wide), max(span.past for span in wide)
    hidden = torch.arange(-past, width) > torch.arange(width)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).to(device)
