"""A Ray cluster of processes on this machine: a head and nodes as `ray start` makes them, any of which can be lost.

Every process of a node carries the node's mark in its environment, and is found by it and killed by its pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.deploy.manifests import ROOT
from tests.deploy.ray_process import outside_port, until

MARK = "KAT_RAY_TEST_NODE"
HEAD = "head"
_SECONDS = 300.0  # that `ray start` may take


class LocalCluster:
    """Start the head first, then nodes one after another. `token` puts all of them behind it."""

    def __init__(self, folder: Path, token: str | None = None, **environment: str) -> None:
        self.port = outside_port()
        self.dashboard = outside_port()
        self.address = ""  # known once the head stands
        self.token = token
        self.folder = folder  # sockets lie in it: its path has to be short
        self._id = uuid.uuid4().hex
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        own = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # A node that is gone fails five checks, in 5 s instead of 15; a slow one has 10 s for each, as ever.
        own["RAY_health_check_period_ms"] = "1000"
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        self._environment = kept | own | auth | environment

    def environment(self, node: str = HEAD, **more: str) -> dict[str, str]:
        """Of a process that is to live on a node, and to be lost with it: a driver, say."""
        return self._environment | {MARK: f"{self._id}:{node}"} | more

    def start_head(
        self,
        cpus: int,
        *,
        gpus: int = 0,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        dashboard: bool = False,
        options: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """Start the head, or start it again under the address that it had."""
        own = [
            "--head", f"--port={self.port}", f"--temp-dir={self.folder}", f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1", f"--include-dashboard={str(dashboard).lower()}",
            f"--ray-client-server-port={outside_port()}", *options,
        ]  # fmt: skip
        # A head on a machine of its own would not see the raylets of other nodes, and take them for its own past.
        current = self.folder / "ray_current_cluster"
        current.unlink(missing_ok=True)
        self._start(HEAD, own, cpus, gpus, resources, labels, environment)
        self.address = current.read_text().strip()

    def start_node(
        self,
        name: str,
        cpus: int,
        *,
        gpus: int = 0,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        **environment: str,
    ) -> None:
        """Start a node that joins the head.

        In a folder of its own, as on a machine of its own: nodes that unpack a job's files in one folder each
        remove first what is there, and one that has just unpacked them may find nothing.
        """
        own = [f"--address={self.address}", f"--temp-dir={self.folder / name}"]
        self._start(name, own, cpus, gpus, resources, labels, environment)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """All that live on a node, or on any: those that bear its mark, and what they started.

        A process that gives itself a title, as Ray's workers do, may write over its environment.
        """
        mark = f"{self._id}:" if node is None else f"{self._id}:{node}"
        found: dict[int, psutil.Process] = {}
        children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                children.setdefault(process.ppid(), []).append(process)
                marked = process.environ().get(MARK, "")
            except psutil.Error:  # another user's, or it has just ended
                continue
            if marked == mark or (node is None and marked.startswith(mark)):
                found[process.pid] = process
        open_ = list(found)
        while open_:
            for child in children.get(open_.pop(), ()):
                if child.pid not in found:
                    found[child.pid] = child
                    open_.append(child.pid)
        found.pop(os.getpid(), None)
        return [p for p in found.values() if _lives(p)]

    def raylet(self, node: str) -> psutil.Process:
        """The process that Ray takes for the node."""
        (found,) = [p for p in self.processes(node) if p.name() == "raylet"]
        return found

    def kill(self, node: str | None = None) -> None:
        """SIGKILL to all that live on a node, or on any, until nothing does."""
        known: set[psutil.Process] = set()

        def gone() -> bool:
            known.update(self.processes(node))
            living = [p for p in known if _lives(p)]
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            return not living

        until(gone, 120, f"the processes of {node or 'the cluster'} end")

    def _start(
        self,
        name: str,
        own: list[str],
        cpus: int,
        gpus: int,
        resources: Mapping[str, float] | None,
        labels: Mapping[str, str] | None,
        environment: Mapping[str, str],
    ) -> None:
        words = ",".join(f"{k}={v}" for k, v in (labels or {}).items())
        command = [
            sys.executable, "-m", "tests.support.quick_workers", "start", *own,
            f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--resources={json.dumps(dict(resources or {}))}",
            "--object-store-memory=150000000",
            f"--dashboard-agent-listen-port={outside_port()}", "--disable-usage-stats",
            *([f"--labels={words}"] if words else []),
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:  # not a pipe: what it starts would keep that open
            done = subprocess.run(
                command, env=self.environment(name, **environment), stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, timeout=_SECONDS, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"ray start of {name}:\n{log.read_text()[-3000:]}"


@contextlib.contextmanager
def local_cluster(token: str | None = None, **environment: str) -> Iterator[LocalCluster]:
    """A cluster without nodes yet; all of its processes are ended at the end, however that comes about."""
    with tempfile.TemporaryDirectory(prefix="kat-", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder), token, **environment)
        try:
            yield cluster
        finally:
            cluster.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
