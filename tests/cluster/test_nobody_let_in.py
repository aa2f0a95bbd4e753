"""The command a user types, and what a stranger finds of it: loopback, a token, no secret in what it leaves."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from kat_ray.observability.redact import redact

pytestmark = pytest.mark.integration

SECRETS = {
    "HF_TOKEN": "hf_MARKEDhubTOKENxxxxxxxxxxxxxxxxxx",
    "WANDB_API_KEY": "MARKEDtracker0123456789abcdef0123456789",
    "RAY_AUTH_TOKEN": "MARKEDray" + "5c" * 28,
    "AWS_SECRET_ACCESS_KEY": "MARKEDaws/0123456789+abcdef",
}
TRAIN = (
    "train", "demo", "-v", "--profile", "run.steps=3", "run.dir=runs", "data.limit=60", "rollout.max_tokens=64",
    "rollout.prompts_per_step=8", "learner.world_size=2", "learner.num_cpus=0.5", "cluster.dashboard=true",
    "evaluation.data.limit=10", "evaluation.k=1", "termination.min_steps=1",
)  # fmt: skip


def environment(tmp_path, **more):
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    return kept | {"RAY_TMPDIR": str(tmp_path / "r"), **more}


def listeners(root):
    """(address, process name) of every socket on which a process below `root` takes calls."""
    found = set()
    for process in [root, *root.children(recursive=True)]:
        try:
            name = process.name()
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN or (socket.type == 2 and not socket.raddr):
                    found.add((socket.laddr.ip, name))
        except psutil.Error:  # it has just ended
            continue
    return found


@pytest.fixture(scope="module")
def short_folder():
    """Makes folders for Ray's sockets, whose paths have to be short: pytest's are 99 of 107 bytes for `root`."""
    with contextlib.ExitStack() as folders:
        yield lambda: Path(
            folders.enter_context(tempfile.TemporaryDirectory(prefix="kat-", ignore_cleanup_errors=True))
        )


# What the command line does, in one process and one Ray: a run, a score of its checkpoint. Then the Ray stays until
# a line comes in. Where it is and its token go to a file that the run knows nothing of.
KEPT = """
import contextlib, json, os, sys
from kat_ray.cli.main import _keep_others_out, main
from kat_ray.config.load import load_config

commands, where = json.loads(sys.argv[1]), sys.argv[2]
_keep_others_out(load_config("demo", []))  # as `main` would first of all: Ray reads the mode when it is imported
assert os.environ["RAY_AUTH_MODE"] == "token"
import ray
from actors.cluster.session import ray_session
from actors.driver import train
from tests.deploy.ray_process import agent_port_of_its_own

with contextlib.ExitStack() as sessions:
    @contextlib.contextmanager
    def kept(config):
        with agent_port_of_its_own():
            fixed_size = sessions.enter_context(ray_session(config))
        yield fixed_size

    train.ray_session = kept
    for command in commands:
        if code := main(command):
            sys.exit(code)
    gcs, dashboard = ray.get_runtime_context().gcs_address, ray._private.worker._global_node.webui_url
    with open(where + ".new", "w") as file:
        json.dump([gcs, dashboard, os.environ["RAY_AUTH_TOKEN"]], file)
    os.rename(where + ".new", where)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def trained(own_ray, short_folder):
    """A run with marked secrets in its environment, watched from outside: its folder, output and listeners, and its
    Ray, which stays: address, dashboard and token.
    """
    root, where = short_folder(), short_folder() / "where"
    commands = json.dumps([TRAIN, ["eval", "runs/latest", "--json"]])
    with (root / "out.txt").open("wb") as out:
        run = subprocess.Popen(
            [sys.executable, "-c", KEPT, commands, where], cwd=root, stdin=subprocess.PIPE, stdout=out,
            stderr=subprocess.STDOUT, env=environment(root, **SECRETS) | {"PYTHONPATH": str(Path.cwd())},
        )  # fmt: skip
        seen = set()
        try:
            while not where.exists():
                assert run.poll() is None, (root / "out.txt").read_text()
                seen |= listeners(psutil.Process(run.pid))
                time.sleep(3.0)  # a look takes a third of a second of a core
            yield root, (root / "out.txt").read_text(), seen, json.loads(where.read_text())
        finally:
            run.communicate(b"end\n", timeout=180)


