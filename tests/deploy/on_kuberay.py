"""A Ray cluster under Ray's own KubeRay autoscaler."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import ray

from tests.deploy.autoscaled import NAME, Cluster
from tests.deploy.kube_api import CLUSTERS, KubeApi
from tests.deploy.manifests import NAMESPACE, Manifest
from tests.deploy.operator_stub import Operator
from tests.deploy.ray_nodes import RAY, Home, head_command, home, wait_started
from tests.deploy.ray_process import free_port, process


class KubeRay(Cluster):
    """A RayCluster as the chart renders it, with its autoscaler and its operator."""

    def __init__(self, manifest: Manifest, api: KubeApi, operator: Operator, ours: Home) -> None:
        self.groups = {g["groupName"]: g for g in manifest["workerGroupSpecs"]}
        self._objects, self._operator, self._home = api.objects, operator, ours

    def logs(self) -> str:
        """The ends of the autoscaler's log and of each node's."""
        return self._home.ends_of_logs()

    def asked(self) -> Counter[str]:
        """What the autoscaler has last written."""
        spec = self._objects.get(CLUSTERS, NAME)["spec"]
        return Counter({g["groupName"]: g["replicas"] for g in spec["workerGroupSpecs"]})

    def check(self) -> None:
        """The operator is at work, and the autoscaler keeps to each group's bounds."""
        assert self._operator.is_alive(), "the toy operator has failed: its traceback is on stderr"
        for name, count in self.asked().items():
            group = self.groups[name]
            assert group["minReplicas"] <= count <= group["maxReplicas"], f"{name}: {count} replicas"

    def deleted(self) -> set[str]:
        """Pods that the autoscaler has ever named in workersToDelete."""
        values = [p["value"] for p in self._objects.patches if p["path"].endswith("/scaleStrategy")]
        return {pod for value in values for pod in value["workersToDelete"]}

    def pods(self, group: str) -> list[str]:
        """Names of a group's pods."""
        return self._operator.pods(group)

    def looked_again(self, times: int = 10) -> None:
        """Wait until the autoscaler has read the RayCluster so many times more."""
        enough = self._objects.reads[CLUSTERS] + times
        self.until(lambda: self._objects.reads[CLUSTERS] >= enough, "the autoscaler has looked again")


@contextlib.contextmanager
def kuberay(manifest: Manifest) -> Iterator[KubeRay]:
    """Ray's head, `ray kuberay-autoscaler` and the toy operator, connected to as a driver on the head."""
    with home() as ours, KubeApi(ours.folder, NAMESPACE) as api:
        cluster = {"metadata": {"name": NAME, "namespace": NAMESPACE}, "spec": manifest}
        api.objects.put(CLUSTERS, cluster)
        operator = Operator(api, NAME, ours)
        with _head(ours, operator, manifest), _autoscaler(ours, operator, api):
            # Before there are other nodes of this address, one of which it might take for its own.
            ray.init(ours.gcs, namespace="kat-ray", log_to_driver=False, logging_level="warning")
            operator.start()
            try:
                yield KubeRay(manifest, api, operator, ours)
            finally:
                operator.stop()
                ray.shutdown()
                ours.end()


@contextlib.contextmanager
def _head(ours: Home, operator: Operator, manifest: Manifest) -> Iterator[None]:
    own = {"RAY_CLOUD_INSTANCE_ID": operator.head, "RAY_NODE_TYPE_NAME": "headgroup"}
    command = [*head_command(ours, manifest["headGroupSpec"]), "--no-monitor"]
    with process(command, ours.log("head"), **ours.environment, **own) as head:
        wait_started(ours.log("head"), head)
        yield


@contextlib.contextmanager
def _autoscaler(ours: Home, operator: Operator, api: KubeApi) -> Iterator[None]:
    own = {
        "RAY_HEAD_POD_NAME": operator.head,
        "KUBERAY_CRD_VER": "v1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
    }
    command = [RAY, "kuberay-autoscaler", f"--cluster-name={NAME}", f"--cluster-namespace={NAMESPACE}"]
    command += [f"--gcs-address={ours.gcs}"]
    with process(command, ours.log("autoscaler"), **ours.environment, **api.environment, **own):
        yield
