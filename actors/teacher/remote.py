"""A teacher that a server has: which kind of server it is, and what asks one of kat-ray's own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.teacher.backend import RunNeeds, Sequences, Teacher, TeacherColumns
from actors.teacher.messages import (
    NOTHING,
    Past,
    Wanted,
    chunk_arrays,
    columns_of_message,
    needs_meta,
    sequences_arrays,
    values_of_message,
)
from actors.teacher.settings import ScorerSettings
from kat_ray.config import TeacherConfig
from kat_ray.errors import StateLost, UserError
from kat_ray.remote.client import Answer, HttpClient, Request
from kat_ray.remote.info import PLAIN, SCORE, STATE_LOST, ServerInfo
from kat_ray.remote.token import read_token
from kat_ray.remote.traffic import Traffic
from kat_ray.remote.wire import CONTENT_TYPE, Message, pack, unpack
from kat_ray.types.records import EngineEnd, FloatArray, IntArray, RolloutChunk


def remote_teacher(settings: ScorerSettings, teacher: TeacherConfig) -> Teacher:
    """What asks the server of this teacher, whichever kind it is."""
    from kat_ray.remote.servers import identify

    token = read_token(teacher.http, settings.section)
    client = HttpClient(teacher.urls, teacher.http, settings.section, token, settings.replica)
    found = identify(client, settings.section)
    if isinstance(found, ServerInfo):
        return ServedTeacher(settings, client, found)
    from actors.teacher.vllm_server import VllmServerTeacher

    return VllmServerTeacher(settings, client, found)


class ServedTeacher:
    """The other end of `kat-ray serve-teacher`: chunks go there as they are, and columns come back to the bit."""

    def __init__(self, settings: ScorerSettings, client: HttpClient, info: ServerInfo) -> None:
        self._name, self._client, self._info = settings.model_name, client, info
        self._student_vocabulary = settings.student_vocabulary
        self._needs = needs_meta(
            RunNeeds(settings.stop_ids, settings.student_vocabulary, settings.top_needed, settings.temperature)
        )
        self._temperature = settings.temperature
        self._session, self._numbers = secrets.token_hex(16), count()
        self._live: dict[int, int] = {}  # by rollout, the number of the request with its last tokens
        self._cache_bytes = 0
        self.run_tokens = 0

    @property
    def vocabulary(self) -> int:
        """The student's where that is larger and the server's engine takes padding."""
        own = self._info.vocabulary
        return max(own, self._student_vocabulary) if self._info.backend == "transformers" else own

    @property
    def traffic(self) -> Traffic:
        return self._client.traffic

    @property
    def held(self) -> int:
        return len(self._live)

    @property
    def cache_bytes(self) -> int:
        """Memory of all states of the server, as it said last."""
        return self._cache_bytes

    def on_progress(self, beat: Callable[[], None]) -> None:
        self._client.on_progress = beat

    def release(self, rollout_ids: Sequence[int]) -> None:
        """The server is told with the next chunk."""
        for rollout_id in rollout_ids:
            self._live.pop(rollout_id, None)

    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked.

        With `own_top` the targets are those of so many of the teacher's own most likely ids.
        `StateLost` names rollouts whose past is not held there: send them again with their whole past.
        """
        past, number = self._past(chunk), next(self._numbers)
        meta = {"session": self._session, "number": number, "own_top": own_top}
        message = self._ask(SCORE, meta, chunk_arrays(chunk, past))
        common = min(self.vocabulary, self._student_vocabulary or self.vocabulary)
        rows, top_k = topk_ids.shape
        columns = columns_of_message(message, Wanted(rows, top_k, own_top, common, self._temperature))
        self.run_tokens += int(message.meta["run_tokens"])
        self._cache_bytes = int(message.meta["cache_bytes"])
        running = chunk.ended == EngineEnd.RUNNING  # the others the server has dropped by itself
        self._live |= dict.fromkeys(chunk.rollout_ids[running].tolist(), number)
        return columns

    def _past(self, chunk: RolloutChunk) -> Past:
        """What a chunk follows. Until it is answered nothing is known of its rollouts: a server may have run it."""
        ids = chunk.rollout_ids.tolist()
        after = np.array([self._live.pop(i, NOTHING) for i in ids], dtype=np.int64)
        if (lost := chunk.rollout_ids[~chunk.whole_past & (after == NOTHING)]).size:
            raise StateLost(f"the past of rollouts {lost.tolist()} is not held: send their context")
        return Past(after, np.array([*self._live], dtype=np.int64))

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        message = self._ask(PLAIN, {}, sequences_arrays(sequences))
        return values_of_message(message, [len(answer) for _, answer in sequences])

    def _ask(self, path: str, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Message:
        body = pack({**self._needs, **meta}, arrays)
        if len(body) > self._info.max_body:
            raise UserError(
                f"{self._name}: a chunk has {len(body):,} bytes, and its server takes {self._info.max_body:,}: "
                "start it with a larger --max-body-mib, or lower rollout.chunk_tokens or sampler.max_num_seqs"
            )
        answer = self._client.ask(Request(path, body, CONTENT_TYPE))
        if answer.status == STATE_LOST:
            raise StateLost(_error_of(answer))
        if answer.status != 200:
            raise UserError(f"{self._name}: its server refuses a request: {answer.status} {_error_of(answer)}")
        return unpack(answer.body)


def _error_of(answer: Answer) -> str:
    """What a server of kat-ray says was wrong."""
    try:
        found = json.loads(answer.body)
    except ValueError:
        return answer.words
    return str(found["error"]) if isinstance(found, dict) and "error" in found else answer.words
