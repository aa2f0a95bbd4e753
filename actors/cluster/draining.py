"""Nodes that are about to go: Ray is told when a spot machine is taken back, or a pod ends (`ray drain-node`).

What a learner has learnt since the newest checkpoint is lost with its node, so it is saved first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ray.exceptions import RayError

from actors.cluster.placement import Placement

log = logging.getLogger("kat_ray.draining")

_EVERY = 2.0  # seconds between two looks at the cluster
LEARNER, DRIVER = "the learner", "the driver"


class Draining(NamedTuple):
    """A node that is to go, and who lives there."""

    node: str
    holds: tuple[str, ...]
    deadline: float | None  # of time.time(); None where nobody said

    def words(self) -> str:
        """What to say of it."""
        seconds = "" if self.deadline is None else f" in {max(0.0, self.deadline - time.time()):.0f} s"
        return f"node {self.node[:8]} with {' and '.join(self.holds)} is going away{seconds}"


def draining_nodes(placement: Placement) -> list[Draining]:
    """Nodes that go and whose loss would lose what was learnt: a learner's rank's, and the driver's own."""
    import ray
    from ray._private.state import state

    going: Mapping[str, int] = state.get_draining_nodes()  # deadlines in milliseconds; 0: none
    if not going:
        return []
    holds = {DRIVER: {ray.get_runtime_context().get_node_id()}, LEARNER: placement.nodes("learner")}
    found = []
    for node, deadline in sorted(going.items()):
        here = tuple(who for who, nodes in holds.items() if node in nodes)
        if here:
            found.append(Draining(node, here, deadline / 1000 if deadline else None))
    return found


class DrainWatch:
    """What a thread learns of the nodes that are to go. The driver never waits for it: the head may be silent."""

    def __init__(self, ask: Callable[[], list[Draining]], every: float = _EVERY) -> None:
        self._ask, self._every = ask, every
        self._seen: list[Draining] = []
        self._said: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="draining", daemon=True)

    def __enter__(self) -> DrainWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @property
    def is_pressing(self) -> bool:
        """Whether a node of ours is about to go."""
        return bool(self._seen)

    def news(self) -> Iterator[Draining]:
        """Each node that is to go, once."""
        for draining in self._seen:
            if draining.node not in self._said:
                self._said.add(draining.node)
                yield draining

    def _look(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def look(self) -> None:
        """Ask once."""
        try:
            self._seen = self._ask()
        except (RayError, RuntimeError, OSError, AssertionError) as error:  # a head that is away; the run goes on
            log.debug("nodes that drain are not known: %s", error)
