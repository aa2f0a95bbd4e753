"""What tests of autoscaling share: a run's places and actors in them, and a cluster that is waited for."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.cluster.placement import Placement
from kat_ray.cluster.roles import ROLE_LABEL
from kat_ray.config import Config
from tests.deploy.manifests import Manifest, helm, job_config, ray_cluster, render
from tests.deploy.ray_nodes import workers
from tests.deploy.ray_process import until

NAME = "distill"
PATIENCE = 300  # seconds that any change may take before a test fails; none takes half of it on two cores
REPLICAS = {"learner": 1, "sampler": 2, "scorer": 1}  # of `run_config`
SMALL = (  # what two cores can bear, and a test wait for
    *("workers.learner.maxReplicas=1", "workers.sampler.maxReplicas=2", "workers.scorer.maxReplicas=1"),
    *(f"workers.{role}.idleTimeoutSeconds=8" for role in REPLICAS),
)


def rendered(profile: str, *settings: str) -> Manifest:
    """The RayClusterSpec of a profile, values changed as by `helm --set`."""
    return ray_cluster(render(profile, helm.parse_set_string(",".join(settings)), name=NAME))


def run_config(folder: Path) -> Config:
    """What the job of the profile `run` reads, with one learner and two samplers."""
    sizes = "run.config.learner.world_size=1,run.config.sampler.replicas=2"
    return job_config(render("run", helm.parse_set_string(sizes), name=NAME), folder)


class Node:
    """An actor that says where it lives."""

    def where(self) -> tuple[str, int]:
        """Node id, and process id of the node's raylet, whose child this process is."""
        return ray.get_runtime_context().get_node_id(), os.getppid()


def actors(placement: Placement, role: str) -> list[Any]:
    """One in each place of a role, with its options."""
    options = [placement.options(role, i, place) for i, place in enumerate(placement.places(role))]
    assert len(options) == REPLICAS[role]
    return [ray.remote(Node).options(**o, max_task_retries=-1).remote() for o in options]


def where(actors: list[Any]) -> list[tuple[str, int]]:
    """Their places; a RayError if they do not answer."""
    return ray.get([a.where.remote() for a in actors], timeout=PATIENCE)


def by_role() -> Counter[str]:
    """How many worker nodes live, by their label."""
    return Counter(n["Labels"][ROLE_LABEL] for n in workers())


def lose_node(one: Any) -> str:
    """Kill the raylet under an actor; its node's id."""
    ((node, raylet),) = where([one])
    os.kill(raylet, signal.SIGKILL)
    return node


class Cluster:
    """A cluster that grows and shrinks."""

    def placed(self, config: Config, *roles: str) -> Placement:
        """Reserve these roles of a run, as a run does."""
        return self.until(lambda: Placement(config, False, NAME, only=roles), f"placed: {', '.join(roles)}")

    def asked(self) -> Counter[str]:
        """How many workers of each role the autoscaler asks for."""
        return by_role()

    def logs(self) -> str:
        """What its processes said last."""
        return ""

    def check(self) -> None:
        """AssertionError if something that it consists of has failed."""

    def until(self, done: Callable[[], Any], what: str) -> Any:
        """Wait for it, and say how long it took."""
        start = time.monotonic()

        def checked() -> Any:
            self.check()
            return done()

        try:
            answer = until(checked, PATIENCE, what)
        except AssertionError as error:
            state = f"nodes: {by_role()}, asked for: {self.asked()}"
            raise AssertionError(f"{error}; {state}\n{self.logs()}") from error
        print(f"{time.monotonic() - start:6.1f} s: {what}")
        return answer

    def settled(self, **expected: int) -> None:
        """Wait until so many workers of each role are asked for, and are there."""
        wanted = Counter(expected)
        self.until(lambda: self.asked() == wanted == by_role(), f"nodes: {expected or 'none'}")
