"""Ray: started or joined, and every role placed before anything heavy is loaded.

A role is reserved as a placement group first: what cannot be placed is known by name in seconds, before
models are read, and a learner's ranks are placed all or not at all.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.preflight import check_cluster, named_address
from kat_ray.cluster.roles import Node, Role, cpus_asked, place, roles_of
from kat_ray.config import Config
from kat_ray.config.cluster import PlacementConfig
from kat_ray.errors import UserError
from kat_ray.observability.logs import labels

log = logging.getLogger("kat_ray.cluster")


# Ray hands small results over in its messages, and keeps those whose references the caller passes on, as a sampler
# does with scores, for ever (Ray 2.60; measured, docs/log.md). In the object store they are freed.
_RETURNS_IN_STORE = {"RAY_max_direct_call_object_size": "0"}


def environments(config: Config) -> dict[str, dict[str, str]]:
    """Environment of each role's processes."""
    return {
        "learner": _learner_env(config),
        "sampler": _sampler_env(config),
        "scorer": _env(config.scorer) | _RETURNS_IN_STORE,
        "monitor": _env(config.monitor),
    }


def _env(placement: PlacementConfig) -> dict[str, str]:
    # Set before torch is imported: OpenMP reads them once. Threads that wait must not spin: where a core is shared,
    # a barrier then lasts as long as the other process's time slice (measured: a step of 0.2 s took 7 s).
    return {
        "OMP_NUM_THREADS": str(placement.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _learner_env(config: Config) -> dict[str, str]:
    env = _env(config.learner)
    if not config.learner.num_gpus:
        # ZeRO brings an optimiser that DeepSpeed lets torch compile, and with it the compiler: 1.7 s at a start.
        # Nothing that a learner does here is compiled.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


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
    named = named_address(config)
    if ray.is_initialized():  # a test's or a notebook's
        yield False
        return
    common: dict[str, Any] = {
        "namespace": "kat-ray",
        "log_to_driver": bool(os.environ.get("KAT_DEBUG")),
        "logging_level": "warning",
    }
    if named is not None:
        address, name = named
        check_cluster(config)
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{name} = {address!r}: cannot be joined: {reason}. This runs on one of the cluster's nodes; from "
                "outside send it as a job: kat-ray submit --address http://HOST:8265"
            ) from error
    else:
        # The command line has chosen token mode before ray was imported, which is when ray reads it; a program
        # that calls this as a library chooses for itself.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        store = cluster.object_store_gib
        with _bound_to(cluster.bind):
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, cpus_asked(roles_of(config))),
                object_store_memory=int(store * 2**30) if store else None,
                include_dashboard=cluster.dashboard,
                dashboard_host="127.0.0.1",
                **common,
            )
    try:
        yield named is None
    finally:
        ray.shutdown()


@contextmanager
def _bound_to(bind: Literal["loopback", "all"]) -> Iterator[None]:
    """Where the ports of a Ray that is started inside listen; `UserError` for all interfaces without a token.

    Ray takes the address of the network for its node, `_node_ip_address="127.0.0.1"` included, and then listens on
    all interfaces. Only where it believes that there are no clusters is its node 127.0.0.1, and every one of its
    servers, the workers' own among them, listens on loopback. That belief is its switch for Windows and macOS; its
    environment variable (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) is read when ray is imported, which is too early.
    """
    if bind == "all":
        if os.environ.get("RAY_AUTH_MODE") != "token":
            raise UserError(
                "cluster.bind = all: the ports would run code for anyone who reaches them; leave RAY_AUTH_MODE "
                "unset or set it to token, or keep cluster.bind = loopback"
            )
        yield
        return
    switch = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(switch)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[switch] = "0"  # for what the cluster starts: a job looks for its node on loopback, too
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before[1]


class Placement:
    """What a run has reserved: for each role the places of its replicas.

    A learner's ranks are one placement group, all or none. Where a pool can change its size every replica has a
    group of its own, which is given back with it.
    """

    def __init__(self, config: Config, fixed_size: bool, run: str, only: Sequence[str] | None = None) -> None:
        """Reserve all roles (or only these) of the run of this name.

        `UserError` names what is missing, after `cluster.placement_timeout` seconds if it might come.
        """
        roles = {name: role for name, role in roles_of(config).items() if only is None or name in only}
        timeout = config.cluster.placement_timeout
        self._roles, self._env, self._run = roles, environments(config), run
        self._namespace = uuid.uuid4().hex  # two runs on one cluster do not meet
        self._places: dict[str, list[tuple[PlacementGroup, int]]] = {}
        self._asked: list[PlacementGroup] = []  # of replicas that are to come, or to go
        self._numbers = {role.name: role.replicas for role in roles.values()}  # of the next replica
        if fixed_size and (shortage := _shortage(roles)):
            raise UserError(shortage)
        try:
            for role in roles.values():
                self._places[role.name] = _reserve(role)
            for name, places in self._places.items():
                self._wait(roles[name], [group for group, _ in places], timeout)
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

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Options for replica `index` of a role: its bundle, its environment, a telling name."""
        return self._options(role, index, *self._places[role][index])

    def _options(self, role: str, number: int, group: PlacementGroup, place: int) -> dict[str, Any]:
        bundle = dict(self._roles[role].bundle)
        name = f"{role}:{number}"
        return {
            "name": f"kat:{name}",
            "namespace": self._namespace,
            "num_cpus": bundle.pop("CPU", 0),
            "num_gpus": bundle.pop("GPU", 0),
            "resources": bundle,
            "max_restarts": -1,  # how often is counted by the driver: `cluster.max_restarts`
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, place),
            "runtime_env": {"env_vars": self._env[role] | labels(self._run, name)},
        }

    def ask(self, role: str) -> tuple[PlacementGroup, Any]:
        """Ask for one more replica's place; an autoscaler sees it. The reference is there once it is reserved."""
        asks = self._roles[role]
        group = _group([asks.bundle], asks.labels)
        self._asked.append(group)
        return group, group.ready()

    def spare_options(self, role: str, group: PlacementGroup) -> tuple[int, dict[str, Any]]:
        """Number and options of a replica in a place that was asked for; no number is given twice."""
        number = self._numbers[role]
        self._numbers[role] += 1
        return number, self._options(role, number, group, 0)

    def take(self, role: str, group: PlacementGroup) -> None:
        """The place that was asked for is the last replica's now."""
        self._asked.remove(group)
        self._places[role].append((group, 0))

    def detach(self, role: str, index: int) -> PlacementGroup:
        """Replica `index` is not counted any more; `forget` gives its place back."""
        group, _ = self._places[role].pop(index)
        self._asked.append(group)
        return group

    def forget(self, group: PlacementGroup) -> None:
        """Give a place back; an actor in it ends."""
        self._asked.remove(group)
        remove_placement_group(group)

    def remove(self) -> None:
        """Give everything back; actors placed in it end."""
        groups = {group.id: group for places in self._places.values() for group, _ in places}
        for group in (*groups.values(), *self._asked):
            remove_placement_group(group)
        self._places.clear()
        self._asked.clear()


def _reserve(role: Role) -> list[tuple[PlacementGroup, int]]:
    if role.elastic:
        return [(_group([role.bundle], role.labels), 0) for _ in range(role.replicas)]
    group = _group([role.bundle] * role.replicas, role.labels)
    return [(group, i) for i in range(role.replicas)]


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
