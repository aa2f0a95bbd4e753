"""A teacher that a stock vLLM server has: each new token is one request for the log-probabilities of the ids asked,
and each rollout of a chunk one more where the loss is on the teacher's own top k.

`kat_ray/remote/vllm.py` says what is asked, and why so. The server holds nothing of ours: a request brings all that
stands before its token, and the server's prefix cache makes most of that cheap. What is sent again is counted as
run, unless the server tells what it found in its cache (--enable-prompt-tokens-details).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.teacher.backend import Sequences, TeacherColumns, TeacherTargets, own_targets, with_chunk
from actors.teacher.settings import ScorerSettings
from kat_ray.errors import UserError
from kat_ray.losses.divergence import tail_and_stop_of_ids
from kat_ray.remote.client import HttpClient
from kat_ray.remote.traffic import Traffic
from kat_ray.remote.vllm import (
    MAX_IDS,
    NO_TEMPERATURE,
    VllmInfo,
    next_request,
    next_scores,
    plain_request,
    plain_values,
    top_request,
    top_values,
)
from kat_ray.types.records import EngineEnd, FloatArray, IntArray, RolloutChunk


def _vocabulary(settings: ScorerSettings) -> int:
    """As the model's configuration says, which the server does not."""
    from transformers import AutoConfig

    model = settings.teacher
    config = AutoConfig.from_pretrained(
        settings.teacher_dir, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return int(config.get_text_config().vocab_size)


@dataclass(frozen=True)
class _Row:
    """One new token: what stands before it, and the ids to score, all different."""

    before: list[int]
    ids: list[int]


class VllmServerTeacher:
    """The tokens so far of every live rollout, and the server."""

    cache_bytes = 0  # the server's own affair

    def __init__(self, settings: ScorerSettings, client: HttpClient, info: VllmInfo) -> None:
        self._name, self._client, self._info = settings.model_name, client, info
        self._vocabulary = _vocabulary(settings)
        # An id that the teacher has no token for has no mass, and the server refuses it.
        self._stop_ids = [i for i in settings.stop_ids if i < self._vocabulary]
        if settings.top_needed:
            raise UserError(
                f"{self._name}: the rule needs the teacher's most likely ids, which a vLLM server does not give "
                "beside chosen ones; use kat-ray serve-teacher, or another rule"
            )
        if settings.temperature != 1:
            raise UserError(f"objective.opd.teacher_temperature = {settings.temperature:g}: {NO_TEMPERATURE}")
        self._common = settings.student_vocabulary or self._vocabulary
        asked = settings.rollout.top_k_logprobs + len(self._stop_ids)
        if asked > MAX_IDS:
            raise UserError(
                f"rollout.top_k_logprobs = {settings.rollout.top_k_logprobs}: must be <= "
                f"{MAX_IDS - len(self._stop_ids)} with a vLLM server, which scores {MAX_IDS} ids of a token, "
                "the stop ids among them"
            )
        self._tokens: dict[int, list[int]] = {}
        self.run_tokens = 0

    @property
    def vocabulary(self) -> int:
        """Ids that the model has a token for."""
        return self._vocabulary

    @property
    def traffic(self) -> Traffic:
        return self._client.traffic

    @property
    def held(self) -> int:
        return len(self._tokens)

    def on_progress(self, beat: Callable[[], None]) -> None:
        self._client.on_progress = beat

    def release(self, rollout_ids: Sequence[int]) -> None:
        for rollout_id in rollout_ids:
            self._tokens.pop(rollout_id, None)

    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked.

        With `own_top` the targets are those of so many of the teacher's own most likely ids.
        `StateLost` names rollouts whose past is not held: send them again with their whole past. Where this raises,
        nothing of the chunk is held.
        """
        tokens = with_chunk(self._tokens, chunk)
        rows = self._rows(chunk, tokens, topk_ids)
        answers = self._client.ask_all(next_request(self._info.model, row.before, row.ids) for row in rows)
        what = f"{self._name}: its server"
        scored = [next_scores(answer, row.ids, what) for answer, row in zip(answers, rows, strict=True)]
        self.run_tokens += sum(s.run for s in scored)
        best = self._own_top(chunk, tokens, own_top) if own_top else None
        ended = (chunk.ended != EngineEnd.RUNNING).tolist()
        self._tokens |= {i: t for (i, t), end in zip(tokens.items(), ended, strict=True) if not end}
        values = [dict(zip(row.ids, s.logprobs, strict=True)) for row, s in zip(rows, scored, strict=True)]
        return self._columns(values, topk_ids, best)

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        """By passes of whole texts, in which the server reads no cache."""
        texts = [[*prompt, *answer] for prompt, answer in sequences]
        answers = self._client.ask_all(plain_request(self._info.model, text) for text in texts)
        what = f"{self._name}: its server"
        found = [plain_values(a, text, what) for a, text in zip(answers, texts, strict=True)]
        return [
            np.array(v[len(prompt) :], dtype=np.float32) for v, (prompt, _) in zip(found, sequences, strict=True)
        ]

    def _rows(self, chunk: RolloutChunk, tokens: dict[int, list[int]], topk_ids: IntArray) -> list[_Row]:
        """One for each new token, in the chunk's order."""
        rows = []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            own = tokens[rollout_id]
            first = len(own) - len(chunk.new_tokens(i))
            for at, ids in enumerate(topk_ids[chunk.offsets[i] : chunk.offsets[i + 1]].tolist(), first):
                rows.append(_Row(own[:at], list(dict.fromkeys([*ids, *self._stop_ids]))))
        return rows

    def _own_top(
        self, chunk: RolloutChunk, tokens: dict[int, list[int]], own_top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [N, own_top] and ids of the server's most likely ids at all rows of a chunk."""
        counts = np.diff(chunk.offsets).tolist()
        asked = [(tokens[i], n) for i, n in zip(chunk.rollout_ids.tolist(), counts, strict=True) if n]
        answers = self._client.ask_all(top_request(self._info.model, text, own_top) for text, _ in asked)
        what = f"{self._name}: its server"
        found = [
            top_values(answer, len(text), n, own_top, what)
            for answer, (text, n) in zip(answers, asked, strict=True)
        ]
        self.run_tokens += sum(f.run for f in found)
        logprobs = torch.tensor([row for f in found for row in f.logprobs], dtype=torch.float32)
        return logprobs, torch.tensor([row for f in found for row in f.ids], dtype=torch.long)

    def _columns(
        self,
        values: Sequence[dict[int, float]],
        topk_ids: IntArray,
        best: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> TeacherColumns:
        top_k = topk_ids.shape[1]
        if not values:
            return TeacherColumns.join([], top_k)
        given = np.array(
            [[row[i] for i in (*ids, *self._stop_ids)] for row, ids in zip(values, topk_ids.tolist(), strict=True)],
            dtype=np.float32,
        )
        topk, stops = torch.from_numpy(given[:, :top_k].copy()), torch.from_numpy(given[:, top_k:].copy())
        tail, stop = tail_and_stop_of_ids(topk, torch.from_numpy(topk_ids.copy()), stops, self._stop_ids)
        unknown = torch.full((len(topk),), torch.nan)
        top = torch.full((len(topk),), -1, dtype=torch.int32)
        targets: TeacherTargets | None = None
        if best is not None:
            targets = own_targets(*best, stops, self._stop_ids, self._common)
        return TeacherColumns(topk, tail, stop, unknown, unknown, unknown, top, targets)
