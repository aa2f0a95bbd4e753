"""The learner: one DeepSpeed rank per actor, gloo on a CPU, NCCL on a GPU.

A step is one optimiser step on the kept tokens of the whole batch. A checkpoint holds all that another process
needs to take the next step bit for bit. NCCL and several GPUs have not been run by this project.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from actors.learner.agreement import (
    Sequences,
    change_parameters,
    own_logprobs,
    reference_logprobs,
    restore_parameters,
    save_parameters,
)
from actors.learner.average import WeightAverage
from actors.learner.collectives import rendezvous
from actors.learner.engine import gathered, make_engine
from actors.learner.logprob_log import LogprobLog
from actors.learner.model import StudentModel, load_student
from actors.learner.objective import make_term, sequence_pass
from actors.learner.packing import collator_for
from actors.learner.report import report_of
from actors.learner.settings import LearnerSettings
from actors.learner.snapshots import Snapshots
from actors.learner.step import StudentTrainer
from actors.learner.tensors import dummy_sample
from kat_ray.cluster.devices import device_of
from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.batch import TrainingSample, check_vocabulary, collect_samples
from kat_ray.data.collate import Collator, MicroBatch
from kat_ray.data.given import GivenShare, given_samples
from kat_ray.errors import StateLost
from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.term import LossTerm
from kat_ray.models.load import DTYPES
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.run.checkpoint import FileDigest
from kat_ray.run.step_result import LearnerReport
from kat_ray.types.records import FloatArray, KeptRollout, RolloutChunk, TeacherRows, WeightUpdate

log = logging.getLogger("kat_ray.learner")


class _Loaded(NamedTuple):
    """What a rank has once it has started."""

    engine: Any  # DeepSpeed's
    student: StudentModel
    collator: Collator
    trainer: StudentTrainer
    snapshots: Snapshots
    average: WeightAverage | None  # of rank 0, where a teacher has it


class Learner:
    """One rank. Call order: `address` (rank 0), `start` on all ranks at once, then steps on all ranks.

    Long, since each call of the driver is a method, with its heartbeat, its span and who of the ranks does what.
    """

    def __init__(self, rank: int, settings: LearnerSettings) -> None:
        label_logs()
        self._rank = rank
        self._settings = settings
        self._loaded: _Loaded | None = None
        self._listener: socket.socket | None = None  # of rank 0, between `address` and `start`
        self._batches: list[MicroBatch] | None = None
        self._collect_seconds = 0.0
        self._saved: list[torch.Tensor] | None = None  # the weights while they are changed
        self._timeline = Timeline()
        self._heartbeat = Heartbeat()

    def health(self) -> HeartbeatReport:
        """Answered by another thread, also while a step is taken (`actors.cluster.replica.remote_class`)."""
        return self._heartbeat.read()

    def spans(self) -> tuple[Span, ...]:
        """What this rank did since the last call."""
        return self._timeline.drain()

    def address(self) -> tuple[str, int]:
        """Host and port of the rendezvous; this rank listens there from now on.

        On this address only: a store that torch opens itself listens on all interfaces.
        """
        import ray

        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return host, int(self._listener.getsockname()[1])

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Meet the other ranks at rank 0's `address`, load the student and hand it to DeepSpeed."""
        started = time.monotonic()
        settings, world_size = self._settings, self._settings.learner.world_size
        if settings.learner.threads is not None:  # else the environment has set them
            torch.set_num_threads(settings.learner.threads)
        torch.manual_seed(settings.seed)
        listener, self._listener = self._listener, None
        device = device_of(settings.learner.num_gpus, "learner")
        rendezvous(host, port, listener, self._rank, world_size, device)
        self._loaded = self._load()
        seconds = time.monotonic() - started
        log.info("rank %d of %d is ready, started in %.1f s", self._rank, world_size, seconds)
        return {"rank": self._rank, "seconds": seconds}

    def _load(self) -> _Loaded:
        settings, learner = self._settings, self._settings.learner
        student = load_student(
            settings.student, settings.student_dir, learner, settings.max_model_len, settings.seed
        )
        collator = collator_for(student, learner, f"student.path = {settings.student.path!r}")
        logprobs = LogprobLog() if settings.record_logprobs else None

        def term_at(step: int) -> LossTerm:
            term = make_term(settings, step)
            return term if logprobs is None else logprobs.watched(term)

        term = term_at(0)
        curve = MassCurve(student.vocabulary) if settings.top_k else None
        engine = make_engine(student, term, learner, curve)
        (dummy,) = collator.micro_batches([dummy_sample(settings.top_k)])
        beat = self._heartbeat.beat
        trainer = StudentTrainer(
            engine, term, learner, settings.steps, dummy, self._timeline, beat, curve, sequence_pass(settings),
            term_at if settings.objective.is_annealed else None, logprobs,
        )  # fmt: skip
        snapshots = Snapshots(engine, student, self._rank, settings)
        average = None
        if settings.average_decay is not None:
            with gathered(engine):
                if self._rank == 0:
                    given = student.weight_update(0, torch.float32)
                    average = WeightAverage(settings.average_decay, given)
        return _Loaded(engine, student, collator, trainer, snapshots, average)

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise StateLost(f"learner {self._rank} was not started: its process is new")
        return self._loaded

    def collect(
        self,
        chunks: Sequence[Any],
        teacher: Sequence[Any],
        kept: Sequence[KeptRollout],
        given: GivenShare | None = None,
    ) -> None:
        """Fetch this rank's share of a batch, by references to its records, for `learn`; `given` beside it.

        Raises Ray's ObjectLostError if records are lost, and UserError for a token id that the student's vocabulary
        does not have.
        """
        import ray

        self._ready()
        started = time.monotonic()
        with self._timeline.span("collect"), self._heartbeat.busy("collect"):
            samples = collect_samples(ray.get(list(chunks)), ray.get(list(teacher)), kept)
            if given is not None:
                records = ray.get(list(given.chunks)), ray.get(list(given.teacher))
                samples += given_samples(given, *records, self._settings.top_k)
            self._take(samples)
        self._collect_seconds = time.monotonic() - started

    def _take(self, samples: Sequence[TrainingSample]) -> None:
        loaded, source = self._ready(), f"student.path = {self._settings.student.path!r}"
        check_vocabulary(samples, loaded.student.vocabulary, source)
        self._batches = loaded.collator.micro_batches(samples)

    def learn(self, global_weight: float, policy_version: int) -> LearnerReport:
        """Take one optimiser step on what was collected; `StateLost` if nothing was. All ranks must call it.

        `global_weight` is the sum of the kept tokens' weights over all ranks, their number where the rule does not
        weigh. If it is 0 nothing is updated; `LearnerReport` says what makes a step skipped.
        """
        if self._batches is None:
            raise StateLost(f"learner {self._rank} holds no batch: its process is new")
        batches, self._batches = self._batches, None
        collect_seconds, self._collect_seconds = self._collect_seconds, 0.0
        started = time.monotonic()
        with self._heartbeat.busy("learn"):
            trainer, objective = self._ready().trainer, self._settings.objective
            weights = objective.weights_at(trainer.steps_taken)
            result = trainer.step(batches, global_weight)
            if math.isfinite(result.grad_norm):  # else the step was skipped, on all ranks
                self._take_average(policy_version)
        seconds = collect_seconds + time.monotonic() - started
        shown = weights if objective.is_annealed else None
        return report_of(result, policy_version, seconds, shown, distils=weights["opd"] > 0)

    def _take_average(self, policy_version: int) -> None:
        """Move the average towards the weights of this moment; a collective operation, where one is kept."""
        if self._settings.average_decay is None:
            return
        loaded = self._ready()
        with self._timeline.span("average"), gathered(loaded.engine):
            if loaded.average is not None:
                loaded.average.take(loaded.student.weight_update(policy_version, torch.float32))

    def train_step(
        self,
        chunks: Sequence[RolloutChunk],
        teacher: Sequence[TeacherRows],
        kept: Sequence[KeptRollout],
        global_weight: float,
        policy_version: int,
    ) -> LearnerReport:
        """`collect` and `learn` in one, from records instead of references to them."""
        self._take(collect_samples(chunks, teacher, kept))
        return self.learn(global_weight, policy_version)

    def step_logprobs(self) -> dict[int, FloatArray]:
        """Of the tokens that this rank was given in its last step, [T] by rollout id, as they were before it.

        Once; empty where `run.learner_logprobs` is off, and where the step made no pass.
        """
        logprobs = self._ready().trainer.logprobs
        return {} if logprobs is None else logprobs.take()

    def weights(self, policy_version: int) -> tuple[WeightUpdate | None, int]:
        """The whole student as the samplers take it, and its version; None on ranks other than 0.

        All ranks must call it.
        """
        loaded = self._ready()
        dtype, gather = DTYPES[self._settings.student.dtype], partial(gathered, loaded.engine)
        with self._timeline.span("weights"), self._heartbeat.busy("weights"):
            update = loaded.student.collect_update(gather, policy_version, dtype, keep=self._rank == 0)
        return update, policy_version

    def average(self, policy_version: int) -> tuple[WeightUpdate | None, int]:
        """The average of the student's weights, as `weights` gives those themselves. All ranks must call it."""
        average, dtype = self._ready().average, self._settings.student.dtype
        with self._heartbeat.busy("average"):
            return None if average is None else average.weight_update(policy_version, DTYPES[dtype]), policy_version

    def logprobs(self, sequences: Sequences, plain: bool) -> list[FloatArray]:
        """Log-probabilities [tokens] of answers to prompts: by a plain forward pass, or as a step computes them.

        All ranks must call it, between two steps.
        """
        loaded, settings = self._ready(), self._settings
        with self._heartbeat.busy("agreement"):
            if plain:
                return reference_logprobs(loaded.engine, loaded.student, sequences, settings.fp32_output)
            return own_logprobs(loaded.engine, loaded.collator, sequences, settings.top_k)

    def change_weights(self, scale: float) -> None:
        """Change the weights a little, for a test of their publication; 0 takes the change back, to the bit.

        All ranks must call it. No step may be taken in between.
        """
        loaded = self._ready()
        with self._heartbeat.busy("agreement"):
            if self._saved is None:
                self._saved = save_parameters(loaded.engine, loaded.student)
            restore_parameters(loaded.engine, loaded.student, self._saved)
            if scale:
                change_parameters(loaded.engine, loaded.student, scale)
            else:
                self._saved = None

    def snapshot(self, path: str, tokenizer_dir: str) -> None:
        """Copy weights and optimiser to host memory; a thread writes them below the directory or address `path`.

        All ranks must call it, between two steps. Training may go on when it returns.
        """
        loaded, beat = self._ready(), self._heartbeat.beat
        saved = gathered(loaded.engine, loaded.student.saved_parameters())
        with self._timeline.span("snapshot"), self._heartbeat.busy("snapshot"), saved:
            average = None if loaded.average is None else loaded.average.arrays
            folder, upload = self._settings.parts.for_writing(path, self._rank)
            loaded.snapshots.take(folder, tokenizer_dir, loaded.trainer.steps_taken, beat, average, upload)

    def written(self) -> dict[str, FileDigest]:
        """Wait until this rank's files of the last snapshot are on disk or in the bucket; their digests by relative
        path.
        """
        loaded = self._ready()
        with self._timeline.span("written"), self._heartbeat.busy("write the checkpoint"):
            return loaded.snapshots.written(self._heartbeat.beat)

    def find_damage(self, path: str, files: Mapping[str, FileDigest]) -> str | None:
        """Read these files of a checkpoint to their end: what is wrong with the first that is damaged, or None."""
        with self._heartbeat.busy("verify the checkpoint"):
            return self._settings.parts.find_damage(path, files, self._heartbeat.beat)

    def restore(self, path: str) -> None:
        """Continue from the checkpoint `path`, bit for bit. All ranks must call it after `start`, before a step.

        Weights and moments are the same with another number of ranks or ZeRO stage. `CheckpointError` where the
        checkpoint is of another student.
        """
        loaded = self._ready()
        with self._heartbeat.busy("restore"):
            folder = self._settings.parts.for_reading(path, self._heartbeat.beat)
            steps = loaded.snapshots.restore(folder, self._heartbeat.beat)
            if loaded.average is not None:
                loaded.average.restore(folder)
        loaded.trainer.steps_taken = steps
        log.info("restored %s, %d optimiser steps", path, steps)
