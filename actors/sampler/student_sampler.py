"""The student sampler: generates rollouts, sends chunks to scorers, and aborts rollouts that are cut.

Without a teacher it only generates: a rollout is one chunk for the learner, made once it has ended.

It does not wait for a score while fewer than `max_chunks_ahead` chunks are unanswered at each scorer: decisions are
futures that the loop polls between two engine steps. `actors.sampler.stream` recovers what is lost with scorers and
monitor; the driver replaces a sampler that dies (`actors.driver.dispatcher`).
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from actors.sampler.score_stream import ScoringStream, scorer_ranges
from actors.sampler.settings import SamplerSettings, ScoredBy
from actors.sampler.unscored import UnscoredStream
from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.errors import StateLost
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.types.records import (
    EndedRollout,
    EngineEnd,
    EngineRows,
    GenerateRequest,
    SampleCheck,
    SampledRollout,
    SamplerReport,
    SamplingSettings,
    WeightUpdate,
)

log = logging.getLogger("kat_ray.sampler")


class Engine(Protocol):
    """What the loop needs of an engine; see `actors.sampler.vllm_engine.VllmEngine`."""

    @property
    def running(self) -> int: ...

    def add(self, request_id: str, prompt_ids: Sequence[int], seed: int, settings: SamplingSettings) -> None: ...

    def step(self) -> list[EngineRows]:
        """Run one engine step; returns the new tokens of the requests that it scheduled."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests at once; those that ended are ignored."""

    def load_weights(self, update: WeightUpdate) -> None:
        """Replace the weights; no request may be running."""

    def clear_cache(self) -> None:
        """Drop what is cached of prompts; no request may be running."""


EngineMaker = Callable[[SamplerSettings], Engine]


def vllm_engine(settings: SamplerSettings) -> Engine:
    """A vLLM engine, which every run uses except for tests and benchmarks."""
    from actors.sampler.vllm_engine import VllmEngine  # here: the driver places samplers, it need not load vLLM

    return VllmEngine(
        settings.model,
        settings.sampler,
        settings.model_dir,
        max_model_len=settings.max_model_len,
        top_k=settings.rollout.top_k_logprobs,
        seed=settings.seed,
        fp32_output=settings.fp32_output,
        lora=settings.lora,
    )


class StudentSampler:
    """One engine and the loop around it."""

    def __init__(self, name: str, settings: SamplerSettings, make_engine: EngineMaker = vllm_engine) -> None:
        label_logs()
        self._name = name
        self._settings = settings
        self._version = 0
        self._scorers: Mapping[str, Sequence[Any]] | None = None  # until it is told; none at all is {}
        self._monitor: Any = None
        self._timeline = Timeline()
        self._heartbeat = Heartbeat()
        self._index, self._samplers = 0, 1
        self._generation: _Generation | None = None  # the newest
        started = time.monotonic()
        self._engine = make_engine(settings)
        self._load_seconds = time.monotonic() - started
        log.info("%s is ready, loaded in %.1f s", settings.model_dir, self._load_seconds)

    def ready(self) -> dict[str, Any]:
        """Returns once the engine is loaded."""
        return {"name": self._name, "seconds": self._load_seconds}

    def health(self) -> HeartbeatReport:
        return self._heartbeat.read()

    def connect(
        self, scorers: Mapping[str, Sequence[Any]], monitor: Any, index: int = 0, samplers: int = 1
    ) -> None:
        """Take the handles of each group's scorers and of this sampler's monitor: no scorers, no monitor.

        This is sampler `index` of `samplers`.
        """
        self._scorers, self._monitor = scorers, monitor
        self._index, self._samplers = index, samplers

    def load_weights(self, update: WeightUpdate) -> int:
        """Replace the weights between two steps; returns their policy version."""
        with self._timeline.span("load weights"), self._heartbeat.busy("load weights"):
            self._engine.load_weights(update)
        self._version = update.policy_version
        return self._version

    def spans(self) -> tuple[Span, ...]:
        """The spans since the last call."""
        return self._timeline.drain()

    def generate(self, request: GenerateRequest) -> SamplerReport:
        """Generate rollouts to their ends, scored and monitored meanwhile. Returns once all have ended.

        `StateLost` if this is a new process that does not hold the requested weights yet, or knows no scorers.
        """
        if request.version != self._version:
            raise StateLost(
                f"{self._name} holds version {self._version}, not {request.version}: its process is new"
            )
        if self._scorers is None:  # lost between two steps: it was given the weights like any other
            raise StateLost(f"{self._name} was not told which scorers to ask: its process is new")
        with self._heartbeat.busy("generate"):
            self._generation = _Generation(self, request, self._scorers)
            return self._generation.run()

    def ended(self, attempt: int, since: int) -> list[EndedRollout]:
        """Rollouts of a request that the engine has ended, in that order, but for the first `since` of them.

        Answered while `generate` is at work, in another thread; empty where nothing is learnt from rewards.
        """
        generation = self._generation
        if generation is None or generation.attempt != attempt:
            return []
        return generation.ended[since:]

    def complete(
        self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], settings: SamplingSettings, version: int
    ) -> list[list[int]]:
        """Complete prompts for an evaluation, without scoring: each answer's token ids, stop id included."""
        if version != self._version:
            raise StateLost(f"{self._name} holds version {self._version}, not {version}: its process is new")
        answers: list[list[int]] = [[] for _ in prompts]
        for i, rows in self._sampled("complete", prompts, seeds, settings):
            answers[i].extend(rows.token_ids)
        return answers

    def check(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, prompt_logprobs: bool = False
    ) -> list[SampleCheck]:
        """Sample `max_tokens` tokens after each prompt, all prompts together, with the weights held now.

        On the path that rollouts take. For between two steps; nothing is left in the engine or its cache. Prompt i
        draws with the seed `seed + i`. With `prompt_logprobs` those of the prompts' own tokens come too, for which
        vLLM makes float32 logits of a whole prompt at once.
        """
        settings = SamplingSettings(max_tokens, 1.0, 1.0, logprobs=1, stop_ids=(), prompt_logprobs=prompt_logprobs)
        parts: list[list[EngineRows]] = [[] for _ in prompts]
        seeds = range(seed, seed + len(prompts))
        for i, rows in self._sampled("check", prompts, seeds, settings):
            parts[i].append(rows)
        self._engine.clear_cache()
        return [_joined(part) for part in parts]

    def _sampled(
        self, what: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings
    ) -> Iterator[tuple[int, EngineRows]]:
        """Sample after all prompts to the end: each prompt's number with the rows of it, as they come."""
        numbers = {f"{what}-{i}": i for i in range(len(prompts))}
        with self._heartbeat.busy(what), self._idle_after(numbers):
            for name, prompt, seed in zip(numbers, prompts, seeds, strict=True):
                self._engine.add(name, prompt, seed, settings)
            while self._engine.running:
                for rows in self._engine.step():
                    yield numbers[rows.request_id], rows
                self._heartbeat.beat()

    @contextmanager
    def _idle_after(self, requests: Collection[str]) -> Iterator[None]:
        """Abort these requests if the work inside fails, so that the next call finds the engine idle."""
        try:
            yield
        except BaseException:
            self._engine.abort(list(requests))
            raise


