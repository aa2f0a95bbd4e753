"""Runs in processes of their own that are killed or told to end, and resumed: the same bits as without that."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import yaml

from kat_ray.config_io import config_yaml
from kat_ray.traces import read_traces
from tests.cluster.disturb import steps_done, wait_for_step
from tests.cluster.test_run import config_of, files  # noqa: F401 (a fixture)
from tests.deploy.ray_process import job_logs, ray_process, submitted, until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("alone")]
STEPS = 20


def start(*arguments):
    """A training command; its output goes to its own pipes."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kat_ray.cli", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, code=0, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return out, err


def run_config(files, tmp_path, name, **sections):  # noqa: F811
    config = config_of(
        files, tmp_path,
        run={"name": name, "steps": STEPS, "checkpoint_every": 5, "deterministic": True, "keep_checkpoints": 10},
        evaluation={"every": 10}, sampler={"replicas": 1}, scorer={"replicas": 1}, learner={"world_size": 1},
        **sections,
    )  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(config_yaml(config))
    return path, tmp_path / name


def timeless(line):
    """A line of metrics.jsonl without what is measured by the clock."""
    clocked = ("time", "throughput", "store", "learner/seconds")
    return {k: v for k, v in line.items() if not k.startswith(clocked)}


def everything(run):
    """What must not depend on how often a run was interrupted."""
    last = run / "checkpoints" / f"step-{STEPS}"
    names = [
        "model.safetensors",
        *(f"training/{p.name}" for p in sorted((last / "training").glob("*.safetensors"))),
    ]
    assert len(names) == 2
    summary = json.loads((run / "summary.json").read_text())
    state = json.loads((last / "training" / "state.json").read_text())
    return {
        "weights": {n: (last / n).read_bytes() for n in names},
        "metrics": [timeless(json.loads(x)) for x in (run / "metrics.jsonl").read_text().splitlines()],
        "evaluations": (run / "evaluations.jsonl").read_text(),
        "traces": read_traces(run).to_pylist(),
        "summary": {k: v for k, v in summary.items() if k not in ("wall_seconds", "git_commit")},
        "state": {k: v for k, v in state.items() if k not in ("seconds", "positions")},
    }


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    config, run = run_config(files, tmp_path_factory.mktemp("straight"), "straight")
    finish(start(config))
    return everything(run)


def complete(run):
    """The steps of a run's checkpoints, without one that was being written."""
    return sorted(
        int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*") if "." not in p.name
    )


def check_same(run, straight):
    again = everything(run)
    for part in ("metrics", "evaluations", "traces", "summary", "state", "weights"):
        assert again[part] == straight[part], part
    assert any(m.get("kat/threshold") for m in again["metrics"])


def test_ten_steps_a_kill_and_ten_steps_are_twenty_steps(straight, files, tmp_path):  # noqa: F811
    config, run = run_config(files, tmp_path, "killed")
    process = start(config)
    wait_for_step(run / "metrics.jsonl", 13, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    saved = complete(run)
    assert saved in ([5, 10], [5, 10, 15]), "it was killed at step 13, or a little later"
    before, newest = saved[-2:]
    # The same run with its newest checkpoint damaged: the one before it, which is named.
    damaged = shutil.copytree(run, tmp_path / "damaged")
    weights = damaged / "checkpoints" / f"step-{newest}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    resumed = [start("--resume", path) for path in (run, damaged)]  # beside each other
    (out, _), (other, _) = map(finish, resumed)
    assert f"after step {newest}" in out
    check_same(run, straight)
    assert f"step-{newest}" in other and f"after step {before}" in other
    check_same(damaged, straight)


def test_told_to_end_it_saves_and_a_second_run_goes_on(straight, files, tmp_path):  # noqa: F811
    config, run = run_config(files, tmp_path, "told")
    process = start(config)
    wait_for_step(run / "metrics.jsonl", 6, process)
    process.terminate()
    out, err = finish(process, code=128 + signal.SIGTERM)
    assert "--resume" in err
    saved = complete(run)[-1]
    assert saved >= 6 and saved % 5, "the step that was done is saved, not only each fifth one"
    out, _ = finish(start("--resume", run))
    assert f"after step {saved}" in out
    check_same(run, straight)
    out, _ = finish(start("--resume", run))
    assert f"all {STEPS} steps are done" in out
    changed = yaml.safe_load(config.read_text())["run"]["seed"] + 1
    _, err = finish(start("--resume", run, f"run.seed={changed}"), code=2)
    assert err.startswith("error: ") and "run.seed" in err and "Traceback" not in err


def test_a_retried_job_goes_on_by_itself(straight, files, tmp_path, monkeypatch):  # noqa: F811
    """As a Ray job, submitted again and again under one name: after a kill of its driver, and after `job stop`."""
    from ray.job_submission import JobStatus

    config, run = run_config(files, tmp_path, "job")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    metrics = run / "metrics.jsonl"
    with ray_process("import time\ntime.sleep(900)", tmp_path / "ray.log", cpus=6) as (dashboard, _, _):
        train = f"{sys.executable} -m kat_ray.cli train {config}"

        def ended(jobs, job):
            until(lambda: jobs.get_job_status(job).is_terminal(), 300, f"job {job} ends")
            return jobs.get_job_status(job), job_logs(jobs, job)

        jobs, job = submitted(dashboard, train)
        until(lambda: steps_done(metrics) >= 6, 300, "six steps")
        (driver,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == [str(config)]]
        driver.kill()
        status, text = ended(jobs, job)
        assert status == JobStatus.FAILED, text
        _, job = submitted(dashboard, train)
        until(lambda: steps_done(metrics) >= 12, 300, "twelve steps")
        jobs.stop_job(job)
        status, text = ended(jobs, job)
        assert re.search(r"after step (5|10)\b", text) and "saving step" in text, text
        _, job = submitted(dashboard, train)
        status, text = ended(jobs, job)
        assert status == JobStatus.SUCCEEDED, text
        saved = int(text.split("after step ")[1].split()[0])
        assert saved >= 12
    assert not (tmp_path / "job-2").exists(), "it stayed one run"
    check_same(run, straight)
