"""Runs in processes of their own that are killed or told to end, and resumed: the same bits as without that.

What a resumption must put back is the same with stub engines as with real ones, but for the real learner's state
and its random numbers.
"""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import psutil
import pytest
import yaml

from kat_ray.cli import main as cli
from kat_ray.config.load import config_yaml
from tests.cluster.disturb import steps_done, wait_for_step
from tests.deploy.manifests import ROOT
from tests.deploy.ray_process import job_logs, ray_process, submitted, until
from tests.support.runs import config_of, everything

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]


@dataclass(frozen=True)
class Kind:
    """By what a run is made, and how long it is."""

    command: str
    steps: int
    every: int  # steps from one checkpoint to the next
    rewards: bool = False  # whether it learns from them, beside the teacher
    lora: bool = False  # whether adapters are trained, and not the weights
    publish: str = "merged"  # how samplers are given them
    dora: bool = False  # whether an adapter learns each output's length apart
    rounded: bool = False  # whether weights are bfloat16, and sums and logits float32
    packed: bool = False  # whether rollouts lie behind each other in one row

    @property
    def model(self):
        """The file of a checkpoint that holds what was learnt."""
        return "adapter_model.safetensors" if self.lora else "model.safetensors"

    def train(self, *arguments):
        """The command line of a training command."""
        return [sys.executable, "-m", self.command, "train", *map(str, arguments)]

    def train_here(self, *arguments):
        """The same in this process, which has imported what it needs: of a run that is left alone."""
        command = importlib.import_module(self.command.replace("kat_ray.cli", "kat_ray.cli.main"))
        assert command.main(["train", *map(str, arguments)]) == 0


STUBS = Kind("tests.cluster.stub_train", 12, 4)
LONG = Kind("kat_ray.cli", 20, 5)
REWARDS = Kind("kat_ray.cli", 12, 4, rewards=True)
LORA = Kind("kat_ray.cli", 12, 4, lora=True)
ADAPTERS = Kind("kat_ray.cli", 12, 4, lora=True, publish="adapters")
DORA = Kind("kat_ray.cli", 12, 4, lora=True, dora=True)
ROUNDED = Kind("kat_ray.cli", 12, 4, rounded=True)
PACKED = Kind("kat_ray.cli", 12, 4, packed=True)

# Stubs in the gate, and runs with real engines in the nightly tier.
KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(STUBS, id="gate"),
        pytest.param(LONG, id="long", marks=pytest.mark.nightly),
        pytest.param(REWARDS, id="rewards", marks=pytest.mark.nightly),
        pytest.param(LORA, id="lora", marks=pytest.mark.nightly),
        pytest.param(ADAPTERS, id="adapters", marks=pytest.mark.nightly),
        pytest.param(DORA, id="dora", marks=pytest.mark.nightly),
        pytest.param(ROUNDED, id="bfloat16", marks=pytest.mark.nightly),
        pytest.param(PACKED, id="packed", marks=pytest.mark.nightly),
    ],
)


def start(kind, *arguments):
    """A training command; its output goes to its own pipes."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = kind.train(*arguments)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, code=0, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return out, err


def run_config(kind, files, tmp_path, name):
    rewarded = {
        "objective": {"rl": {"weight": 1.0}}, "student": {"path": "demo:student"}, "data": {"path": "demo:train"},
        "rollout": {"top_k_logprobs": 16, "prompts_per_step": 4, "rollouts_per_prompt": 6, "top_p": 1.0},
    }  # fmt: skip
    sections = rewarded if kind.rewards else {"rollout": {"top_k_logprobs": 16}}
    learner = {"world_size": 1}
    if kind.lora:
        learner["lora"] = {"rank": 4, "publish": kind.publish, "dora": kind.dora}
    if kind.packed:
        learner |= {"batching": "packed", "micro_batch_tokens": 256}
    if kind.rounded:
        learner |= {"dtype": "bfloat16", "zero_stage": 2, "reduce_dtype": "float32"}
        sections |= {"student": {"dtype": "bfloat16"}, "numerics": {"fp32_output_layer": True}}
    config = config_of(
        files, tmp_path,
        run={"name": name, "steps": kind.steps, "checkpoint_every": kind.every, "deterministic": True,
             "keep_checkpoints": 10,
             "check_agreement": not kind.rounded},  # of random weights: half of them change little in bfloat16
        evaluation={"every": 2 * kind.every}, sampler={"replicas": 1}, scorer={"replicas": 1},
        learner=learner, **sections,
    )  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(config_yaml(config))
    return path, tmp_path / name


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """What a run of a kind leaves that nothing happens to."""

    @cache
    def of(kind):
        folder = tmp_path_factory.mktemp("straight")
        config, run = run_config(kind, files, folder, "straight")
        let_go(folder)
        kind.train_here(config)
        found = everything(run, kind.model)
        taught = [m["step"] for m in found["metrics"] if m.get("advantage/abs_mean")]
        assert bool(taught) == kind.rewards, "rewards that differ within a group, or none"
        return found

    return of


def let_go(folder):
    """A run of stubs below a folder goes on as fast as it can."""
    (folder / "seen").touch()


def complete(run):
    """The steps of a run's checkpoints, without one that was being written."""
    return sorted(
        int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*") if "." not in p.name
    )


