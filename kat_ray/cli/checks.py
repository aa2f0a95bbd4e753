"""Lines of the doctor's report, and those about what the roles ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kat_ray.cluster.roles import ROLE_LABEL, Node, Role, place, roles_of
from kat_ray.cluster.versions import other_ray
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.tracking.choice import check_trackers


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.name}: {self.text}"


def ok(name: str, text: str) -> Check:
    """A check that passed."""
    return Check("ok", name, text)


def warn(name: str, text: str) -> Check:
    """It runs, but the user should know."""
    return Check("warn", name, text)


def fail(name: str, text: str) -> Check:
    """It will not run."""
    return Check("FAIL", name, text)


def trackers(config: Config) -> Iterator[Check]:
    """Whether the trackers that the configuration names can be had here."""
    named = [name for name in config.trackers if name != "tensorboard"]
    try:
        check_trackers(config.tracking, named)
    except UserError as error:
        yield fail("trackers", str(error))
    else:
        if named:
            yield ok("trackers", f"{', '.join(named)}: {'online' if config.tracking.online else 'RUN/tracking'}")


def resources(config: Config, cores: int, gpus: int) -> Iterator[Check]:
    """What the roles reserve against what this machine has; a cluster that is joined is asked at the start."""
    roles = {name: role for name, role in roles_of(config).items() if name != "monitor"}
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        yield ok("resources", f"requested from the cluster when the run starts: {_asked(roles, 'CPU')} CPU")
        return
    cpus_wanted, gpus_wanted = _sum(roles, "CPU"), _sum(roles, "GPU")
    if gpus_wanted > gpus:
        yield fail("GPUs", f"the roles ask for {gpus_wanted:g} ({_asked(roles, 'GPU')}), the machine has {gpus}")
    elif gpus and not gpus_wanted:
        yield warn(
            "GPUs",
            f"the machine has {gpus}, no role asks for one (num_gpus = 0), so all run on the CPU; to "
            "use it: learner.num_gpus=1 sampler.num_gpus=1 scorer.num_gpus=1, or fractions of one",
        )
    elif gpus:
        yield ok("GPUs", f"the roles ask for {gpus_wanted:g} of {gpus} ({_asked(roles, 'GPU')})")
    limit = config.cluster.num_cpus
    if limit is not None and cpus_wanted > limit:
        yield fail(
            "CPUs", f"the roles ask for {cpus_wanted:g} ({_asked(roles, 'CPU')}), cluster.num_cpus = {limit}"
        )
    elif cpus_wanted > cores:
        yield warn("CPUs", f"the roles ask for {cpus_wanted:g} on {cores} cores: they share them, which is slower")
    else:
        yield ok("CPUs", f"the roles ask for {cpus_wanted:g} of {cores}")


def _sum(roles: Mapping[str, Role], resource: str) -> float:
    return sum(role.replicas * role.bundle.get(resource, 0.0) for role in roles.values())


def _asked(roles: Mapping[str, Role], resource: str) -> str:
    return " + ".join(
        f"{role.replicas} x {name} {role.bundle[resource]:g}"
        for name, role in roles.items()
        if resource in role.bundle
    )


@dataclass(frozen=True)
class ClusterSeen:
    """What a cluster's dashboard says of it. What its autoscaler could add is the user's to say: Ray keeps it."""

    ray_version: str
    nodes: Sequence[Node]
    autoscaled: bool = False


def same_ray(cluster: ClusterSeen, ours: str | None) -> Check:
    """Whether jobs for this cluster can be submitted from here."""
    if ours is not None and ours.split(".")[:2] != cluster.ray_version.split(".")[:2]:
        return fail("ray", other_ray(cluster.ray_version, ours))
    return ok("ray", f"{cluster.ray_version} on the cluster")


def placements(config: Config, cluster: ClusterSeen) -> Iterator[Check]:
    """Which nodes of a cluster each role would get, with all that they have; what other jobs hold is not seen."""
    nodes = cluster.nodes
    for node in nodes:
        have = ", ".join(
            f"{v:g} {k}"
            for k, v in sorted(node.resources.items())
            if not k.startswith(("node:", "memory", "object_"))
        )
        role = node.labels.get(ROLE_LABEL)
        yield ok("node", f"{node.name}: {have or 'no resources'}" + (f", {ROLE_LABEL}={role}" if role else ""))
    for found in place([*roles_of(config).values()], nodes):
        role_words = f"{found.role.replicas} x {found.role.words}"
        where = ", ".join(f"{n} on {name}" if n > 1 else name for name, n in found.nodes.items())
        if not found.lacking:
            yield ok(found.role.name, f"{role_words}: {where}")
        elif cluster.autoscaled:
            yield warn(
                found.role.name,
                f"{role_words}: {found.lacking}; the run waits {config.cluster.placement_timeout:g} s "
                "(cluster.placement_timeout) for the autoscaler to add nodes",
            )
        else:
            yield fail(
                found.role.name,
                f"{role_words}: {found.lacking}; add nodes, or give --autoscaled if an autoscaler adds them",
            )
