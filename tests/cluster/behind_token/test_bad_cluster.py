"""A cluster that cannot be used as asked: each time one message that says what to do, exit code 2, nothing left."""

import json
import shutil
import subprocess
import sys

import pytest

from kat_ray.cluster.auth import WHERE_FROM
from tests.deploy.manifests import ROOT
from tests.support.commands import refusal

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]

WRONG = "6d" * 32


@pytest.mark.parametrize(
    ("command", "variables", "words"),
    [
        ("train", {}, f"the cluster asks for a token, and none was sent. {WHERE_FROM}"),
        ("train", {"RAY_AUTH_MODE": "disabled"}, "none was sent (RAY_AUTH_MODE = disabled; unset it)"),
        ("train", {"RAY_AUTH_TOKEN": WRONG}, f"does not know this token (of RAY_AUTH_TOKEN). {WHERE_FROM}"),
        ("train", {"RAY_AUTH_TOKEN_PATH": "/no/such"}, "RAY_AUTH_TOKEN_PATH = /no/such: cannot be read"),
        # The other commands ask the dashboard: two of the refusals are in test_submit.
        ("list", {"RAY_AUTH_MODE": "disabled"}, "none was sent (RAY_AUTH_MODE = disabled; unset it)"),
        ("list", {"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE = token, but there is no token: "),
    ],
)
def test_without_its_token(cluster, call, command, variables, words):
    if command == "train":
        message = refusal(call("train", "demo", f"cluster.address={cluster.address}", **variables))
    else:
        message = refusal(call("list", "--address", f"http://127.0.0.1:{cluster.dashboard}", **variables))
    assert words in message


def test_a_run_is_let_in_with_the_token_and_told_what_the_cluster_lacks(cluster, call):
    few = ("sampler.replicas=9", "cluster.placement_timeout=3", "run.dir=/proc/nowhere")
    done = call("train", "demo", f"cluster.address={cluster.address}", *few, RAY_AUTH_TOKEN=cluster.token)
    assert "/proc/nowhere: cannot be written" in refusal(done), "past the cluster's door"


def test_the_dashboard_where_the_gcs_is_meant(cluster, call):
    message = refusal(
        call("train", "demo", f"cluster.address=127.0.0.1:{cluster.dashboard}", RAY_AUTH_TOKEN=cluster.token)
    )
    assert "no Ray cluster" in message and "ray start --head" in message


def test_the_gcs_where_the_dashboard_is_meant(cluster, call):
    given = refusal(call("list", "--address", cluster.address, RAY_AUTH_TOKEN=cluster.token))
    assert "speaks no HTTP: the GCS" in given and "--address http://127.0.0.1:8265" in given
    ours = refusal(call("list", RAY_ADDRESS=cluster.address, RAY_AUTH_TOKEN=cluster.token))
    assert f"RAY_ADDRESS = '{cluster.address}'" in ours and "its dashboard: --address" in ours


def test_the_address_that_is_given_goes_before_rays_own_variable(cluster, call):
    """Ray's client would ask RAY_ADDRESS instead: in a pod of KubeRay, another cluster than the one named."""
    address = f"http://127.0.0.1:{cluster.dashboard}"
    done = call("list", "--address", address, RAY_AUTH_TOKEN=cluster.token, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 0, done.stderr


PRETEND = """
import json, sys
import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

ray.init(address=sys.argv[1], log_to_driver=False)
truth = _internal_kv_get(CLUSTER_METADATA_KEY, namespace="cluster")
other = json.dumps(json.loads(truth) | json.loads(sys.argv[2]))
_internal_kv_put(CLUSTER_METADATA_KEY, other, overwrite=True, namespace="cluster")
print("pretends", flush=True)
sys.stdin.readline()
_internal_kv_put(CLUSTER_METADATA_KEY, truth, overwrite=True, namespace="cluster")
"""


def test_other_versions_than_the_clusters(cluster, call):
    """The cluster says of itself what an older one would; one version alone: test_joining."""
    other = {"ray_version": "2.9.1", "python_version": "3.9.1"}
    pretender = subprocess.Popen(
        [sys.executable, "-c", PRETEND, cluster.address, json.dumps(other)],
        env=cluster.environment("client"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert pretender.stdout.readline() == "pretends\n"
        message = refusal(call("train", "demo", f"cluster.address={cluster.address}", RAY_AUTH_TOKEN=cluster.token))
    finally:
        pretender.communicate("enough\n", timeout=60)
    assert "the cluster runs Ray 2.9.1 under Python 3.9.1, here is Ray " in message
    assert "install ray==" in message and "in the cluster's image" in message


@pytest.fixture
def submit(cluster, call, tmp_path_factory):
    """Submit a folder to the cluster and follow the job to its end."""

    def run(name, *files):
        folder = tmp_path_factory.mktemp("tree")
        for file in ("README", *files):
            (folder / file).touch()
        if "foreign" in files:
            shutil.copytree(ROOT / "kat_ray", folder / "kat_ray", ignore=shutil.ignore_patterns("demo", "*.pyc"))
        done = call(  # the agent that starts jobs comes up after the dashboard: it is waited for
            "submit", "demo", "run.dir=/runs", f"run.name={name}", "--working-dir", str(folder),
            "--address", f"http://127.0.0.1:{cluster.dashboard}", RAY_AUTH_TOKEN=cluster.token, seconds=240,
        )  # fmt: skip
        assert not [line for line in done.stderr.splitlines() if " INFO " in line or " WARNING " in line]
        return done

    return run


def test_an_image_without_the_package(submit, bare_python):
    done = submit("without")
    assert done.returncode == 1 and "job without-1: FAILED" in done.stdout, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "the image lacks the package: build it from docker/Dockerfile, or submit from a working tree"
    )


def test_another_python_than_rays_is_named_with_rays(submit):
    done = submit("foreign", "foreign")
    assert done.returncode == 2 and "job foreign-1: FAILED" in done.stdout, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    # The test's wrapper runs the same program as Ray does; in life they differ (tests/unit, test_interpreter).
    assert line.startswith(f"error: {sys.executable} (Python 3.") and "Ray runs under it too" in line, line
    assert "the cluster lacks a package" not in done.stdout, "said once"


def test_a_job_that_dies_at_once(submit):
    done = submit("dead", "killed")
    assert done.returncode == 137 and "job dead-1: FAILED" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("its driver was killed (SIGKILL), as happens for want of memory")
