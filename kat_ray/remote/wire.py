"""Messages of a run and its teacher's server: a few named arrays and plain data, in a binary body. No pickle.

    b"KATT" | length of the head, uint32 | head, JSON | the arrays' bytes, one after another

The head is {"version": 1, "meta": {...}, "arrays": [[name, dtype, shape], ...]}. All numbers are little-endian;
float32 stays float32, so that what is scored elsewhere is to the bit what it is here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kat_ray.errors import UserError

VERSION = 1
CONTENT_TYPE = "application/x-kat-ray"
_MAGIC = b"KATT"
_START = struct.Struct("<4sI")
_DTYPES = frozenset({"<f4", "<i4", "<i8", "<u2", "|u1", "|i1", "|b1"})
_MAX_HEAD = 2**20  # bytes
_MAX_ARRAYS, _MAX_AXES = 64, 3


class WireError(UserError):
    """A body is no message, or not one of this version."""


class Message(NamedTuple):
    """Plain data and arrays by name."""

    meta: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def pack(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The body of a message."""
    parts, listed = [], []
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array)
        plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
        if plain.dtype.str not in _DTYPES:
            raise ValueError(f"{name}: arrays of {plain.dtype.str} are not sent; of {', '.join(sorted(_DTYPES))}")
        listed.append([name, plain.dtype.str, list(array.shape)])
        parts.append(plain.tobytes())
    head = json.dumps({"version": VERSION, "meta": meta, "arrays": listed}, allow_nan=False).encode()
    return b"".join([_START.pack(_MAGIC, len(head)), head, *parts])


def unpack(body: bytes) -> Message:
    """The message of a body; `WireError` says what is wrong with it."""
    head, at = _head(body)
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in _listed(head):
        count = math.prod(shape)
        end = at + count * np.dtype(dtype).itemsize
        if end > len(body):
            raise WireError(f"the body ends within the array {name!r}: {len(body)} bytes, {end} are announced")
        arrays[name] = np.frombuffer(body, dtype=dtype, count=count, offset=at).reshape(shape)
        at = end
    if at != len(body):
        raise WireError(f"the body has {len(body) - at} bytes after its arrays")
    meta = head.get("meta")
    if not isinstance(meta, dict):
        raise WireError("the head has no plain data (meta)")
    return Message(meta, arrays)


def _head(body: bytes) -> tuple[dict[str, Any], int]:
    if len(body) < _START.size or not body.startswith(_MAGIC):
        raise WireError("the body is no message of kat-ray")
    _, length = _START.unpack_from(body)
    end = _START.size + length
    if length > _MAX_HEAD or end > len(body):
        raise WireError(f"the head is said to have {length} bytes, which the body or the limit does not hold")
    try:
        head = json.loads(body[_START.size : end])
    except (ValueError, RecursionError) as error:
        raise WireError("the head is not JSON") from error
    if not isinstance(head, dict) or head.get("version") != VERSION:
        shown = head.get("version") if isinstance(head, dict) else None
        raise WireError(
            f"the message is of version {shown!r}, this side speaks {VERSION}: install the same kat-ray on both"
        )
    return head, end


def _listed(head: Mapping[str, Any]) -> list[tuple[str, str, list[int]]]:
    listed = head.get("arrays")
    if not isinstance(listed, list) or len(listed) > _MAX_ARRAYS:
        raise WireError("the head does not list its arrays")
    found: list[tuple[str, str, list[int]]] = []
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 3:
            raise WireError("an array is not given as name, type and shape")
        name, dtype, shape = entry
        sizes = isinstance(shape, list) and len(shape) <= _MAX_AXES and all(_is_size(n) for n in shape)
        if not isinstance(name, str) or dtype not in _DTYPES or not sizes:
            raise WireError(f"array {name!r} of type {dtype!r} and shape {shape!r} cannot be one")
        found.append((name, dtype, shape))
    if len({name for name, *_ in found}) != len(found):
        raise WireError("an array is given twice")
    return found


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**40
