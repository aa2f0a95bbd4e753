"""Real packages, offline, and a real MLflow server: an interrupted run is one curve, with configuration, summary.

They are in no lock of the runtime: `make test-trackers` installs them beside it (requirements-trackers.lock).
"""

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from kat_ray.tracking import tracker as tracking
from tests.support.tracked import ACCURACY, KL, TrackedRun

pytestmark = pytest.mark.nightly
SECRETS = {
    "WANDB_API_KEY": "a1" * 20, "SWANLAB_API_KEY": "b2" * 10 + "c", "HF_TOKEN": "hf_" + "c3" * 15,
    "MLFLOW_TRACKING_PASSWORD": "d4" * 8, "TRACKIO_WRITE_TOKEN": "e5" * 10,
}  # fmt: skip


def needs(package):
    if find_spec(package) is None:
        if os.environ.get("KAT_RAY_REQUIRE_TRACKERS"):
            pytest.fail(f"{package} is not installed; make test-trackers installs it")
        pytest.skip(f"needs {package}: make test-trackers")


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch):
    """Importing these packages takes a minute where others are at work."""
    monkeypatch.setattr(tracking, "END_SECONDS", 300.0)


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """A run whose environment holds tokens, none of which is anywhere afterwards; and nothing failed."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    made = TrackedRun(tmp_path / "night")
    yield made
    assert not caplog.records
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        found = [name for name, secret in SECRETS.items() if secret.encode() in path.read_bytes()]
        assert not found, f"{path} holds {found}"
    assert not any(secret in line for secret in SECRETS.values() for line in made.said)


def log_records(path):
    """The records of a log in LevelDB's format, as wandb and SwanLab write it: 7 bytes, then blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def collect(rows):
    """{step: KL} and {step: accuracy} of (step, name, value); a second value of a step is an error."""
    found = {"kl/mean": {}, "eval/avg_at_k": {}}
    for step, name, value in rows:
        assert name != "learner/grad_norm", "what is not finite is left out"
        if name in found:
            assert step not in found[name], f"step {step} of {name} is there twice"
            found[name][step] = value
    return found["kl/mean"], found["eval/avg_at_k"]


def wandb_rows(records):
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            step = record.history.step.num if record.history.HasField("step") else items["_step"]
            yield from ((step, name, value) for name, value in items.items() if "/" in name)


def test_wandb_offline(run):
    needs("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run.interrupted_and_resumed("wandb")
    files = sorted(run.folder.glob("tracking/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2, "a folder for each process"
    records = [Record.FromString(data) for file in files for data in log_records(file)]
    assert collect(wandb_rows(records)) == (KL, ACCURACY)
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.project) for r in runs} == {(tracking.run_id(run.folder), "kat-ray")}
    config = {u.key: json.loads(u.value_json) for r in runs for u in r.config.update if u.key}
    assert config["learner"]["lr"] == 0.003 or config["learner"]["lr"] > 0
    summary = [u for r in records if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
    assert any("1234" in u.value_json for u in summary)
    ends = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert ends == [1, 0]
    assert not list(run.folder.rglob("requirements.txt")) and not list(run.folder.rglob("wandb-metadata.json"))


def test_swanlab_offline(run):
    needs("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    run.interrupted_and_resumed("swanlab")
    files = sorted(run.folder.glob("tracking/swanlab/run-*/*.swanlab"))
    assert len(files) == 2
    records = [Record.FromString(data) for file in files for data in log_records(file)]
    scalars = [r.scalar for r in records if r.HasField("scalar")]
    assert collect((s.step, s.key, s.value.number) for s in scalars) == (KL, ACCURACY)
    starts = [r.start for r in records if r.HasField("start")]
    assert {(s.id, s.project) for s in starts} == {(tracking.run_id(run.folder), "kat-ray")}
    config = "".join(f.read_text() for f in run.folder.glob("tracking/swanlab/run-*/files/config.yaml"))
    assert "rollouts_per_prompt" in config and "1234" in config


def test_trackio_local(run):
    needs("trackio")
    run.interrupted_and_resumed("trackio")
    with sqlite3.connect(run.folder / "tracking" / "trackio" / "kat-ray.db") as store:
        rows = store.execute("select run_id, run_name, step, metrics from metrics order by step").fetchall()
        (config,) = store.execute("select config from configs").fetchall()
    assert len({row[0] for row in rows}) == 1, "one run"
    assert {row[1] for row in rows} == {tracking.run_id(run.folder)}
    found = [(step, name, value) for _, _, step, text in rows for name, value in json.loads(text).items()]
    assert collect(found) == (KL, ACCURACY)
    assert json.loads(config[0])["rollout"] and any(name == "summary" and "1234" in str(v) for _, name, v in found)


def read_mlflow(uri, run, tmp_path):
    """What MLflow's own client says of the one run there: figures as `collect` gives them, and the run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "kat-ray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.tags["kat_ray.run_id"] == tracking.run_id(run.folder)
    rows = [
        (m.step, m.key, m.value)
        for name in found.data.metrics
        for m in client.get_metric_history(found.info.run_id, name)
    ]
    summary = client.download_artifacts(found.info.run_id, "summary.json", str(tmp_path))
    assert json.loads(Path(summary).read_text())["generated_tokens"] == 1234
    assert found.data.params["run.steps"] == "150" and found.info.status == "FINISHED"
    return collect(rows)


def test_mlflow_offline(run, tmp_path):
    needs("mlflow")
    run.interrupted_and_resumed("mlflow")
    assert read_mlflow(f"sqlite:///{run.folder / 'tracking' / 'mlflow.db'}", run, tmp_path) == (KL, ACCURACY)


@pytest.fixture
def server(tmp_path):
    """MLflow's server on loopback, with a SQLite store: its address, and the process."""
    needs("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "server").mkdir()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server/mlflow.db", "--artifacts-destination",
        str(tmp_path / "server" / "artifacts"),
    ]  # fmt: skip
    quiet = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONPATH": "",
    }
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=quiet, cwd=tmp_path, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_an_mlflow_server(server, run, tmp_path, monkeypatch):
    address, _ = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    run.interrupted_and_resumed("mlflow", online=True)
    assert read_mlflow(address, run, tmp_path) == (KL, ACCURACY)
    assert any(address in line for line in run.said)


def test_a_server_that_goes_away_costs_one_line(server, tmp_path, monkeypatch, caplog):
    """And what it lacks is told by the next process that finds it, or another one, with the same id."""
    address, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name, value in {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "0", "TIMEOUT": "5"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    run = TrackedRun(tmp_path / "night")
    with run.driver("mlflow", online=True) as trackers:
        trackers.start(0)
        for _ in range(600):  # until it is open
            run.said or (trackers.start(0), time.sleep(0.2))
        assert run.said
        os.killpg(process.pid, 9)
        process.wait()
        run.steps(trackers, 1, 3)
    (record,) = caplog.records
    assert "tracking: mlflow failed" in record.getMessage() and "127.0.0.1" in record.getMessage()
