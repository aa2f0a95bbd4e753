"""A disk that fills up while a run goes on: one message, and the last good checkpoint is what it goes on from."""

import os
import shutil
import subprocess

import pytest

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_engine import fast_stub_engine
from actors.testing.stub_teacher import stub_teacher
from kat_ray.errors import UserError
from kat_ray.run.checkpoint import Checkpoints
from tests.cluster.disturb import steps_done
from tests.support.lacking import lacking
from tests.support.runs import QUICK, SINGLE, check_books, stub_config

pytestmark = pytest.mark.integration
REAL_LEARNER = Engines(fast_stub_engine, stub_teacher)


@pytest.fixture
def mounted():
    """Puts a file system of so many MiB at a place."""
    places = []

    def mount(place, mib):
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lacking(f"no file system can be mounted (needs root, and a container that may): {done.stderr.strip()}")
        places.append(place)
        return place

    if os.geteuid():
        lacking("mounting a file system needs root")
    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk):
    """All but a page of it; returns the file that does."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
    return filler


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(ray_local, files, tmp_path, mounted, monkeypatch):
    disk = mounted(tmp_path / "disk", 90)
    config = stub_config(
        files, disk, steps=12, run={"steps": 12, "checkpoint_every": 2, "tensorboard": False}, **SINGLE
    )
    run = disk / "run"
    write_traces = job.RunDirectory.write_traces

    def full(records, step, rows):
        if step == 5:
            fill(disk)
        write_traces(records, step, rows)

    monkeypatch.setattr(job.RunDirectory, "write_traces", full)
    with pytest.raises(UserError, match=r"(cannot be written|No space left on device)") as error:
        job.train(config, engines=QUICK)
    assert "intact" in str(error.value)
    assert steps_done(run / "metrics.jsonl") == 5
    loaded, notes = Checkpoints(run / "checkpoints", 3, True).newest()
    assert loaded is not None and loaded.step == 4 and not notes
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert job.train(config, resume=run, engines=QUICK) == run
    check_books(config, run)


@pytest.mark.nightly  # a write that fails in a checkpoint, without a run: test_checkpoint
def test_a_disk_that_is_full_while_the_learner_writes(ray_local, files, tmp_path, mounted, monkeypatch):
    """Checkpoints have a disk of their own, so that it is the learner's process whose writing fails."""
    config = stub_config(
        files, tmp_path, steps=6, run={"steps": 6, "checkpoint_every": 2, "tensorboard": False}, **SINGLE
    )
    run = tmp_path / "run"
    disk = run / "checkpoints"
    begin = Checkpoints.begin

    def full(checkpoints, step):
        if not disk.exists():
            mounted(disk, 64)
        partial = begin(checkpoints, step)
        if step == 4:
            fill(disk)
        return partial

    monkeypatch.setattr(Checkpoints, "begin", full)
    with pytest.raises(
        UserError, match=r"the checkpoint of step 4 to be written: .*No space left on device.*intact"
    ):
        job.train(config, engines=REAL_LEARNER)
    # The files are written while the next step goes on: that one was learnt before the error was heard of.
    assert steps_done(run / "metrics.jsonl") == 4 and list(run.glob("traces/**/step-*4.*"))
    assert not (disk / "step-4").exists()
    loaded, notes = Checkpoints(disk, 3, True).newest()
    assert loaded is not None and loaded.step == 2 and not notes
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert job.train(config, resume=run, engines=REAL_LEARNER) == run
    check_books(config, run)
