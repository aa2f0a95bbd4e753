"""Attention of several slots at once: spans of a pass whose queries and keys are padded to the longest of them.

One call takes the place of one for each span and layer, which is what a GPU waits for where spans are short. On a
CPU, where arithmetic and copies are the cost, spans are taken one by one (docs/gpu.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.teacher.slot_masks import Selection, SlotMask, View

_WASTE = 1.5  # scores that are computed for each one that is asked for
_SCORES = 2**22  # scores [n, N, K] of a group, of one head: its mask is in memory once for all layers
_KEYS = 2**17  # keys [n, K] of a group: a layer's are copied, 4 KiB each in a model of 8 billion parameters
_ALIGNED = 8  # keys; kernels of a GPU copy a mask whose rows are not aligned

# queries [n, key heads, sharers x N, width], keys and values [n, key heads, K, width] and the group.
Attention = Callable[[Tensor, Tensor, Tensor, "SpanGroup"], Tensor]


def takes_together(device: torch.device) -> bool:
    """Whether short spans are taken together: where calls, not arithmetic and copies, are the cost."""
    return device.type == "cuda"


@dataclass(frozen=True)
class SpanGroup:
    """n spans with at most N new tokens and K keys each.

    A span with fewer new tokens has its last one again, and one with fewer keys its first, which nobody sees.
    """

    query_rows: Tensor  # [n x N] tokens of the pass
    key_rows: Tensor  # [n x K] rows of the slots
    seen: Tensor  # bool [n, N, K]
    real: Tensor  # [M] which of the n x N queries are tokens of their own
    tokens: Tensor  # [M] of the pass
    _folded: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[int], views: Sequence[View], mask: SlotMask, selection: Selection) -> SpanGroup:
        """The group of these spans of a pass, by their indices."""
        device, counts = selection.positions_T.device, selection.counts
        starts = torch.tensor([0, *counts]).cumsum(0)[list(members)]
        spans = torch.tensor([selection.spans[i] for i in members])
        first, end = torch.tensor([[views[i].first, views[i].end] for i in members]).unbind(1)
        (slot, past, new), keys = spans.unbind(1), int((end - first).max())
        slot, past, new, first, end, starts = (t.to(device)[:, None] for t in (slot, past, new, first, end, starts))
        wide = -(-keys // _ALIGNED) * _ALIGNED
        query = torch.arange(max(counts[i] for i in members), device=device)
        own = torch.minimum(query, new - 1)
        position_nK = first + torch.arange(wide, device=device)
        there = position_nK < end
        seen = mask.seen(past + own, position_nK) & there[:, None, :]
        rows = starts + own
        real = (query < new).flatten().nonzero()[:, 0]
        return cls(
            query_rows=rows.flatten(),
            key_rows=(slot * selection.capacity + torch.where(there, position_nK, first)).flatten(),
            seen=seen,
            real=real,
            tokens=rows.flatten()[real],
        )

    @property
    def size(self) -> int:
        """Number of spans."""
        return len(self.seen)

    def folded(self, sharers: int) -> Tensor:
        """`seen` for query heads that share a key head, one after the other: bool [n, 1, sharers x N, K]."""
        return self._fold(sharers, torch.bool)

    def added(self, sharers: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a key is seen, else -inf; shaped as `folded`."""
        return self._fold(sharers, dtype)

    def _fold(self, sharers: int, dtype: torch.dtype) -> Tensor:
        if (sharers, dtype) not in self._folded:
            mask = self.seen
            if dtype != torch.bool:
                mask = torch.zeros_like(self.seen, dtype=dtype).masked_fill_(~self.seen, -torch.inf)
            n, new, keys = mask.shape
            self._folded[sharers, dtype] = mask[:, None].expand(n, sharers, new, keys).reshape(n, 1, -1, keys)
        return self._folded[sharers, dtype]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, attention: Attention, result: Tensor) -> None:
        """Write the group's rows of `result` [T, heads, width].

        `query` is [key heads, sharers, T, width], `keys` and `values` [slots, capacity, key heads, width].
        """
        heads, sharers, _, width = query.shape
        own = query.index_select(2, self.query_rows).unflatten(2, (self.size, -1))
        own = own.permute(2, 0, 1, 3, 4).reshape(self.size, heads, -1, width)
        past_keys, past_values = (
            stored.flatten(0, 1).index_select(0, self.key_rows).unflatten(0, (self.size, -1)).transpose(1, 2)
            for stored in (keys, values)
        )
        found = attention(own, past_keys, past_values, self).unflatten(2, (sharers, -1))
        rows = found.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        result.index_copy_(0, self.tokens, rows.index_select(0, self.real))


@dataclass(frozen=True)
class Plan:
    """How the spans of a pass are taken under one mask."""

    groups: Sequence[SpanGroup]
    alone: Sequence[int]  # indices of spans


@dataclass
class Pass(Selection):
    """A pass, and how its spans are taken under each mask that its layers share."""

    grouped: bool = False
    plans: dict[SlotMask, Plan] = field(default_factory=dict)

    def plan(self, mask: SlotMask) -> Plan:
        """Made by the first layer that asks."""
        if mask not in self.plans:
            views = mask.views(self)
            members, alone = group_spans(views, self.counts) if self.grouped else ([], [*range(len(views))])
            self.plans[mask] = Plan([SpanGroup.of(m, views, mask, self) for m in members], alone)
        return self.plans[mask]


def group_spans(views: Sequence[View], counts: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Groups of two spans and more, by index, and the spans that stay alone: with any other they would be padded
    too far, or are large enough by themselves.
    """
    keys = [view.end - view.first for view in views]
    groups: list[list[int]] = []
    longest = asked = 0
    for i in sorted(range(len(views)), key=lambda i: (-keys[i], -counts[i])):
        last = groups[-1] if groups else []
        new = max(longest, counts[i]) if last else counts[i]
        padded = (len(last) + 1) * (keys[last[0]] if last else keys[i])
        asked += counts[i] * keys[i]
        if not last or padded * new > min(_WASTE * asked, _SCORES) or padded > _KEYS:
            groups.append([i])
            longest, asked = counts[i], counts[i] * keys[i]
        else:
            last.append(i)
            longest = new
    return [g for g in groups if len(g) > 1], [g[0] for g in groups if len(g) == 1]
