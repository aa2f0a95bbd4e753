"""A run as users submit it: to a cluster of several nodes, behind a token, watched, stopped and gone on with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.disturb import lines_of
from tests.deploy.manifests import ROOT
from tests.deploy.ray_process import until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]

# The embedded task with stub engines (the `python` of the cluster's jobs), slow until this file lies where runs go.
# By role: each of them on the node made for it, the monitor on the head.
SEEN = "seen"
LONG = 4000  # steps, of which nobody waits for the last
SETTINGS = (
    "run.name=night", f"run.steps={LONG}", "run.checkpoint_every=4", "evaluation.data=null", "data.limit=60",
    "rollout.max_tokens=64", "rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=4",
    "rollout.top_k_logprobs=16", "guards={logprob_diff: null, tail_mass: null}",
    "cluster.by_role=true", "learner.world_size=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """The command line as on a user's machine: `run(token, arguments)`; and where runs go."""
    folder = tmp_path_factory.mktemp("runs")
    address = f"http://127.0.0.1:{cluster.dashboard}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}

    def call(*arguments, token=cluster.token, seconds=600):
        env = kept | ({"RAY_AUTH_TOKEN": token} if token else {})
        return subprocess.run(
            [sys.executable, "-m", "kat_ray.cli", *arguments, "--address", address],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip

    def jobs_taken():  # the agent that starts jobs comes up after the dashboard
        done = call("list")
        return done.returncode == 0 and done

    until(jobs_taken, 300, "the dashboard answers")
    call.folder = folder
    return call


def submit(run, *more, **options):
    return run("submit", "demo", f"run.dir={run.folder}", *SETTINGS, *more, **options)


def steps_of(run):
    return [m["step"] for m in lines_of(run.folder / "night" / "metrics.jsonl")]


# Of `train` and `list`: test_bad_cluster.
@pytest.mark.parametrize(
    "arguments, token, words",
    [
        (("submit", "demo", "run.dir=/runs"), None, "asks for a token"),
        (("stop", "night"), "6d" * 32, "does not know this token"),
    ],
)
def test_nobody_gets_in_without_the_token(run, arguments, token, words):
    done = run(*arguments, token=token)
    assert done.returncode == 2 and words in done.stderr and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_shows_where_the_roles_would_go(run):
    done = run("doctor", "demo", "--cluster", *SETTINGS, "scorer.num_gpus=1", "sampler.replicas=2")
    assert done.returncode == 1, done.stdout + done.stderr
    for role, node in (("learner", "learner"), ("monitor", "head")):
        assert re.search(rf"ok +{role}: 1 x .*on a node labelled kat.ray/role={node}: ", done.stdout), done.stdout
    assert re.search(r"FAIL +scorer: .*1 of 1 find no room; most that one node has left: 0 GPU", done.stdout)
    assert re.search(r"FAIL +sampler: .*1 of 2 find no room; most that one node has left: 0 sampler", done.stdout)


def actors(cluster):
    code = (
        "import json, sys\nfrom ray.util.state import list_actors, list_nodes\n"
        "a = sys.argv[1]\nroles = {n.node_id: n.labels.get('kat.ray/role') for n in list_nodes(a, detail=True)}\n"
        "print(json.dumps({x.name: roles[x.node_id] for x in list_actors(a) if x.state == 'ALIVE' and x.name}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"http://127.0.0.1:{cluster.dashboard}"],
        env=cluster.environment("client"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_is_submitted_watched_stopped_and_gone_on_with(run, cluster, browser):
    first = submit(run, "--no-wait")
    assert first.returncode == 0, first.stderr
    assert f"job night-1 is submitted: http://127.0.0.1:{cluster.dashboard}/#/jobs/night-1" in first.stdout

    again = submit(run, "--no-wait")
    assert again.returncode == 2 and "job night-1 is at it" in again.stderr

    until(lambda: len(steps_of(run)) >= 2, 300, "two steps")
    found = actors(cluster)
    assert {name: node for name, node in found.items() if name.startswith("kat:")} == {
        "kat:learner:0": "learner", "kat:sampler:0": "sampler", "kat:scorer:0": "scorer", "kat:monitor:0": "head",
    }  # fmt: skip
    assert {node for name, node in found.items() if not name.startswith("kat:")} == {"head"}
    status = run("status", "night")
    assert "status     RUNNING" in status.stdout and re.search(rf"last step +step +\d+/{LONG}", status.stdout)
    assert "placing actors" in run("logs", "night").stdout
    look_at_the_dashboard(cluster, browser)

    stopped = run("stop", "night")
    assert stopped.returncode == 0 and "its run is saved" in stopped.stdout, stopped.stdout + stopped.stderr
    done = max(steps_of(run))
    assert (run.folder / "night" / "checkpoints" / f"step-{done}").is_dir()
    assert "STOPPED" in run("status", "night-1").stdout
    assert "has ended before: STOPPED" in run("stop", "night").stdout

    (run.folder / SEEN).touch()
    second = submit(run, f"run.steps={done + 2}")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resuming {run.folder}/night after step {done}" in second.stdout
    assert "job night-2: SUCCEEDED" in second.stdout
    assert steps_of(run) == list(range(1, done + 3)), "each step once"
    listed = run("list").stdout
    assert re.search(r"night-1 +night +STOPPED", listed) and re.search(r"night-2 +night +SUCCEEDED", listed)
    check_log_lines(run, cluster)


def check_log_lines(run, cluster):
    """Each says whose it is: the driver's log, and what actors wrote into Ray's."""
    lines = (run.folder / "night" / "run.log").read_text().splitlines()
    assert all("[night driver]" in line for line in lines if re.match(r"\d{4}-\d\d-\d\d ", line))
    for role in ("learner", "sampler", "scorer"):
        files = (cluster.folder / role / "session_latest" / "logs").glob("worker-*.err")
        assert any(f"[night {role}:0]" in file.read_text(errors="replace") for file in files), role


@pytest.mark.nightly  # in a run of the same process: test_run; of a job, what its cluster lacks: test_bad_cluster
def test_a_role_without_a_node_is_named_by_the_job(run):
    done = submit(run, "run.name=nowhere", "scorer.labels={zone: mars}", "cluster.placement_timeout=5")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 x scorer could not be placed" in done.stdout and "no node is labelled" in done.stdout
    assert "zone=mars" in done.stdout and "job nowhere-1: FAILED" in done.stdout


def look_at_the_dashboard(cluster, browser):
    """Job and actors by name, in a browser; KAT_RAY_PICTURES names a folder for the picture of the docs."""
    page = f"http://127.0.0.1:{cluster.dashboard}"
    browser.get(page)
    browser.add_cookie({"name": "ray-authentication-token", "value": cluster.token})

    def text_of(part, *words):
        browser.get(f"{page}/#/{part}")
        browser.refresh()
        text = ""

        def shown():
            nonlocal text
            text = browser.execute_script("return document.body.innerText")
            return all(word in text for word in words)

        until(shown, 180, f"{words} on the dashboard's page {part}")

    text_of("jobs", "night-1", "RUNNING")
    text_of("actors", "kat:sampler:0", "kat:scorer:0", "kat:learner:0", "kat:monitor:0")
    if folder := os.environ.get("KAT_RAY_PICTURES"):
        browser.save_screenshot(str(Path(folder) / "dashboard-actors.png"))
