"""The student sampler: generates rollouts, streams chunks out, and aborts what is terminated.

It never waits for a score as long as fewer than `max_chunks_ahead` chunks are unanswered at each scorer: a
decision is a callback that the loop looks at between two engine steps. Left out: recovery of lost scorers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray

from kat_ray.chunking import PendingRollout, build_chunk
from kat_ray.config import Config, ModelConfig
from kat_ray.timeline import Span, Timeline
from kat_ray.types import (
    ChunkRefs,
    EngineRows,
    RolloutSpec,
    SampledRollout,
    SamplerReport,
    SamplingSettings,
    TerminationDecision,
    WeightUpdate,
)


class Engine(Protocol):
    """What the loop needs of an engine; see `actors.vllm_engine.VllmEngine`."""

    @property
    def running(self) -> int:
        """Requests that have not ended."""

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None:
        """Queue one request."""

    def step(self) -> list[EngineRows]:
        """New tokens of the requests it scheduled."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once; those that ended are ignored."""

    def load_weights(self, update: WeightUpdate) -> None:
        """Replace the weights; no request may be running."""


EngineMaker = Callable[[Config, ModelConfig, str, int], Engine]


def vllm_engine(config: Config, model: ModelConfig, model_dir: str, max_model_len: int) -> Engine:
    """The engine of every run."""
    from actors.vllm_engine import VllmEngine  # here: the driver places samplers, it need not load vLLM

    return VllmEngine(
        model,
        config.sampler,
        model_dir,
        max_model_len=max_model_len,
        top_k=config.rollout.top_k_logprobs,
        seed=config.run.seed,
    )


class StudentSampler:
    """One engine and the loop around it."""

    def __init__(
        self,
        name: str,
        config: Config,
        model: ModelConfig,
        model_dir: str,
        *,
        stop_ids: tuple[int, ...],
        vocabulary: int,
        max_model_len: int,
        make_engine: EngineMaker = vllm_engine,
    ) -> None:
        self._name = name
        self._config = config
        self._stop_ids = stop_ids
        self._vocabulary = vocabulary
        self._version = 0
        self._scorers: Sequence[Any] = ()
        self._monitor: Any = None
        self._timeline = Timeline()
        self._index, self._samplers = 0, 1
        started = time.monotonic()
        self._engine = make_engine(config, model, model_dir, max_model_len)
        self._load_seconds = time.monotonic() - started

    def ready(self) -> dict[str, Any]:
        """Answers once the engine stands."""
        return {"name": self._name, "seconds": self._load_seconds}

    def connect(self, scorers: Sequence[Any], monitor: Any, index: int = 0, samplers: int = 1) -> None:
        """Handles of all scorers and of this sampler's monitor; it is the `index`-th of `samplers`."""
        self._scorers, self._monitor = tuple(scorers), monitor
        self._index, self._samplers = index, samplers

    def load_weights(self, update: WeightUpdate) -> int:
        """Take new weights between two steps; returns the policy version now sampled from."""
        with self._timeline.span("load weights"):
            self._engine.load_weights(update)
        self._version = update.policy_version
        return self._version

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def generate(self, specs: Sequence[RolloutSpec]) -> SamplerReport:
        """Generate rollouts to their end, scored and monitored on the way. Blocks until all have ended."""
        return _Generation(self, specs).run()

    def complete(
        self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], settings: SamplingSettings
    ) -> list[list[int]]:
        """Plain completions (evaluation): the token ids of each prompt's answer, stop id included."""
        answers: dict[str, list[int]] = {}
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            answers[f"complete-{i}"] = []
            self._engine.add(f"complete-{i}", prompt, seed, settings)
        while self._engine.running:
            for rows in self._engine.step():
                answers[rows.request_id].extend(rows.token_ids)
        return list(answers.values())


