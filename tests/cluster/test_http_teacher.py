"""Runs on real engines whose teacher is behind HTTP: kat-ray's own server, killed and started again, and vLLM's."""

import json
import os
import shutil
import signal
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest

from actors.driver.train import train
from kat_ray.analysis.replay import load_traces
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.run.resume import resumed_config
from tests.cluster.disturb import AtSteps, kill_named, named
from tests.support.runs import everything
from tests.support.teacher_server import free_port, own_server, server_process

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]
STEPS, SECRET = 3, "hush-hush-5309"


def config_of(folder, name, server=None, steps=STEPS, **run):
    """The embedded task, its teacher here or behind an address."""
    tree = load_config("demo").model_dump(mode="json")
    tree["run"] |= {
        "dir": str(folder), "name": name, "steps": steps, "checkpoint_every": 1, "deterministic": True,
        "tensorboard": False, **run,
    }  # fmt: skip
    if server:
        http = {"token_file": str(server.token), "answer_seconds": 60.0}
        tree["teacher"] |= {"type": "http", "url": server.url, "http": tree["teacher"]["http"] | http}
    tree["rollout"] |= {"prompts_per_step": 12, "max_tokens": 64}
    tree["termination"] |= {"min_samples": 8, "min_steps": 1, "probe_share": 0.3}
    tree["scorer"] |= {"num_cpus": 0.5, "threads": 1}
    tree["sampler"] |= {"num_cpus": 0.5, "max_num_seqs": 32}
    tree["learner"] |= {"num_cpus": 0.5, "threads": 1}
    tree["evaluation"] |= {"k": 1, "max_tokens": 48, "data": {"path": "demo:heldout", "limit": 4}, "teacher": False}
    return Config.model_validate(tree)


class Server:
    """kat-ray's server in a process of its own, behind a token."""

    def __init__(self, folder):
        self.port, self.log, self.token = free_port(), folder / "log", folder / "token"
        self.url = f"http://127.0.0.1:{self.port}"
        self.token.write_text(SECRET)

    def start(self):
        command = own_server(self.port, "--token-env", "TEACHER_TOKEN")
        return server_process(command, self.url, self.log, TEACHER_TOKEN=SECRET)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    with server.start():
        yield server


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A run from the first step to the last."""
    return train(config_of(tmp_path_factory.mktemp("runs"), "straight", server))


def test_it_is_the_run_of_a_local_teacher_to_the_bit(straight, tmp_path):
    here = everything(train(config_of(tmp_path, "here")))
    assert everything(straight) == here
    assert sum(len(row["token_ids"]) for row in here["traces"]) > 0


def test_the_loss_on_its_own_top_k_at_a_temperature_is_that_of_a_local_teacher_to_the_bit(server, tmp_path):
    """Of rollouts, and of completions of the data."""
    paths = []
    for name, where in (("there", server), ("here", None)):
        tree = config_of(tmp_path, name, where, steps=2).model_dump(mode="json")
        tree["objective"]["opd"] |= {"divergence": "forward", "support": "teacher", "teacher_temperature": 0.7}
        tree["objective"]["off_policy"]["share"] = 0.34
        tree["data"] |= {"path": "demo:hints", "completion_column": "solution"}
        tree["evaluation"]["data"] = None
        paths.append(train(Config.model_validate(tree)))
    assert everything(paths[0]) == everything(paths[1])


def test_the_token_is_in_nothing_that_a_run_or_its_server_leaves(straight, server):
    files = [p for p in (*straight.rglob("*"), server.log) if p.is_file()]
    assert len(files) > 10 and not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert str(server.token) in (straight / "config.yaml").read_text()


def test_a_resumed_run_has_the_same_bits(straight, tmp_path):
    """From its last step but one on, in a copy of its directory."""
    copy = tmp_path / "copy"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")
    (copy / "summary.json").unlink()
    train(resumed_config(copy, []), resume=copy)
    assert everything(copy) == everything(straight)


def test_server_and_scorer_are_killed_in_the_middle_of_a_run(straight, tmp_path):
    """The server is started again in its place: what it has forgotten is sent again."""
    server = Server(tmp_path)
    config = config_of(tmp_path, "killed", server, steps=8, check_agreement=False)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"data": None})})
    metrics, ended = tmp_path / "killed" / "metrics.jsonl", named("kat:scorer:0")
    with ExitStack() as servers:
        first = servers.enter_context(server.start())

        def another_server():
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            servers.enter_context(server.start())

        with AtSteps(metrics, (2, another_server), (4, partial(kill_named, "kat:scorer:0", ended))) as killed:
            path = train(config)
    steps = [m for m in map(json.loads, metrics.read_text().splitlines()) if "learner/loss" in m]
    assert len(killed.done) == 2 and killed.done[1] < 8, "both were killed before the last step"
    assert len(steps) == 8 and all(np.isfinite(m["learner/loss"]) for m in steps)
    traces, others = (load_traces(p)[0] for p in (path, straight))
    (end,) = traces.offsets[[int((traces.step == 0).sum())]]
    np.testing.assert_allclose(traces.d[:end], others.d[:end], atol=1e-6)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["rollouts_ended"]["failed"] == 0 and summary["rollouts_started"] == 96
    assert summary["generated_tokens"] == sum(summary[f"{n}_tokens"] for n in ("kept", "overshoot", "cut_back"))
