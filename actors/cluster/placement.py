"""Every role placed before anything heavy is loaded.

A role is reserved as a placement group first: what cannot be placed is known by name in seconds, before
models are read, and a learner's ranks are placed all or not at all.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.handles import Ref
from kat_ray.cluster.devices import environment_of
from kat_ray.cluster.machine import own_cores
from kat_ray.cluster.roles import Node, Role, place, roles_of, settings_of
from kat_ray.cluster.threads import threads_of
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.observability.logs import labels

log = logging.getLogger("kat_ray.cluster")


# Ray hands small results over in its messages, and keeps those whose references the caller passes on, as a sampler
# does with scores, for ever (Ray 2.60; measured, docs/log.md). In the object store they are freed.
_RETURNS_IN_STORE = {"RAY_max_direct_call_object_size": "0"}


# torch's settings of its GPU allocator: the name of today and that of before, which it reads as well.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environments(config: Config, threads: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """Environment of each role's processes, by the role's threads."""
    asks = settings_of(config)
    own = {name: _env(asks[name].num_gpus, threads[name]) for name in threads}
    own["learner"] |= _learner_env(config)
    own["sampler"] |= _sampler_env(config)
    for group in config.scorer_groups:
        own[group.role] |= _RETURNS_IN_STORE | _vllm_env()
    return own


def _env(num_gpus: float, threads: int) -> dict[str, str]:
    # Set before torch is imported: OpenMP reads them once. Threads that wait must not spin: where a core is shared,
    # a barrier then lasts as long as the other process's time slice (measured: a step of 0.2 s took 7 s).
    return environment_of(num_gpus) | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _learner_env(config: Config) -> dict[str, str]:
    if not config.learner.num_gpus:
        # ZeRO brings an optimiser that DeepSpeed lets torch compile, and with it the compiler: 1.7 s at a start.
        # Nothing that a learner does here is compiled.
        return {"TORCHDYNAMO_DISABLE": "1"}
    # Micro-batches have other lengths each time: with segments of fixed sizes what is free falls into pieces.
    return {} if any(name in os.environ for name in _ALLOCATOR) else {_ALLOCATOR[0]: "expandable_segments:True"}


def _vllm_env() -> dict[str, str]:
    return {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _sampler_env(config: Config) -> dict[str, str]:
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's loop is the actor's own
        **_vllm_env(),
    }
    if config.sampler.tensor_parallel_size > 1 and not config.sampler.num_gpus:
        # vLLM would bind each of an engine's processes to a NUMA node of its own, and refuse where there are fewer.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.sampler.eager:
        # vLLM compiles its token-rank function even so: 14 s at the first start, and a compiler needed.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


@dataclass(frozen=True)
class Place:
    """Where one replica lives: a bundle of a placement group."""

    group: PlacementGroup
    bundle: int


class Placement:
    """What a run has reserved: for each role the places of its replicas.

    A learner's ranks are one placement group, all or none. Where a role can change its size every replica has a
    group of its own, which is given back with it.
    """

    def __init__(self, config: Config, fixed_size: bool, run: str, only: Sequence[str] | None = None) -> None:
        """Reserve all roles (or only these) of the run of this name.

        `UserError` names what is missing, after `cluster.placement_timeout` seconds if it might come.
        """
        roles = {name: role for name, role in roles_of(config).items() if only is None or name in only}
        timeout = config.cluster.placement_timeout
        threads = threads_of(config, own_cores() if fixed_size else None)
        log.info("threads of a replica: %s", ", ".join(f"{name} {n}" for name, n in threads.items()))
        self._roles, self._env, self._run = roles, environments(config, threads), run
        self._namespace = uuid.uuid4().hex  # two runs on one cluster do not meet
        self._places: dict[str, tuple[Place, ...]] = {}
        self._held: dict[Any, PlacementGroup] = {}  # by id: all groups that are to be given back
        if fixed_size and (shortage := _shortage(roles)):
            raise UserError(shortage)
        try:
            for role in roles.values():
                self._places[role.name] = _reserve(role)
                self._held |= {place.group.id: place.group for place in self._places[role.name]}
            for name, places in self._places.items():
                self._wait(roles[name], [place.group for place in places], timeout)
        except BaseException:
            self.remove()
            raise

    def _wait(self, role: Role, groups: Sequence[PlacementGroup], timeout: float) -> None:
        try:
            ray.get([group.ready() for group in groups], timeout=timeout)
        except GetTimeoutError as error:
            raise UserError(
                _shortage(self._roles)
                or _misplaced(self._roles)
                or f"{role.replicas} x {role.name} could not be placed within {timeout:g} s "
                f"(cluster.placement_timeout): each asks for {role.words}; "
                f"free now: {_words(ray.available_resources())}. Other jobs may hold the rest: wait for them, "
                "add nodes, or raise cluster.placement_timeout where an autoscaler brings them"
            ) from error

    def places(self, role: str) -> tuple[Place, ...]:
        """The places reserved at the start, one for each replica; none of a role that the run does without."""
        return self._places.get(role, ())

    def nodes(self, role: str) -> set[str]:
        """Ids of the nodes on which a role has its places now: what is lost finds another."""
        groups = {place.group.id: place.group for place in self._places.get(role, ())}
        tables = (placement_group_table(group) for group in groups.values())
        return {node for table in tables for node in table["bundles_to_node_id"].values() if node}

    def options(self, role: str, number: int, place: Place, label: str = "") -> dict[str, Any]:
        """Options of replica `number` of a role: its bundle, its environment, a telling name.

        `label` stands in the name instead of the role.
        """
        bundle = dict(self._roles[role].bundle)
        return {
            "name": f"kat:{label or role}:{number}",
            "namespace": self._namespace,
            "num_cpus": bundle.pop("CPU", 0),
            "num_gpus": bundle.pop("GPU", 0),
            "resources": bundle,
            "max_restarts": -1,  # how often is counted by the driver: `cluster.max_restarts`
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place.group, place.bundle),
            "runtime_env": {"env_vars": self._env[role] | labels(self._run, f"{role}:{number}")},
        }

    def request(self, role: str) -> tuple[Place, Ref[Any]]:
        """Ask for one more replica's place; an autoscaler sees it. The reference is there once it is reserved."""
        asks = self._roles[role]
        group = _group([asks.bundle], asks.labels)
        self._held[group.id] = group
        return Place(group, 0), group.ready()

    def release(self, place: Place) -> None:
        """Give a replica's own place back; an actor in it ends."""
        del self._held[place.group.id]
        remove_placement_group(place.group)

    def remove(self) -> None:
        """Give everything back; actors placed in it end."""
        for group in self._held.values():
            remove_placement_group(group)
        self._held.clear()
        self._places.clear()


