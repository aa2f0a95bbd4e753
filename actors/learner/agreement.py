"""The student's log-probabilities in a learner rank: by the path that training takes, and by a plain forward pass.

Both are of the rank's own parameters. The plain pass is that of transformers: one sequence, no padding, no cache,
the model's own logits. All ranks must do the same, since ZeRO 3 gathers parameters on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.learner.model import StudentModel
from actors.learner.tensors import dummy_sample, model_arguments, token_rows
from kat_ray.data.batch import TrainingSample
from kat_ray.data.collate import Collator
from kat_ray.losses.term import StudentLogprobs, TermSums, TokenRows
from kat_ray.models.load import plain_logprobs
from kat_ray.types.records import FloatArray

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt and answer, token ids


class SampledLogprobs:
    """A loss term of 0 that keeps what the head computes for the sampled tokens, in the order of the rows."""

    sum_names: tuple[str, ...] = ()
    max_names: tuple[str, ...] = ()

    def __init__(self, stop_ids: tuple[int, ...] = ()) -> None:
        """`stop_ids` only decide the order in which a distribution is summed: the last bits of its logarithm."""
        self.stop_ids = stop_ids
        self.parts: list[Tensor] = []

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """See `kat_ray.losses.term.LossTerm`."""
        self.parts.append(student.sampled.detach().float())
        loss = (student.sampled * 0).sum()
        return TermSums(loss, torch.zeros(0, dtype=torch.float64), torch.zeros(0))


def own_logprobs(engine: Any, collator: Collator, sequences: Sequences, top_k: int) -> list[FloatArray]:
    """Log-probabilities of the answers, [tokens] each, as a step computes them, in micro-batches."""
    batches = collator.micro_batches([_sample(i, *pair, top_k) for i, pair in enumerate(sequences)])
    found: dict[int, FloatArray] = {}
    for batch in batches:
        term, device = SampledLogprobs(), engine.device
        positions = torch.from_numpy(batch.inputs.positions).to(device)
        with torch.no_grad(), engine.module.with_term(term):
            engine(model_arguments(batch, device), positions, token_rows(batch, device))
        rows = torch.cat(term.parts).cpu().numpy()[: len(batch.inputs.positions)]
        ends = np.cumsum([len(s.token_ids) for s in batch.samples])
        parts = np.split(rows, ends[:-1])
        found |= {s.rollout_id: part for s, part in zip(batch.samples, parts, strict=True)}
    return [found[i] for i in range(len(sequences))]


def reference_logprobs(
    engine: Any, student: StudentModel, sequences: Sequences, wide: bool = False
) -> list[FloatArray]:
    """Those of a plain forward pass, a sequence at a time; `wide`: see `plain_logprobs`."""
    with student.plain_attention():
        return [plain_logprobs(student.network, *pair, engine.device, wide) for pair in sequences]


@contextmanager
def _written_here(engine: Any, student: StudentModel) -> Iterator[dict[str, Tensor]]:
    """Whole parameters that this rank may write to: under ZeRO 3 the first rank's, which all ranks hold then."""
    own = dict(student.trained_parameters())
    if engine.zero_optimization_stage() < 3:
        yield {name: p.data for name, p in own.items()}
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(own.values()), modifier_rank=0):
        yield {name: p.data for name, p in own.items()} if engine.global_rank == 0 else {}


def save_parameters(engine: Any, student: StudentModel) -> list[Tensor]:
    """Copies on the host, for `restore_parameters`; under ZeRO 3 on the first rank alone."""
    with _written_here(engine, student) as own:
        return [parameter.to("cpu", copy=True) for parameter in own.values()]


def restore_parameters(engine: Any, student: StudentModel, saved: Sequence[Tensor]) -> None:
    """The same bits again."""
    with _written_here(engine, student) as own, torch.no_grad():
        for parameter, copy in zip(own.values(), saved, strict=True):
            parameter.copy_(copy)


def change_parameters(engine: Any, student: StudentModel, scale: float) -> None:
    """Noise of `scale` times each parameter's own size; the same on every rank. The optimiser's copies stay."""
    with _written_here(engine, student) as own, torch.no_grad():
        for i, (name, parameter) in enumerate(own.items()):
            random = torch.Generator(parameter.device).manual_seed(i)
            noise = torch.randn(parameter.shape, generator=random, device=parameter.device)
            parameter.copy_(student.changed(name, parameter, scale * noise))


def _sample(number: int, prompt: Sequence[int], answer: Sequence[int], top_k: int) -> TrainingSample:
    dummy, tokens = dummy_sample(top_k), len(answer)
    return TrainingSample(
        rollout_id=number,
        prompt_ids=np.array(prompt, dtype=np.int32),
        token_ids=np.array(answer, dtype=np.int32),
        **{
            name: np.repeat(getattr(dummy, name), tokens, axis=0)
            for name in (
                "topk_ids", "teacher_topk", "teacher_tail", "teacher_stop", "sampled_logprobs", "weights",
            )
        },
        policy=None,
    )  # fmt: skip
