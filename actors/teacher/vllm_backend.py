"""A teacher on vLLM, which scores given ids at given rows of a prompt. Not run on a GPU by this project.

A rollout's tokens so far are sent as a prompt of L tokens of which the last n are new. Row p of the engine is its
distribution after token p, so the n new tokens are scored by rows L - 1 - n to L - 2; the last row, L - 1, predicts
the token that the engine must generate, and is of no use. Only vLLM's V2 model runner scores given ids
(`SamplingParams.prompt_logprob_token_ids`), and it needs a GPU. It returns float32 [n, ids] on the CPU, once for
each request, also where a long prompt was run in several steps. Entropy is not reported (NaN); the most likely ids,
from which overlap and largest probability follow, are asked for only where the rule needs them.

What is run, and what is run again. The prefix cache keeps whole blocks of earlier requests. Three things follow.
- A block that is not full is run again with the next chunk. Samplers therefore end a running rollout's chunk where
  all tokens but the last fill blocks (`PendingRollout.ready`): 1 + 1 / block tokens are run for each new one.
- A cached block must not reach past the first row asked for, or vLLM drops the request's scores. The last token of
  a request is therefore never the rollout's own: no row that is scored depends on it, and the block that it fills
  is found by nobody. Another rollout with the same first tokens may still have left such a block; then the rollout
  is run once more whole, under a name of its own in the cache, which it keeps: this happens to it once at most.
- Where live rollouts exceed the cache, those scored last are asked for first: what they left is still there, and
  what is run again whole pushes out only what would be.

What this rests on (tests/cluster/test_teacher_vllm.py): engine, front door, scheduler, prefix cache, tensor
parallelism and the code that picks rows are vLLM's own, run on a CPU; the kernel that takes log-probabilities of
ids, and the V2 runner that calls all this, were only read (docs/gpu.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from vllm import LLMEngine, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from actors.teacher.backend import (
    OVERLAP_TOP,
    RunNeeds,
    Sequences,
    TeacherColumns,
    overlap_share,
    own_targets,
    with_chunk,
)
from actors.teacher.plain_copy import logprobs_of_copy
from actors.teacher.prefix_cache import PrefixCacheWatch
from actors.teacher.settings import ScorerSettings
from actors.teacher.vllm_engine import cache_tokens, check_runner, start_engine
from kat_ray.errors import UserError
from kat_ray.losses.divergence import tail_and_stop_of_ids
from kat_ray.types.records import FloatArray, IntArray, RolloutChunk

log = logging.getLogger("kat_ray.scorer")


@dataclass(frozen=True)
class _Ask:
    """What a rollout asks for: its tokens so far, and the ids [n, k + stop ids] to score for the last n of them."""

    rollout_id: int
    tokens: list[int]
    ids: IntArray
    alone: bool  # it has a part of the prefix cache of its own
    top: int | None = None  # of the teacher's most likely ids, how many are asked for

    @property
    def prompt(self) -> list[int]:
        """The tokens with another one in place of the last, on which no row depends that is asked for."""
        return [*self.tokens[:-1], 1 if self.tokens[-1] == 0 else 0]


@dataclass(frozen=True)
class _Scores:
    """Of one rollout's n rows: log-probabilities [n, ids], and of the most likely ids [n, top], where asked for."""

    given: torch.Tensor
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None


