"""Training samples as inputs of forward passes: which samples share a pass, and how they are laid out.

Padding is recognised by lengths, never by token ids: any id may be a real token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kat_ray.data.batch import TrainingSample
from kat_ray.types.records import IntArray


@dataclass(frozen=True)
class ModelInputs:
    """The arrays of one forward pass: B sequences of L tokens, right-padded with zeros, or one row of several.

    `positions` lists (row, column) of the hidden states that predict the T kept tokens of all samples, sample by
    sample, each in its order.
    """

    input_ids: IntArray  # [B, L] int64
    attention_mask: IntArray  # [B, L] int64
    positions: IntArray  # [T, 2] int64
    position_ids: IntArray | None = None  # [1, L] int64 of a packed row: each sequence begins at 0

    def arguments(self) -> dict[str, IntArray]:
        """Keyword arguments of the model's `forward`; a packed row's model must know of it (`position_ids`)."""
        arguments = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return arguments if self.position_ids is None else arguments | {"position_ids": self.position_ids}


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass, in the order of `inputs.positions`."""

    samples: tuple[TrainingSample, ...]
    inputs: ModelInputs


class Collator(Protocol):
    """Groups samples into micro-batches."""

    def micro_batches(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """Micro-batches that hold each kept token of the samples once. Samples without one are left out."""


@dataclass(frozen=True)
class PaddedCollator:
    """One sequence per sample; samples of similar length share a batch, padded to the longest."""

    max_tokens: int  # B x L of a micro-batch, padding included

    def micro_batches(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """A sample longer than `max_tokens` gets a micro-batch of its own."""
        batches: list[MicroBatch] = []
        group: list[TrainingSample] = []
        kept = (s for s in samples if len(s.token_ids))
        for sample in sorted(kept, key=lambda s: (s.input_length, s.rollout_id)):
            if group and (len(group) + 1) * sample.input_length > self.max_tokens:
                batches.append(_pad(group))
                group = []
            group.append(sample)
        if group:
            batches.append(_pad(group))
        return batches


@dataclass(frozen=True)
class PackedCollator:
    """All samples of a micro-batch in one row, without padding."""

    max_tokens: int  # of a row

    def micro_batches(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """A sample longer than `max_tokens` gets a micro-batch of its own.

        The longest first, each to the first row that has room: rows are then as few as 11/9 of the fewest, and one.
        """
        groups: list[list[TrainingSample]] = []
        rooms: list[int] = []
        kept = (s for s in samples if len(s.token_ids))
        for sample in sorted(kept, key=lambda s: (-s.input_length, s.rollout_id)):
            length = sample.input_length
            fitting = next((i for i, room in enumerate(rooms) if room >= length), None)
            if fitting is None:
                groups.append([sample])
                rooms.append(self.max_tokens - length)
            else:
                groups[fitting].append(sample)
                rooms[fitting] -= length
        return [_pack(group) for group in groups]


def _pack(samples: Sequence[TrainingSample]) -> MicroBatch:
    """One micro-batch of at least one sample."""
    lengths = np.array([s.input_length for s in samples], dtype=np.int64)
    ids = [np.concatenate([s.prompt_ids, s.token_ids])[:-1] for s in samples]
    starts = np.cumsum(lengths) - lengths
    columns = [
        start + len(s.prompt_ids) - 1 + np.arange(len(s.token_ids), dtype=np.int64)
        for s, start in zip(samples, starts, strict=True)
    ]
    column_T = np.concatenate(columns)
    inputs = ModelInputs(
        input_ids=np.concatenate(ids).astype(np.int64)[None],
        attention_mask=np.ones((1, int(lengths.sum())), dtype=np.int64),
        positions=np.stack([np.zeros_like(column_T), column_T], axis=-1),
        position_ids=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])[None],
    )
    return MicroBatch(tuple(samples), inputs)


def _pad(samples: Sequence[TrainingSample]) -> MicroBatch:
    """One micro-batch of at least one sample."""
    width = max(s.input_length for s in samples)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros((len(samples), width), dtype=np.int64)
    positions = []
    for b, sample in enumerate(samples):
        length, first = sample.input_length, len(sample.prompt_ids) - 1
        input_ids[b, :length] = np.concatenate([sample.prompt_ids, sample.token_ids])[:-1]
        mask[b, :length] = 1
        columns = np.arange(first, first + len(sample.token_ids), dtype=np.int64)
        positions.append(np.stack([np.full_like(columns, b), columns], axis=-1))
    return MicroBatch(tuple(samples), ModelInputs(input_ids, mask, np.concatenate(positions)))
