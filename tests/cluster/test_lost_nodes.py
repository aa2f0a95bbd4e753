"""A whole node is lost in the middle of a step's sampling: a run on real nodes goes on, and comes out the same."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from actors.cluster.object_store import store_usage
from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.run.checkpoint import MANIFEST
from tests.cluster.disturb import role_of
from tests.cluster.local_cluster import local_cluster
from tests.deploy.held_steps import Gate, HeldEngine
from tests.deploy.ray_process import until
from tests.support.runs import QUICK, check_alike, stub_config

# In virtual time all of it: test_control_plane.
pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]

STEPS = 8
LOST_IN = 5  # the step, the first of which is 1; there is a checkpoint of the one before
HEAD_CPUS, HEAD_GPUS = 12, 1
LOST, SPARE = "lost", "spare"


@dataclass(frozen=True)
class Scene:
    """What lies on the node that is lost, and the sizes that make Ray place it there: roles are placed where they
    fit, learner, samplers, scorers and monitor in this order.
    """

    name: str
    roles: tuple[str, ...]
    cpus: int  # of the node
    gpus: int
    sections: dict


SCENES = [
    # Two samplers do not fit on one GPU, nor do two scorers on what they leave: one of each on either node.
    Scene("a sampler and a scorer", ("sampler", "scorer"), 1, 1, {
        "sampler": {"num_cpus": 0.5, "num_gpus": 0.6}, "scorer": {"num_cpus": 0.5, "num_gpus": 0.3},
        "learner": {"world_size": 1, "num_cpus": 1.5},
    }),
    # Both scorers fit where there are four GPUs only; the others fill the head, and the monitor takes what is left.
    Scene("all scorers and the monitor", ("scorer", "monitor"), 1, 4, {
        "sampler": {"num_cpus": 1.5}, "scorer": {"num_cpus": 0.45, "num_gpus": 2},
        "learner": {"world_size": 1, "num_cpus": HEAD_CPUS - 3},
    }),
    # The learner is too large for the head.
    Scene("the learner", ("learner",), HEAD_CPUS + 1, 0, {
        "sampler": {"num_cpus": 1}, "scorer": {"num_cpus": 1},
        "learner": {"world_size": 1, "num_cpus": HEAD_CPUS + 1},
    }),
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    """A head. Records as small as those of these tests travel inside of messages: here they lie in the stores of
    nodes as large ones do, and are lost with them.
    """
    with local_cluster(RAY_max_direct_call_object_size="1000") as cluster:
        cluster.start_head(HEAD_CPUS, gpus=HEAD_GPUS)
        yield cluster


def config_for(files, cluster, folder, sections, checkpoint_every=4):
    """Limits are the defaults: the loss of a node must not need others."""
    run = {"steps": STEPS, "checkpoint_every": checkpoint_every, "deterministic": True}
    return stub_config(files, folder, STEPS, run=run, cluster={"address": cluster.address}, **sections)


@pytest.fixture(scope="module")
def quiet(cluster, files, tmp_path_factory):
    """The run that nothing happens to: its configuration and directory."""
    config = config_for(files, cluster, tmp_path_factory.mktemp("quiet"), {})
    return config, job.train(config, engines=QUICK)


def roles_on(cluster, node):
    return {role_of(p) for p in cluster.processes(node)} - {None}


def lose_a_node(cluster, scene, gate):
    """Beside a run: add a node, and take away the other one while both samplers are in the middle of a step."""
    try:
        until(lambda: len(gate.stopped(LOST_IN - 1)) == 2, 300, f"the middle of step {LOST_IN}")
        cluster.start_node(SPARE, scene.cpus, gpus=scene.gpus)
        assert roles_on(cluster, LOST) == set(scene.roles), "it is not placed as the scene says"
        cluster.kill(LOST)
    finally:
        gate.open(STEPS)
    assert store_usage().used_share < 1, "the driver can ask how full the stores are while a node is missing"
    until(lambda: roles_on(cluster, SPARE) == set(scene.roles), 300, f"{scene.roles} come up on the other node")


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_run_survives_the_loss_of_a_node(cluster, quiet, files, tmp_path, caplog, scene):
    config, gate = config_for(files, cluster, tmp_path, scene.sections), Gate(tmp_path)
    gate.open(LOST_IN - 1)
    cluster.start_node(LOST, scene.cpus, gpus=scene.gpus)
    try:
        with ThreadPoolExecutor(1) as beside:
            losing = beside.submit(lose_a_node, cluster, scene, gate)
            path = job.train(config, engines=Engines(partial(HeldEngine, gate), stub_teacher, StubLearner))
            losing.result()
    finally:
        cluster.kill(LOST)
        cluster.kill(SPARE)
    restarts = [m["step"] for m in check_alike(config, path, quiet) if m["pool/restarts"]]
    # A learner's loss takes the run back to a checkpoint: the figures are those of the second time.
    assert "learner" in scene.roles or min(restarts, default=0) == LOST_IN, restarts
    for role, index in (("sampler", 1), ("learner", 0)):  # of scorers and monitors samplers hear, not the driver
        assert (f"{role}:{index} was lost" in caplog.text) == (role in scene.roles)


def drain_a_node(cluster, scene, gate, path):
    """As `lose_a_node`, but Ray is told before: what `ray drain-node` sends when a spot machine is taken back."""
    try:
        until(lambda: len(gate.stopped(LOST_IN - 1)) == 2, 300, f"the middle of step {LOST_IN}")
        cluster.start_node(SPARE, scene.cpus, gpus=scene.gpus)
        # Nobody is on the spare one yet.
        free = ray._private.state.available_resources_per_node()
        nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU") == scene.cpus]
        (going,) = [node for node in nodes if free[node].get("CPU", 0.0) < scene.cpus]
        client = GcsClient(address=cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = client.drain_node(going, reason, "a test", int((time.time() + 600) * 1000))
        assert accepted, why
        # No checkpoint is due, and the step is held: it is written now or never.
        until(lambda: (path / "checkpoints" / f"step-{LOST_IN - 1}" / MANIFEST).is_file(), 60, "it is saved")
        cluster.kill(LOST)
    finally:
        gate.open(STEPS)
    until(lambda: roles_on(cluster, SPARE) == set(scene.roles), 300, f"{scene.roles} come up on the other node")


@pytest.mark.nightly
def test_a_learner_is_saved_before_its_node_goes(cluster, quiet, files, tmp_path, caplog):
    (scene,) = [s for s in SCENES if s.roles == ("learner",)]
    config, gate = config_for(files, cluster, tmp_path, scene.sections, checkpoint_every=0), Gate(tmp_path)
    gate.open(LOST_IN - 1)
    cluster.start_node(LOST, scene.cpus, gpus=scene.gpus)
    try:
        with ThreadPoolExecutor(1) as beside:
            losing = beside.submit(drain_a_node, cluster, scene, gate, tmp_path / config.run.name)
            path = job.train(config, engines=Engines(partial(HeldEngine, gate), stub_teacher, StubLearner))
            losing.result()
    finally:
        cluster.kill(LOST)
        cluster.kill(SPARE)
    check_alike(config, path, quiet)
    said = (path / "run.log").read_text() + caplog.text
    assert "with the learner is going away in " in said and f"going on from step {LOST_IN - 1}" in said
