"""A toy of KubeRay's operator: makes as many pods as a RayCluster says, each of them a real Ray node."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time

import psutil

from tests.deploy.kube_api import CLUSTERS, PODS, Document, KubeApi
from tests.deploy.manifests import ROOT
from tests.deploy.ray_nodes import START_SECONDS, STARTED, Home, worker_command
from tests.deploy.ray_process import until

GRACE = 15  # seconds
# An autoscaler names an idle node only once its raylet, told to, has ended. An operator that took the ended pod
# for a failed one and replaced it at once would win that race now and then; KubeRay looks once a probe has failed.
NOTICED = 5  # seconds from the end of a raylet to the end of its pod


class Operator(threading.Thread):
    """Reconciles the pods of one RayCluster once a second."""

    def __init__(self, api: KubeApi, cluster: str, ours: Home) -> None:
        super().__init__(daemon=True, name="operator")
        self._objects, self._cluster, self._home = api.objects, cluster, ours
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._dead: dict[str, float] = {}  # when a pod was first seen without its raylet
        self._numbers = itertools.count(1)
        self._ended = threading.Event()
        self._put_pod(self.head, "headgroup", "head")
        self._make_pods()

    @property
    def head(self) -> str:
        """Name of the head's pod; its container is not started here."""
        return f"{self._cluster}-head"

    def run(self) -> None:
        """Until `stop`."""
        while not self._ended.wait(1):
            self._remove_pods()
            self._make_pods()
            self._start_a_node()

    def stop(self) -> None:
        """End the thread; the nodes stay."""
        self._ended.set()
        self.join(150)

    def pods(self, group: str) -> list[str]:
        """Names of a group's pods."""
        found = self._objects.items(PODS, {"ray.io/cluster": self._cluster, "ray.io/group": group})
        return [pod["metadata"]["name"] for pod in found["items"]]

    def _groups(self) -> list[Document]:
        return self._objects.get(CLUSTERS, self._cluster)["spec"]["workerGroupSpecs"]

    def _put_pod(self, name: str, group: str, kind: str, running: bool = True) -> None:
        """What an autoscaler looks at of a pod."""
        labels = {"ray.io/cluster": self._cluster, "ray.io/node-type": kind, "ray.io/group": group}
        containers: list[Document] = [{"state": {"running": {}}}] if running else []
        pod = {
            "metadata": {"name": name, "namespace": self._objects.namespace, "labels": labels},
            "spec": {"containers": [{"name": f"ray-{kind}"}]},
            "status": {"phase": "Running" if running else "Pending", "containerStatuses": containers},
        }
        self._objects.put(PODS, pod)

    def _make_pods(self) -> None:
        """All that are missing, at once."""
        for group in self._groups():
            kind, wanted = group["groupName"], max(group["replicas"], group["minReplicas"])
            for _ in range(wanted - len(self.pods(kind))):
                name = f"{self._cluster}-{kind}-worker-{next(self._numbers):05d}"
                self._put_pod(name, kind, "worker", running=False)

    def _start_a_node(self) -> None:
        """One after another: two that start in the same moment may choose the same port."""
        waiting = [(n, g) for g in self._groups() for n in self.pods(g["groupName"]) if n not in self._processes]
        if not waiting:
            return
        name, group = waiting[0]
        log = self._home.log(name)
        own = {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group["groupName"]}
        with log.open("wb") as out:
            process = self._processes[name] = subprocess.Popen(
                worker_command(self._home, group),
                env={**os.environ, "PYTHONPATH": str(ROOT), **self._home.environment, **own},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._put_pod(name, group["groupName"], "worker")

        def done() -> bool:
            return self._ended.is_set() or process.poll() is not None or STARTED in log.read_text()

        until(done, START_SECONDS, f"{log}: {STARTED}")

    def _remove_pods(self) -> None:
        """Those that the autoscaler names, and, since restartPolicy is Never, those that have failed."""
        for group in self._groups():
            unwanted = group.get("scaleStrategy", {}).get("workersToDelete", [])
            for name in self.pods(group["groupName"]):
                process = self._processes.get(name)
                if name in unwanted or (process is not None and self._failed(name, process)):
                    if process is not None:
                        _end(process)
                    self._objects.delete(PODS, name)

    def _failed(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether a pod's raylet has been dead for long enough to be noticed."""
        if _live(process):
            return False
        return time.monotonic() - self._dead.setdefault(name, time.monotonic()) > NOTICED


def _live(first: subprocess.Popen[bytes]) -> bool:
    """KubeRay's liveness probe asks the raylet; `ray start --block` may outlive it for a while."""
    if first.poll() is not None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        nodes = [p for p in psutil.Process(first.pid).children(recursive=True) if p.name() == "raylet"]
        return any(node.status() != psutil.STATUS_ZOMBIE for node in nodes)
    return False


def _end(first: subprocess.Popen[bytes]) -> None:
    """As Kubernetes: a container's first process is asked to end, and after a grace all of them are ended."""
    first.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
