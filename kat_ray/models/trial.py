"""A model tried in another layout than its plain forward pass: how long a sequence, and how far off it is.

Used where a model is loaded, by what lays out its sequences anew: packed rows of the learner, slots of scorers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kat_ray.models.edges import edges_of
from kat_ray.models.support import has_experts

_SHORTEST = 40  # tokens of a model without a window: some of each block that a kernel takes
_STRETCH = 8  # tokens


def trial_length(text_config: Any, most: int) -> int:
    """Tokens of a sequence, `most` at most, that goes beyond the window or chunk of a language model.

    By as many tokens again, or by as many as `most` leaves; a window that it does not reach beyond is left out. The
    sequence is no longer than what the model takes, nor than the length from which on positions may be others.
    """
    edges = edges_of(text_config)
    original = edges.pop("the original rope length", None)
    wanted = [min(2 * edge, most) for edge in edges.values() if edge + _STRETCH <= most]
    longest = getattr(text_config, "max_position_embeddings", None)
    return min(max([_SHORTEST, *wanted]), *(n for n in (most, original, longest) if n is not None))


def worst_difference(found_TH: Tensor, expected_TH: Tensor, text_config: Any) -> float:
    """The largest distance of hidden states, as a share of the norm of what was expected; NaN where one is.

    In float32 it is that of the worst token. Rounding in 16 bits makes single tokens outliers, and so do experts
    that are chosen otherwise at a tie: there it is that of the worst stretch of 8 tokens, at its median token.
    """
    expected_TH = expected_TH.float()
    difference_T = (found_TH.float() - expected_TH).norm(dim=-1) / expected_TH.norm(dim=-1)
    if found_TH.dtype == torch.float32 and not has_experts(text_config):
        return float(difference_T.max())
    whole = len(difference_T) // _STRETCH * _STRETCH
    stretches = torch.stack([*difference_T[:whole].split(_STRETCH), difference_T[-_STRETCH:]])
    return float(stretches.median(dim=1).values.max())
