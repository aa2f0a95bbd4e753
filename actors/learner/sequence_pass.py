"""A pass without gradient before the one with it, for losses that hold a rollout's ratio as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from actors.learner.agreement import SampledLogprobs
from actors.learner.tensors import model_arguments
from kat_ray.data.collate import MicroBatch
from kat_ray.losses.sequence import RolloutRatio, rollout_log_ratios
from kat_ray.losses.term import TokenRows


@dataclass(frozen=True)
class SequencePass:
    """A micro-batch holds whole rollouts, so one pass knows all tokens of each.

    Every rank makes it for every micro-batch, also for one that counts nothing: ZeRO 3 gathers weights on the way.
    """

    kind: RolloutRatio
    stop_ids: tuple[int, ...]  # of the term that follows, whose log-probabilities are then the same to the bit

    def __call__(self, engine: Any, batch: MicroBatch, rows: TokenRows) -> TokenRows:
        """The rows of `batch`, with their rollouts' ratios where they have a part in the policy's loss."""
        collect = SampledLogprobs(self.stop_ids)
        positions = torch.from_numpy(batch.inputs.positions).to(engine.device)
        with torch.no_grad(), engine.module.with_term(collect):
            engine(model_arguments(batch, engine.device), positions, rows)
        if rows.policy_weights is None:
            return rows
        log_ratio = torch.cat(collect.parts) - rows.sampled_logprobs
        tokens = [len(sample.token_ids) for sample in batch.samples]
        return rows._replace(sequence=rollout_log_ratios(self.kind, log_ratio, rows.policy_weights > 0, tokens))
