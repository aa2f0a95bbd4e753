"""The real actors with stub engines on a local Ray, and what they cost.

`StudentSampler`, `TeacherScorer`, `TrapMonitor`, `Steps.sample` and the object store are those of every run; only
the models are stubs, whose own CPU time is taken off. Learner ranks are left out: without a model they do nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import psutil
import ray

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.learners import LearnerGroup
from actors.cluster.replica import Replica, remote_class
from actors.cluster.run_actors import RunActors
from actors.cluster.samplers import ModelPaths, SamplerGroup
from actors.cluster.scorers import ScorerActors
from actors.cluster.signals import StopRequest
from actors.cluster.supervisor import Supervisor
from actors.driver.steps import SampledStep, Steps
from actors.sampler.settings import SamplerSettings
from actors.teacher.settings import ScorerSettings
from actors.testing.stub_engine import PlainMonitor, StubSampler, stub_engine
from actors.testing.stub_teacher import StubScorer, stub_teacher
from kat_ray.config import Config
from kat_ray.data.prompt_order import PromptOrder
from kat_ray.run.carried import Carried
from kat_ray.termination import RunFacts
from kat_ray.types.records import DEFAULT_TEACHER, Prompt

CHUNK_TOKENS = 16
MAX_TOKENS = 64
_MOST_PROMPTS = 100_000  # of a step: its ids are its own
_SYSTEM = ("raylet", "gcs_server")


@dataclass(frozen=True)
class Setting:
    """One configuration of the benchmark; `rate` in tokens a second over all samplers, None for full speed."""

    samplers: int
    rollouts: int
    scorers: int = 4
    shards: int = 1
    rate: float | None = None
    max_tokens: int = MAX_TOKENS

    @property
    def name(self) -> str:
        """In a word."""
        longer = f", {self.max_tokens} tokens" if self.max_tokens != MAX_TOKENS else ""
        return f"{self.samplers} x {self.rollouts}{longer}"


@dataclass(frozen=True)
class Measured:
    """What a setting gave. CPU seconds are of whole processes, less the stubs; `busiest` is a share of one core."""

    setting: Setting
    tokens: int
    seconds: float
    rollouts: int
    chunks: int
    remote_calls: int
    puts: int
    bytes_put: float  # arrays of chunks, scores and teacher's rows
    trapped_share: float
    cpu: Mapping[str, float]  # by role: sampler, scorer, monitor, driver, system (raylet and GCS)
    busiest: Mapping[str, float]  # by role: CPU time of its busiest process over the wall time
    decision_seconds: np.ndarray  # [chunks]

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated a second of wall time."""
        return self.tokens / self.seconds

    def cpu_per_million(self, role: str) -> float:
        """CPU seconds of a role per million tokens."""
        return self.cpu[role] / self.tokens * 1e6

    def latency(self, percent: float) -> float:
        """Percentile of the time from building a chunk to applying its decision, seconds."""
        return float(np.percentile(self.decision_seconds, percent))


def bench_config(rollouts: int, top_k: int = 64, max_tokens: int = MAX_TOKENS) -> Config:
    """Short rollouts under the KAT rule, active after the first step; the models' paths are not read."""
    return Config.model_validate(
        {
            "student": {"path": "stub"},
            "teacher": {"path": "stub"},
            "data": {"path": "stub"},
            "rollout": {
                "prompts_per_step": rollouts,
                "max_tokens": max_tokens,
                "chunk_tokens": CHUNK_TOKENS,
                "top_k_logprobs": top_k,
            },
            "termination": {
                "rule": "kat",
                "window": 16,
                "exempt": 8,
                "eta": 0.3,  # the paper's quantile, as in what was measured before there were budgets
                "buffer": 1024,
                "min_samples": 16,
                "min_steps": 0,
            },
        }
    )


