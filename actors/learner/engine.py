"""A learner rank's engine: the student with its loss, and DeepSpeed around both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.model import StudentModel
from kat_ray.config import LearnerConfig
from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.fused_head import HeadLoss
from kat_ray.losses.term import LossTerm, TermSums, TokenRows


class StudentWithLoss(nn.Module):
    """The student and its loss in one module: ZeRO 3 gathers parameters by module, on entering `forward`."""

    def __init__(
        self, student: StudentModel, term: LossTerm, chunk_tokens: int, curve: MassCurve | None = None
    ) -> None:
        super().__init__()
        self.network = student.network  # a submodule, for DeepSpeed to find
        self.head_loss = HeadLoss(student.output_layer, term, chunk_tokens, curve)
        self._student = student

    @contextlib.contextmanager
    def with_term(self, term: LossTerm) -> Iterator[None]:
        """Another term of the loss inside, and no curve."""
        head = self.head_loss
        own, curve = head.term, head.curve
        head.term, head.curve = term, None
        try:
            yield
        finally:
            head.term, head.curve = own, curve

    def use_term(self, term: LossTerm) -> None:
        """Another term of the loss from now on."""
        self.head_loss.term = term

    def forward(self, arguments: dict[str, Tensor], positions: Tensor, rows: TokenRows) -> TermSums:
        """The term for the tokens whose hidden states lie at `positions` [T, 2]; see `ModelInputs`.

        Inputs and result are tuples of tensors: ZeRO 3 looks there for the tensors to hook its passes to.
        """
        hidden_BLH = self._student.hidden_states(arguments)
        hidden_TH = hidden_BLH[positions[:, 0], positions[:, 1]]
        result: TermSums = self.head_loss(hidden_TH, rows)
        return result


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
    if learner.dtype == "bfloat16" and learner.zero_stage < 2:
        # These stages leave the sum over micro-batches to autograd, and DeepSpeed's way to have it in fp32 (another
        # optimiser of its own at stage 1, none at 0) is not needed: autograd can keep it wider than the weights.
        for _, parameter in student.trained_parameters():
            parameter.grad_dtype = torch.float32
    if learner.zero_stage == 0:
        # In bf16 DeepSpeed has just run AdamW on zero gradients, which puts its bias correction one step ahead
        # (the first update half as large).
        engine.basic_optimizer.state.clear()
    return engine


@contextlib.contextmanager
def gathered(engine: Any, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
    """These parameters (None: all) whole inside, which ZeRO 3 holds in pieces. All ranks must call it."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters() if parameters is None else parameters)):
        yield


def complete_gradients(engine: Any) -> None:
    """Zeros for parameters that no token of a step has touched, such as experts: stage 0 makes them in bf16."""
    if engine.zero_optimization_stage() == 0:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)


def clips_itself(learner: LearnerConfig) -> bool:
    """Whether gradients are for the caller to clip: in fp32 without ZeRO DeepSpeed does not keep their norm."""
    return learner.zero_stage == 0 and learner.dtype == "float32"


def _deepspeed_config(learner: LearnerConfig) -> dict[str, Any]:
    # Summed in bf16, the gradients of 64 micro-batches are off by 0.7 %; each sum over ranks rounds once more.
    bf16, stage = learner.dtype == "bfloat16", learner.zero_stage
    sums: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and stage >= 2 else {}
    if bf16 and (stage == 0 or (stage >= 2 and learner.reduce_dtype == "float32")):
        sums["communication_data_type"] = "fp32"
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
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **sums,
    }
