"""One actor of a role, and an actor class as all roles are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from actors.cluster.placement import Place


@dataclass(frozen=True, eq=False)
class Replica:
    """One actor of a role. Its number is its own for as long as the run lasts, whoever leaves before it."""

    role: str
    number: int
    handle: Any  # of the Ray actor
    place: Place

    @property
    def name(self) -> str:
        """As in logs and messages: `sampler:0`."""
        return f"{self.role}:{self.number}"


def remote_class(cls: type) -> Any:
    """A plain class as an actor class that answers `health` while it works."""
    return ray.remote(concurrency_groups={"health": 1})(cls)
