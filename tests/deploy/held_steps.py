"""An engine that stops in the middle of a step until the test lets the step go on, and says where it stands.

What a test does in the middle of a step so meets rollouts in flight, and a run cannot end before the test is done.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from actors.sampler.settings import SamplerSettings
from actors.testing.stub_engine import STUB_RATE, StubEngine
from kat_ray.types.records import EngineRows


@dataclass(frozen=True)
class Stand:
    """Where a sampler is with a step: its node, the process of the node's raylet, and its rollouts in flight."""

    node: str
    raylet: int
    rollouts: int


class Gate:
    """How many steps may be ended, and who is in the middle of one: files in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "gate"
        self._open = self._folder / "open"

    def open(self, steps: int) -> None:
        """Let the first `steps` steps go on to their ends."""
        self._folder.mkdir(exist_ok=True)
        _write(self._open, steps)

    def is_open(self, step: int) -> bool:
        """Whether a step, the first of which is 0, may go on."""
        return self._open.is_file() and step < int(self._open.read_text())

    def stop_at(self, step: int, sampler: str, stand: Stand) -> None:
        """Note that a sampler is in the middle of a step."""
        (self._folder / str(step)).mkdir(parents=True, exist_ok=True)
        _write(self._folder / str(step) / sampler, asdict(stand))

    def stopped(self, step: int) -> dict[str, Stand]:
        """The samplers that are, or were, in the middle of a step, by their names."""
        files = [p for p in (self._folder / str(step)).glob("*") if not p.name.startswith(".")]
        return {p.name: Stand(**json.loads(p.read_text())) for p in files}


def _write(path: Path, value: Any) -> None:
    """Whoever reads it meanwhile finds all of it or nothing."""
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(value))
    new.replace(path)


class HeldEngine(StubEngine):
    """The stub, whose rollouts wait half-way while the gate is shut."""

    def __init__(self, gate: Gate, settings: SamplerSettings) -> None:
        rollout = settings.rollout
        super().__init__(rollout.top_k_logprobs, vocabulary=16, rate=2 * STUB_RATE)
        self._gate = gate
        self._per_step, self._half = rollout.rollouts_per_step, rollout.max_tokens // 2
        self._told: set[int] = set()  # steps

    def step(self) -> list[EngineRows]:
        """Nothing new while the gate is shut: the sampler's loop goes on around it, and answers."""
        request_id, left = next(iter(self._left.items()))  # all of an order's are equally far
        step = int(request_id) // self._per_step
        if left != self._half or self._gate.is_open(step):
            return super().step()
        if step not in self._told:
            self._told.add(step)
            here = ray.get_runtime_context()
            self._gate.stop_at(step, here.get_actor_name(), Stand(here.get_node_id(), os.getppid(), self.running))
        time.sleep(0.02)
        return []
