"""What the roles of a run ask of a cluster, and which nodes could give it: arithmetic only, no Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kat_ray.config import Config
from kat_ray.config.cluster import PlacementConfig, PoolConfig

ROLE_LABEL = "kat.ray/role"
# The monitor's share of the head's resource `head`, with cluster.by_role.
_HEAD_SHARE = 0.01
_SLACK = 1e-6


@dataclass(frozen=True)
class Role:
    """A group of equal actors: how many, and what each of them reserves on a node of which labels."""

    name: str
    replicas: int
    bundle: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    bounds: tuple[int, int] | None = None  # fewest and most replicas; None: placed all or none

    @property
    def elastic(self) -> bool:
        """Whether its number may change."""
        return self.bounds is not None and self.bounds[0] < self.bounds[1]

    @property
    def words(self) -> str:
        """What a replica asks for."""
        words = ", ".join(f"{v:g} {k}" for k, v in self.bundle.items())
        labels = ", ".join(f"{k}={v}" for k, v in self.labels.items())
        return f"{words} on a node labelled {labels}" if labels else words


def roles_of(config: Config) -> dict[str, Role]:
    """The roles of a run, in the order in which they are placed; scorers and monitors where a teacher is asked."""

    def role(name: str, replicas: int, asks: PlacementConfig, nodes: str = "") -> Role:
        bundle = {"CPU": asks.num_cpus, "GPU": asks.num_gpus, **asks.resources}
        labels = dict(asks.labels)
        if config.cluster.by_role:
            at = nodes or name
            labels.setdefault(ROLE_LABEL, at)
            bundle.setdefault(at, _HEAD_SHARE if name == "monitor" else 1.0)
            if name == "monitor":  # a head has no CPUs to give
                bundle["CPU"] = 0.0
        bounds = asks.bounds if isinstance(asks, PoolConfig) else None
        return Role(name, replicas, {k: v for k, v in bundle.items() if v}, labels, bounds)

    roles = [
        role("learner", config.learner.world_size, config.learner),
        role("sampler", config.sampler.replicas, config.sampler),
    ]
    roles += [role(g.role, g.scorer.replicas, g.scorer, "scorer") for g in config.scorer_groups]
    if config.used_teachers:
        roles.append(role("monitor", config.monitor.shards, config.monitor, "head"))
    return {r.name: r for r in roles}


def settings_of(config: Config) -> dict[str, PlacementConfig]:
    """The section of the configuration that says what each role asks for."""
    scorers: dict[str, PlacementConfig] = {g.role: g.scorer for g in config.scorer_groups}
    monitor = {"monitor": config.monitor} if scorers else {}
    return {"learner": config.learner, "sampler": config.sampler, **scorers, **monitor}


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what it has in all (or has left), and its labels."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def matches(self, role: Role) -> bool:
        """Whether its labels are those that the role needs."""
        return all(self.labels.get(k) == v for k, v in role.labels.items())


@dataclass(frozen=True)
class Place:
    """Where a role's replicas would go: replicas by node, and why the rest cannot be placed."""

    role: Role
    nodes: Mapping[str, int]
    lacking: str = ""

    @property
    def placed(self) -> int:
        """Replicas that have a node."""
        return sum(self.nodes.values())


def place(roles: Sequence[Role], nodes: Sequence[Node]) -> Iterator[Place]:
    """Put replicas on nodes, the role with the largest demand first; first the node with the least left over.

    Ray's own scheduler may choose other nodes; where this finds room for all, there is room.
    """
    left = {node.name: dict(node.resources) for node in nodes}
    for role in sorted(roles, key=lambda r: (-r.bundle.get("GPU", 0), -r.bundle.get("CPU", 0))):
        fitting = [node for node in nodes if node.matches(role)]
        counts: Counter[str] = Counter()
        for _ in range(role.replicas):
            room = [n for n in fitting if _fits(role.bundle, left[n.name])]
            if not room:
                break
            node = min(room, key=lambda n: (sum(left[n.name].get(k, 0.0) for k in ("GPU", "CPU")), n.name))
            for name, amount in role.bundle.items():
                left[node.name][name] -= amount
            counts[node.name] += 1
        lacking = "" if counts.total() == role.replicas else _lacking(role, fitting, left, counts.total())
        yield Place(role, dict(counts), lacking)


def _fits(bundle: Mapping[str, float], left: Mapping[str, float]) -> bool:
    return all(left.get(name, 0.0) >= amount - _SLACK for name, amount in bundle.items())


def _lacking(role: Role, fitting: Sequence[Node], left: Mapping[str, Mapping[str, float]], placed: int) -> str:
    if not fitting:
        labels = ", ".join(f"{k}={v}" for k, v in role.labels.items())
        return f"no node is labelled {labels}"
    short = {k for k, v in role.bundle.items() if all(left[n.name].get(k, 0.0) < v - _SLACK for n in fitting)}
    have = ", ".join(
        f"{max(left[n.name].get(k, 0.0) for n in fitting):g} {k}" for k in role.bundle if not short or k in short
    )
    return f"{role.replicas - placed} of {role.replicas} find no room; most that one node has left: {have}"


def cpus_asked(roles: Mapping[str, Role]) -> int:
    """Logical CPUs of a local Ray on which all roles find room."""
    return math.ceil(
        sum((r.bounds[1] if r.bounds else r.replicas) * r.bundle.get("CPU", 0.0) for r in roles.values()) - _SLACK
    )
