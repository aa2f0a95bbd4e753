"""Chunks, pieces of text and their scores as messages of `kat_ray/remote/wire.py`, for both sides of a server.

A chunk goes without the student's log-probabilities, which no teacher needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from actors.teacher.backend import RunNeeds, Sequences, TeacherColumns, TeacherTargets
from kat_ray.remote.wire import Message, WireError, pack
from kat_ray.types.records import FloatArray, IntArray, RolloutChunk

MAX_VOCABULARY = 2**22  # ids; a server makes rows of so many numbers
_CHUNK: Mapping[str, tuple[str, int]] = {  # fields that are sent, with type and number of axes
    "rollout_ids": ("<i8", 1), "offsets": ("<i4", 1), "token_ids": ("<i4", 1), "ended": ("|i1", 1),
    "context_offsets": ("<i4", 1), "context_ids": ("<i4", 1), "inserted": ("|b1", 1),
    "topk_ids_low": ("<u2", 2), "topk_ids_high": ("|u1", 2),
}  # fmt: skip
_COLUMNS = tuple(f.name for f in fields(TeacherColumns) if f.name != "targets")
_TARGETS = ("topk", "tail", "stop")  # beside `ids`; they travel under these names behind `targets_`
Arrays = Mapping[str, NDArray[Any]]

NOTHING = -1  # of `Past.after`: no request brought anything of a rollout yet


@dataclass(frozen=True)
class Past:
    """What a server has to hold of a session when a chunk comes; all else of the session it can drop.

    A number of tokens would not tell: a server that others were asked in place of may hold as many of an earlier
    attempt at a rollout. The number of a request does, since each has one of its own and is always the same bytes.
    """

    after: IntArray  # [R] int64, the request that brought the last tokens of each of the chunk's rollouts
    others: IntArray  # [*] int64, live rollouts that are not in the chunk


def needs_meta(run: RunNeeds) -> dict[str, Any]:
    """What a run asks of its teacher, as plain data."""
    return {
        "stop_ids": list(run.stop_ids), "student_vocabulary": run.student_vocabulary, "top_needed": run.top_needed,
        "temperature": run.temperature,
    }  # fmt: skip


def needs_of(meta: Mapping[str, Any]) -> RunNeeds:
    """The other way round; `WireError` where it is wrong."""
    stops, vocabulary = meta.get("stop_ids"), meta.get("student_vocabulary")
    if not isinstance(stops, list) or not all(is_count(i, MAX_VOCABULARY) for i in stops):
        raise WireError(f"stop_ids = {stops!r}: must be ids")
    if not is_count(vocabulary, MAX_VOCABULARY):
        raise WireError(f"student_vocabulary = {vocabulary!r}: must be a whole number <= {MAX_VOCABULARY}")
    temperature = meta.get("temperature")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise WireError(f"temperature = {temperature!r}: must be a number > 0")
    return RunNeeds(tuple(stops), vocabulary, meta.get("top_needed") is True, float(temperature))


def is_count(value: Any, most: int) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def chunk_arrays(chunk: RolloutChunk, past: Past) -> dict[str, NDArray[Any]]:
    """The arrays of a chunk that its teacher needs, and of what it follows."""
    arrays = {name: getattr(chunk, name).astype(dtype, copy=False) for name, (dtype, _) in _CHUNK.items()}
    return arrays | {"after": past.after.astype("<i8"), "others": past.others.astype("<i8")}


def past_of_message(message: Message, rollouts: int) -> Past:
    """What a chunk of so many rollouts follows; `WireError` where it is not said."""
    after, others = (_array(message.arrays, name, "<i8", 1) for name in ("after", "others"))
    if len(after) != rollouts:
        raise WireError(f"after has {len(after)} entries, the chunk {rollouts}")
    return Past(after, others)


def chunk_of_message(message: Message) -> RolloutChunk:
    """A chunk from its arrays; `WireError` where these do not fit together. Ids are not looked at."""
    given = {name: _array(message.arrays, name, *kind) for name, kind in _CHUNK.items()}
    rollouts, rows = len(given["rollout_ids"]), len(given["token_ids"])
    for name, count in (("offsets", rows), ("context_offsets", len(given["context_ids"]))):
        _check_offsets(name, given[name], rollouts, count)
    for name, count in (
        ("ended", rollouts),
        ("inserted", rollouts),
        ("topk_ids_low", rows),
        ("topk_ids_high", rows),
    ):
        if len(given[name]) != count:
            raise WireError(f"{name} has {len(given[name])} entries, the chunk {count}")
    if len(np.unique(given["rollout_ids"])) != rollouts:
        raise WireError("rollout_ids: a rollout is named twice")
    top_k = given["topk_ids_low"].shape[1]
    if given["topk_ids_high"].shape[1] not in (0, -(-top_k // 4), top_k):
        raise WireError("topk_ids_high: its width is none of those that go with topk_ids_low")
    return RolloutChunk(
        attempt=0,
        start=np.zeros(rollouts, dtype=np.int32),
        sampled_logprobs=np.zeros(rows, dtype=np.float32),
        topk_logprobs=np.broadcast_to(np.float16(0.0), (rows, top_k)),
        tail_logprobs=np.zeros(rows, dtype=np.float32),
        released=np.zeros(0, dtype=np.int64),
        **given,
    )


def _array(arrays: Arrays, name: str, dtype: str, axes: int) -> NDArray[Any]:
    array = arrays.get(name)
    if array is None or array.dtype.str != dtype or array.ndim != axes:
        raise WireError(f"the array {name} is missing, or not of type {dtype} with {axes} axes")
    return array


def _check_offsets(name: str, offsets: IntArray, parts: int, count: int) -> None:
    good = len(offsets) == parts + 1 and offsets[0] == 0 and offsets[-1] == count and (np.diff(offsets) >= 0).all()
    if not good:
        raise WireError(f"{name}: do not divide {count} entries among {parts} rollouts")


# --- what comes back -----------------------------------------------------------------------------------------


def columns_body(columns: TeacherColumns, meta: Mapping[str, Any]) -> bytes:
    """The body of an answer to a chunk."""
    arrays = {name: getattr(columns, name).numpy() for name in _COLUMNS}
    if (targets := columns.targets) is not None:
        arrays |= {f"targets_{name}": getattr(targets, name).numpy() for name in _TARGETS}
        if targets.ids is not None:
            arrays["targets_ids"] = targets.ids.int().numpy()
    return pack(meta, arrays)


@dataclass(frozen=True)
class Wanted:
    """What an answer has to hold: columns of `rows` rows at `top_k` ids, and what the learner gets of each."""

    rows: int
    top_k: int
    own_top: int = 0  # ids of the teacher's own in its targets
    own_below: int = MAX_VOCABULARY  # all of which are smaller than this
    temperature: float = 1.0

    @property
    def targets(self) -> int:
        """Ids of each row of its targets; 0 where there are none."""
        return (self.own_top or self.top_k if self.own_top or self.temperature != 1.0 else 0) if self.rows else 0


def columns_of_message(message: Message, wanted: Wanted) -> TeacherColumns:
    """The columns of an answer; `WireError` where they are not the wanted ones."""
    found: dict[str, torch.Tensor] = {}
    for name in _COLUMNS:
        dtype = "<i4" if name == "top" else "<f4"
        found[name] = _column(message.arrays, name, dtype, wanted.rows, wanted.top_k if name == "topk" else None)
    return TeacherColumns(**found, targets=_targets(message.arrays, wanted) if wanted.targets else None)


def _targets(arrays: Arrays, wanted: Wanted) -> TeacherTargets:
    rows, width = wanted.rows, wanted.targets
    topk, tail, stop = (
        _column(arrays, f"targets_{name}", "<f4", rows, width if name == "topk" else None) for name in _TARGETS
    )
    if not wanted.own_top:
        return TeacherTargets(topk, tail, stop)
    ids = _column(arrays, "targets_ids", "<i4", rows, width).long()
    if not ((ids >= 0) & (ids < wanted.own_below)).all():
        raise WireError(f"targets_ids: hold ids that are not below {wanted.own_below}")
    return TeacherTargets(topk, tail, stop, ids)


def _column(arrays: Arrays, name: str, dtype: str, rows: int, width: int | None) -> torch.Tensor:
    array = _array(arrays, name, dtype, 1 if width is None else 2)
    if array.shape != ((rows,) if width is None else (rows, width)):
        ids = "" if width is None else f" of {width} ids"
        raise WireError(f"{name} has the shape {array.shape} for {rows} rows{ids}")
    return torch.from_numpy(array.copy())


# --- plain passes --------------------------------------------------------------------------------------------


def sequences_arrays(sequences: Sequences) -> dict[str, NDArray[Any]]:
    """Prompts and answers, one after another."""
    parts = [part for pair in sequences for part in pair]
    lengths = [len(part) for part in parts]
    return {
        "offsets": np.cumsum([0, *lengths], dtype=np.int32),
        "token_ids": np.array([token for part in parts for token in part], dtype=np.int32),
    }


def sequences_of_message(message: Message) -> list[tuple[list[int], list[int]]]:
    """The other way round; `WireError` where they do not fit together."""
    offsets, tokens = (_array(message.arrays, name, "<i4", 1) for name in ("offsets", "token_ids"))
    _check_offsets("offsets", offsets, len(offsets) - 1, len(tokens))
    parts = [tokens[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    if len(parts) % 2 or not all(parts[::2]):
        raise WireError("offsets: must divide the ids into prompts and answers, and no prompt may be empty")
    return list(zip(parts[::2], parts[1::2], strict=True))


def values_of_message(message: Message, lengths: Sequence[int]) -> list[FloatArray]:
    """Values of sequences of these lengths; `WireError` where there are others."""
    values = _array(message.arrays, "values", "<f4", 1)
    if len(values) != sum(lengths):
        raise WireError(f"{len(values)} values for {sum(lengths)} tokens")
    return [part.copy() for part in np.split(values, np.cumsum(lengths)[:-1])] if lengths else []