def test_the_embedded_task_is_trained_and_what_it_leaves_is_scored(trained):
    root, text, *_ = trained
    for said in (
        "starting Ray",
        "evaluation of the teacher",
        "step 3/3",
        "student before",
        "student after",
        "checkpoint",
    ):
        assert said in text
    assert "Traceback" not in text
    summary = json.loads((root / "runs" / "latest" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["eval_before"]["problems"] == 10
    result = json.loads(text.splitlines()[-1])
    assert result["avg_at_k"] == summary["eval_after"]["avg_at_k"], "vLLM loads the checkpoint, and draws the same"


def test_everything_listens_on_loopback(trained):
    _, _, seen, _ = trained
    names = " ".join(name for _, name in seen)
    for role in (
        "gcs_server",
        "raylet",
        "DashboardAgent",
        "RuntimeEnvAgent",
        "Learner",
        "StudentSampler",
        "Monitor",
    ):
        assert role in names, f"{role} was not seen: {sorted(seen)}"
    open_ = {(ip, name) for ip, name in seen if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert not open_, "reached from other machines"


def test_secrets_are_nowhere_in_what_a_run_leaves(trained):
    root, text, _, (*_, token) = trained
    assert (root / "runs" / "demo" / "timeline.json").is_file() and list((root / "r").rglob("*.log"))
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(files) > 20
    for name, value in {**SECRETS, "RAY_AUTH_TOKEN": token}.items():
        assert value not in text
        holding = [str(p) for p in files if value.encode() in p.read_bytes()]
        assert not holding, f"{name} stands in them"


SAY_NO = """
import contextlib, io, json, sys
from kat_ray.cli.main import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def test_secrets_are_not_repeated_in_messages(tmp_path):
    commands = [
        ["train", "demo", "cluster.address=ray://me:{HF_TOKEN}@127.0.0.1:1"],
        ["train", "demo", "cluster.address=127.0.0.1:1?token={RAY_AUTH_TOKEN}"],
        ["train", "demo", "student.path=https://me:{HF_TOKEN}@hub/model"],
        ["train", "demo", "run.name={WANDB_API_KEY}", "run.stpes=3"],
        ["train", "{HF_TOKEN}.yaml"],
        ["eval", "{HF_TOKEN}", "--config", "demo"],
    ]
    given = [[a.format(**SECRETS) for a in arguments] for arguments in commands]
    done = subprocess.run(
        [sys.executable, "-c", SAY_NO, json.dumps(given)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environment(tmp_path, **SECRETS) | {"PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [v for v in SECRETS.values() if v in done.stdout + done.stderr]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands)
    for code, _, said in answers:
        assert code == 2 and said.startswith("error: "), said
        assert redact(said, SECRETS) == said
    assert not list(tmp_path.iterdir())


# --- the token -----------------------------------------------------------------------------------------------

CLIENT = """
import sys, ray

ray.init(address=sys.argv[1], log_to_driver=False)
print("let in", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""
INSIDE = "import ray; ray.init(); print('ran', ray.get(ray.remote(lambda: 6 * 7).remote()))"
JOB = """
import shlex, sys, time
from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient("http://" + sys.argv[1])
job = client.submit_job(entrypoint=sys.executable + " -c " + shlex.quote(sys.argv[2]))
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
for attempt in range(60):
    try:
        print(client.get_job_logs(job), client.get_job_info(job).runtime_env)
        break
    except RuntimeError:  # the agent is busy, or has no file yet
        time.sleep(1)
"""


def call(root, code, address, **variables):
    # A driver looks for its node at the machine's address on the network, where a cluster on loopback has none.
    variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return subprocess.run(
        [sys.executable, "-c", code, address, INSIDE], cwd=root, env=environment(root, **variables),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    "variables",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
    ids=["without", "wrong"],
)
def test_without_the_token_nobody_gets_in(trained, variables):
    root, _, _, (gcs, dashboard, _) = trained
    for code, address in ((CLIENT, gcs), (JOB, dashboard)):
        done = call(root, code, address, **variables)
        assert done.returncode != 0 and "let in" not in done.stdout and "ran 42" not in done.stdout, done.stdout
        assert "uthenticat" in done.stderr or "token" in done.stderr.lower(), done.stderr[-2000:]


@pytest.mark.parametrize(("token", "code"), [(None, 401), ("0" * 64, 403)])
def test_the_job_api_refuses_plain_calls(trained, token, code):
    *_, (_, dashboard, _) = trained
    body = json.dumps({"entrypoint": "touch broken-into"}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"http://{dashboard}/api/jobs/", body, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=120)
    assert refused.value.code == code


def test_with_the_token_a_job_runs(trained):
    root, _, _, (gcs, dashboard, token) = trained
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    client = call(root, CLIENT, gcs, **variables)
    assert client.returncode == 0 and "let in 42" in client.stdout, client.stderr[-2000:]
    job = call(root, JOB, dashboard, **variables)
    assert "ran 42" in job.stdout and token not in job.stdout, job.stderr[-2000:]


def test_open_ports_demand_a_token(monkeypatch):
    from actors.cluster.session import _bound_to
    from kat_ray.errors import UserError

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=r"cluster\.bind = all: .* RAY_AUTH_MODE"), _bound_to("all"):
        pass
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with _bound_to("all"):
        pass
