"""The learner: one DeepSpeed rank per actor, gloo on a CPU, NCCL on a GPU.

A step is one optimiser step on the kept tokens of the whole batch: the loss is the mean reverse KL over the
*global* number of kept tokens, so that two ranks do what one does. Checkpoints hold all that a later process needs
to take the next step bit for bit. NCCL and several GPUs have not been run by this project.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.learner.engine import clips_itself, make_engine, meet
from actors.learner.model import weight_update
from actors.learner.snapshots import Snapshots
from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.config import Config
from kat_ray.data.batch import TrainingSample, check_vocabulary, collect_samples
from kat_ray.data.collate import Collator, MicroBatch, PaddedCollator, pad
from kat_ray.errors import StateLost
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import dequantise
from kat_ray.losses.term import LossTerm, TermSums, TokenRows
from kat_ray.models.load import DTYPES
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.run.checkpoint import FileDigest
from kat_ray.types.records import KeptRollout, RolloutChunk, TeacherRows, WeightUpdate

log = logging.getLogger("kat_ray.learner")


@dataclass(frozen=True)
class LearnerReport:
    """One optimiser step, summed over all ranks. `loss` is the (weighted) mean KL over the kept tokens, nats.

    A step is `skipped` if its loss or gradient is not finite, or none of its tokens has a finite KL: weights and
    optimiser stay as they were, to the bit, on all ranks. A step without kept tokens is not: nothing was wrong.
    """

    policy_version: int
    loss: float  # nan where tokens were kept and none has a finite KL
    grad_norm: float  # before clipping; inf where the step was skipped
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
    skipped: bool


class Learner:
    """One rank. Call order: `address` (rank 0), `start` on all ranks at once, then steps on all ranks."""

    def __init__(
        self, rank: int, world_size: int, config: Config, student_dir: str, stop_ids: tuple[int, ...]
    ) -> None:
        label_logs()
        self._rank, self._world_size = rank, world_size
        self._config = config
        self._student_dir = student_dir
        self._term: LossTerm = Distillation(stop_ids, config.rollout.eos)
        self._collator: Collator = PaddedCollator(config.learner.micro_batch_tokens)
        self._engine: Any = None
        self._snapshots: Any = None
        self._optimizer_steps = 0
        self._clipped_norm = 0.0
        self._vocabulary = 0
        self._timeline = Timeline()
        self._door: socket.socket | None = None  # where the ranks meet, until they have met
        self._heartbeat = Heartbeat()
        self._batches: list[MicroBatch] | None = None
        self._collect_seconds = 0.0

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def address(self) -> tuple[str, int]:
        """Host and port, for the ranks to meet at; this rank listens there from now on.

        On this address only: a store that torch opens itself listens on all interfaces.
        """
        import ray

        host = ray.util.get_node_ip_address()
        self._door = socket.create_server((host, 0))
        return host, int(self._door.getsockname()[1])

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Meet the other ranks, load the student and hand it to DeepSpeed."""
        started = time.monotonic()
        config = self._config
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        door, self._door = self._door, None
        meet(host, port, door, self._rank, self._world_size)
        self._engine = make_engine(config, self._student_dir, self._term)
        if clips_itself(config):
            self._engine.basic_optimizer.register_step_pre_hook(self._clip)
        self._vocabulary = self._engine.module.student.config.get_text_config().vocab_size
        self._snapshots = Snapshots(
            self._engine,
            self._rank,
            self._world_size,
            DTYPES[config.learner.dtype],
            config.student.trust_remote_code,
        )
        seconds = time.monotonic() - started
        log.info("rank %d of %d stands, started in %.1f s", self._rank, self._world_size, seconds)
        return {"rank": self._rank, "seconds": seconds}

    def health(self) -> HeartbeatReport:
        """What it is at."""
        return self._heartbeat.read()

    def collect(self, chunks: Sequence[Any], teacher: Sequence[Any], kept: Sequence[KeptRollout]) -> None:
        """Fetch this rank's share of a batch, for `learn`. Raises Ray's ObjectLostError if records are lost."""
        self._check_started()
        started = time.monotonic()
        with self._timeline.span("collect"), self._heartbeat.busy("collect"):
            samples = collect_samples(_fetch(chunks), _fetch(teacher), kept)
            check_vocabulary(samples, self._vocabulary, f"student.path = {self._config.student.path!r}")
            self._batches = self._collator.micro_batches(samples)
        self._collect_seconds = time.monotonic() - started

    def learn(self, global_weight: float, policy_version: int) -> LearnerReport:
        """One optimiser step on what was collected; see `train_step`. `StateLost` if nothing was."""
        if self._batches is None:
            raise StateLost(f"learner {self._rank} holds no batch: its process is new")
        batches, self._batches = self._batches, None
        with self._heartbeat.busy("learn"):
            return self._step(batches, global_weight, policy_version)

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
        weights over all ranks, their number where the rule does not weigh. If it is 0 nothing is updated; what
        makes a step skipped is said at `LearnerReport`. UserError names a token id beyond the student's vocabulary.
        """
        self.collect(chunks, teacher, kept)
        return self.learn(global_weight, policy_version)

    def _step(self, batches: Sequence[MicroBatch], global_weight: float, policy_version: int) -> LearnerReport:
        started = time.monotonic()
        lr = self._set_lr()
        chunks = self._chunks_of_passes(batches)
        totals, maxima = self._pass_over(batches, chunks, global_weight)
        grad_norm = 0.0 if global_weight == 0 else self._update(totals, global_weight)
        self._optimizer_steps += 1  # a skipped step too: the schedule goes by the steps of the run
        skipped = not math.isfinite(grad_norm)
        count = max(totals["tokens"], 1.0)
        return LearnerReport(
            policy_version=policy_version,
            loss=math.nan if skipped and not totals["tokens"] else totals["loss"] / max(totals["weight"], 1e-9),
            grad_norm=grad_norm,
            lr=lr,
            tokens=int(totals["tokens"]),
            dropped_tokens=int(totals["dropped"]),
            logprob_diff_mean=totals["logprob_diff"] / count,
            logprob_diff_max=maxima["logprob_diff"],
            entropy=totals["entropy"] / count,
            tail_mass=totals["tail_mass"] / count,
            stop_mass=totals["stop_mass"] / count,
            micro_batches=len(chunks),
            seconds=self._collect_seconds + time.monotonic() - started,
            skipped=skipped,
        )

    def _pass_over(
        self, batches: Sequence[MicroBatch], chunks: Sequence[int], global_weight: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """All forward and backward passes; the term's sums and maxima over all ranks by name.

        A global weight of 0 leaves nothing to learn, and one that is not finite no mean: no pass is made then.
        """
        totals = np.zeros(len(self._term.sum_names) + 1)
        maxima = np.zeros(len(self._term.max_names))
        if math.isfinite(global_weight) and global_weight > 0:
            for i, n in enumerate(chunks):
                with self._timeline.span("forward and backward"):
                    sums = self._backward(batches[i] if i < len(batches) else None, n, global_weight)
                self._heartbeat.beat()
                if sums is not None:
                    totals += [float(sums.loss), *sums.sums.tolist()]
                    maxima = np.maximum(maxima, sums.maxima.numpy())
        totals = self._reduce(totals, torch.distributed.ReduceOp.SUM)
        maxima = self._reduce(maxima, torch.distributed.ReduceOp.MAX)
        return (
            dict(zip(("loss", *self._term.sum_names), totals.tolist(), strict=True)),
            dict(zip(self._term.max_names, maxima.tolist(), strict=True)),
        )

    def _update(self, totals: Mapping[str, float], global_weight: float) -> float:
        """Take the optimiser step, or skip it on all ranks; returns the gradient norm, inf where it was skipped."""
        if not math.isfinite(global_weight):
            return math.inf
        with self._timeline.span("optimiser"):
            if not math.isfinite(totals["loss"]) or not totals["tokens"]:
                # Gradients may be finite all the same, and zeros would still move AdamW. DeepSpeed skips a step,
                # and forgets its gradients, where their norm is not finite: so make it that. `totals` are those of
                # all ranks, which makes this pass, a collective operation, one that all make or none.
                self._backward(None, 1, math.nan)
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return self._clipped_norm if norm is None else float(norm)

    def _chunks_of_passes(self, batches: Sequence[MicroBatch]) -> list[int]:
        """For every pass of the busiest rank, the chunks of logits of its largest micro-batch.

        ZeRO gathers parameters and reduces gradients on the way: all ranks must do as many of both.
        """
        maximum = torch.distributed.ReduceOp.MAX
        passes = int(self._reduce([len(batches)], maximum)[0])
        size = self._config.learner.logits_chunk_tokens
        own = [-(-len(b.inputs.positions) // size) for b in batches]
        return [int(n) for n in self._reduce(own + [1] * (passes - len(own)), maximum)]

    def _backward(self, batch: MicroBatch | None, chunks: int, global_weight: float) -> TermSums | None:
        device = self._engine.device
        top_k = self._config.rollout.top_k_logprobs
        given = _dummy_batch(top_k) if batch is None else batch
        result: TermSums = self._engine(
            {name: torch.from_numpy(array).to(device) for name, array in given.inputs.arguments().items()},
            torch.from_numpy(given.inputs.positions).to(device),
            _token_rows(given, top_k, device),
            chunks,
        )
        # DeepSpeed averages over ranks; the mean is over the tokens of all ranks together. A dummy counts nothing,
        # unless it is there to spoil the gradient.
        weight = 0.0 if batch is None and math.isfinite(global_weight) else self._world_size / global_weight
        self._engine.backward(result.loss * weight)
        return None if batch is None else result._replace(loss=result.loss.detach())

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

    def weights(self, policy_version: int) -> tuple[WeightUpdate | None, int]:
        """The whole student as the samplers take it, and its version; None on ranks other than 0.

        All ranks must call it.
        """
        self._check_started()
        with self._timeline.span("weights"), self._heartbeat.busy("weights"), self._gathered():
            if self._rank != 0:
                return None, policy_version
            student, dtype = self._engine.module.student, DTYPES[self._config.student.dtype]
            return weight_update(student, policy_version, dtype), policy_version

    def snapshot(self, path: str, tokenizer_dir: str) -> None:
        """Copy weights and optimiser to host memory; a thread writes them below the directory `path`.

        All ranks must call it, between two steps. Training may go on when it returns.
        """
        self._check_started()
        with self._timeline.span("snapshot"), self._heartbeat.busy("snapshot"), self._gathered():
            self._snapshots.take(Path(path), tokenizer_dir, self._optimizer_steps, self._heartbeat.beat)

    def written(self) -> dict[str, FileDigest]:
        """Wait until this rank's files of the last snapshot are on disk; their digests by relative path."""
        self._check_started()
        with self._timeline.span("written"), self._heartbeat.busy("write the checkpoint"):
            digests: dict[str, FileDigest] = self._snapshots.written(self._heartbeat.beat)
        return digests

    def restore(self, path: str) -> None:
        """Go on from the checkpoint `path`, bit for bit. All ranks must call it, after `start` and before a step.

        Another number of ranks or ZeRO stage finds the same weights and moments; `CheckpointError` where they are
        of another student.
        """
        self._check_started()
        with self._heartbeat.busy("restore"):
            self._optimizer_steps = self._snapshots.restore(Path(path), self._heartbeat.beat)
        log.info("restored %s, %d optimiser steps", path, self._optimizer_steps)

    def _check_started(self) -> None:
        if self._engine is None:
            raise StateLost(f"learner {self._rank} was not started: its process is new")

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


def _fetch(records: Sequence[Any]) -> Sequence[Any]:
    import ray

    if not records or isinstance(records[0], (RolloutChunk, TeacherRows)):
        return records
    fetched: Sequence[Any] = ray.get(list(records))
    return fetched


def _token_rows(batch: MicroBatch, top_k: int, device: torch.device) -> TokenRows:
    def join(field: str, dtype: type[np.generic], width: tuple[int, ...] = ()) -> Tensor:
        parts = [getattr(sample, field).astype(dtype) for sample in batch.samples]
        return torch.from_numpy(np.concatenate([np.zeros((0, *width), dtype), *parts])).to(device)

    topk, tail, stop = dequantise(
        join("teacher_topk", np.float32, (top_k,)),
        join("teacher_tail", np.float32),
        join("teacher_stop", np.float32),
    )
    return TokenRows(
        topk_ids=join("topk_ids", np.int64, (top_k,)),
        teacher_topk=topk,
        teacher_tail=tail,
        teacher_stop=stop,
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
    sample = TrainingSample(-1, zero, zero, np.arange(top_k)[None], uniform, half, half, half, half * 0 + 1)
    return pad([sample])
