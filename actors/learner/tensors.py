"""The arrays of samples as the tensors of the loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kat_ray.data.batch import TrainingSample
from kat_ray.data.collate import MicroBatch
from kat_ray.losses.divergence import dequantise
from kat_ray.losses.term import TokenRows


def token_rows(batch: MicroBatch, device: torch.device) -> TokenRows:
    """The rows of a micro-batch's kept tokens, in the order of `ModelInputs.positions`."""

    def join(field: str, dtype: type[np.generic]) -> Tensor:
        parts = [getattr(sample, field).astype(dtype) for sample in batch.samples]
        return torch.from_numpy(np.concatenate(parts)).to(device)

    def join_policy(field: str) -> Tensor | None:
        """A column of `PolicyCredit`, 0 where a token has none; None where no sample has any."""
        if not any(sample.policy for sample in batch.samples):
            return None
        parts = []
        for sample in batch.samples:
            column = np.zeros(len(sample.token_ids), dtype=np.float32)
            if (policy := sample.policy) is not None:
                column[: policy.tokens] = getattr(policy, field)
            parts.append(column)
        return torch.from_numpy(np.concatenate(parts)).to(device)

    def join_given() -> Tensor | None:
        """Weights of given tokens, 0 of others; None where there are none."""
        if all(sample.given is None for sample in batch.samples):
            return None
        parts = [np.zeros(len(s.token_ids), np.float32) if s.given is None else s.given for s in batch.samples]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)

    topk, tail, stop = dequantise(
        join("teacher_topk", np.float32), join("teacher_tail", np.float32), join("teacher_stop", np.float32)
    )
    return TokenRows(
        topk_ids=join("topk_ids", np.int64),
        teacher_topk=topk,
        teacher_tail=tail,
        teacher_stop=stop,
        token_ids=join("token_ids", np.int64),
        sampled_logprobs=join("sampled_logprobs", np.float32),
        weights=join("weights", np.float32),
        advantages=join_policy("advantage"),
        policy_weights=join_policy("weight"),
        given_weights=join_given(),
    )


def model_arguments(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """What the student's `forward` takes, by name."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.arguments().items()}


def dummy_sample(top_k: int) -> TrainingSample:
    """One token with finite log-probabilities, for a pass whose loss counts nothing."""
    uniform = np.full((1, top_k), -math.log(2 * max(1, top_k)), dtype=np.float32)
    half = np.full(1, -math.log(2), dtype=np.float32)
    zero = np.zeros(1, dtype=np.int32)
    return TrainingSample(
        rollout_id=-1,
        prompt_ids=zero,
        token_ids=zero,
        topk_ids=np.arange(top_k)[None],
        teacher_topk=uniform,
        teacher_tail=half,
        teacher_stop=np.full(1, -np.inf, dtype=np.float32),
        sampled_logprobs=half,
        weights=np.ones(1, dtype=np.float32),
        policy=None,
    )
