"""Keys and values of live rollouts in slots, and ragged attention over them.

A forward pass takes the new tokens of some slots, one after the other, as one row of T tokens with their positions.
All layers but attention treat tokens independently. The cache layer stores new keys and values in the slots; the
attention, registered with transformers under `ATTENTION`, then runs rollout by rollout on views of the slots, or on
a GPU for many rollouts at once (`slot_groups.py`).

Which keys a token sees is what the model asks transformers' mask interface for (`slot_masks.py`). What a model asks
of its attention beyond that is done, or refused by name: nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from actors.teacher.slot_groups import Pass, SpanGroup
from actors.teacher.slot_masks import ATTENTION, SlotMask, Span, View
from kat_ray.errors import UserError
from kat_ray.models.attention import attention_by_steps, own_mask


class _SlotLayer(CacheLayerMixin):
    """One layer of all slots: keys and values, [slots, capacity, heads, head_dim] each."""

    is_sliding = False

    def __init__(self, shared: Pass) -> None:
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

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [1, heads, T, width] in the slots; returns what it was given, by which the attention finds them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_T = self._shared.rows_T
        self.keys.flatten(0, 1).index_copy_(0, rows_T, key_states[0].transpose(0, 1))
        self.values.flatten(0, 1).index_copy_(0, rows_T, value_states[0].transpose(0, 1))
        for states in (key_states, value_states):
            states.slot_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self, query: Tensor, mask: SlotMask, scale: float | None, cap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of queries [1, heads, T, width] over each span's own slot; [1, T, heads, width]."""
        heads, shared = self.keys.shape[2], self._shared
        # Query heads that share a key head are adjacent: [key heads, sharers, T, width].
        queries = query[0].unflatten(0, (heads, -1))
        scoring = _Scoring(scale, cap, None if sinks is None else sinks.reshape(heads, -1, 1, 1))
        plan, views = shared.plan(mask), mask.views(shared)
        if not plan.groups:
            parts = [
                self._alone(own, view, scoring)
                for view, own in zip(views, queries.split(shared.counts, dim=2), strict=True)
            ]
            return torch.cat(parts, dim=2).flatten(0, 1).transpose(0, 1)[None].contiguous()
        result = query.new_empty(query.shape[2], query.shape[1], self.values.shape[3])
        starts = list(accumulate(shared.counts, initial=0))
        for i in plan.alone:
            rows = slice(starts[i], starts[i + 1])
            result[rows] = self._alone(queries[:, :, rows], views[i], scoring).flatten(0, 1).transpose(0, 1)
        for group in plan.groups:
            group.attend(queries, self.keys, self.values, scoring.of_group, result)
        return result[None]

    def _alone(self, query: Tensor, view: View, scoring: _Scoring) -> Tensor:
        keys, values = (self._view(stored, view, query.shape[1]) for stored in (self.keys, self.values))
        return scoring.of_view(query, keys, values, view)

    @staticmethod
    def _view(stored: Tensor, view: View, sharers: int) -> Tensor:
        """[heads, sharers, end - first, width] of one slot, without a copy."""
        slot, position, head, width = stored.stride()
        size = (stored.shape[2], sharers, view.end - view.first, stored.shape[3])
        return stored.as_strided(size, (head, 0, position, width), view.slot * slot + view.first * position)

    def get_seq_length(self) -> int:
        """Not used: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Not used: the sizes of masks are those of the spans."""
        return int(query_length), 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class _Scoring:
    """Attention as a model asks for it; `sinks` are [key heads, sharers, 1, 1]."""

    scale: float | None
    cap: float | None
    sinks: Tensor | None

    @property
    def _is_plain(self) -> bool:
        return self.cap is None and self.sinks is None

    def of_view(self, query: Tensor, keys: Tensor, values: Tensor, view: View) -> Tensor:
        """Of one span: [key heads, sharers, new, width] each, keys as many as the view has."""
        mask = view.mask
        if self._is_plain:
            return scaled_dot_product_attention(
                query, keys, values, mask, is_causal=view.is_causal, scale=self.scale
            )
        if view.is_causal:
            mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
        return attention_by_steps(query, keys, values, mask, self.scale, self.cap, self.sinks)

    def of_group(self, query: Tensor, keys: Tensor, values: Tensor, group: SpanGroup) -> Tensor:
        """Of several spans, whose sharers follow one another: [n, key heads, sharers x N, width]."""
        new = group.seen.shape[1]
        sharers = query.shape[2] // new
        if self._is_plain:
            mask = group.added(sharers, query.dtype)
            return scaled_dot_product_attention(query, keys, values, mask, scale=self.scale)
        sinks = None if self.sinks is None else self.sinks.expand(-1, -1, new, 1).flatten(1, 2)
        return attention_by_steps(query, keys, values, group.folded(sharers), self.scale, self.cap, sinks)


def _slot_attention(
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
        attention_mask, SlotMask, module, "slots",
        dropout=dropout, sliding_window=sliding_window, is_causal=is_causal, others=others,
    )  # fmt: skip
    # The layer that stored them may be an earlier one, whose keys this one shares.
    owners = [getattr(states, "slot_layer", None) for states in (key, value)]
    if owners[0] is None or owners[0] is not owners[1]:
        raise UserError(f"{type(module).__name__} changes keys or values after they are stored")
    layer = cast(_SlotLayer, owners[0])
    return layer.attend(query, mask, scaling, softcap, s_aux), None


AttentionInterface.register(ATTENTION, _slot_attention)


class SlotCache(Cache):
    """Slots for rollouts: taken, written by forward passes, freed."""

    def __init__(self, layers: int, grouped: bool = False) -> None:
        """`grouped`: short spans of a pass are attended to together (`slot_groups.py`)."""
        self._selection = Pass(grouped=grouped)
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

    def select(self, spans: Sequence[Span], device: torch.device) -> Tensor:
        """Prepare a pass over these spans, in order; returns the positions [T] of its tokens."""
        s = self._selection
        longest = max(span.past + span.new for span in spans)
        if longest > s.capacity:
            while s.capacity < longest:
                s.capacity *= 2
            self._fit()
        s.spans, s.counts = spans, [span.new for span in spans]
        s.plans.clear()
        slots, pasts, counts = torch.tensor(spans, dtype=torch.long).unbind(1)
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions_T = pasts.repeat_interleave(counts) + within
        s.rows_T = (slots.repeat_interleave(counts) * s.capacity + positions_T).to(device)
        s.positions_T = positions_T.to(device)
        return s.positions_T

    def _fit(self) -> None:
        for layer in self.layers:
            layer.fit()

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(
            stored.numel() * stored.element_size()
            for layer in self.layers
            if layer.is_initialized
            for stored in (layer.keys, layer.values)
        )


def run_spans(decoder: Any, cache: SlotCache, spans: Sequence[Span], token_ids: Sequence[int]) -> Tensor:
    """Last hidden states [T, H] of the tokens of all spans, which are stored in their slots."""
    device = decoder.device
    ids_T = torch.tensor(token_ids, dtype=torch.long, device=device)
    positions_T = cache.select(spans, device)
    hidden_TH: Tensor = decoder(
        input_ids=ids_T[None], position_ids=positions_T[None], past_key_values=cache, use_cache=True
    )[0][0]
    return hidden_TH
