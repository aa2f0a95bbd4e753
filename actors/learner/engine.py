"""A learner rank's engine: ranks that meet, the student with its loss, and DeepSpeed around both."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.model import load_student
from kat_ray.config import Config
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.term import LossTerm, TermSums, TokenRows


class StudentWithLoss(nn.Module):
    """The student and its loss in one module: ZeRO 3 gathers parameters by module, on entering `forward`."""

    def __init__(self, student: Any, term: LossTerm, chunk_tokens: int) -> None:
        super().__init__()
        self.student = student
        self._term = term
        self._chunk_tokens = chunk_tokens

    def forward(self, arguments: dict[str, Tensor], positions: Tensor, rows: TokenRows, chunks: int) -> TermSums:
        """The term for the tokens whose hidden states lie at `positions` [T, 2]; see `ModelInputs`.

        Inputs and result are tuples of tensors: ZeRO 3 looks there for the tensors to hook its passes to.
        """
        hidden_BLH = self.student.model(**arguments, use_cache=False)[0]
        hidden_TH = hidden_BLH[positions[:, 0], positions[:, 1]]
        return head_loss(hidden_TH, self.student.lm_head, rows, self._term, self._chunk_tokens, chunks)


def meet(host: str, port: int, door: socket.socket | None, rank: int, world_size: int) -> None:
    """Join the other ranks at this address; the first listens at `door`, which is closed with its store."""
    on_gpu = torch.cuda.is_available()
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK="0",  # Ray shows an actor its own GPUs only
        WORLD_SIZE=str(world_size),
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        # Its shared-memory collective needs a compiler and a minute at the first start; gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if on_gpu else "gloo"
    listening = None if door is None else door.detach()
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.TCPStore(host, port, world_size, is_master=rank == 0, master_listen_fd=listening),
        rank=rank,
        world_size=world_size,
        timeout=deepspeed.constants.default_pg_timeout,
        # As DeepSpeed does it: NCCL connects now, not in the first collective.
        device_id=torch.device("cuda", 0) if on_gpu and world_size > 1 else None,
    )
    deepspeed.init_distributed(backend, verbose=False)


def make_engine(config: Config, student_dir: str, term: LossTerm) -> Any:
    """The student with its loss, in DeepSpeed's hands. The ranks must have met."""
    import deepspeed

    module = StudentWithLoss(load_student(config, student_dir), term, config.learner.logits_chunk_tokens)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=_deepspeed_config(config)
    )
    if config.learner.zero_stage == 0:
        # In bf16 DeepSpeed has just run AdamW on zero gradients, which puts its bias correction one step ahead
        # (the first update half as large).
        engine.basic_optimizer.state.clear()
    return engine


def clips_itself(config: Config) -> bool:
    """Whether gradients are for the caller to clip: in fp32 without ZeRO DeepSpeed does not keep their norm."""
    return config.learner.zero_stage == 0 and config.learner.dtype == "float32"


def _deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run."""
    learner = config.learner
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
        "gradient_clipping": 0.0 if clips_itself(config) else learner.clip,
        "zero_optimization": {"stage": learner.zero_stage},
        # Without the check ZeRO 1 and 2 would take a step in bf16 on a gradient that is not finite.
        "bf16": {"enabled": learner.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
