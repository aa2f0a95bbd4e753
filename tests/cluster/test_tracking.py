"""A whole run with trackers, killed with its driver and resumed: one curve in each, every step once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kat_ray.config.load import config_yaml
from tests.cluster.disturb import wait_for_step
from tests.support.paths import ROOT
from tests.support.runs import config_of

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]
STEPS = 12
TRACKERS = ("trackio", "mlflow", "wandb", "swanlab")
TOKEN = "f6" * 20


@pytest.fixture
def packages():
    if missing := [name for name in TRACKERS if find_spec(name) is None]:
        if os.environ.get("KAT_RAY_REQUIRE_TRACKERS"):
            pytest.fail(f"{', '.join(missing)}: make test-trackers installs them")
        pytest.skip(f"needs {', '.join(missing)}: make test-trackers")


def start(*arguments):
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"WANDB_API_KEY": TOKEN, "SWANLAB_API_KEY": TOKEN}
    command = [sys.executable, "-m", "tests.cluster.stub_train", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_killed_run_is_one_curve(packages, files, tmp_path):
    config = config_of(
        files, tmp_path,
        run={"name": "night", "steps": STEPS, "checkpoint_every": 4, "deterministic": True},
        tracking={"to": ["tensorboard", *TRACKERS]}, evaluation={"every": 6}, sampler={"replicas": 1},
        scorer={"replicas": 1}, learner={"world_size": 1}, rollout={"top_k_logprobs": 16},
    )  # fmt: skip
    (tmp_path / "night.yaml").write_text(config_yaml(config))
    run = tmp_path / "night"
    process = start(tmp_path / "night.yaml")
    wait_for_step(run / "metrics.jsonl", 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (tmp_path / "seen").touch()  # the stubs need not be slow any more
    resumed = start("--resume", run)
    out, _ = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, out[-3000:]
    assert "failed" not in out, out[-3000:]
    for name in TRACKERS:
        assert f"tracking: {name}: " in out, "where it can be seen"
        assert json.loads((run / "tracking" / f"{name}.json").read_text()) == {
            "step": STEPS,
            "evaluation": STEPS,
            "place": "",
        }
    with sqlite3.connect(run / "tracking" / "trackio" / "kat-ray.db") as store:
        rows = [(step, json.loads(text)) for step, text in store.execute("select step, metrics from metrics")]
    assert sorted(step for step, values in rows if "kl/mean" in values) == list(range(1, STEPS + 1))
    with sqlite3.connect(run / "tracking" / "mlflow.db") as store:
        steps = [step for (step,) in store.execute("select step from metrics where key = 'kl/mean'")]
        (state,) = store.execute("select status from runs").fetchone()
    assert sorted(steps) == list(range(1, STEPS + 1)) and state == "FINISHED"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = {step: values["kl/mean"] for step, values in rows if "kl/mean" in values}
    assert shown == pytest.approx({m["step"]: m["kl/mean"] for m in lines if "kl/mean" in m})
    assert not any(TOKEN.encode() in p.read_bytes() for p in run.rglob("*") if p.is_file())