class _Generation:
    """One `generate` call: the rollouts under way and the chunks without an answer."""

    def __init__(self, sampler: StudentSampler, specs: Sequence[RolloutSpec]) -> None:
        self._sampler = sampler
        self._engine = sampler._engine
        self._rollout = sampler._config.rollout
        self._version = sampler._version
        self._active: dict[str, PendingRollout] = {}
        self._ended: list[PendingRollout] = []
        self._chunks: list[ChunkRefs] = []
        self._wait_seconds = 0.0
        self._control_seconds = 0.0
        self._decision_seconds: list[float] = []
        settings = SamplingSettings(
            max_tokens=self._rollout.max_tokens,
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            logprobs=self._rollout.top_k_logprobs,
            stop_ids=sampler._stop_ids,
        )
        for i, spec in enumerate(specs):
            own = replace(settings, max_tokens=spec.max_tokens)
            self._engine.add(str(spec.rollout_id), spec.prompt_ids, spec.seed, own)
            scorer = scorer_of(i, len(specs), sampler._index, sampler._samplers, len(sampler._scorers))
            self._active[str(spec.rollout_id)] = PendingRollout(spec.rollout_id, spec.prompt_ids, scorer)
        used = sorted({r.scorer for r in self._active.values()})
        self._released: dict[int, list[int]] = {index: [] for index in used}
        self._unanswered: dict[int, deque[tuple[Any, float]]] = {index: deque() for index in used}

    def run(self) -> SamplerReport:
        """Step the engine until nothing runs and every chunk has been answered."""
        started = time.monotonic()
        steps = 0
        span = self._sampler._timeline.span
        while self._engine.running:
            with span("generate"):
                for _ in range(self._rollout.chunk_tokens):
                    if not self._engine.running:
                        break
                    self._collect()
                    steps += 1
                    control = time.thread_time()
                    self._take_decisions()
                    self._control_seconds += time.thread_time() - control
            control = time.thread_time()
            if self._engine.running:
                self._flush()
            self._control_seconds += time.thread_time() - control
        control = time.thread_time()
        self._flush()
        self._drain()
        self._control_seconds += time.thread_time() - control
        return SamplerReport(
            sampler=self._sampler._name,
            policy_version=self._version,
            rollouts=tuple(
                SampledRollout(r.rollout_id, np.array(r.token_ids, dtype=np.int32), r.sent)
                for r in (*self._ended, *self._active.values())
            ),
            chunks=tuple(self._chunks),
            engine_steps=steps,
            seconds=time.monotonic() - started,
            wait_seconds=self._wait_seconds,
            control_seconds=self._control_seconds,
            decision_seconds=np.array(self._decision_seconds),
        )

    def _collect(self) -> None:
        for rows in self._engine.step():
            rollout = self._active[rows.request_id]
            if rows.token_ids:
                assert rows.topk_ids is not None and rows.logprobs is not None
                rollout.add(rows.token_ids, rows.topk_ids, rows.logprobs)
            rollout.end = rows.end

    def _flush(self) -> None:
        """Send what is new to the scorers, each rollout to its own."""
        by_scorer: dict[int, list[PendingRollout]] = {}
        for rollout in self._active.values():
            if rollout.has_news:
                by_scorer.setdefault(rollout.scorer, []).append(rollout)
        for index, news in by_scorer.items():
            self._wait_for_room(index)
            # Waiting may have brought decisions: what they aborted is not sent any more.
            news = [r for r in news if str(r.rollout_id) in self._active]
            if news:
                self._send(index, news)

    def _send(self, index: int, news: Sequence[PendingRollout]) -> None:
        with self._sampler._timeline.span("send"):
            self._hand_over(index, news)

    def _hand_over(self, index: int, news: Sequence[PendingRollout]) -> None:
        sent_at = time.monotonic()
        chunk = build_chunk(
            news,
            self._released[index],
            sampler=self._sampler._name,
            policy_version=self._version,
            top_k=self._rollout.top_k_logprobs,
            vocabulary=self._sampler._vocabulary,
        )
        self._released[index] = []
        chunk_ref = ray.put(chunk)
        scored, teacher = self._sampler._scorers[index].score.options(num_returns=2).remote(chunk_ref)
        decision = self._sampler._monitor.observe.remote(scored)
        self._unanswered[index].append((decision.future(), sent_at))
        self._chunks.append(ChunkRefs(tuple(chunk.rollout_ids.tolist()), chunk_ref, scored, teacher))

    def _wait_for_room(self, index: int) -> None:
        while len(self._unanswered[index]) >= self._rollout.max_chunks_ahead:
            self._wait(*self._unanswered[index].popleft())

    def _take_decisions(self) -> None:
        for unanswered in self._unanswered.values():
            while unanswered and unanswered[0][0].done():
                future, sent_at = unanswered.popleft()
                self._apply(future.result(), sent_at)

    def _drain(self) -> None:
        """Wait for the last decisions, and let the scorers forget what was cut since the last chunk."""
        for unanswered in self._unanswered.values():
            while unanswered:
                self._wait(*unanswered.popleft())
        for index, released in self._released.items():
            if released:
                self._sampler._scorers[index].release.remote(released)

    def _wait(self, future: Any, sent_at: float) -> None:
        started = time.monotonic()
        with self._sampler._timeline.span("wait"):
            decision: TerminationDecision = future.result()
        self._wait_seconds += time.monotonic() - started
        self._apply(decision, sent_at)

    def _apply(self, decision: TerminationDecision, sent_at: float) -> None:
        """Abort what a decision names. A rollout that the engine ended meanwhile has nothing to abort."""
        self._decision_seconds.append(time.monotonic() - sent_at)
        ids = [str(i) for i in decision.rollout_ids.tolist()]
        self._engine.abort(ids)
        for request_id in ids:
            rollout = self._active.pop(request_id)
            rollout.topk_ids.clear()
            rollout.logprobs.clear()
            if not rollout.end_sent:  # a scorer that was told of the end has dropped its state already
                self._released[rollout.scorer].append(rollout.rollout_id)
            self._ended.append(rollout)


def scorer_of(position: int, rollouts: int, sampler: int, samplers: int, scorers: int) -> int:
    """The scorer of a sampler's `position`-th of `rollouts`: both roles are laid along one line of equal parts.

    Every scorer gets as many rollouts as any other, from as few samplers as can be: chunks per period number less
    than samplers + scorers, where dealing to all would make samplers x scorers.
    """
    return int((sampler + (position + 0.5) / rollouts) / samplers * scorers)
