"""A teacher that scores for several runs: their sessions, what of them it holds, and answers that come again.

A session is one scorer of one run. Its requests are numbered: one that comes again, since its answer was lost on
the way, gets that answer and is not scored twice. A request may also go elsewhere, where there are several servers:
so each says of its rollouts which request has brought their last tokens, and what another one did is not added to.
All of it belongs to one thread. No HTTP here: `server.py` has that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from actors.teacher.backend import RunNeeds, ServesRuns, Teacher
from actors.teacher.messages import (
    MAX_VOCABULARY,
    Past,
    chunk_of_message,
    columns_body,
    is_count,
    needs_of,
    past_of_message,
    sequences_of_message,
)
from kat_ray.data.chunks import check_chunk_vocabulary
from kat_ray.errors import StateLost, UserError
from kat_ray.remote.wire import WireError, pack, unpack
from kat_ray.types.records import EngineEnd, RolloutChunk

_MAX_NUMBER = 2**53


@dataclass(frozen=True)
class Limits:
    """What a server bears."""

    max_length: int  # tokens of prompt and answer together
    max_rollouts: int = 4096  # live ones, of all sessions
    idle_seconds: float = 900.0  # after which a session without requests is forgotten


class TooManyRollouts(Exception):
    """The server holds as many rollouts as it bears: ask again."""


@dataclass(frozen=True)
class _Rollout:
    """A live rollout."""

    name: int  # that the teacher knows it by
    length: int  # tokens
    number: int  # of the request that brought the last of them


@dataclass
class _Session:
    """One scorer of a run, and its live rollouts."""

    used: float
    number: int = -1  # of the request answered last
    answer: bytes = b""
    held: dict[int, _Rollout] = field(default_factory=dict)


class TeacherService:
    """One teacher and its sessions."""

    def __init__(
        self, teacher: Teacher, name: str, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert isinstance(teacher, ServesRuns), type(teacher)
        self._teacher, self._runs = teacher, teacher
        self._name, self._limits, self._clock = name, limits, clock
        self._sessions: dict[str, _Session] = {}
        self._names = count()
        self.scored_tokens = 0

    @property
    def held(self) -> int:
        """Live rollouts of all sessions."""
        return sum(len(s.held) for s in [*self._sessions.values()])  # asked for by another thread, too

    def score(self, body: bytes) -> bytes:
        """The answer to a chunk.

        `StateLost` names rollouts whose past is not held. `UserError` where the request is wrong,
        `TooManyRollouts` where it has to wait.
        """
        message = unpack(body)
        run, chunk = needs_of(message.meta), chunk_of_message(message)
        past = past_of_message(message, len(chunk.rollout_ids))
        session = self._session(message.meta)
        number = message.meta.get("number")
        if not is_count(number, _MAX_NUMBER) or number < session.number:
            raise WireError(
                f"number = {number!r}: requests of a session are numbered upwards; {session.number} was"
            )
        if number == session.number:
            return session.answer
        self._release(session, [*session.held.keys() - {*chunk.rollout_ids.tolist(), *past.others.tolist()}])
        own_top = self._own_top(message.meta, run)
        self._check(session, chunk, past, run)
        try:
            session.answer = self._score(session, chunk, number, own_top)
        except Exception:  # what the teacher holds of the session is not known any more; the error goes on
            self._release(session, [*session.held])
            raise
        session.number = number
        return session.answer

    def plain(self, body: bytes) -> bytes:
        """Log-probabilities of answers by plain passes."""
        message = unpack(body)
        self._runs.serve(needs_of(message.meta))
        sequences = sequences_of_message(message)
        for prompt, answer in sequences:
            self._check_length(len(prompt) + len(answer))
            if not all(0 <= i < self._teacher.vocabulary for i in (*prompt, *answer)):
                raise UserError(f"an id is none of the {self._teacher.vocabulary} of {self._name}")
        found = self._teacher.plain_logprobs(sequences)
        return pack({}, {"values": np.concatenate([np.zeros(0), *found]).astype(np.float32)})

    def close(self, body: bytes) -> bytes:
        """Forget a session."""
        session = self._sessions.pop(self._name_of(unpack(body).meta), None)
        if session is not None:
            self._release(session, [*session.held])
        return pack({}, {})

    def expire(self) -> None:
        """Forget sessions that have asked for nothing for long."""
        oldest = self._clock() - self._limits.idle_seconds
        for name in [name for name, s in self._sessions.items() if s.used < oldest]:
            session = self._sessions.pop(name)
            self._release(session, [*session.held])

    # --- one chunk --------------------------------------------------------------------------------------------

    def _session(self, meta: Mapping[str, Any]) -> _Session:
        self.expire()
        session = self._sessions.setdefault(self._name_of(meta), _Session(0.0))
        session.used = self._clock()
        return session

    @staticmethod
    def _name_of(meta: Mapping[str, Any]) -> str:
        name = meta.get("session")
        if not isinstance(name, str) or not 16 <= len(name) <= 64:
            raise WireError("session: must be a name of 16 to 64 characters")
        return name

    def _release(self, session: _Session, rollout_ids: list[int]) -> None:
        known = [session.held.pop(i).name for i in rollout_ids if i in session.held]
        self._teacher.release(known)

    def _check(self, session: _Session, chunk: RolloutChunk, past: Past, run: RunNeeds) -> None:
        """Refuse what cannot be scored, before anything is changed."""
        self._runs.serve(run)
        check_chunk_vocabulary(chunk, chunk.topk_ids(), self._teacher.vocabulary, self._name)
        ids, whole = chunk.rollout_ids.tolist(), chunk.whole_past.tolist()
        last = {i: rollout.number for i, rollout in session.held.items()}
        rollouts = zip(ids, whole, past.after.tolist(), strict=True)
        if lost := [i for i, w, after in rollouts if not w and last.get(i) != after]:
            raise StateLost(f"the past of rollouts {lost} is not held: send their context")
        for length in self._lengths(session, chunk):
            self._check_length(length)
        if self.held + len([i for i in ids if i not in session.held]) > self._limits.max_rollouts:
            raise TooManyRollouts(f"{self.held} rollouts are held, of {self._limits.max_rollouts} (--max-rollouts)")

    def _own_top(self, meta: Mapping[str, Any], run: RunNeeds) -> int:
        """How many of the teacher's own most likely ids are asked for: of those that the student has, too."""
        own_top, most = meta.get("own_top"), min(self._teacher.vocabulary, run.student_vocabulary or MAX_VOCABULARY)
        if not is_count(own_top, most):
            raise WireError(f"own_top = {own_top!r}: must be a whole number <= {most}")
        return own_top

    def _check_length(self, length: int) -> None:
        if length > self._limits.max_length:
            raise UserError(f"prompt and answer have {length} tokens, {self._name} takes {self._limits.max_length}")

    def _lengths(self, session: _Session, chunk: RolloutChunk) -> list[int]:
        """Tokens of each rollout with what the chunk brings."""
        brought = (np.diff(chunk.offsets) + np.diff(chunk.context_offsets)).tolist()
        before = [
            0 if whole else session.held[i].length
            for i, whole in zip(chunk.rollout_ids.tolist(), chunk.whole_past.tolist(), strict=True)
        ]
        return [a + b for a, b in zip(before, brought, strict=True)]

    def _score(self, session: _Session, chunk: RolloutChunk, number: int, own_top: int) -> bytes:
        own_ids, lengths = chunk.rollout_ids.tolist(), self._lengths(session, chunk)
        for i, length in zip(own_ids, lengths, strict=True):
            name = session.held[i].name if i in session.held else next(self._names)
            session.held[i] = _Rollout(name, length, number)
        here = np.array([session.held[i].name for i in own_ids], dtype=np.int64)
        before = self._teacher.run_tokens
        columns = self._teacher.score(replace(chunk, rollout_ids=here), chunk.topk_ids(), own_top)
        self.scored_tokens += chunk.tokens
        self._release(session, chunk.rollout_ids[chunk.ended != EngineEnd.RUNNING].tolist())
        meta = {
            "run_tokens": self._teacher.run_tokens - before,
            "held": len(session.held),
            "cache_bytes": self._teacher.cache_bytes,
        }
        return columns_body(columns, meta)