def _joined(parts: Sequence[EngineRows]) -> SampleCheck:
    columns = [rows.logprobs[:, 0] for rows in parts if rows.logprobs is not None and rows.token_ids]
    of_prompt = [rows.prompt_logprobs for rows in parts if rows.prompt_logprobs is not None]
    return SampleCheck(
        token_ids=np.array([token for rows in parts for token in rows.token_ids], dtype=np.int32),
        logprobs=np.concatenate([np.zeros(0), *columns]).astype(np.float32),
        prompt_logprobs=of_prompt[0] if of_prompt else None,
    )


class _Generation:
    """The state of one `generate` call."""

    def __init__(
        self, sampler: StudentSampler, request: GenerateRequest, scorers: Mapping[str, Sequence[Any]]
    ) -> None:
        self._sampler = sampler
        self._engine = sampler._engine
        self._rollout = sampler._settings.rollout
        self._request = request
        self._control_seconds = 0.0
        self.attempt = request.attempt
        self.ended: list[EndedRollout] = []  # appended to and never changed: another thread reads it
        # Without a teacher nobody asks for other tokens than the sampled one, nor for a rollout before its end: no
        # block is full earlier.
        self._top_k = self._rollout.top_k_logprobs if scorers else 0
        settings = sampler._settings
        unscored = ScoredBy("", settings.max_model_len + 1)
        ranges = scorer_ranges(scorers) or {unscored.group: range(1)}  # a stream of its own
        routes = [settings.scored_by[spec.teacher] if scorers else unscored for spec in request.specs]
        counts, taken = Counter(route.group for route in routes), Counter[str]()
        self._rollouts: dict[int, PendingRollout] = {}
        for spec, route in zip(request.specs, routes, strict=True):
            peers, position = ranges[route.group], taken[route.group]
            scorer = peers[scorer_of(position, counts[route.group], sampler._index, sampler._samplers, len(peers))]
            taken[route.group] += 1
            recorded = array("f") if settings.record_logprobs else None
            self._rollouts[spec.rollout_id] = PendingRollout(
                spec.rollout_id, spec.scored_prompt, scorer, block=route.cache_block, sampled=recorded
            )
        self._active = {str(i): r for i, r in self._rollouts.items()}
        self._stream: ScoringStream | UnscoredStream = UnscoredStream()
        if scorers:
            self._stream = ScoringStream(
                request,
                scorers,
                sampler._monitor,
                self._rollouts,
                self._abort,
                sampler._settings.cluster,
                sampler._heartbeat,
            )

    def run(self) -> SamplerReport:
        """Step the engine until nothing runs and every chunk has been answered."""
        started = time.monotonic()
        with self._sampler._idle_after(self._active):
            self._start()
            self._generate()
        traffic = self._stream
        return SamplerReport(
            rollouts=tuple(_sampled_rollout(r) for r in self._rollouts.values()),
            chunks=tuple(traffic.chunks),
            seconds=time.monotonic() - started,
            wait_seconds=traffic.wait_seconds,
            control_seconds=self._control_seconds,
            decision_seconds=np.array(traffic.decision_seconds),
            recovered=traffic.recovered,
        )

    def _start(self) -> None:
        settings = SamplingSettings(
            max_tokens=self._rollout.max_tokens,
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            logprobs=self._top_k,
            stop_ids=self._sampler._settings.stop_ids,
        )
        for spec in self._request.specs:
            own = replace(settings, max_tokens=spec.max_tokens)
            self._engine.add(str(spec.rollout_id), spec.prompt_ids, spec.seed, own)

    def _generate(self) -> None:
        span, heartbeat = self._sampler._timeline.span, self._sampler._heartbeat
        fixed = self._sampler._settings.deterministic
        while self._engine.running:
            with span("generate"):
                for _ in range(self._rollout.chunk_tokens):
                    if not self._engine.running:
                        break
                    self._collect()
                    heartbeat.beat()
                    if not fixed:
                        control = time.thread_time()
                        self._stream.poll()
                        self._control_seconds += time.thread_time() - control
            control = time.thread_time()
            if self._engine.running:
                self._flush()
            self._control_seconds += time.thread_time() - control
        control = time.thread_time()
        self._flush()
        with span("wait"):
            self._stream.drain()
        self._control_seconds += time.thread_time() - control

    def _collect(self) -> None:
        for rows in self._engine.step():
            rollout = self._active[rows.request_id]
            if rows.token_ids:
                assert rows.topk_ids is not None and rows.logprobs is not None
                rollout.add(rows.token_ids, rows.topk_ids, rows.logprobs)
            rollout.end = rows.end
            if rows.end in (EngineEnd.EOS, EngineEnd.MAX_TOKENS) and rollout.sampled is not None:
                self.ended.append(EndedRollout(rollout.rollout_id, np.array(rollout.token_ids, dtype=np.int32)))

    def _flush(self) -> None:
        """Send new tokens and ends to the rollouts' scorers."""
        by_scorer: dict[int, list[PendingRollout]] = {}
        for rollout in self._active.values():
            if rollout.has_news:
                by_scorer.setdefault(rollout.scorer, []).append(rollout)
        for index, news in by_scorer.items():
            self._wait_for_room(index)
            # While this waited, decisions may have cut rollouts, and a loss may have moved them to another scorer.
            live = [r for r in news if not r.cut]
            for scorer in sorted({r.scorer for r in live}):
                with self._sampler._timeline.span("send"):
                    self._send(scorer, [r for r in live if r.scorer == scorer])

    def _send(self, scorer: int, news: Sequence[PendingRollout]) -> None:
        chunk = build_chunk(
            news,
            self._stream.take_released(scorer),
            attempt=self._request.attempt,
            top_k=self._top_k,
            vocabulary=self._sampler._settings.vocabulary,
        )
        self._stream.send(scorer, chunk)

    def _wait_for_room(self, scorer: int) -> None:
        """With `run.deterministic` decisions are applied only here, at the same token in every run."""
        with self._sampler._timeline.span("wait"):
            while self._stream.unanswered(scorer) >= self._rollout.max_chunks_ahead:
                self._stream.wait(scorer)

    def _abort(self, rollout_ids: Sequence[int]) -> None:
        """Abort rollouts that a decision cuts. The engine ignores those that have ended meanwhile."""
        names = [str(i) for i in rollout_ids]
        self._engine.abort(names)
        for name in names:
            rollout = self._active.pop(name)
            rollout.topk_ids.clear()
            rollout.logprobs.clear()


def _sampled_rollout(rollout: PendingRollout) -> SampledRollout:
    recorded = None if rollout.sampled is None else np.array(rollout.sampled, dtype=np.float32)
    return SampledRollout(rollout.rollout_id, np.array(rollout.token_ids, dtype=np.int32), recorded, rollout.end)


def scorer_of(position: int, rollouts: int, sampler: int, samplers: int, scorers: int) -> int:
    """The scorer of a sampler's `position`-th of `rollouts`.

    Samplers and scorers each divide the same line of rollouts into equal parts. So every scorer gets the same
    number of rollouts, from as few samplers as possible: a period has fewer than samplers + scorers chunks, not
    samplers x scorers.
    """
    return int((sampler + (position + 0.5) / rollouts) / samplers * scorers)
