"""The actors of a run: made, connected, and watched while their models load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.cluster import Placement
from actors.learner import Learner
from actors.student_sampler import StudentSampler
from actors.teacher_scorer import TeacherScorer
from actors.trap_monitor import TrapMonitor
from kat_ray.config import Config, ModelConfig
from kat_ray.errors import UserError
from kat_ray.termination import RunFacts

log = logging.getLogger("kat_ray.pools")


@dataclass(frozen=True)
class ModelPaths:
    """What the actors need to know of the two models, resolved once by the driver."""

    student_dir: str
    teacher_dir: str
    stop_ids: tuple[int, ...]  # of both models: the stop event of the KL
    student_stop_ids: tuple[int, ...]  # those that end a student's rollout
    vocabulary: int  # the student's
    max_model_len: int  # longest prompt and answer together


class Pools:
    """All actors of a run.

    The samplers' places are taken by one set of engines at a time: the teacher's, to evaluate it, or the
    student's.
    """

    def __init__(self, config: Config, paths: ModelPaths, placement: Placement) -> None:
        self._config = config
        self._paths = paths
        self._placement = placement
        self._timeout = config.cluster.start_timeout
        facts = RunFacts(config.run.seed, config.rollout.max_tokens)
        self.monitors = [
            self._make("monitor", i, TrapMonitor, config.termination, facts) for i in range(config.monitor.shards)
        ]
        self.learners = [self._learner(i) for i in range(config.learner.world_size)]
        self.scorers = [
            self._make(
                "scorer",
                i,
                TeacherScorer,
                f"scorer:{i}",
                config,
                paths.teacher_dir,
                paths.stop_ids,
                paths.max_model_len,
            )
            for i in range(config.scorer.replicas)
        ]
        self.samplers: list[Any] = []
        self._starting: list[Any] = []

    def start(self) -> None:
        """Begin to load the models of scorers and learners; `join` waits for them."""
        (host, port), *_ = wait(
            [self.learners[0].address.remote()], self._timeout, "learner 0 to start (cluster.start_timeout)"
        )
        self._starting = [
            *(learner.start.remote(host, port) for learner in self.learners),
            *(scorer.ready.remote() for scorer in self.scorers),
        ]

    def use_samplers(self, samplers: list[Any]) -> None:
        """Put these engines in the samplers' places; those that held them end."""
        for sampler in self.samplers:
            ray.kill(sampler)
        self.samplers = samplers
        wait([s.ready.remote() for s in samplers], self._timeout, "samplers to load (cluster.start_timeout)")

    def join(self) -> None:
        """Wait until every model is loaded, and connect samplers, scorers and monitor."""
        wait(self._starting, self._timeout, "models to load (cluster.start_timeout)")
        connect(self.samplers, self.scorers, self.monitors, self._timeout)

    def _learner(self, rank: int) -> Any:
        config, paths = self._config, self._paths
        return self._make(
            "learner", rank, Learner, rank, config.learner.world_size, config, paths.student_dir, paths.stop_ids
        )

    def _make(self, role: str, index: int, cls: type, *args: Any) -> Any:
        return ray.remote(cls).options(**self._placement.options(role, index)).remote(*args)


def shard_of(sampler: int, shards: int) -> int:
    """The monitor that all rollouts of the `sampler`-th sampler belong to."""
    return sampler % shards


def connect(
    samplers: Sequence[Any], scorers: Sequence[Any], monitors: Sequence[Any], timeout: float | None
) -> None:
    """Give every sampler the scorers and the monitor that its chunks go to."""
    n = len(samplers)
    connected = [
        s.connect.remote(scorers, monitors[shard_of(i, len(monitors))], i, n) for i, s in enumerate(samplers)
    ]
    wait(connected, timeout, "samplers to be connected")


def make_samplers(
    config: Config, paths: ModelPaths, placement: Placement, model: ModelConfig, model_dir: str, label: str
) -> list[Any]:
    """Sampler actors that hold `model`; `label` names them on the dashboard."""
    cls = ray.remote(StudentSampler)
    return [
        cls.options(**placement.options("sampler", i) | {"name": f"kat:{label}:{i}"}).remote(
            f"{label}:{i}",
            config,
            model,
            model_dir,
            stop_ids=paths.student_stop_ids,
            vocabulary=paths.vocabulary,
            max_model_len=paths.max_model_len,
        )
        for i in range(config.sampler.replicas)
    ]


def wait(refs: Sequence[Any], timeout: float | None, what: str) -> list[Any]:
    """`ray.get` with a deadline and errors that say what was waited for, and in which actor it failed."""
    try:
        results: list[Any] = ray.get(list(refs), timeout=timeout)
    except GetTimeoutError as error:
        raise UserError(f"waited {timeout:g} s for {what}") from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        if isinstance(error.cause, OSError):  # a full disk, a directory that cannot be written
            reason = error.cause.strerror or error.cause
            raise UserError(f"{what}: {reason}; what was written before is intact") from error
        raise
    except RayActorError as error:
        raise UserError(
            f"an actor died while waiting for {what}: {_last_line(error)}. "
            "Its output is in Ray's session logs (/tmp/ray/session_latest/logs/worker-*)."
        ) from error
    return results


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
