"""Ray: started on loopback, or joined where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from actors.cluster.preflight import check_cluster, named_address
from kat_ray.cluster.roles import cpus_asked, roles_of
from kat_ray.config import Config
from kat_ray.errors import UserError


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
        with _bound_to(cluster.bind):
            _start(config, common)
    try:
        yield named is None
    finally:
        ray.shutdown()


def _start(config: Config, common: Mapping[str, Any]) -> None:
    """A local Ray; `UserError` where its processes do not come up."""
    cluster = config.cluster
    store = cluster.object_store_gib
    try:
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, cpus_asked(roles_of(config))),
            object_store_memory=int(store * 2**30) if store else None,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            **common,
        )
    except Exception as error:  # Ray raises a bare one where it has waited half a minute for its own processes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"a local Ray did not start: {reason} Is the machine overloaded, or its memory, disk or /dev/shm full "
            "(kat-ray doctor)? Ray's own logs: /tmp/ray/session_latest/logs"
        ) from error


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
