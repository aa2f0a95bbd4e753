"""A tracker's process: whatever becomes of it, the run does not wait for it, and is told once."""

import json
import sys
import time
from types import SimpleNamespace
from typing import get_args

import pytest

from kat_ray.cli import main as cli
from kat_ray.cli.records import SERVICES
from kat_ray.config import TrackerName, TrackingConfig
from kat_ray.config.load import config_yaml, load_config
from kat_ray.errors import UserError
from kat_ray.observability.trackers import Trackers
from kat_ray.tracking import choice, follow
from kat_ray.tracking import tracker as tracking
from kat_ray.tracking.choice import check_trackers
from kat_ray.tracking.tracker import Ending, ServiceTracker, run_id

IN_FULL = "import sys, json\nfor line in sys.stdin: pass\nprint(json.dumps(['at', 'the end']), flush=True)"
FAILS = """
import sys, json
sys.stdin.readline()
print(json.dumps(['failed', 'ValueError: no']), flush=True)
sys.exit(1)
"""
DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
HANGS = "import time\ntime.sleep(600)"


def tracker_of(code, folder, ending=None, say=print):
    command = [sys.executable, "-c", code]
    return ServiceTracker("wandb", {"run": str(folder)}, ending or Ending(), say, command)


def until(done):
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen in 30 s")


def test_a_process_that_ends_by_itself_is_waited_for(tmp_path, caplog):
    said = []
    with Trackers([tracker_of(IN_FULL, tmp_path, say=said.append)]) as trackers:
        trackers.start(0)
        trackers.step(1, {"kl/mean": 0.5})
    assert said == ["tracking: wandb: the end"] and not caplog.records


@pytest.mark.parametrize(("code", "words"), [(FAILS, "ValueError: no"), (DIES, "(exit code -9)")])
def test_one_that_fails_is_said_once_and_left_out(tmp_path, caplog, code, words):
    one = tracker_of(code, tmp_path)
    with Trackers([one]) as trackers:
        trackers.start(0)
        child = one._child
        until(lambda: (trackers.step(1, {"kl/mean": 0.5}), child.poll() is not None)[1])
        for step in range(2, 6):
            trackers.step(step, {"kl/mean": 0.5})
        trackers.start(2)
        trackers.step(3, {"kl/mean": 0.5})
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("tracking: wandb failed (TrackingError: ") and words in said


def test_one_that_hangs_is_never_waited_for_before_the_end(tmp_path, caplog, monkeypatch):
    """Far more than a pipe holds; at the end two of them share one deadline."""
    monkeypatch.setattr(tracking, "END_SECONDS", 1.0)
    ending = Ending()
    both = [tracker_of(HANGS, tmp_path, ending) for _ in range(2)]
    with Trackers(both) as trackers:
        trackers.start(0)
        children = [one._child for one in both]
        for step in range(1, 50_000):
            trackers.step(step, {"kl/mean": 0.5})
        began = time.monotonic()
    assert all(child.returncode == -9 for child in children)
    assert len(caplog.records) == 2 and "not done 1 s after the end" in caplog.text
    assert time.monotonic() - began < 60


def test_a_run_has_one_id(tmp_path):
    first = run_id(tmp_path)
    assert first.startswith(f"{tmp_path.name[:40]}-") and run_id(tmp_path) == first


def test_a_package_that_raises_is_said_without_its_secrets(tmp_path, monkeypatch, caplog):
    """By the real process: here a run whose configuration is not there."""
    secret = "0123456789abcdef" * 2
    folder = tmp_path / secret
    folder.mkdir()
    monkeypatch.setenv("WANDB_API_KEY", secret)
    order = {"run": str(folder), "project": "p", "online": False}
    with Trackers([ServiceTracker("nobody", order, Ending(), print)]) as trackers:
        trackers.start(0)
    assert "tracking: nobody failed (TrackingError: KeyError: 'nobody')" in caplog.text
    (folder / "tracking" / "run_id").write_text("x")
    caplog.clear()
    order = {"run": str(folder), "project": "p", "online": False, "id": json.dumps(None)}
    monkeypatch.setattr(tracking, "run_id", lambda run: "x")
    with Trackers([ServiceTracker("broken", order, Ending(), print, [sys.executable, "-c", BROKEN])]) as trackers:
        trackers.start(0)
    assert secret not in caplog.text and "<WANDB_API_KEY>" in caplog.text


BROKEN = """
from kat_ray.tracking import follow, service
import os, sys
class Broken(service.Service):
    def open(self, shown): raise ValueError("key " + os.environ["WANDB_API_KEY"] + " is refused")
sys.modules["broken"] = sys.modules[__name__]
follow.SERVICES["broken"] = ("broken", "Broken")
import pathlib, json
run = pathlib.Path(json.loads(sys.argv[1])["run"])
(run / "config.yaml").write_text("a: 1")
follow.main()
"""


def test_what_is_named_is_there_or_refused(tmp_path, monkeypatch):
    check_trackers(TrackingConfig(to=("tensorboard",), online=True), ("tensorboard",), {})
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.to: wandb is not installed: pip install 'kat-ray\[wandb\]'"):
        check_trackers(TrackingConfig(to=("wandb",)), ("wandb",), {})
    here = SimpleNamespace(origin="/there/__init__.py")
    monkeypatch.setattr(choice, "find_spec", lambda name: here)
    for name, variable in (("mlflow", "MLFLOW_TRACKING_URI"), ("trackio", "TRACKIO_SERVER_URL")):
        check_trackers(TrackingConfig(to=(name,)), (name,), {})
        check_trackers(TrackingConfig(to=(name,), online=True), (name,), {variable: "http://127.0.0.1:1"})
        with pytest.raises(UserError, match=rf"tracking\.online = true: {name} needs an address .*{variable}"):
            check_trackers(TrackingConfig(to=(name,), online=True), (name,), {})


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    """wandb leaves one where it is run."""
    (tmp_path / "swanlab").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert choice.find_spec("swanlab") is not None and not choice._is_installed("swanlab")


def test_the_command_line_and_the_configuration_know_the_same_trackers(tmp_path, capsys):
    assert {*SERVICES} == {*follow.SERVICES} == {*get_args(TrackerName)} - {"tensorboard"}
    (tmp_path / "config.yaml").write_text(config_yaml(load_config("demo")))
    assert cli.main(["track", str(tmp_path / "nobody"), "--to", "wandb"]) == 2
    said = capsys.readouterr().err
    assert "nobody: not a run directory" in said and "name one, such as runs/latest" in said
    assert cli.main(["track", str(tmp_path)]) == 2
    assert "its tracking.to names none of wandb, mlflow" in capsys.readouterr().err


def test_a_finished_run_is_told_by_the_command_line(tmp_path, monkeypatch, capsys):
    """Its exit code says whether the tracker took it."""
    (tmp_path / "config.yaml").write_text(config_yaml(load_config("demo")))
    monkeypatch.setattr(choice, "find_spec", lambda name: SimpleNamespace(origin="there"))
    real = choice.ServiceTracker
    for code, expected in ((IN_FULL, 0), (FAILS, 1)):
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(choice, "ServiceTracker", lambda *given, c=command: real(*given, command=c))
        assert cli.main(["track", str(tmp_path), "--to", "wandb", "--project", "mine"]) == expected
    assert "tracking: wandb: the end" in capsys.readouterr().out
