"""A cluster looked at before it is joined: whether one is there, lets this process in, and runs the same versions.

Ray finds the same out when it connects, but takes half a minute for it, writes a line a second meanwhile, and then
says no more than that it failed. Here it takes one call, made before models are loaded or a run is begun.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

import grpc
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._private.utils import check_version_info, compute_version_info
from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub

from kat_ray.cluster.auth import refused
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.run.resume import in_ray_job

_SECONDS = 15.0  # for the answer of a cluster that lives
_START = "Start one (`ray start --head`), or leave cluster.address empty for a local Ray"


def named_address(config: Config) -> tuple[str, str] | None:
    """The cluster to join and what names it; None for a local Ray of our own."""
    if config.cluster.address:
        return config.cluster.address, "cluster.address"
    address = os.environ.get("RAY_ADDRESS")
    return (address, "RAY_ADDRESS") if address else None


def check_cluster(config: Config) -> None:
    """`UserError` for a cluster that cannot be joined. `auto` and ray:// addresses are Ray's to resolve."""
    named = named_address(config)
    if named is None:
        return
    address, name = named
    where = f"{name} = {address!r}"
    if re.match(r"^https?://", address) or address.endswith(":8265"):
        raise UserError(
            f"{where}: a dashboard takes jobs (`kat-ray submit --address`); a process on one of the cluster's "
            "nodes joins it at its GCS, such as HOST:6379, or `auto`"
        )
    if re.match(r"^[\w.:\[\]-]+:\d+$", address):
        check_versions(where, _metadata(where, address))


def _metadata(where: str, address: str) -> Mapping[str, str]:
    """What a cluster says about itself; empty where it has not written that yet."""
    request = InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER)
    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            # A job may begin while its cluster's GCS is starting again; elsewhere silence is said at once.
            found = InternalKVGcsServiceStub(channel).InternalKVGet(
                request, timeout=_SECONDS, wait_for_ready=in_ray_job()
            )
        except grpc.RpcError as error:
            raise UserError(f"{where}: {_reason(error)}") from error
    return json.loads(found.value or b"{}")


def _reason(error: grpc.RpcError) -> str:
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return refused(os.environ)
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return f"no Ray cluster answers there. {_START}"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {_SECONDS:g} s. {_START}"
    return f"what answers there is no Ray cluster ({error.code().name}). {_START}"


def check_versions(where: str, metadata: Mapping[str, str]) -> None:
    """`UserError` unless Ray lets this process into a cluster of these versions."""
    if not metadata:
        return
    try:
        check_version_info(dict(metadata), "here")
    except RuntimeError as error:
        ray, python = metadata["ray_version"], metadata["python_version"]
        ray_here, python_here = compute_version_info()
        raise UserError(
            f"{where}: the cluster runs Ray {ray} under Python {python}, here is Ray {ray_here} under Python "
            f"{python_here}, and only equals meet: install ray=={ray} under Python {python} here (or run this in "
            "the cluster's image), or start the cluster from an image with what is here"
        ) from error