class VllmTeacher:
    """One engine, and the tokens so far of every live rollout."""

    cache_bytes = 0  # the engine has its own block pool; only token ids are held here

    def __init__(self, settings: ScorerSettings, engine: LLMEngine | None = None) -> None:
        self._engine: Any = engine or start_engine(settings)
        check_runner(self._engine)
        self._core = self._engine.engine_core
        self._settings = settings
        self._tasks = self._engine.get_supported_tasks()
        self._name = settings.model_name
        self.serve(RunNeeds(settings.stop_ids, settings.student_vocabulary, settings.top_needed))
        self._tokens: dict[int, list[int]] = {}  # by rollout; the one scored last is last
        self._alone: set[int] = set()
        self._numbers = count()
        self._watch = self._make_watch(settings.scorer.cache_block)
        self.run_tokens = 0

    def serve(self, run: RunNeeds) -> None:
        if run.temperature != 1:
            raise UserError(
                f"objective.opd.teacher_temperature = {run.temperature:g}: takes the teacher's whole distribution, "
                f"and vLLM gives {self._name} log-probabilities of single ids at temperature 1: serve it with "
                "--backend transformers"
            )
        self._common = run.student_vocabulary or self.vocabulary
        # An id that the teacher has no token for has no mass, and vLLM refuses it.
        self._stop_ids = np.array([i for i in run.stop_ids if i < self.vocabulary], dtype=np.int32)
        self._top = min(OVERLAP_TOP, self._settings.rollout.top_k_logprobs) if run.top_needed else None

    def _make_watch(self, block: int) -> PrefixCacheWatch:
        cache = self._engine.vllm_config.cache_config
        if not cache.enable_prefix_caching:
            log.warning("%s: vLLM has no prefix cache for it; every chunk runs its rollouts whole", self._name)
        elif cache.block_size != block:
            log.warning(
                "%s: vLLM's cache has blocks of %d tokens; scorer.cache_block = %d: part of them is run again with "
                "every chunk; set scorer.cache_block = %d",
                self._name, cache.block_size, block, cache.block_size,
            )  # fmt: skip
        return PrefixCacheWatch(cache_tokens(self._engine), cache.block_size)

    @property
    def vocabulary(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    @property
    def held(self) -> int:
        return len(self._tokens)

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Drop the tokens of rollouts; their blocks age out of the prefix cache."""
        for rollout_id in rollout_ids:
            self._tokens.pop(rollout_id, None)
            self._alone.discard(rollout_id)

    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked.

        With `own_top` the targets are those of so many of the teacher's own most likely ids, by the engine.
        `StateLost` names rollouts whose past is not held: send them again with their whole past. Where this raises,
        nothing of the chunk is held.
        """
        tokens = with_chunk(self._tokens, chunk)
        asks = {a.rollout_id: a for a in self._asks(chunk, tokens, topk_ids, own_top)}
        before, ordered = self.run_tokens, self._latest_first(asks)
        scores = self._ask([asks[i] for i in ordered])
        missed = [replace(asks[i], alone=True) for i in ordered if i not in scores]
        scores |= self._ask(missed, whole=True)
        if lacking := [i for i in ordered if i not in scores]:
            raise RuntimeError(f"{self._name}: vLLM gave no scores for rollouts {lacking}")
        self._alone.update(a.rollout_id for a in missed)
        for rollout_id in [*(i for i in tokens if i not in asks), *ordered]:
            self._tokens.pop(rollout_id, None)
            self._tokens[rollout_id] = tokens[rollout_id]
        live = sum(map(len, self._tokens.values()))
        for warning in self._watch.observe(chunk.tokens + len(chunk.context_ids), self.run_tokens - before, live):
            log.warning("%s: %s", self._name, warning)
        top_k = topk_ids.shape[1]
        stops = self._stop_ids.tolist()
        parts = [_columns(scores[i], asks[i].ids, stops, top_k, own_top, self._common) for i in asks]
        return TeacherColumns.join(parts, top_k)

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        """By a copy of the teacher in transformers; where that does not fit, by passes that use no cache."""
        found = logprobs_of_copy(self._settings, sequences)
        if found is None:
            log.warning(
                "%s: no memory for a second copy; what is scored in pieces is compared with this engine's own "
                "passes of whole rollouts", self._name,
            )  # fmt: skip
            found = [self._whole(prompt, answer) for prompt, answer in sequences]
        return found

    def _whole(self, prompt: Sequence[int], answer: Sequence[int]) -> FloatArray:
        ids = np.array(answer, dtype=np.int32)[:, None]
        ask, ran = _Ask(-1, [*prompt, *answer], ids, alone=True, top=self._top), self.run_tokens
        scores = self._ask([ask], whole=True)[-1].given[:, 0].numpy()
        self.run_tokens = ran
        return scores

    def _asks(
        self, chunk: RolloutChunk, tokens: dict[int, list[int]], topk_ids: IntArray, own_top: int
    ) -> list[_Ask]:
        """What is asked for each rollout that has new tokens, in the chunk's order."""
        asks = []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            rows = topk_ids[chunk.offsets[i] : chunk.offsets[i + 1]]
            if len(rows):
                stops = np.broadcast_to(self._stop_ids, (len(rows), len(self._stop_ids)))
                ids = np.concatenate([rows, stops], axis=1)
                top = max(own_top, self._top or 0) or None
                asks.append(_Ask(rollout_id, tokens[rollout_id], ids, rollout_id in self._alone, top))
        return asks

    def _latest_first(self, asks: dict[int, _Ask]) -> list[int]:
        """The rollouts in the order in which to ask: what was scored last is still cached; new ones are not."""
        known = [i for i in reversed(self._tokens) if i in asks]
        return [*known, *(i for i in asks if i not in self._tokens)]

    def _ask(self, asks: Sequence[_Ask], whole: bool = False) -> dict[int, _Scores]:
        """Scores by rollout, without those whose cached prefix covered the first row. `whole` reads no cache."""
        requests = [self._request(ask, whole) for ask in asks]  # refused before any is added
        by_name = {r.request_id: ask for r, ask in zip(requests, asks, strict=True)}
        scores: dict[int, _Scores] = {}
        pending = set(by_name)
        try:
            for request in requests:
                self._core.add_request(request)
            while pending:
                for output in self._core.get_output().outputs:
                    if output.request_id not in pending:
                        continue  # of a call that failed before
                    self._read(output, by_name[output.request_id], scores)
                    if output.finish_reason is not None:
                        pending.discard(output.request_id)
        except BaseException:
            self._core.abort_requests(list(pending))
            raise
        return scores

    def _request(self, ask: _Ask, whole: bool) -> EngineCoreRequest:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=ask.top,
            prompt_logprob_token_ids=ask.ids,
            prompt_logprob_start=len(ask.tokens) - 1 - len(ask.ids),
            skip_reading_prefix_cache=whole,
        )
        name = f"score-{next(self._numbers)}"
        salt = f"rollout-{ask.rollout_id}" if ask.alone else None
        prompt = tokens_input(prompt_token_ids=ask.prompt, cache_salt=salt)
        try:
            request: EngineCoreRequest = self._engine.input_processor.process_inputs(
                name, prompt, params, supported_tasks=self._tasks
            )
        except VLLMValidationError as error:
            raise UserError(f"{self._name}: vLLM refuses to score rollout {ask.rollout_id}: {error}") from error
        return request

    def _read(self, output: EngineCoreOutput, ask: _Ask, scores: dict[int, _Scores]) -> None:
        if output.prefill_stats is not None:
            self.run_tokens += output.prefill_stats.num_computed_tokens
        given = output.prompt_token_id_logprobs
        if given is None:
            return
        if given.shape != ask.ids.shape:
            raise RuntimeError(f"{self._name}: vLLM gave {[*given.shape]} scores for {[*ask.ids.shape]} ids")
        top_ids = top_logprobs = None
        if (best := output.new_prompt_logprobs_tensors) is not None:
            rows = slice(len(best.logprobs) - len(given), None)  # the last of those run; column 0 is the prompt's
            top_ids, top_logprobs = best.logprob_token_ids[rows, 1:].cpu(), best.logprobs[rows, 1:].float().cpu()
        scores[ask.rollout_id] = _Scores(given.float().cpu(), top_ids, top_logprobs)


def _columns(
    scores: _Scores, ids: IntArray, stop_ids: Sequence[int], top_k: int, own_top: int = 0, common: int = 0
) -> TeacherColumns:
    topk, topk_ids = scores.given[:, :top_k], torch.from_numpy(ids[:, :top_k])
    tail, stop = tail_and_stop_of_ids(topk, topk_ids, scores.given[:, top_k:], stop_ids)
    unknown = torch.full((len(topk),), torch.nan)
    overlap, largest, top = unknown, unknown, torch.full((len(topk),), -1, dtype=torch.int32)
    targets = None
    if scores.top_ids is not None and scores.top_logprobs is not None:
        compared = min(OVERLAP_TOP, top_k, scores.top_ids.shape[1])
        overlap = overlap_share(topk_ids[:, :compared], scores.top_ids[:, :compared])
        largest, top = scores.top_logprobs[:, 0].exp(), scores.top_ids[:, 0].int()
        if own_top:
            best = scores.top_logprobs[:, :own_top], scores.top_ids[:, :own_top].long()
            targets = own_targets(*best, scores.given[:, top_k:], stop_ids, common)
    return TeacherColumns(topk, tail, stop, overlap, largest, unknown, top, targets)
