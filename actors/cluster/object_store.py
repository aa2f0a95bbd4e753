"""How full the object store is. A step's records stay there until they are learnt, so its size bounds a step.

Ray spills to disk when a store is full: nothing is lost then, but everything waits for disks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger("kat_ray.object_store")

_EVERY = 2.0  # seconds between two looks at most


class StoreUsage(NamedTuple):
    """All nodes together."""

    used_share: float  # of the memory that object stores have
    spilled_bytes: float  # since the cluster was started


def store_usage() -> StoreUsage:
    """Ask the raylet, which asks all others: Ray has no public call for it, its own `ray memory` uses this one.

    It is this process's own: any other may have been lost a moment ago and not be known to be.
    """
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    context = ray.get_runtime_context()
    state = get_state_from_address(context.gcs_address)
    (own,) = (node for node in state.node_table() if node["NodeID"] == context.get_node_id())
    stats = get_memory_info_reply(state, own["NodeManagerAddress"], own["NodeManagerPort"]).store_stats
    share = stats.object_store_bytes_used / max(1, stats.object_store_bytes_avail)
    return StoreUsage(share, float(stats.spilled_bytes_total))


class StoreWatch:
    """Looks once a step, and says once if the store is too full or spills."""

    def __init__(
        self,
        limit: float,
        note: Callable[[str], None],
        ahead: int = 0,
        ask: Callable[[], StoreUsage] = store_usage,
    ) -> None:
        """`ahead` is how many steps' records are made while one's are held."""
        self._limit, self._note, self._ahead, self._ask = limit, note, ahead, ask
        self._usage = StoreUsage(0.0, 0.0)
        self._before = 0.0
        self._first_spilled: float | None = None  # what others on the cluster had spilled before
        self._looked = 0.0
        self._said = False

    def start(self) -> None:
        """Before anything of the run is in the store: what others have there is no step's."""
        self._before = self._ask().used_share

    @property
    def has_room(self) -> bool:
        """Whether another step's records may be made while these are held: they are taken to be as many."""
        return self._expected <= self._limit

    @property
    def _expected(self) -> float:
        used = self._usage.used_share
        return used + self._ahead * max(0.0, used - self._before)

    def sample(self) -> dict[str, float]:
        """The metrics of now; call it when a step's records are all there."""
        if time.monotonic() - self._looked >= _EVERY:
            self._usage, self._looked = self._ask(), time.monotonic()
        if self._first_spilled is None:
            self._first_spilled = self._usage.spilled_bytes
        spilled = self._usage.spilled_bytes - self._first_spilled
        if not self._said and (spilled or not self.has_room):
            self._said = True
            used, expected = self._usage.used_share, self._expected
            ahead = f", and would be {expected:.0%} full with the next step's beside them" if self._ahead else ""
            self._note(
                f"the object store is {used:.0%} full with a step's records{ahead} (cluster.store_share = "
                f"{self._limit:g}), {spilled / 2**20:.0f} MiB were spilled to disk: give Ray a larger store, "
                "or lower rollout.prompts_per_step, rollout.max_tokens or rollout.top_k_logprobs"
            )
        return {"store/used_share": self._usage.used_share, "store/spilled_bytes": spilled}
