"""The teacher scorer: reverse KL at every new position; each token is run through the teacher once.

Any scorer can take over any rollout: a chunk brings the context that this scorer has not seen, and the KV cache is
only an optimisation. d is computed here, where both distributions are; the monitor gets one float per token, and
the teacher's rows stay in the object store for the learner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.teacher.agreement import chunked_logprobs
from actors.teacher.backend import AsksServer, FollowsStudent, ReportsProgress, Sequences, Teacher, TeacherColumns
from actors.teacher.settings import ScorerSettings
from kat_ray.cluster.devices import device_of
from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.chunks import check_chunk_vocabulary
from kat_ray.errors import StateLost, UserError
from kat_ray.losses.divergence import LOG_FLOOR, dequantise, entropy, event_logprobs, is_stop, reverse_kl
from kat_ray.losses.eos import EosMode
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.types.records import (
    EngineEnd,
    FloatArray,
    IntArray,
    RolloutChunk,
    ScoredChunk,
    ScoredGiven,
    TeacherRows,
    WeightUpdate,
    array_bytes,
)
from kat_ray.types.token_ids import pack_ids


def make_teacher(settings: ScorerSettings) -> Teacher:
    """The engine that `scorer.backend` names, or what asks the teacher's server.

    `auto` takes vLLM where scorers have GPUs, transformers elsewhere.
    """
    if settings.remote is not None:
        from actors.teacher.remote import remote_teacher

        return remote_teacher(settings, settings.remote)
    if settings.scorer.engine == "vllm":
        if device_of(settings.scorer.num_gpus, "scorer").type != "cuda":
            raise UserError(
                f"scorer.backend = {settings.scorer.backend!r}: scoring given ids needs vLLM's V2 model runner, "
                "which needs a GPU, and scorer.num_gpus = 0; use 'auto' or 'transformers', or give scorers a GPU "
                "(scorer.num_gpus = 1)"
            )
        from actors.teacher.vllm_backend import VllmTeacher

        return VllmTeacher(settings)
    from actors.teacher.transformers_backend import TransformersTeacher

    return TransformersTeacher(settings)


log = logging.getLogger("kat_ray.scorer")

TeacherMaker = Callable[[ScorerSettings], Teacher]


class TeacherScorer:
    """One replica of the teacher."""

    def __init__(self, name: str, settings: ScorerSettings, make: TeacherMaker = make_teacher) -> None:
        started = time.monotonic()
        if settings.scorer.threads is not None:  # else the environment has set them
            torch.set_num_threads(settings.scorer.threads)
        label_logs()
        self._name = name
        self._stop_ids = settings.stop_ids
        self._teacher_name = settings.model_name
        self._eos: EosMode = settings.rollout.eos
        self._top_k = settings.rollout.top_k_logprobs
        self._heartbeat = Heartbeat()
        number = name.rpartition(":")[2]
        self._teacher = make(replace(settings, replica=int(number)) if number.isdecimal() else settings)
        if isinstance(self._teacher, ReportsProgress):
            self._teacher.on_progress(self._heartbeat.beat)
        self._own_top = self._top_k if settings.own_support else 0
        # Of the student's weights that it holds; None of a new process that does not know which it is to hold.
        self._version: int | None = None if settings.follows_student else 0
        self._timeline = Timeline()
        self._abandoned: set[int] = set()
        self._scored_tokens = 0
        self._busy_seconds = 0.0
        self._load_seconds = time.monotonic() - started
        log.info("%s is ready, loaded in %.1f s", settings.teacher_dir, self._load_seconds)

    def ready(self) -> dict[str, Any]:
        """Returns once the model is loaded."""
        return {"name": self._name, "seconds": self._load_seconds, "backend": type(self._teacher).__name__}

    def health(self) -> HeartbeatReport:
        return self._heartbeat.read()

    def score(self, chunk: RolloutChunk) -> tuple[ScoredChunk, TeacherRows]:
        """Score all rows of a chunk, and drop the rollouts that have ended.

        `StateLost` names rollouts whose past this scorer does not hold: send them again with their whole past.
        UserError names a token id that the teacher has no token for.
        """
        if self._version is None:
            raise StateLost(f"{self._name} was not told which of the student's weights to hold: its process is new")
        if chunk.attempt in self._abandoned:
            raise StateLost(f"attempt {chunk.attempt} was given up: its sampler is lost")
        with self._timeline.span("score"), self._heartbeat.busy("score"):
            return self._score(chunk)

    def score_given(self, chunk: RolloutChunk) -> tuple[ScoredGiven, TeacherRows]:
        """Score completions that no student generated, over the teacher's own top k; all of them are whole.

        What it took, and the rows for the learner.
        """
        if self._version is None:
            raise StateLost(f"{self._name} was not told which of the student's weights to hold: its process is new")
        started = time.monotonic()
        with self._timeline.span("score"), self._heartbeat.busy("score"):
            before = self._http_bytes()
            columns, _ = self._columns(chunk, chunk.topk_ids(), self._top_k)
            rows = self._rows(columns)
            return ScoredGiven(time.monotonic() - started, array_bytes(rows), *self._http_bytes_since(before)), rows

    def follow(self, version: int, update: WeightUpdate | None, unless_held: bool = False) -> None:
        """Hold the student's weights of this version, for the rollouts to come; None: those that it was given.

        `unless_held` leaves one that holds this version already as it is: rollouts may be under way.
        """
        if unless_held and self._version == version:
            return
        if update is not None:
            with self._timeline.span("load weights"), self._heartbeat.busy("load weights"):
                assert isinstance(self._teacher, FollowsStudent), "`Config` lets no other follow"
                self._teacher.load_weights(update)
        self._version = version

    def abandon(self, attempt: int, rollout_ids: Sequence[int]) -> None:
        """Drop the rollouts of an attempt whose sampler was lost, and refuse chunks of it from now on."""
        self._abandoned.add(attempt)
        self.release(rollout_ids)

    def _score(self, chunk: RolloutChunk) -> tuple[ScoredChunk, TeacherRows]:
        started = time.monotonic()
        topk_ids = chunk.topk_ids()
        before = self._http_bytes()
        columns, run = self._columns(chunk, topk_ids, self._own_top)
        scored, rows = self._compare(chunk, topk_ids, columns, started, run)
        self._busy_seconds += scored.seconds
        sent, received = self._http_bytes_since(before)
        moved = replace(scored, row_bytes=array_bytes(rows), http_sent=sent, http_received=received)
        return moved, rows

    def _http_bytes(self) -> tuple[int, int]:
        """Sent to and received from the teacher's server so far; 0 where there is none."""
        if not isinstance(self._teacher, AsksServer):
            return 0, 0
        return self._teacher.traffic.sent_bytes, self._teacher.traffic.received_bytes

    def _http_bytes_since(self, before: tuple[int, int]) -> tuple[int, int]:
        sent, received = self._http_bytes()
        return sent - before[0], received - before[1]

    def _columns(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int) -> tuple[TeacherColumns, int]:
        """What the teacher says of a chunk, and the tokens that it ran for it."""
        check_chunk_vocabulary(chunk, topk_ids, self._teacher.vocabulary, self._teacher_name)
        self.release(chunk.released.tolist())
        before = self._teacher.run_tokens
        score = self._teacher.score
        columns = score(chunk, topk_ids, own_top) if own_top else score(chunk, topk_ids)
        self.release(chunk.rollout_ids[chunk.ended != EngineEnd.RUNNING].tolist())
        self._scored_tokens += chunk.tokens
        return columns, self._teacher.run_tokens - before

    def _rows(self, teacher: TeacherColumns) -> TeacherRows:
        """What the learner gets, quantised."""
        given = teacher.targets or teacher  # d is of temperature 1, and at the student's ids, in any case
        columns = given.topk.half().numpy(), given.tail.numpy(), given.stop.numpy()
        if teacher.targets is None or teacher.targets.ids is None:
            return TeacherRows(*columns)
        return TeacherRows(*columns, *pack_ids(teacher.targets.ids.numpy(), self._teacher.vocabulary))

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Drop the state of rollouts; unknown ones are ignored."""
        self._teacher.release(rollout_ids)

    def logprobs(self, sequences: Sequences, plain: bool) -> list[FloatArray]:
        """Log-probabilities [tokens] of answers to prompts: by a plain pass, or as the chunks of a run are scored.

        No rollout of a run may be held: its state would be mixed up with theirs.
        """
        with self._heartbeat.busy("agreement"):
            if plain:
                return self._teacher.plain_logprobs(sequences)
            ran = self._teacher.run_tokens
            found = chunked_logprobs(self._teacher, sequences, self._top_k)
            self._teacher.run_tokens = ran  # a run's figures are of its rollouts
            return found

    def spans(self) -> tuple[Span, ...]:
        """The spans since the last call."""
        return self._timeline.drain()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the current state."""
        return {
            "scored_tokens": self._scored_tokens,
            "run_tokens": self._teacher.run_tokens,
            "busy_seconds": self._busy_seconds,
            "states": self._teacher.held,
            "cache_bytes": self._teacher.cache_bytes,
        }

    @torch.inference_mode()
    def _compare(
        self, chunk: RolloutChunk, topk_ids: IntArray, teacher: TeacherColumns, started: float, run: int
    ) -> tuple[ScoredChunk, TeacherRows]:
        """Reverse KL of every row over the student's top k and the tail; the teacher's rows, quantised."""
        stops = is_stop(torch.from_numpy(topk_ids), self._stop_ids)
        topk, tail = (torch.from_numpy(a.astype(np.float32)) for a in (chunk.topk_logprobs, chunk.tail_logprobs))
        # Where no id is outside the top k, the sampler's 1 - sum(p) is rounding; where only stop ids are, it is
        # theirs.
        only_stops, no_stops = torch.isneginf(teacher.tail), torch.isneginf(teacher.stop)
        tail = tail.masked_fill(only_stops & no_stops & (tail <= LOG_FLOOR + 1e-3), -torch.inf)
        topk, tail = dequantise(topk, tail)
        only_stops &= ~no_stops
        own = tail.masked_fill(only_stops, -torch.inf), tail.masked_fill(~only_stops, -torch.inf)
        student = event_logprobs(topk, *own, stops, self._eos)
        kl = reverse_kl(student, event_logprobs(teacher.topk, teacher.tail, teacher.stop, stops, self._eos))
        scored = ScoredChunk(
            **chunk.of_rows(),
            scorer=self._name,
            d=torch.where(torch.isfinite(kl), kl, torch.full_like(kl, torch.nan)).numpy(),
            overlap=teacher.overlap.half().numpy(),
            teacher_max=teacher.teacher_max.half().numpy(),
            teacher_entropy=teacher.teacher_entropy.half().numpy(),
            student_entropy=entropy(student).half().numpy(),
            student_tail=tail.exp().half().numpy(),
            teacher_top=teacher.top.numpy(),
            seconds=time.monotonic() - started,
            asked_tokens=chunk.tokens + len(chunk.context_ids),
            run_tokens=run,
        )
        return scored, self._rows(teacher)
