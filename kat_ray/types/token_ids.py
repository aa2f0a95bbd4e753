"""Token ids in few bytes: with k of them per generated token, they are most of a chunk.

    vocabulary <= 2^16    2 bytes an id
    vocabulary <= 2^18    2 bytes and 2 bits (Qwen3, Llama 3, Gemma); int32 would take 4 bytes
    vocabulary <= 2^24    3 bytes

Log-probabilities are sent as float16, whose rounding error is relative, 2^-11 at most: those near 0, of the likely
tokens, are the most exact. The error in d and in the loss: docs/log.md, "Narrow records".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_IDS_PER_BYTE = 4
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)


def pack_ids(ids: NDArray[Any], vocabulary: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Low 16 bits of ids [N, k], and the bits above them: [N, 0], [N, ceil(k / 4)] or [N, k].

    ValueError where the vocabulary is larger than 2^24.
    """
    if vocabulary > 2**24:
        raise ValueError(f"a vocabulary of {vocabulary} ids: more than 2^24 cannot be packed")
    low = ids.astype(np.uint16)
    rows, k = ids.shape
    if vocabulary <= 2**16:
        return low, np.zeros((rows, 0), dtype=np.uint8)
    high = (ids >> 16).astype(np.uint8)
    if vocabulary > 2**18:
        return low, high
    width = -(-k // _IDS_PER_BYTE)
    quads = np.zeros((rows, width * _IDS_PER_BYTE), dtype=np.uint8)
    quads[:, :k] = high
    return low, np.bitwise_or.reduce(quads.reshape(rows, width, _IDS_PER_BYTE) << _SHIFTS, axis=-1)


def unpack_ids(low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.int32]:
    """Ids [N, k] int32 from what `pack_ids` gave."""
    ids = low.astype(np.int32)
    rows, k = low.shape
    if high.shape[1] == 0:
        return ids
    if high.shape[1] != k:  # for k = 1 both ways are the same
        high = ((high[:, :, None] >> _SHIFTS) & 3).reshape(rows, high.shape[1] * _IDS_PER_BYTE)[:, :k]
    return ids | high.astype(np.int32) << 16


def out_of_vocabulary(ids: NDArray[Any], vocabulary: int) -> int | None:
    """An id outside 0..vocabulary - 1 in an array of any shape; None if there is none."""
    if not ids.size:
        return None
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        return lowest
    return highest if highest >= vocabulary else None


def out_of_vocabulary_message(rollout_id: int, part: str, foreign: int, vocabulary: int, model: str) -> str:
    """The message for an id that `model`, a configuration field and its value, has no token for."""
    return (
        f"rollout {rollout_id}: its {part} holds the token id {foreign}, but {model} has a vocabulary of "
        f"{vocabulary} ids; use models and a tokenizer that belong together (kat-ray doctor compares them)"
    )
