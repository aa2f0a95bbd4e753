"""Against a real Ray: the preStop hook stops a job and waits for its checkpoint.

A module of its own: no other Ray may be alive, whose agent would hold the port on which jobs are taken.
"""

import subprocess
import sys
import textwrap

import pytest

from tests.deploy.manifests import ROOT
from tests.deploy.ray_process import job_logs, ray_process, submitted, until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]

JOB = textwrap.dedent(
    """
    import pathlib, signal, sys, time
    def stop(*_):
        time.sleep(6)  # a checkpoint; Ray's own patience is 3 s
        pathlib.Path(sys.argv[1]).write_text("saved")
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    print("running", flush=True)
    time.sleep(600)
    """
)


def drain(dashboard, mode, seconds):
    script = ROOT / "deploy/kuberay/chart/files/drain.py"
    environment = {"PATH": "/usr/bin:/bin", "KAT_RAY_DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    environment |= {"RAY_AUTH_MODE": "disabled", "HOME": "/tmp"}
    command = [sys.executable, str(script), mode, str(seconds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_hook_stops_a_job_and_waits_for_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "30")
    (tmp_path / "job.py").write_text(JOB)
    saved = tmp_path / "saved"
    with ray_process("import time\ntime.sleep(600)", tmp_path / "ray.log") as (dashboard, _, _):
        jobs, job = submitted(dashboard, f"{sys.executable} {tmp_path / 'job.py'} {saved}")
        until(lambda: "running" in job_logs(jobs, job), 300, "the job runs")
        waited = drain(dashboard, "wait", 2)
        assert waited.returncode == 1 and job in waited.stderr and not saved.exists()
        done = drain(dashboard, "stop", 60)
        assert done.returncode == 0, done.stderr
        assert saved.read_text() == "saved"
        assert jobs.get_job_status(job).is_terminal()
        assert drain(dashboard, "wait", 2).returncode == 0
    assert drain(dashboard, "stop", 2).returncode == 0, "no dashboard: nothing to wait for"
