"""The learner: one DeepSpeed rank per actor, gloo on a CPU, NCCL on a GPU.

A step is one optimiser step on the kept tokens of the whole batch: the loss is the mean reverse KL over the
*global* number of kept tokens, so that two ranks do what one does. Left out: resuming from a checkpoint.
NCCL and several GPUs have not been run by this project.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.student_model import load_student, weight_update
from kat_ray.batch import MicroBatch, TrainRow, collect_rows, micro_batches
from kat_ray.config import Config
from kat_ray.divergence import widen
from kat_ray.hf_model import DTYPES
from kat_ray.loss import SUMS, LossSums, TeacherTargets, distillation_loss
from kat_ray.timeline import Span, Timeline
from kat_ray.types import KeptRollout, RolloutChunk, TeacherRows, WeightUpdate


@dataclass(frozen=True)
class LearnerReport:
    """One optimiser step, summed over all ranks. `loss` is the (weighted) mean KL over the kept tokens, nats."""

    policy_version: int
    loss: float
    grad_norm: float  # before clipping; inf where it was not finite: the update was then skipped
    lr: float
    tokens: int  # tokens in the loss
    dropped_tokens: int  # kept, but without a finite KL
    logprob_diff_mean: float  # mean |log p learner - log p sampler| of the sampled tokens
    logprob_diff_max: float
    entropy: float  # nats, of the student's events
    tail_mass: float
    stop_mass: float
    micro_batches: int
    seconds: float


class StudentWithLoss(nn.Module):
    """The student and its loss in one module: ZeRO 3 gathers parameters by module, on entering `forward`."""

    def __init__(self, student: Any, stop_ids: Sequence[int], config: Config) -> None:
        super().__init__()
        self.student = student
        self._stop_ids = tuple(stop_ids)
        self._eos = config.rollout.eos
        self._chunk = config.learner.logits_chunk_tokens

    def forward(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, targets: TeacherTargets, chunks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `LossSums` for the tokens at `positions` [T, 2] of a padded batch [B, L].

        A plain tuple: ZeRO 3 looks for tensors in it to hook its backward pass to.
        """
        hidden_BLH = self.student.model(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
        hidden_TH = hidden_BLH[positions[:, 0], positions[:, 1]]
        result = distillation_loss(
            hidden_TH, self.student.lm_head, targets, self._stop_ids, self._eos, self._chunk, chunks
        )
        return result.loss, result.sums, result.logprob_diff_max


class Learner:
    """One rank. Call order: `address` (rank 0), `start` on all ranks at once, then steps on all ranks."""

    def __init__(
        self, rank: int, world_size: int, config: Config, student_dir: str, stop_ids: tuple[int, ...]
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._config = config
        self._student_dir = student_dir
        self._stop_ids = stop_ids
        self._engine: Any = None
        self._optimizer_steps = 0
        self._clipped_norm = 0.0
        self._timeline = Timeline()

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def address(self) -> tuple[str, int]:
        """Host and a free port of this rank's node, for the ranks to meet at."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Meet the other ranks, load the student and hand it to DeepSpeed."""
        started = time.monotonic()
        config = self._config
        on_gpu = torch.cuda.is_available()
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        os.environ.update(
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
            RANK=str(self._rank),
            LOCAL_RANK="0",  # Ray shows an actor its own GPUs only
            WORLD_SIZE=str(self._world_size),
        )
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not on_gpu:
            # Its shared-memory collective needs a compiler and a minute at the first start; gloo needs neither.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
        module = StudentWithLoss(load_student(config, self._student_dir), self._stop_ids, config)
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=deepspeed_config(config)
        )
        if config.learner.zero_stage == 0:
            # In bf16 DeepSpeed has just run AdamW on zero gradients, which puts its bias correction one step ahead
            # (the first update half as large). In fp32 it clips without keeping the norm: `_clip` does both.
            self._engine.basic_optimizer.state.clear()
            if config.learner.dtype == "float32":
                self._engine.basic_optimizer.register_step_pre_hook(self._clip)
        return {"rank": self._rank, "seconds": time.monotonic() - started}

    def train_step(
        self,
        chunks: Sequence[Any],
        teacher: Sequence[Any],
        kept: Sequence[KeptRollout],
        global_weight: float,
        policy_version: int,
    ) -> LearnerReport:
        """One optimiser step on this rank's share of the batch.

        `chunks` and `teacher` are records or references to them; `global_weight` is the sum of the kept tokens'
        weights over all ranks, their number where the rule does not weigh. If it is 0 nothing is updated.
        """
        started = time.monotonic()
        lr = self._set_lr()
        span = self._timeline.span
        with span("collect"):
            rows = collect_rows(_fetch(chunks), _fetch(teacher), kept)
            batches = micro_batches(rows, self._config.learner.micro_batch_tokens)
        chunks = self._chunks_of_passes(batches)
        totals = np.zeros(len(SUMS) + 1)
        worst = grad_norm = 0.0
        if global_weight > 0:
            for i, n in enumerate(chunks):
                with span("forward and backward"):
                    sums = self._backward(batches[i] if i < len(batches) else None, n, global_weight)
                if sums is not None:
                    totals += [float(sums.loss), *sums.sums.tolist()]
                    worst = max(worst, float(sums.logprob_diff_max))
            with span("optimiser"):
                self._engine.step()
            norm = self._engine.get_global_grad_norm()
            grad_norm = self._clipped_norm if norm is None else float(norm)
        self._optimizer_steps += 1
        totals = self._reduce(totals, torch.distributed.ReduceOp.SUM)
        worst = float(self._reduce([worst], torch.distributed.ReduceOp.MAX)[0])
        loss, *rest = totals.tolist()
        named = dict(zip(SUMS, rest, strict=True))
        count = max(named["tokens"], 1.0)
        return LearnerReport(
            policy_version=policy_version,
            loss=loss / max(named["weight"], 1e-9),
            grad_norm=grad_norm,
            lr=lr,
            tokens=int(named["tokens"]),
            dropped_tokens=int(named["dropped"]),
            logprob_diff_mean=named["logprob_diff"] / count,
            logprob_diff_max=worst,
            entropy=named["entropy"] / count,
            tail_mass=named["tail_mass"] / count,
            stop_mass=named["stop_mass"] / count,
            micro_batches=len(chunks),
            seconds=time.monotonic() - started,
        )

    def _chunks_of_passes(self, batches: Sequence[MicroBatch]) -> list[int]:
        """For every pass of the busiest rank, the chunks of logits of its largest micro-batch.

        ZeRO gathers parameters and reduces gradients on the way: all ranks must do as many of both.
        """
        maximum = torch.distributed.ReduceOp.MAX
        passes = int(self._reduce([len(batches)], maximum)[0])
        size = self._config.learner.logits_chunk_tokens
        own = [-(-len(b.positions) // size) for b in batches]
        return [int(n) for n in self._reduce(own + [1] * (passes - len(own)), maximum)]

    def _backward(self, batch: MicroBatch | None, chunks: int, global_weight: float) -> LossSums | None:
        device = self._engine.device
        inputs = _dummy_batch(self._config.rollout.top_k_logprobs) if batch is None else batch
        loss, sums, worst = self._engine(
            torch.from_numpy(inputs.input_ids).to(device),
            torch.from_numpy(inputs.attention_mask).to(device),
            torch.from_numpy(inputs.positions).to(device),
            _targets(inputs, self._config.rollout.top_k_logprobs, device),
            chunks,
        )
        # DeepSpeed averages over ranks; the mean is over the tokens of all ranks together.
        weight = 0.0 if batch is None else self._world_size / global_weight
        self._engine.backward(loss * weight)
        return None if batch is None else LossSums(loss.detach(), sums, worst)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip reduced gradients before an fp32 step without ZeRO, and skip the step where ZeRO would."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._clipped_norm = float(nn.utils.clip_grad_norm_(parameters, self._config.learner.clip))
        if not math.isfinite(self._clipped_norm):
            self._clipped_norm = math.inf
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves parameters without a gradient alone

    def _set_lr(self) -> float:
        config = self._config.learner
        lr = config.lr * lr_factor(
            self._optimizer_steps, self._config.run.steps, config.warmup_ratio, config.min_lr_ratio
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _reduce(self, values: Sequence[float] | np.ndarray, op: Any) -> np.ndarray:
        tensor = torch.tensor(np.asarray(values, dtype=np.float64), device=self._engine.device)
        torch.distributed.all_reduce(tensor, op=op)
        return tensor.cpu().numpy()

    def weights(self, policy_version: int) -> WeightUpdate | None:
        """The whole student as the samplers take it; None on ranks other than 0. All ranks must call it."""
        with self._timeline.span("weights"), self._gathered():
            if self._rank != 0:
                return None
            return weight_update(self._engine.module.student, policy_version, DTYPES[self._config.student.dtype])

    def save_pretrained(self, path: str, tokenizer_dir: str) -> None:
        """Write the student in Hugging Face format (safetensors, tokenizer). All ranks must call it.

        The directory appears under its name only when it is complete.
        """
        from transformers import AutoTokenizer

        with self._gathered():
            if self._rank != 0:
                return
            partial = Path(f"{path}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a run that died here
            student = self._engine.module.student
            student.config.use_cache = True
            dtype = DTYPES[self._config.learner.dtype]
            state = {k: v.detach().to(dtype) for k, v in student.state_dict().items()}
            student.save_pretrained(partial, state_dict=state)
            student.config.use_cache = False
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_dir, trust_remote_code=self._config.student.trust_remote_code
            )
            tokenizer.save_pretrained(partial)
            partial.rename(path)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """Under ZeRO 3 parameters are in pieces; put them together for as long as this lasts."""
        if self._config.learner.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._engine.module.parameters())):
            yield


def lr_factor(step: int, steps: int, warmup_ratio: float, min_ratio: float) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then a cosine down to `min_ratio`."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run."""
    learner = config.learner
    plain = learner.zero_stage == 0 and learner.dtype == "float32"  # clipped by `Learner._clip`
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
        "gradient_clipping": 0.0 if plain else learner.clip,
        "zero_optimization": {"stage": learner.zero_stage},
        "bf16": {"enabled": learner.dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _fetch(records: Sequence[Any]) -> Sequence[Any]:
    import ray

    if not records or isinstance(records[0], (RolloutChunk, TeacherRows)):
        return records
    fetched: Sequence[Any] = ray.get(list(records))
    return fetched


def _targets(batch: MicroBatch, top_k: int, device: torch.device) -> TeacherTargets:
    def join(field: str, dtype: type[np.generic], width: tuple[int, ...] = ()) -> Tensor:
        parts = [getattr(row, field).astype(dtype) for row in batch.rows]
        return torch.from_numpy(np.concatenate([np.zeros((0, *width), dtype), *parts])).to(device)

    topk, tail, stop = widen(
        join("teacher_topk", np.float32, (top_k,)),
        join("teacher_tail", np.float32),
        join("teacher_stop", np.float32),
    )
    return TeacherTargets(
        topk_ids=join("topk_ids", np.int64, (top_k,)),
        topk_logprobs=topk,
        tail=tail,
        stop=stop,
        token_ids=join("token_ids", np.int64),
        sampled_logprobs=join("sampled_logprobs", np.float32),
        weights=join("weights", np.float32),
    )


def _dummy_batch(top_k: int) -> MicroBatch:
    """A pass that touches every parameter and is weighted with 0, for a rank that has run out of work.

    Without it ZeRO's collectives on the other ranks would wait for ever.
    """
    uniform = np.full((1, top_k), -math.log(2 * top_k), dtype=np.float32)
    half = np.full(1, -math.log(2), dtype=np.float32)
    zero = np.zeros(1, dtype=np.int32)
    row = TrainRow(-1, zero, zero, np.arange(top_k)[None], uniform, half, half, half, half * 0 + 1)
    return micro_batches([row], budget=1)[0]
