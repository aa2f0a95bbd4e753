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
    """The arrays of one forward pass: B sequences of L tokens, right-padded with zeros.

    `positions` lists (sequence, column) of the hidden states that predict the T kept tokens of all samples, sample
    by sample, each in its order.
    """

    input_ids: IntArray  # [B, L] int64
    attention_mask: IntArray  # [B, L] int64
    positions: IntArray  # [T, 2] int64

    def arguments(self) -> dict[str, IntArray]:
        """Keyword arguments of the model's `forward`."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


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
