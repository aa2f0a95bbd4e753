"""Which keys the new tokens of each slot see: the mask that a model asks transformers for, over ragged spans.

transformers gives a mask as a function of the positions of query and key; causal, sliding and chunked masks are
such functions. `SlotMask` keeps the function, in place of one tensor over a padded batch, and evaluates it for the
spans of the pass, once for all layers that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from kat_ray.errors import UserError

ATTENTION = "kat_ray_slots"
FIRST_CAPACITY = 64

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Span(NamedTuple):
    """The part of a pass that belongs to one slot: `new` tokens after the `past` that it holds."""

    slot: int
    past: int
    new: int


class View(NamedTuple):
    """The keys `first` to `end` of a slot, all that a span's tokens may see, and which token sees which.

    `mask` is bool [new, end - first]; without one all are seen by all, or the later ones not by the earlier
    (`is_causal`).
    """

    slot: int
    first: int
    end: int
    mask: Tensor | None
    is_causal: bool


@dataclass
class Selection:
    """The state that all layers share: the size of the slots, and the spans of the current pass."""

    slots: int = 0
    capacity: int = FIRST_CAPACITY
    spans: Sequence[Span] = ()
    counts: list[int] = field(default_factory=list)
    rows_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # in [slots x capacity]
    positions_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class SlotMask:
    """What the layers of a model get in place of a mask's tensor; lives for one pass."""

    def __init__(self, function: MaskFunction) -> None:
        self._function = function
        self._views: Sequence[View] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all tokens up to itself."""
        return self._function is causal_mask_function

    def views(self, selection: Selection) -> Sequence[View]:
        """What each span of the pass sees, in their order."""
        if self._views is None:
            self._views = _causal(selection) if self.is_plain else self._evaluate(selection)
        return self._views

    def seen(self, query_nN: Tensor, key_nK: Tensor) -> Tensor:
        """Which keys these queries see, bool [n, N, K], by their positions in n sequences."""
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=query_nN.device)
        table = self._function(zero, zero, query_nN[:, None, :, None], key_nK[:, None, None, :])
        return table.expand(len(query_nN), 1, query_nN.shape[1], key_nK.shape[1])[:, 0]

    def _evaluate(self, selection: Selection) -> Sequence[View]:
        """One table of all tokens and all positions, of which each span gets its part."""
        spans, query_T = selection.spans, selection.positions_T
        key_K = torch.arange(max(s.past + s.new for s in spans), device=query_T.device)
        seen_TK = self.seen(query_T[None], key_K[None])[0].contiguous()
        bounds = torch.stack([seen_TK.view(torch.uint8).argmax(dim=1), seen_TK.sum(dim=1)], dim=1).tolist()
        views, row = [], 0
        for span in spans:
            own = bounds[row : row + span.new]
            if any(seen == 0 for _, seen in own):
                raise UserError("its mask leaves a token without a key")
            first, end = min(first for first, _ in own), span.past + span.new
            if span.new == 1 and own[0][1] == end - first:
                views.append(View(span.slot, first, end, None, False))
            else:
                views.append(View(span.slot, first, end, seen_TK[row : row + span.new, first:end], False))
            row += span.new
        return views


def _causal(selection: Selection) -> Sequence[View]:
    """Under a plain causal mask all spans' masks are parts of one band: a token sees the past and itself."""
    wide = [span for span in selection.spans if span.past and span.new > 1]
    width, past = max((s.new for s in wide), default=0), max((s.past for s in wide), default=0)
    device = selection.positions_T.device
    band = torch.arange(-past, width, device=device) <= torch.arange(width, device=device)[:, None]
    views = []
    for slot, held, new in selection.spans:
        masked = held > 0 and new > 1
        mask = band[:new, past - held : past + new] if masked else None
        views.append(View(slot, 0, held + new, mask, is_causal=not masked and new > 1))
    return views


def _slot_mask(
    *, mask_function: MaskFunction, attention_mask: Tensor | None = None, use_vmap: bool = False, **_: Any
) -> SlotMask:
    """As transformers' mask functions: the sizes, offsets and types they are given are those of a padded batch."""
    if attention_mask is not None:
        raise UserError("it masks tokens of its own")
    if use_vmap:
        raise UserError("its mask depends on more than the positions of query and key")
    return SlotMask(mask_function)


AttentionMaskInterface.register(ATTENTION, _slot_mask)
