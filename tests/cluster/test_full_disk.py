"""A disk that fills up while a run goes on: one message, and the last good checkpoint is what it goes on from."""

import os
import shutil
import subprocess

import pytest

from actors import run as job
from actors.bench.stub_teacher import stub_teacher
from actors.bench.stubs import fast_stub_engine
from actors.sampler_pool import Engines
from kat_ray.checkpoint import Checkpoints
from kat_ray.errors import UserError
from tests.cluster.disturb import steps_done
from tests.cluster.test_recovery import check_books, stub_config
from tests.cluster.test_run import files  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow
STUBS = Engines(fast_stub_engine, stub_teacher)
MIB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 90 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", place]).returncode:
        pytest.skip("needs to mount a file system of its own")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(ray_local, files, small_disk, monkeypatch):  # noqa: F811
    config = stub_config(
        files, small_disk, steps=12, run={"steps": 12, "checkpoint_every": 2, "tensorboard": False}
    )
    run, filler = small_disk / "run", small_disk / "filler"
    write_traces = job.RunDirectory.write_traces

    def fill(records, step, rows):
        if step == 5 and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        write_traces(records, step, rows)

    monkeypatch.setattr(job.RunDirectory, "write_traces", fill)
    with pytest.raises(UserError, match=r"(cannot be written|No space left on device)") as error:
        job.train(config, engines=STUBS)
    assert "intact" in str(error.value)
    assert steps_done(run / "metrics.jsonl") == 5
    loaded, notes = Checkpoints(run / "checkpoints", 3, True).newest()
    assert loaded is not None and loaded.step == 4 and not notes
    filler.unlink()
    monkeypatch.undo()
    assert job.train(config, resume=run, engines=STUBS) == run
    check_books(config, run)
