"""A learner rank's engine: the student with its loss, and DeepSpeed around both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.model import StudentModel
from kat_ray.config import LearnerConfig
from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.term import LossTerm, TermSums, TokenRows

# Tokens of a pass whose whole distribution is sorted: 0.17 s on a core for 49,152 entries each, beside seconds. Of
# 8 tokens a pass, in steps of one pass, the k for 99 % of the mass scattered by a factor of 3.
_CURVE_TOKENS = 32


class StudentWithLoss(nn.Module):
    """The student and its loss in one module: ZeRO 3 gathers parameters by module, on entering `forward`."""

    def __init__(
        self, student: StudentModel, term: LossTerm, chunk_tokens: int, curve: MassCurve | None = None
    ) -> None:
        super().__init__()
        self.network = student.network  # a submodule, for DeepSpeed to find
        self._student = student
        self._term = term
        self._chunk_tokens = chunk_tokens
        self._curve = curve

    def forward(self, arguments: dict[str, Tensor], positions: Tensor, rows: TokenRows, chunks: int) -> TermSums:
        """The term for the tokens whose hidden states lie at `positions` [T, 2]; see `ModelInputs`.

        Inputs and result are tuples of tensors: ZeRO 3 looks there for the tensors to hook its passes to.
        """
        hidden_BLH = self._student.hidden_states(arguments)
        hidden_TH = hidden_BLH[positions[:, 0], positions[:, 1]]
        if self._curve is not None:
            with torch.no_grad():  # one call a pass on every rank: under ZeRO 3 it is a collective operation
                some = torch.linspace(0, len(hidden_TH) - 1, min(_CURVE_TOKENS, len(hidden_TH))).long()
                self._curve.add(self._student.output_layer(hidden_TH[some.to(hidden_TH.device)]))
        return head_loss(hidden_TH, self._student.output_layer, rows, self._term, self._chunk_tokens, chunks)


def make_engine(
    student: StudentModel, term: LossTerm, learner: LearnerConfig, curve: MassCurve | None = None
) -> Any:
    """The student with its loss, in DeepSpeed's hands. The process group must exist.

    `curve` is given some tokens of each pass.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=StudentWithLoss(student, term, learner.logits_chunk_tokens, curve),
        model_parameters=[parameter for _, parameter in student.trained_parameters()],
        config=_deepspeed_config(learner),
    )
    if learner.zero_stage == 0:
        # In bf16 DeepSpeed has just run AdamW on zero gradients, which puts its bias correction one step ahead
        # (the first update half as large).
        engine.basic_optimizer.state.clear()
    return engine


@contextlib.contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Whole parameters inside, which ZeRO 3 holds in pieces. All ranks must call it."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def clips_itself(learner: LearnerConfig) -> bool:
    """Whether gradients are for the caller to clip: in fp32 without ZeRO DeepSpeed does not keep their norm."""
    return learner.zero_stage == 0 and learner.dtype == "float32"


def _deepspeed_config(learner: LearnerConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: micro-batches are ours, budgeted by tokens
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` ends the batch, however many backward passes it had
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": learner.lr,
                "betas": list(learner.betas),
                "eps": 1e-8,
                "weight_decay": learner.weight_decay,
                "torch_adam": True,  # the fused one has to be compiled
            },
        },
        "gradient_clipping": 0.0 if clips_itself(learner) else learner.clip,
        "zero_optimization": {"stage": learner.zero_stage},
        # Without the check ZeRO 1 and 2 would take a step in bf16 on a gradient that is not finite.
        "bf16": {"enabled": learner.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