def _reserve(role: Role) -> tuple[Place, ...]:
    if role.elastic:
        return tuple(Place(_group([role.bundle], role.labels), 0) for _ in range(role.replicas))
    group = _group([role.bundle] * role.replicas, role.labels)
    return tuple(Place(group, i) for i in range(role.replicas))


def _group(bundles: Sequence[Mapping[str, float]], labels: Mapping[str, str]) -> PlacementGroup:
    selectors = [dict(labels)] * len(bundles) if labels else None
    return placement_group([dict(b) for b in bundles], strategy="PACK", bundle_label_selector=selectors)


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


def _misplaced(roles: Mapping[str, Role]) -> str:
    """One line a role that no nodes of the whole cluster have room for, by labels or by what one node holds."""
    return "\n".join(
        f"{p.role.replicas} x {p.role.name} could not be placed: each asks for {p.role.words}; {p.lacking}. Add "
        f"such nodes, or ask for others: {p.role.name}'s labels, resources, num_cpus, num_gpus; cluster.by_role"
        for p in place([*roles.values()], nodes_of(ray.nodes()))
        if p.lacking
    )


def nodes_of(listed: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Nodes that live, as `ray.nodes()` lists them, with all that they have."""
    return [
        Node(f"{n['NodeManagerHostname']} ({n['NodeID'][:8]})", n["Resources"], n.get("Labels") or {})
        for n in listed
        if n["Alive"]
    ]


def _words(resources: Mapping[str, float]) -> str:
    named = {k: v for k, v in resources.items() if k in ("CPU", "GPU")}
    return ", ".join(f"{v:g} {k}" for k, v in sorted(named.items())) or "nothing"
