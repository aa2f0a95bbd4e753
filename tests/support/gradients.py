"""Gradients in the logits, taken apart by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor


def of_events(gradient: Tensor, topk_ids: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """A gradient [T, V] in the logits of events [T, k + 2]: the top k, all other ids, the stop ids elsewhere."""
    top = torch.zeros(gradient.shape, dtype=torch.bool).scatter(1, topk_ids, True)
    stop = torch.isin(torch.arange(gradient.shape[1]), torch.tensor(stop_ids)) & ~top
    others = [(gradient * kind).sum(1, keepdim=True) for kind in (~top & ~stop, stop)]
    return torch.cat([gradient.gather(1, topk_ids), *others], 1)
