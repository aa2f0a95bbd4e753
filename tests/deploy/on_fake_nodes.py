"""A Ray cluster that Ray's autoscaler grows by its provider of fake nodes: no Kubernetes, not even a stub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.deploy.autoscaled import NAME, Cluster
from tests.deploy.manifests import NAMESPACE, Manifest
from tests.deploy.ray_nodes import OBJECT_STORE, head_command, home, wait_started
from tests.deploy.ray_process import process

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def autoscaling_config(manifest: Manifest, gcs: str) -> Manifest:
    """What Ray's own autoscaler reads out of a RayCluster, with the provider of fake nodes."""
    cluster = {"metadata": {"name": NAME, "namespace": NAMESPACE}, "spec": manifest}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    for kind in types.values():
        del kind["resources"]["memory"]  # the provider cannot give it to a node
        kind["resources"]["object_store_memory"] = OBJECT_STORE
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    config["head_node_type"] = FAKE_HEAD_NODE_TYPE
    config["provider"] |= {
        "type": "external",
        "module": PROVIDER,
        "gcs_address": gcs,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "use_node_id_as_ip": True,
        "launch_multiple": True,
    }
    return config


@contextlib.contextmanager
def fake_nodes(manifest: Manifest) -> Iterator[Cluster]:
    """Ray's head with its autoscaler, connected to as a driver; nodes of the manifest's groups."""
    with home() as ours:
        path = ours.folder / "autoscaling.json"
        path.write_text(json.dumps(autoscaling_config(manifest, ours.gcs)))
        own = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        command = [*head_command(ours, manifest["headGroupSpec"]), f"--autoscaling-config={path}"]
        with process(command, ours.log("head"), **ours.environment, **own) as head:
            wait_started(ours.log("head"), head)
            ray.init(ours.gcs, namespace="kat-ray", log_to_driver=False, logging_level="warning")
            try:
                yield Cluster()
            finally:
                ray.shutdown()
                ours.end()
