"""Ray: started or joined, and every role placed before anything heavy is loaded.

A role is reserved as a placement group first: what cannot be placed is known by name in seconds, before
models are read, and a learner's ranks are placed all or not at all.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kat_ray.config import Config, PlacementConfig
from kat_ray.errors import UserError

log = logging.getLogger("kat_ray.cluster")

# The monitor and a run's other light work. It must not take a core from an engine.
MONITOR_CPUS = 0.1


@dataclass(frozen=True)
class Role:
    """A group of equal actors: what each replica reserves, and the environment of its process."""

    name: str
    replicas: int
    placement: PlacementConfig
    env: Mapping[str, str]
    strategy: str = "PACK"

    @property
    def bundle(self) -> dict[str, float]:
        """What one replica reserves."""
        bundle = {"CPU": self.placement.num_cpus or MONITOR_CPUS}
        if self.placement.num_gpus:
            bundle["GPU"] = self.placement.num_gpus
        return bundle


def roles_of(config: Config) -> dict[str, Role]:
    """The roles of a run, in the order in which they are placed."""
    return {
        role.name: role
        for role in (
            Role("learner", config.learner.world_size, config.learner, _env(config.learner)),
            Role("sampler", config.sampler.replicas, config.sampler, _sampler_env(config)),
            Role("scorer", config.scorer.replicas, config.scorer, _env(config.scorer)),
            Role("monitor", config.monitor.shards, PlacementConfig(num_cpus=MONITOR_CPUS), {}),
        )
    }


def _env(placement: PlacementConfig) -> dict[str, str]:
    # Set before torch is imported: OpenMP reads them once. Threads that wait must not spin: where a core is shared,
    # a barrier then lasts as long as the other process's time slice (measured: a step of 0.2 s took 7 s).
    return {
        "OMP_NUM_THREADS": str(placement.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _sampler_env(config: Config) -> dict[str, str]:
    env = _env(config.sampler) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's loop is the actor's own
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if config.sampler.enforce_eager:
        # vLLM compiles its token-rank function even so: 14 s at the first start, and a compiler needed.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


@contextmanager
def ray_session(config: Config) -> Iterator[bool]:
    """A Ray cluster to run on: the one named, the one of the environment, or a local one of our own.

    Yields whether its size is fixed: a local one cannot grow.
    """
    cluster = config.cluster
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():  # a test's or a notebook's
        yield False
        return
    common: dict[str, Any] = {
        "namespace": "kat-ray",
        "log_to_driver": bool(os.environ.get("KAT_DEBUG")),
        "logging_level": "warning",
    }
    if address is not None:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"cluster.address = {address!r}: no Ray cluster answers there ({error}). "
                "Start one (`ray start --head`), or leave cluster.address empty for a local Ray."
            ) from error
    else:
        # The command line has chosen token mode before ray was imported, which is when ray reads it; a program
        # that calls this as a library chooses for itself.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        store = cluster.object_store_gib
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, _cpus_asked(config)),
            object_store_memory=int(store * 2**30) if store else None,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            **common,
        )
    try:
        yield address is None
    finally:
        ray.shutdown()


def _cpus_asked(config: Config) -> int:
    return math.ceil(sum(role.replicas * role.bundle["CPU"] for role in roles_of(config).values()))


class Placement:
    """The placement groups of a run."""

    def __init__(self, roles: Mapping[str, Role], timeout: float, fixed_size: bool) -> None:
        """Reserve all roles; `UserError` names what is missing, after `timeout` seconds if it might come."""
        self._roles = roles
        self._groups: dict[str, PlacementGroup] = {}
        if fixed_size and (shortage := _shortage(roles)):
            raise UserError(shortage)
        try:
            for role in roles.values():
                self._groups[role.name] = placement_group([role.bundle] * role.replicas, strategy=role.strategy)
            for name, group in self._groups.items():
                self._wait(roles[name], group, timeout)
        except BaseException:
            self.remove()
            raise

    def _wait(self, role: Role, group: PlacementGroup, timeout: float) -> None:
        try:
            ray.get(group.ready(), timeout=timeout)
        except GetTimeoutError as error:
            raise UserError(
                _shortage(self._roles)
                or f"{role.replicas} x {role.name} could not be placed within {timeout:g} s "
                f"(cluster.placement_timeout): each asks for {_words(role.bundle)}; "
                f"free now: {_words(ray.available_resources())}. Other jobs may hold the rest."
            ) from error

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Options for replica `index` of a role: its bundle, its environment, a telling name."""
        bundle = self._roles[role].bundle
        return {
            "name": f"kat:{role}:{index}",
            "namespace": self._groups[role].id.hex(),  # two runs on one cluster do not meet
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[role], index),
            "runtime_env": {"env_vars": dict(self._roles[role].env)},
        }

    def remove(self) -> None:
        """Give everything back; actors placed in it end."""
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()


def _shortage(roles: Mapping[str, Role]) -> str:
    """One line a resource that the whole cluster has too little of; empty where it has enough."""
    total = ray.cluster_resources()
    lines = []
    for resource in ("CPU", "GPU"):
        asks = {r.name: r.replicas * r.bundle.get(resource, 0.0) for r in roles.values()}
        wanted, have = sum(asks.values()), total.get(resource, 0.0)
        if wanted > have + 1e-6:
            parts = ", ".join(f"{roles[n].replicas} x {n} {a / roles[n].replicas:g}" for n, a in asks.items() if a)
            lines.append(
                f"the cluster has {have:g} {resource}, the roles ask for {wanted:g} ({parts}): lower "
                f"sampler.replicas, scorer.replicas, learner.world_size or their "
                f"num_{resource.lower()}s, or add nodes"
            )
    return "\n".join(lines)


def _words(resources: Mapping[str, float]) -> str:
    named = {k: v for k, v in resources.items() if k in ("CPU", "GPU")}
    return ", ".join(f"{v:g} {k}" for k, v in sorted(named.items())) or "nothing"
