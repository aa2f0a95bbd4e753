"""deploy/kuberay/redis.yaml: valid, confined, reached by heads only, and its command run by a real Redis."""

import contextlib
import shutil
import socket

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, ROOT, one, profile_values, ray_cluster, ray_pods, render
from tests.deploy.pod_security import restricted_errors
from tests.deploy.ray_process import free_port, process, until
from tests.support.lacking import lacking

PASSWORD = "f00d" * 12  # as `openssl rand -hex 24` writes it


@pytest.fixture(scope="module")
def docs():
    return list(yaml.safe_load_all((ROOT / "deploy/kuberay/redis.yaml").read_text()))


def test_it_is_valid_and_confined(docs):
    assert [d["kind"] for d in docs] == ["Service", "StatefulSet", "NetworkPolicy"]
    for doc in docs:
        for version in KUBERNETES:
            kubernetes_validate.validate(doc, version, strict=True)
    pod = one(docs, "StatefulSet")["spec"]["template"]
    pod["spec"]["volumes"] = []  # the set's claims
    assert list(restricted_errors(pod)) == []


def test_the_profile_finds_it(docs):
    """Address, Secret, labels and who is let in are the same names on both sides."""
    tolerant = profile_values("interactive")["gcsFaultTolerance"]
    service = one(docs, "Service")
    assert (
        tolerant["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    container = one(docs, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert secret == tolerant["passwordSecret"]
    options = ray_cluster(render("interactive"))["gcsFaultToleranceOptions"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    labels = one(docs, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == one(docs, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    (rule,) = one(docs, "NetworkPolicy")["spec"]["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["podSelector"]["matchExpressions"]
    assert expression["key"] == "ray.io/node-type" and "worker" not in expression["values"]


def test_a_redis_without_a_password(docs):
    changes = {"gcsFaultTolerance": {"redisAddress": "rediss://10.0.0.5:6380", "passwordSecret": {"name": ""}}}
    options = ray_cluster(render("interactive", changes))["gcsFaultToleranceOptions"]
    assert options == {"redisAddress": "rediss://10.0.0.5:6380"}


def test_its_command_asks_for_the_password(docs, tmp_path):
    if shutil.which("redis-server") is None:
        lacking("redis-server is not installed (Debian: apt install redis-server)")
    container = one(docs, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    port = free_port()
    (script,) = container["args"]
    assert "--dir /data " in script
    script = script.replace("--dir /data ", f"--dir {tmp_path} --bind 127.0.0.1 --port {port} ")

    def said(text):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(text.encode())
            return connection.recv(100).decode()

    with process([*container["command"], script], tmp_path / "log", REDIS_PASSWORD=PASSWORD) as redis:
        assert until(lambda: said("PING\r\n"), 30, "Redis answers").startswith("-NOAUTH")
        assert said("AUTH guess\r\n").startswith("-WRONGPASS")
        assert said(f"AUTH {PASSWORD}\r\n").startswith("+OK")
        with open(f"/proc/{redis.pid}/cmdline") as line:
            command = line.read()
    assert "redis-server" in command, "it is the process that is told to end, not a shell before it"
    assert PASSWORD not in command


def test_a_head_has_the_labels_that_the_operators_services_select():
    """By app.kubernetes.io/name it finds the head of a RayJob; it sets that itself where nobody else does."""
    for profile in ("run", "interactive"):
        for name, pod in ray_pods(render(profile)).items():
            has = "app.kubernetes.io/name" in pod["metadata"]["labels"]
            assert has == (name == "submitter"), name
