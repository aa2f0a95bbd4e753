"""A run on the RayJob that the chart renders for it, under Ray's own KubeRay autoscaler: driver, job configuration,
placement and pools are the shipped ones, engines and teacher are stubs, and the nodes are real.

The run grows by a sampler, whose node the autoscaler brings, and loses the other's node in the middle of a step.
"""

import os
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import helm_python as helm
import pytest
import ray

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.cluster.roles import ROLE_LABEL
from tests.cluster.disturb import lines_of, steps_done
from tests.deploy.autoscaled import NAME, PATIENCE, SMALL, by_role
from tests.deploy.held_steps import Gate, HeldEngine
from tests.deploy.manifests import job_config, merged, ray_cluster, render
from tests.deploy.on_kuberay import kuberay
from tests.deploy.ray_nodes import workers
from tests.support.runs import check_books

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray", "openssl")]

STEPS = 20  # more than growing takes; what is left of them passes at once
MINIMUM = {"learner": 1, "sampler": 1, "scorer": 1}
GROWN = MINIMUM | {"sampler": 2}
FIRST, SECOND = "kat:sampler:0", "kat:sampler:1"
OTHERS = (SECOND, "kat:scorer:0", "kat:learner:0", "kat:monitor:0")


def run_job(files, folder):
    """The documents of the profile `run` for small models and two cores; its pools grow as shipped, but sooner."""
    small = helm.parse_set_string(",".join((*SMALL, "workers.learner.replicas=1", "workers.learner.minReplicas=1")))
    config = {
        "student": {"path": str(files / "student"), "dtype": "float32"},
        "teacher": {"path": str(files / "teacher"), "dtype": "float32"},
        "data": {"path": str(files / "prompts.jsonl"), "chat_template": False},
        "rollout": {"prompts_per_step": 8, "rollouts_per_prompt": 2, "max_tokens": 48, "chunk_tokens": 4,
                    "top_k_logprobs": 16},
        "termination": {"rule": "kat", "window": 8, "exempt": 4, "consecutive": 2, "eta": 0.5, "min_samples": 12,
                        "min_steps": 1, "probe_share": 0.25},
        "sampler": {"max_replicas": 2}, "scorer": {"max_replicas": 1},
        "learner": {"world_size": 1, "dtype": "float32"},
        "pools": {"grow_after": 1, "shrink_after": STEPS},
        "run": {"steps": STEPS, "checkpoint_every": 0, "tensorboard": False},
    }  # fmt: skip
    ours = {"run": {"config": config, "overrides": [f"run.dir={folder}"]}}
    return render("run", merged(small, ours), name=NAME)


class Beside:
    """Goes with a run from a thread of its own."""

    def __init__(self, cluster, folder):
        self._cluster, self._gate = cluster, Gate(folder)
        self._metrics = folder / NAME / "metrics.jsonl"

    def last(self, name):
        return lines_of(self._metrics)[-1][f"pools/{name}"]

    def pass_a_step(self):
        done = steps_done(self._metrics)
        assert done < STEPS - 2, "the run is over before it has come to that"
        self._gate.open(done + 1)
        self._cluster.until(lambda: steps_done(self._metrics) > done, f"step {done + 1} is done")

    def stopped(self, step, *names):
        """Where these samplers are, once all of them are in the middle of a step."""

        def there():
            found = self._gate.stopped(step)
            return {name: found[name] for name in names} if found.keys() >= {*names} else None

        return self._cluster.until(there, f"in the middle of step {step + 1}: {', '.join(names)}")

    def grow(self):
        """Until the run has another sampler, on a node that it has asked for."""
        self.stopped(0, FIRST)
        assert by_role() == self._cluster.asked() == Counter(MINIMUM)
        self.pass_a_step()
        while not self.last("sampler_pending"):
            self.pass_a_step()
        self._cluster.settled(**GROWN)
        while actor(SECOND) is None:
            self.pass_a_step()
        self._cluster.until(lambda: pids(SECOND), "the second sampler stands")
        while self.last("sampler_replicas") == 1:
            self.pass_a_step()

    def lose_a_node(self):
        """Kill the first sampler's raylet while both sample, and wait until that sampler samples on another node;
        returns the step, the first of which is 1.
        """
        step = steps_done(self._metrics)
        lost, second = self.stopped(step, FIRST, SECOND).values()
        assert lost.node != second.node and min(lost.rollouts, second.rollouts) > 0
        others, nodes = pids(*OTHERS), alive().keys() - {lost.node}
        os.kill(lost.raylet, signal.SIGKILL)
        self._gate.open(step + 1)
        self._cluster.until(lambda: lost.node not in alive(), "the node is lost")
        self._cluster.settled(**GROWN)
        (new,) = alive().keys() - nodes
        assert new != lost.node and alive()[new] == "sampler" and nodes < alive().keys()
        first, second_now = self.stopped(step + 1, FIRST, SECOND).values()
        assert (first.node, second_now.node) == (new, second.node) and first.rollouts > 0
        assert pids(*OTHERS) == others, "who was on another node is the process that it was"
        return step + 1

    def grow_and_lose(self):
        """All of it; the run ends in any case."""
        try:
            self.grow()
            return self.lose_a_node()
        finally:
            self._gate.open(STEPS)


def alive():
    """The roles of living nodes, by their ids."""
    return {n["NodeID"]: n["Labels"][ROLE_LABEL] for n in workers()}


def actor(name):
    """A run's actor, wherever its namespace; None while it is not known."""
    for known in ray.util.list_named_actors(all_namespaces=True):
        if known["name"] == name:
            return ray.get_actor(**known)
    return None


def pids(*names):
    """The processes of actors; of one that loads its model, once it has."""
    pings = [actor(name).health.options(concurrency_group="health").remote() for name in names]
    return [beat.pid for beat in ray.get(pings, timeout=PATIENCE)]


def test_a_run_grows_and_survives_the_loss_of_a_samplers_node(files, tmp_path):
    docs = run_job(files, tmp_path)
    config = job_config(docs, tmp_path)
    assert config.cluster.by_role and config.sampler.bounds == (1, 2)
    with kuberay(ray_cluster(docs)) as cluster:
        with ThreadPoolExecutor(1) as beside:
            watching = beside.submit(Beside(cluster, tmp_path).grow_and_lose)
            engine = partial(HeldEngine, Gate(tmp_path))
            path = job.train(config, engines=Engines(engine, stub_teacher, StubLearner))
            lost_in = watching.result()
        cluster.settled(**MINIMUM)
        cluster.looked_again(5)
        cluster.settled(**MINIMUM)
        given_back, left = cluster.deleted(), {pod for role in MINIMUM for pod in cluster.pods(role)}
        assert given_back and all("-sampler-worker-" in pod for pod in given_back) and not given_back & left
    _, _, metrics = check_books(config, path)
    assert {m["step"]: m["pool/restarts"] for m in metrics if m["pool/restarts"]} == {lost_in: 1}
    sizes = [m["pools/sampler_replicas"] for m in metrics]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (1, 2), sizes
    said = (path / "run.log").read_text()
    assert re.findall(r"(\S+) was lost", said) == ["sampler:0"] and "goes on without it" not in said