def check_same(run, straight, kind):
    again = everything(run, kind.model)
    for part in ("metrics", "evaluations", "traces", "summary", "state", "weights"):
        assert again[part] == straight[part], part
    assert any(m.get("kat/threshold") for m in again["metrics"])


@pytest.mark.nightly
@KINDS
def test_a_kill_and_a_resumption_change_nothing(straight, files, tmp_path, kind):
    config, run = run_config(kind, files, tmp_path, "killed")
    process = start(kind, config)
    wait_for_step(run / "metrics.jsonl", 2 * kind.every + 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    let_go(tmp_path)
    saved, steps = complete(run), [kind.every, 2 * kind.every, 3 * kind.every]
    assert saved in (steps[:2], steps), (
        "it was killed between the second checkpoint and the third, or a little later"
    )
    before, newest = saved[-2:]
    # The same run with its newest checkpoint damaged: the one before it, which is named.
    damaged = shutil.copytree(run, tmp_path / "damaged")
    weights = damaged / "checkpoints" / f"step-{newest}" / kind.model
    weights.write_bytes(weights.read_bytes()[:-10])
    resumed = [start(kind, "--resume", path) for path in (run, damaged)]  # beside each other
    (out, _), (other, _) = map(finish, resumed)
    assert f"after step {newest}" in out
    check_same(run, straight(kind), kind)
    assert f"step-{newest}" in other and f"after step {before}" in other
    check_same(damaged, straight(kind), kind)


@KINDS
def test_told_to_end_and_killed_it_goes_on_to_the_same_bits(straight, files, tmp_path, capsys, kind):
    """First SIGTERM, then a resumption that is killed, then one that is left alone."""
    config, run = run_config(kind, files, tmp_path, "told")
    process = start(kind, config)
    wait_for_step(run / "metrics.jsonl", kind.every + 1, process)
    process.terminate()
    _, err = finish(process, code=128 + signal.SIGTERM)
    assert "--resume" in err
    saved = complete(run)[-1]
    assert saved > kind.every and saved % kind.every, "the step that was done is saved, not only each fourth one"
    process = start(kind, "--resume", run)
    wait_for_step(run / "metrics.jsonl", 2 * kind.every + 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    let_go(tmp_path)
    saved = complete(run)[-1]
    kind.train_here("--resume", run)
    assert f"after step {saved}" in capsys.readouterr().out
    check_same(run, straight(kind), kind)
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert f"all {kind.steps} steps are done" in capsys.readouterr().out
    changed = yaml.safe_load(config.read_text())["run"]["seed"] + 1
    assert cli.main(["train", "--resume", str(run), f"run.seed={changed}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "run.seed" in err and "Traceback" not in err


@pytest.mark.nightly  # a submitted run that is given again goes on: test_submit
@KINDS
def test_a_retried_job_goes_on_by_itself(straight, files, tmp_path, monkeypatch, kind):
    """As a Ray job, submitted again and again under one name: after a kill of its driver, and after `job stop`."""
    from ray.job_submission import JobStatus

    config, run = run_config(kind, files, tmp_path, "job")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    metrics = run / "metrics.jsonl"
    with ray_process("import time\ntime.sleep(900)", tmp_path / "ray.log", cpus=6) as (dashboard, _, _):
        train = " ".join(kind.train(config))

        def ended(jobs, job):
            until(lambda: jobs.get_job_status(job).is_terminal(), 300, f"job {job} ends")
            return jobs.get_job_status(job), job_logs(jobs, job)

        jobs, job = submitted(dashboard, train)
        until(lambda: steps_done(metrics) > kind.every, 300, "a checkpoint, and a step more")
        (driver,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == [str(config)]]
        driver.kill()
        status, text = ended(jobs, job)
        assert status == JobStatus.FAILED, text
        _, job = submitted(dashboard, train)
        goal = 2 * kind.every + 2
        until(
            lambda: steps_done(metrics) >= goal or jobs.get_job_status(job).is_terminal(), 300,
            "another checkpoint, and two steps more",
        )  # fmt: skip
        assert steps_done(metrics) >= goal, job_logs(jobs, job)
        jobs.stop_job(job)
        status, text = ended(jobs, job)
        assert re.search(rf"after step ({kind.every}|{2 * kind.every})\b", text) and "saving step" in text, text
        let_go(tmp_path)
        _, job = submitted(dashboard, train)
        status, text = ended(jobs, job)
        assert status == JobStatus.SUCCEEDED, text
        saved = int(text.split("after step ")[1].split()[0])
        assert saved >= 2 * kind.every + 2
    assert not (tmp_path / "job-2").exists(), "it stayed one run"
    check_same(run, straight(kind), kind)
