"""Ray nodes that a test starts beside each other: their environment, their commands, and the end of them all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.kuberay.utils import parse_quantity

from tests.deploy.manifests import Manifest
from tests.deploy.ray_process import free_port, until

MARK = "KAT_RAY_TEST_CLUSTER"
RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE = 80_000_000  # bytes; Ray's least is 75 MiB
START_SECONDS = 300  # that a node may take
STARTED = "Ray runtime started"  # in the output of `ray start`


class Home:
    """Where a cluster of a test lives: Ray's folder, logs, and the mark that all its processes carry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ray = folder / "ray"
        self.mark = uuid.uuid4().hex
        self.gcs = f"{ray.util.get_node_ip_address()}:{free_port()}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: marked, and with Ray's own programs on the path."""
        return {
            MARK: self.mark,
            "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def log(self, name: str) -> Path:
        """The file of a process's output."""
        return self.folder / f"{name}.log"

    def ends_of_logs(self) -> str:
        """For the message of a test that fails: its folder goes with it."""
        return "\n".join(f"{p.name}: ...{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))

    def processes(self) -> list[psutil.Process]:
        """Those that carry the mark."""
        mark = f"{MARK}={self.mark}".encode()
        return [p for p in psutil.process_iter() if _carries(p, mark)]

    def end(self) -> None:
        """Kill them until there are none, whatever was just being started; AssertionError if some remain."""
        for _ in range(100):
            left = self.processes()
            if not left:
                return
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.2)
        raise AssertionError(f"processes outlive the test: {left}")


def _carries(process: psutil.Process, mark: bytes) -> bool:
    """Not by psutil's environ(), which ends where a process that names itself anew (ray::...) has written."""
    try:
        return mark in Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # another user's, or gone
        return False


@contextlib.contextmanager
def home() -> Iterator[Home]:
    """A cluster's home; none of its processes outlives the block."""
    folder = Path(tempfile.mkdtemp(prefix="kat-"))  # not pytest's: paths of sockets are short
    ours = Home(folder)
    try:
        yield ours
    finally:
        ray.shutdown()
        try:
            ours.end()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def head_command(ours: Home, group: Manifest) -> list[str]:
    """The command of a head node, up to what is particular to an autoscaler."""
    _, port = ours.gcs.rsplit(":", 1)
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={ours.ray}"]
    command += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    return command + _node_arguments(group)


def worker_command(ours: Home, group: Manifest) -> list[str]:
    """The command of a worker node of a group."""
    return [RAY, "start", "--block", f"--address={ours.gcs}", *_node_arguments(group)]


def _node_arguments(group: Manifest) -> list[str]:
    """Resources and labels as KubeRay's operator writes them; ports, because here all pods share one address."""
    ports = [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    has = resources(group)
    own = {k: v for k, v in has.items() if k not in ("CPU", "GPU", "memory")}
    return [
        f"--num-cpus={has['CPU']:g}",
        f"--num-gpus={has.get('GPU', 0):g}",
        f"--memory={has['memory']:.0f}",
        f"--resources={json.dumps(own)}",
        f"--labels={','.join(f'{k}={v}' for k, v in group['labels'].items())}",
        f"--object-store-memory={OBJECT_STORE}",
        *ports,
    ]


def resources(group: Manifest) -> dict[str, float]:
    """What Ray has on a node of a group: its `resources`, and its container's memory."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {
        "memory": float(parse_quantity(limits["memory"])),
        **{name: float(parse_quantity(amount)) for name, amount in group["resources"].items()},
    }


def wait_started(log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a node's log says that it runs; AssertionError, with the log, if it does not come to that."""

    def started() -> bool:
        assert process.poll() is None, "the node has ended"
        return STARTED in log.read_text()

    try:
        until(started, START_SECONDS, STARTED)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.name}: ...{log.read_text()[-3000:]}") from error


def workers() -> list[dict[str, Any]]:
    """Ray's own list of living nodes, without the head."""
    return [n for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]]
