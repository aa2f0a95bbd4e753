"""A run beside which a test waits for something: its stub engines are slow until the test has seen that.

So the run lasts for as long as it has to on any machine, and what is left of it then passes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.config import Config
from tests.cluster.paced_engine import PacedEngine


def seen_file(config: Config) -> Path:
    """Its being there ends the slow part of a run."""
    return Path(config.run.dir) / "seen"


def paced(config: Config, rate: float) -> Engines:
    """Stub engines for a run; the tokens of a rollout are those of any stub."""
    return Engines(partial(PacedEngine, rate=rate, seen=seen_file(config)), stub_teacher, StubLearner)


def train_beside(config: Config, watch: Callable[[], Any], rate: float) -> Path:
    """A whole run, slow until `watch`, in a thread beside it, has returned or failed; its directory."""

    def watched() -> None:
        try:
            watch()
        finally:
            seen_file(config).touch()

    with ThreadPoolExecutor(1) as beside:
        watching = beside.submit(watched)
        path = job.train(config, engines=paced(config, rate))
        watching.result()
    return path
