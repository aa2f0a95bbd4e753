"""A model on slots, tried when it is loaded: passes in pieces, of ragged rollouts, against its plain forward pass.

What a configuration does not tell is found here: attention that looks elsewhere than the cache, a state beside keys
and values, positions that are not those given, a window that is not kept to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actors.teacher.slot_cache import SlotCache, run_spans
from actors.teacher.slot_masks import ATTENTION, Span
from kat_ray.cluster.fatal_errors import fatal_reason
from kat_ray.errors import UserError
from kat_ray.models.trial import trial_length, worst_difference

_INSTEAD = "use scorer.backend = vllm on GPUs, or another teacher"
# Of a hidden state's norm: 1e-5 and 1e-2 were seen in float32 and in 16 bits, 0.3 and more where the attention was
# another one.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_LONGEST = 256  # tokens: the slots are as long from then on
_FIRST, _SHORT = 10, 7  # tokens of the long rollout before the last pass, and of the other one
# Passes of (rollout, tokens before, new tokens): both begin, one token, many tokens beside one. The last one runs
# what is left of the long rollout, and `_LAST` of the other.
_PASSES = (((0, 0, 5), (1, 0, 3)), ((0, 5, 1),), ((1, 3, 1), (0, 6, 4)))
_LAST = (1, 4, 3)


@contextmanager
def refused_by_name(name: str, architecture: str) -> Iterator[None]:
    """Errors inside are the model's, which cannot be scored with: `UserError` names it and what was wrong."""
    try:
        yield
    except Exception as error:  # whatever another library's code raises where it finds no cache of its own
        if fatal_reason(error) is not None:  # the device's fault, not the model's
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name}: {architecture} cannot be scored by the transformers backend: {lines[0]}; {_INSTEAD}"
        ) from error


@torch.inference_mode()
def check_slots(decoder: Any, cache: SlotCache, vocabulary: int) -> None:
    """Let a decoder attend over slots; an error where its hidden states are then others."""
    text = decoder.config.get_text_config()
    longest = trial_length(text, _LONGEST)
    tokens = [[(7 * i + 31 * r + 3) % vocabulary for i in range(n)] for r, n in enumerate((longest, _SHORT))]
    decoder.set_attn_implementation("eager")  # where caps and sinks are not passed over
    plain = [_plain(decoder, ids) for ids in tokens]
    decoder.set_attn_implementation(ATTENTION)
    if decoder.config._attn_implementation != ATTENTION:
        raise UserError("it does not go through transformers' attention interface")
    slots = [cache.take() for _ in tokens]
    parts: list[list[Tensor]] = [[] for _ in tokens]
    for spans in (*_PASSES, ((0, _FIRST, longest - _FIRST), _LAST)):
        new = [t for r, past, n in spans for t in tokens[r][past : past + n]]
        hidden_TH = run_spans(decoder, cache, [Span(slots[r], past, n) for r, past, n in spans], new)
        for (r, *_), part in zip(spans, hidden_TH.split([n for *_, n in spans]), strict=True):
            parts[r].append(part)
    for slot in slots:
        cache.free(slot)
    worst = worst_difference(torch.cat([t for rollout in parts for t in rollout]), torch.cat(plain), text)
    if not worst <= _TOLERANCES[decoder.dtype]:
        raise UserError(f"scored in pieces, its hidden states differ from a plain forward pass by {worst:.1g}")


def _plain(decoder: Any, token_ids: list[int]) -> Tensor:
    """Hidden states [T, H] of a plain pass."""
    hidden_TH: Tensor = decoder(input_ids=torch.tensor([token_ids], device=decoder.device), use_cache=False)[0][0]
    return hidden_TH
