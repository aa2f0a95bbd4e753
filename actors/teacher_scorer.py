"""The teacher scorer: reverse KL at every new position, each token run through the teacher once.

A request is stateless in effect: it brings the context that this scorer has not seen, and rows are scored from
`start` on. The KV cache is an optimisation keyed by rollout, so any scorer can take over any rollout. d is
computed here, where both distributions are; the monitor gets floats, and the teacher's rows stay in the object
store for the learner.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kat_ray.config import Config
from kat_ray.divergence import (
    EosMode,
    entropy,
    event_logprobs,
    is_stop,
    reverse_kl,
    stop_mass,
    tail_from_logprobs,
)
from kat_ray.types import EngineEnd, FloatArray, RolloutChunk, ScoredChunk, TeacherRows

OVERLAP_TOP = 16  # ids compared for the overlap ratio (arXiv 2604.13016)
_LOGITS_TOKENS = 1024  # tokens whose logits over the vocabulary exist at once


@dataclass
class _State:
    """A live rollout: `fed` tokens are in its slot, `pending` is its last token, not yet run."""

    slot: int
    fed: int
    pending: int


class TeacherScorer:
    """One replica of the teacher."""

    def __init__(self, name: str, config: Config, teacher_dir: str, stop_ids: tuple[int, ...]) -> None:
        started = time.monotonic()
        torch.set_num_threads(config.scorer.threads)
        self._name = name
        self._stop_ids = stop_ids
        self._eos: EosMode = config.rollout.eos
        self._teacher = _load(config, teacher_dir)
        self._states: dict[int, _State] = {}
        self._scored_tokens = self._run_tokens = 0
        self._busy_seconds = 0.0
        self._load_seconds = time.monotonic() - started

    def ready(self) -> dict[str, Any]:
        """Answers once the model stands."""
        return {"name": self._name, "seconds": self._load_seconds, "vocabulary": self._teacher.vocabulary}

    def score(self, chunk: RolloutChunk) -> tuple[ScoredChunk, TeacherRows]:
        """Score all rows of a chunk; rollouts that ended are forgotten.

        ValueError names rollouts whose past this scorer does not hold: send them again with their context.
        """
        started = time.monotonic()
        self.release(chunk.released.tolist())
        feeds = self._feeds(chunk)
        hidden: dict[int, Tensor] = {}
        self._teacher.run(feeds, hidden.__setitem__)
        self._run_tokens += sum(len(f.token_ids) for f in feeds)
        rows = [hidden[i] for i in range(len(feeds)) if feeds[i].wanted]
        measured = _Measured(chunk.tokens, chunk.topk_ids.shape[1])
        if rows:
            hidden_NH = torch.cat(rows)
            for first in range(0, chunk.tokens, _LOGITS_TOKENS):
                part = slice(first, first + _LOGITS_TOKENS)
                measured.take(part, chunk, self._teacher.logprobs(hidden_NH[part]), self._stop_ids, self._eos)
        self._advance(chunk)
        self._scored_tokens += chunk.tokens
        seconds = time.monotonic() - started
        self._busy_seconds += seconds
        return measured.records(self._name, chunk, seconds)

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Forget rollouts; unknown ones are ignored."""
        for rollout_id in rollout_ids:
            state = self._states.pop(int(rollout_id), None)
            if state is not None:
                self._teacher.cache.free(state.slot)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is held now."""
        return {
            "scored_tokens": self._scored_tokens,
            "run_tokens": self._run_tokens,
            "busy_seconds": self._busy_seconds,
            "states": len(self._states),
            "cache_bytes": self._teacher.cache.bytes,
        }

    def _feeds(self, chunk: RolloutChunk) -> list[Any]:
        """What has to be run for each rollout: its unseen context and all new tokens but the last."""
        from actors.teacher_transformers import Feed

        unknown, feeds = [], []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            context = chunk.context_ids[chunk.context_offsets[i] : chunk.context_offsets[i + 1]].tolist()
            new = chunk.token_ids[chunk.offsets[i] : chunk.offsets[i + 1]].tolist()
            if context:
                self.release([rollout_id])
                slot = self._teacher.cache.take()
                self._states[rollout_id] = _State(slot, fed=0, pending=-1)
                # A row per new token: after the context, and after each new token but the last.
                tokens, past = (context + new[:-1] if new else context[:-1]), 0
            elif (state := self._states.get(rollout_id)) is None:
                unknown.append(rollout_id)
                continue
            else:
                slot, past = state.slot, state.fed
                tokens = [state.pending, *new[:-1]] if new else []
            if tokens:
                feeds.append(Feed(slot, past, tokens, wanted=len(new)))
        if unknown:
            raise ValueError(f"{self._name} does not hold the past of rollouts {unknown}: send their context")
        return feeds

    def _advance(self, chunk: RolloutChunk) -> None:
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            new = chunk.token_ids[chunk.offsets[i] : chunk.offsets[i + 1]]
            context = chunk.context_ids[chunk.context_offsets[i] : chunk.context_offsets[i + 1]]
            if chunk.ended[i] != EngineEnd.RUNNING:
                self.release([rollout_id])
                continue
            state = self._states[rollout_id]
            tokens = [*context.tolist(), *new.tolist()]
            if tokens:
                # The pending token was run if any new one came after it.
                state.fed += len(tokens) - (1 if len(context) else 0)
                state.pending = tokens[-1]


class _Measured:
    """The columns of one chunk's records, filled in pieces of tokens."""

    def __init__(self, tokens: int, top_k: int) -> None:
        self.topk = np.empty((tokens, top_k), dtype=np.float32)
        names = (
            "tail",
            "stop",
            "d",
            "overlap",
            "teacher_max",
            "teacher_entropy",
            "student_entropy",
            "student_tail",
        )
        self.columns: dict[str, FloatArray] = {name: np.empty(tokens, dtype=np.float32) for name in names}

    @torch.inference_mode()
    def take(
        self, part: slice, chunk: RolloutChunk, logprobs: Tensor, stop_ids: tuple[int, ...], eos: EosMode
    ) -> None:
        """Measure the rows of `part` from the teacher's log-probabilities [n, V]."""
        ids = torch.from_numpy(chunk.topk_ids[part].astype(np.int64))
        student_topk = torch.from_numpy(chunk.topk_logprobs[part].astype(np.float32))
        student_tail = torch.from_numpy(chunk.tail_logprobs[part].astype(np.float32))
        topk, tail, stop = (
            logprobs.gather(-1, ids),
            tail_from_logprobs(logprobs, ids),
            stop_mass(logprobs, stop_ids),
        )
        stops = is_stop(ids, stop_ids)
        student = event_logprobs(student_topk, student_tail, None, stops, eos)
        teacher = event_logprobs(topk, tail, stop, stops, eos)
        d = reverse_kl(student, teacher)
        top = min(OVERLAP_TOP, ids.shape[-1], logprobs.shape[-1])
        best, best_ids = logprobs.topk(top, dim=-1)
        shared = (ids[:, :top, None] == best_ids[:, None, :]).any(dim=-1).float().mean(dim=-1)
        values = {
            "tail": tail,
            "stop": stop,
            "d": torch.where(torch.isfinite(d), d, torch.full_like(d, torch.nan)),
            "overlap": shared,
            "teacher_max": best[:, 0].exp(),
            "teacher_entropy": entropy(logprobs),
            "student_entropy": entropy(student),
            "student_tail": student_tail.exp(),
        }
        self.topk[part] = topk.numpy()
        for name, value in values.items():
            self.columns[name][part] = value.numpy()

    def records(self, scorer: str, chunk: RolloutChunk, seconds: float) -> tuple[ScoredChunk, TeacherRows]:
        """The two records of the chunk."""
        columns = dict(self.columns)
        teacher = TeacherRows(self.topk, columns.pop("tail"), columns.pop("stop"))
        scored = ScoredChunk(
            scorer=scorer,
            policy_version=chunk.policy_version,
            rollout_ids=chunk.rollout_ids,
            start=chunk.start,
            offsets=chunk.offsets,
            ended=chunk.ended,
            seconds=seconds,
            **columns,
        )
        return scored, teacher


def _load(config: Config, teacher_dir: str) -> Any:
    from actors.teacher_transformers import TransformersTeacher

    return TransformersTeacher(config.teacher, teacher_dir, config.scorer.max_batch_tokens)
