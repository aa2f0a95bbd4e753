"""The engine of a run beside which a test waits, by itself: a sampler that loads it loads no torch."""

from __future__ import annotations

from pathlib import Path

from actors.sampler.settings import SamplerSettings
from actors.testing.stub_engine import StubEngine
from kat_ray.types.records import EngineRows


class PacedEngine(StubEngine):
    """`rate` tokens a second, and from the moment that the file is there as many as it can."""

    def __init__(self, settings: SamplerSettings, rate: float, seen: Path) -> None:
        super().__init__(settings.rollout.top_k_logprobs, vocabulary=16, rate=rate)
        self._seen = seen

    def step(self) -> list[EngineRows]:
        """One token of every running request."""
        if self._rate is not None and self._seen.exists():
            self.set_rate(None)
        return super().step()