@contextmanager
def local_ray(store_gib: float = 3.0) -> Iterator[None]:
    """A local Ray of many logical CPUs on loopback, ended afterwards."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=64,
        object_store_memory=int(store_gib * 2**30),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        namespace="kat-ray-bench",
    )
    try:
        yield
    finally:
        ray.shutdown()


def fleet_actors(config: Config, handles: Mapping[str, Sequence[Any]]) -> RunActors:
    """Actors that are ready already, by role, without learners."""
    nowhere: Any = None  # they have no places: none is made or given back here
    supervisor = Supervisor(config.cluster, StopRequest(config.run.grace_seconds))
    unread = ModelPaths(
        "", {}, (), (), {}, vocabulary=0, max_model_len=0, scored_len=0
    )  # of models that nobody loads
    samplers = SamplerGroup(config, unread, supervisor, nowhere)
    monitors: Any = ActorGroup("monitor", supervisor, nowhere, nowhere)
    scorers = ScorerActors(config.scorer_groups[0], nowhere, supervisor, nowhere, nowhere)
    for group in (samplers, scorers, monitors):
        group.replicas = tuple(Replica(group.role, i, h, nowhere) for i, h in enumerate(handles[group.role]))
    return RunActors(
        supervisor,
        samplers,
        {DEFAULT_TEACHER: scorers},
        monitors,
        LearnerGroup("learner", supervisor, nowhere, nowhere),
    )


class Fleet:
    """Actors that settings share: each takes the first so many of a role. Ray must be running."""

    def __init__(self, samplers: int, scorers: int, shards: Collection[int], vocabulary: int = 50_000) -> None:
        config = bench_config(256)
        facts = RunFacts(config.run.seed, MAX_TOKENS)
        env = {"env_vars": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}}

        def make(cls: type, *args: Any, **kwargs: Any) -> Any:
            return remote_class(cls).options(num_cpus=1, runtime_env=env).remote(*args, **kwargs)

        # Monitors that share a calibration have learnt from the same steps: each number of shards has its own.
        self.monitors = {n: [make(PlainMonitor, config.termination, facts) for _ in range(n)] for n in {1, *shards}}
        scoring = ScorerSettings.from_config(config, "stub", (1,), MAX_TOKENS)
        self.scorers = [make(StubScorer, f"scorer:{i}", scoring, stub_teacher) for i in range(scorers)]
        sampling = SamplerSettings.from_config(
            config, config.student, str(vocabulary), stop_ids=(1,), vocabulary=vocabulary, max_model_len=MAX_TOKENS
        )
        self.samplers = [make(StubSampler, f"sampler:{i}", sampling, stub_engine) for i in range(samplers)]
        ray.get([a.ready.remote() for a in (*self.scorers, *self.samplers)])
        self._prompts = [Prompt(str(i), tuple(range(2, 34))) for i in range(64)]
        self._step = 0

    def measure(self, setting: Setting, tokens: int = 100_000) -> Measured:
        """Sample steps of a setting until about so many tokens are generated; one step goes before, uncounted."""
        used = {
            "sampler": self.samplers[: setting.samplers],
            "scorer": self.scorers[: setting.scorers],
            "monitor": self.monitors[setting.shards],
        }
        actors = fleet_actors(bench_config(64), used)
        actors.wire()
        rate = None if setting.rate is None else setting.rate / setting.samplers
        ray.get([s.set_rate.remote(rate) for s in used["sampler"]])
        order = PromptOrder(self._prompts, seed=0, shuffle=False)
        self._one_step(Steps(bench_config(max(64, setting.samplers)), actors, order))
        steps = Steps(bench_config(setting.rollouts, max_tokens=setting.max_tokens), actors, order)
        parts: list[_Part] = []
        before, started = _usage(used), time.monotonic()
        while not parts or sum(p.tokens for p in parts) < tokens:
            parts.append(_part(self._one_step(steps)))
        return _measured(setting, parts, before, _usage(used), time.monotonic() - started)

    def _one_step(self, steps: Steps) -> SampledStep:
        self._step += 1  # over all settings: actors know those that were
        steps.reset_carried(self._step, Carried(prompts=self._step * _MOST_PROMPTS))
        return steps.sample(self._step)


@dataclass(frozen=True)
class _Part:
    """One step's counts; its records are gone."""

    tokens: int
    chunks: int
    calls: int
    bytes_put: float
    trapped: int
    rollouts: int
    decision_seconds: np.ndarray


def _part(sampled: SampledStep) -> _Part:
    tokens = sum(r.counts.generated for r in sampled.rollouts)
    refs = sampled.chunks[len(sampled.chunks) // 2]
    records = (*ray.get([refs.chunk, refs.teacher]), sampled.scored[len(sampled.chunks) // 2])
    return _Part(
        tokens=tokens,
        chunks=len(sampled.chunks),
        # A score and an observe for every chunk; what the driver calls once a step is small and counted by hand.
        calls=2 * len(sampled.chunks) + 2 * sum(map(len, sampled.reports)) + 2,
        bytes_put=sum(nbytes(r) for r in records) / max(1, records[0].tokens) * tokens,
        trapped=sum(r.outcome.cut is not None for r in sampled.rollouts),
        rollouts=len(sampled.rollouts),
        decision_seconds=np.concatenate([r.decision_seconds for batch in sampled.reports for r in batch]),
    )


def nbytes(record: Any) -> int:
    """Bytes of a record's arrays."""
    values = (getattr(record, f.name) for f in fields(record))
    return sum(v.nbytes for v in values if isinstance(v, np.ndarray))


def _usage(used: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """CPU seconds by role and process so far, stubs taken off."""
    usage = {
        role: [cpu - stub for cpu, stub in ray.get([a.cpu.remote() for a in actors])]
        for role, actors in used.items()
    }
    children = psutil.Process().children(recursive=True)
    system = [p.cpu_times() for p in children if p.name() in _SYSTEM]
    return usage | {"driver": [time.process_time()], "system": [sum(t.user + t.system for t in system)]}


def _measured(
    setting: Setting,
    parts: Sequence[_Part],
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    seconds: float,
) -> Measured:
    spent = {role: np.subtract(after[role], before[role]) for role in before}
    return Measured(
        setting=setting,
        tokens=sum(p.tokens for p in parts),
        seconds=seconds,
        rollouts=sum(p.rollouts for p in parts),
        chunks=sum(p.chunks for p in parts),
        remote_calls=sum(p.calls for p in parts),
        puts=sum(p.chunks for p in parts),
        bytes_put=sum(p.bytes_put for p in parts),
        trapped_share=sum(p.trapped for p in parts) / sum(p.rollouts for p in parts),
        cpu={role: float(s.sum()) for role, s in spent.items()},
        busiest={role: float(s.max()) / seconds for role, s in spent.items()},
        decision_seconds=np.concatenate([p.decision_seconds for p in parts]),
    )
