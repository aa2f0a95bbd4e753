"""A cluster whose state is in Redis outlives its head, started as KubeRay does with gcsFaultToleranceOptions."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys

import pytest

from kat_ray.config.load import config_yaml
from tests.cluster.disturb import role_of, steps_done
from tests.cluster.local_cluster import HEAD, local_cluster
from tests.deploy.ray_process import free_port, process, until
from tests.support.lacking import lacking
from tests.support.runs import check_books, config_of

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]

WORKER = "worker"
PASSWORD = "kept-from-others"
# A worker node gives up a head that was away for a minute; the operator tells it to wait this long instead.
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}

COUNTER = """
import json, os, sys, ray

ray.init(address=sys.argv[1], namespace="proof", log_to_driver=False)

@ray.remote(num_cpus=1)  # the head has none: it lives on the worker node
class Counter:
    def __init__(self):
        self.count = 0
    def add(self):
        self.count += 1
        return {"count": self.count, "pid": os.getpid()}

if sys.argv[2] == "make":
    counter = Counter.options(name="counter", lifetime="detached").remote()
else:
    try:
        counter = ray.get_actor("counter")
    except ValueError:
        print(json.dumps({"count": None}))
        sys.exit()
print(json.dumps(ray.get(counter.add.remote(), timeout=60)))
"""


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    """A Redis behind a password; its port."""
    if shutil.which("redis-server") is None:
        lacking("redis-server is not installed (Debian: apt install redis-server)")
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    (folder / "redis.conf").write_text(
        f"bind 127.0.0.1\nport {port}\nrequirepass {PASSWORD}\nsave ''\nappendonly no\ndir {folder}\n"
    )

    def answers():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(f"AUTH {PASSWORD}\r\nPING\r\n".encode())
            return connection.recv(100).startswith(b"+OK")

    with process(["redis-server", str(folder / "redis.conf")], folder / "redis.log"):
        until(answers, 120, "Redis answers")
        yield port


def start_head(cluster, redis):
    """A head without CPUs, as the chart's; `redis` is a port, None for a head that keeps its state to itself."""
    if redis is None:
        cluster.start_head(0)
    else:
        namespace = f"cluster-{cluster.port}"
        cluster.start_head(
            0, options=[f"--redis-password={PASSWORD}"],
            RAY_REDIS_ADDRESS=f"redis://127.0.0.1:{redis}", RAY_external_storage_namespace=namespace,
        )  # fmt: skip


def lose_the_head(cluster, redis):
    cluster.kill(HEAD)
    start_head(cluster, redis)


def counter(cluster, what, folder):
    """Make the counter, or ask it: what it says."""
    log = folder / f"{what}.txt"
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", COUNTER, cluster.address, what], env=cluster.environment("client"), stdout=out,
            stderr=subprocess.STDOUT, timeout=300, check=False,
        )  # fmt: skip
    text = log.read_text()
    assert done.returncode == 0, text
    return json.loads(text.splitlines()[-1])


def test_an_actor_outlives_the_head(redis, tmp_path):
    with local_cluster() as cluster:
        start_head(cluster, redis)
        cluster.start_node(WORKER, 1, **PATIENT)
        made = counter(cluster, "make", tmp_path)
        raylet = cluster.raylet(WORKER)
        lose_the_head(cluster, redis)
        assert counter(cluster, "ask", tmp_path) == {"count": 2, "pid": made["pid"]}
        assert raylet.is_running()


def test_without_redis_it_does_not(tmp_path):
    with local_cluster() as cluster:
        start_head(cluster, None)
        cluster.start_node(WORKER, 1, **PATIENT)
        assert counter(cluster, "make", tmp_path)["count"] == 1
        lose_the_head(cluster, None)
        assert counter(cluster, "ask", tmp_path) == {"count": None}


def train(cluster, log, *arguments):
    """A driver on the head: it is lost with it."""
    command = [sys.executable, "-m", "kat_ray.cli", "train", *map(str, arguments)]
    with log.open("wb") as out:
        return subprocess.Popen(command, env=cluster.environment(), stdout=out, stderr=out, start_new_session=True)


def test_a_run_goes_on_when_the_head_is_back(redis, files, tmp_path):
    with local_cluster() as cluster:
        start_head(cluster, redis)
        cluster.start_node(WORKER, 4, **PATIENT)
        config = config_of(
            files, tmp_path, run={"steps": 8, "checkpoint_every": 2}, evaluation={"data": None},
            sampler={"replicas": 1}, scorer={"replicas": 1}, learner={"world_size": 1},
            cluster={"address": cluster.address},
        )  # fmt: skip
        (tmp_path / "config.yaml").write_text(config_yaml(config))
        run, raylet = tmp_path / "run", cluster.raylet(WORKER)
        driver = train(cluster, tmp_path / "first.txt", tmp_path / "config.yaml")
        until(
            lambda: steps_done(run / "metrics.jsonl") >= 3 or driver.poll() is not None, 300, "three steps are done"
        )
        assert driver.poll() is None, (tmp_path / "first.txt").read_text()[-3000:]
        left = {p.pid for p in cluster.processes(WORKER) if role_of(p)}
        assert len(left) == 4, "sampler, scorer, monitor and learner live on the worker node"
        lose_the_head(cluster, redis)
        assert driver.wait(120) != 0
        driver = train(cluster, tmp_path / "second.txt", "--resume", run)
        code = driver.wait(300)
        text = (tmp_path / "second.txt").read_text()
        assert code == 0 and re.search(r"after step [246]\b", text), text[-3000:]
        assert raylet.is_running(), "the worker node is the one that it was"
        until(lambda: not [p for p in cluster.processes(WORKER) if role_of(p)], 180, "its actors have ended")
    check_books(config, run)
