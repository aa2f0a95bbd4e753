"""A teacher on vLLM, which scores given ids at given rows of a prompt. Not run on a GPU by this project.

A rollout's tokens so far are sent as a prompt of which only the new rows are scored; the prefix cache keeps what
was run before, so that a token is run about once (a block that is not full is run again). Only vLLM's V2 model
runner can do this (`SamplingParams.prompt_logprob_token_ids`), and it needs a GPU. It returns log-probabilities of
the requested ids and nothing else: overlap, largest probability and entropy are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs.engine import tokens_input

from actors.teacher.backend import TeacherColumns
from actors.teacher.settings import ScorerSettings
from kat_ray.errors import StateLost, UserError
from kat_ray.losses.divergence import tail_and_stop_of_ids
from kat_ray.types.records import IntArray, RolloutChunk


class VllmTeacher:
    """One engine, and the tokens so far of every live rollout."""

    cache_bytes = 0  # the engine has its own block pool; only token ids are held here

    def __init__(self, settings: ScorerSettings) -> None:
        model = settings.teacher
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.teacher_dir,
                revision=model.revision,
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
                skip_tokenizer_init=True,
                max_model_len=settings.max_model_len + 1,  # scoring a finished rollout still generates one token
                gpu_memory_utilization=settings.scorer.gpu_memory_utilization,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
            )
        )
        if not self._engine.vllm_config.use_v2_model_runner:
            raise UserError(
                "scorer.backend: vLLM did not choose its V2 model runner for this teacher; only that one scores "
                "given ids; set VLLM_USE_V2_MODEL_RUNNER=1, or scorer.backend = 'transformers'"
            )
        self._tasks = self._engine.get_supported_tasks()
        self._stop_ids = settings.stop_ids
        self._tokens: dict[int, list[int]] = {}
        self._numbers = count()
        self.run_tokens = 0

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

    def score(self, chunk: RolloutChunk, topk_ids: IntArray) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked."""
        asked: dict[int, np.ndarray] = {}
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            if chunk.whole_past[i]:
                self._tokens[rollout_id] = []
            elif rollout_id not in self._tokens:
                raise StateLost(f"the past of rollouts [{rollout_id}] is not held: send their context")
            new = chunk.new_tokens(i)
            self._tokens[rollout_id] += [*chunk.context(i).tolist(), *new.tolist()]
            self.run_tokens += len(new) + chunk.context(i).size
            if new.size:
                rows = topk_ids[chunk.offsets[i] : chunk.offsets[i + 1]].astype(np.int64)
                stops = np.broadcast_to(np.array(self._stop_ids, dtype=np.int64), (len(rows), len(self._stop_ids)))
                asked[rollout_id] = np.concatenate([rows, stops], axis=1)
        scores = self._ask(asked, skip_cache=False)
        # If the cached prefix, whole blocks, covers the first requested row, vLLM returns no scores.
        scores |= self._ask({i: ids for i, ids in asked.items() if i not in scores}, skip_cache=True)
        top_k = chunk.topk_logprobs.shape[1]
        return TeacherColumns.join([_columns(scores[i], asked[i], self._stop_ids, top_k) for i in asked], top_k)

    def _ask(self, asked: dict[int, np.ndarray], skip_cache: bool) -> dict[int, torch.Tensor]:
        """Log-probabilities [n, ids] of each rollout's last n rows; rollouts without scores are left out."""
        names = {}
        for rollout_id, ids in asked.items():
            prompt = self._tokens[rollout_id]
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                prompt_logprob_token_ids=ids,
                prompt_logprob_start=len(prompt) - 1 - len(ids),
                skip_reading_prefix_cache=skip_cache,
            )
            name = f"score-{next(self._numbers)}"
            request = self._engine.input_processor.process_inputs(
                name, tokens_input(prompt_token_ids=list(prompt)), params, supported_tasks=self._tasks
            )
            self._engine.engine_core.add_request(request)
            names[name] = rollout_id
        scores, open_names = {}, set(names)
        while open_names:
            for output in self._engine.engine_core.get_output().outputs:
                if output.prompt_token_id_logprobs is not None:
                    scores[names[output.request_id]] = output.prompt_token_id_logprobs.float().cpu()
                if output.finish_reason is not None:
                    open_names.discard(output.request_id)
        return scores


def _columns(scores: torch.Tensor, ids: np.ndarray, stop_ids: Sequence[int], top_k: int) -> TeacherColumns:
    topk, topk_ids = scores[:, :top_k], torch.from_numpy(ids[:, :top_k])
    tail, stop = tail_and_stop_of_ids(topk, topk_ids, scores[:, top_k:], stop_ids)
    unknown = torch.full((len(scores),), torch.nan)
    top = torch.full((len(scores),), -1, dtype=torch.int32)
    return TeacherColumns(topk, tail, stop, unknown, unknown, unknown, top)
