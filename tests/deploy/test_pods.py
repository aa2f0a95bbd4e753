"""What a cluster asks of its pods: environment, annotations, volumes, further resources; and models fetched."""

import os
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from tests.deploy.crd import crd_errors
from tests.deploy.hub_server import COMMIT, Hub, hub_server
from tests.deploy.manifests import CHART, KUBERNETES, ROOT, helm, one, profile_values, ray_pods, render
from tests.deploy.operator_rules import operator_errors
from tests.deploy.pod_security import restricted_errors

EVERY = {
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HF_HOME", "value": "/scratch/hf"}],
    "envFrom": [{"secretRef": {"name": "trackers"}}],
    "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma", "team": "a"},
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]}}},
    "priorityClassName": "high", "runtimeClassName": "nvidia", "serviceAccountName": "reader", "ipcLock": True,
    "volumes": [{"name": "scratch", "hostPath": {"path": "/mnt/nvme"}}],
    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
}  # fmt: skip
LEARNER = {
    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "annotations": {"team": "b"},
    "priorityClassName": "highest",
    "ipcLock": False,
    "resources": {"rdma/hca": 1, "vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5120Mi"},
}


@pytest.fixture
def docs():
    return render("run", {"pods": EVERY, "workers": {"learner": LEARNER}, "annotations": {"owner": "me"}})


def env_of(pod):
    (container,) = pod["spec"]["containers"]
    names = [e["name"] for e in container["env"]]
    assert len(names) == len(set(names)), "each name once"
    return {e["name"]: e.get("value") for e in container["env"]}


def test_every_ray_pod_has_what_all_are_given(docs):
    pods = ray_pods(docs)
    for name in ("head", "sampler", "scorer"):
        pod = pods[name]
        (container,) = pod["spec"]["containers"]
        assert pod["metadata"]["annotations"] == EVERY["annotations"]
        for field in ("affinity", "priorityClassName", "runtimeClassName", "serviceAccountName"):
            assert pod["spec"][field] == EVERY[field], field
        assert container["envFrom"] == EVERY["envFrom"]
        assert EVERY["volumes"][0] in pod["spec"]["volumes"]
        assert EVERY["volumeMounts"][0] in container["volumeMounts"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert env_of(pod)["NCCL_DEBUG"] == "INFO" and env_of(pod)["HF_HOME"] == "/scratch/hf"
        assert env_of(pod)["VLLM_CACHE_ROOT"] == "/cache/vllm", "the chart's own stay"


def test_a_groups_own_goes_before(docs):
    pod = ray_pods(docs)["learner"]
    (container,) = pod["spec"]["containers"]
    assert pod["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma", "team": "b"}
    assert pod["spec"]["priorityClassName"] == "highest" and pod["spec"]["runtimeClassName"] == "nvidia"
    assert env_of(pod)["NCCL_DEBUG"] == "WARN"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, "refused where all may"
    for kind in ("requests", "limits"):
        got = container["resources"][kind]
        assert (got["rdma/hca"], got["vpc.amazonaws.com/efa"], got["hugepages-2Mi"]) == ("1", "4", "5120Mi")
    sampler = ray_pods(docs)["sampler"]["spec"]["containers"][0]
    assert "rdma/hca" not in sampler["resources"]["limits"]


def test_they_are_valid(docs, crds):
    job = one(docs, "RayJob")
    assert job["metadata"]["annotations"] == {"owner": "me"}
    assert crd_errors(job, crds) == [] and operator_errors(job) == []
    for name, pod in ray_pods(docs).items():
        for version in KUBERNETES:
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, version, strict=True)
        said = list(restricted_errors(pod))
        allowed = name in ("learner", "submitter")
        assert allowed != any("capabilit" in error.lower() for error in said), f"{name}: {said}"


def test_nothing_of_it_is_there_unasked():
    for pod in ray_pods(render("run")).values():
        spec = pod["spec"]
        unasked = {"affinity", "priorityClassName", "runtimeClassName", "serviceAccountName"} & spec.keys()
        assert not unasked and "annotations" not in pod["metadata"] and "envFrom" not in spec["containers"][0]


def test_a_private_registrys_secrets_go_to_every_pod():
    storage = {"modelsClaim": "models", "fetch": ["a/b"]}
    docs = render("run", {"image": {"pullSecrets": ["mine", "theirs"]}, "storage": storage})
    pods = ray_pods(docs) | {"fetch": one(docs, "Job")["spec"]["template"]}
    assert {"head", "learner", "submitter", "fetch"} <= pods.keys()
    for name, pod in pods.items():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "mine"}, {"name": "theirs"}], name
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, KUBERNETES[0], strict=True)
    assert not [pod for pod in ray_pods(render("run")).values() if "imagePullSecrets" in pod["spec"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pods": {"volumes": [{"name": "shm", "emptyDir": {}}]}}, "volumes"),
        ({"pods": {"env": [{"name": "A"}]}}, "env"),
        ({"pods": {"env": [{"name": "A", "value": 1}]}}, "value"),
        ({"pods": {"resources": {"rdma/hca": 1}}}, "resources"),
        ({"workers": {"learner": {"resources": {"nvidia.com/gpu": 2}}}}, "nvidia.com/gpu"),
        ({"workers": {"learner": {"resources": {"memory": "1Gi"}}}}, "memory"),
        ({"storage": {"modelsClaim": "m", "fetch": ["Qwen3-8B"]}}, "fetch"),
        ({"storage": {"modelsClaim": "m", "fetch": ["a/b; rm -rf /models"]}}, "fetch"),
    ],
)
def test_the_schema_refuses(changes, said):
    with pytest.raises(helm.HelmValuesError, match=said):
        render("run", changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pods": {"env": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}}, "RAY_AUTH_MODE is set by the chart"),
        (
            {"workers": {"sampler": {"env": [{"name": "WANDB_API_KEY", "value": "a"}]}}},
            "WANDB_API_KEY has the name",
        ),
        ({"storage": {"fetch": ["a/b"]}}, "name the claim"),
        ({"storage": {"claim": ""}}, "keep runs in a bucket"),
    ],
)
def test_the_chart_refuses(changes, said):
    with pytest.raises(helm.HelmRenderError, match=said):
        render("run", changes)


def test_a_run_in_a_bucket_needs_no_claim():
    docs = render("run", {"storage": {"claim": ""}, "run": {"overrides": ["run.dir=s3://my-bucket/runs"]}})
    for name in ("head", "sampler", "learner"):
        assert {"name": "runs", "emptyDir": {}} in ray_pods(docs)[name]["spec"]["volumes"]
    assert "run.dir=/runs" in (line := one(docs, "RayJob")["spec"]["entrypoint"])
    assert line.index("run.dir=s3://my-bucket/runs") > line.index("run.dir=/runs"), "the last one counts"


def test_a_secret_comes_by_reference():
    key = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}
    head = ray_pods(render("run", {"pods": {"env": [key]}}))["head"]
    assert key in head["spec"]["containers"][0]["env"]


# --- models that a job fetches ---------------------------------------------------------------------------------


def fetch_job(**hub):
    env = [{"name": "HF_ENDPOINT", "value": "https://hub.example"}, {"name": "HF_HOME", "value": "/models/hf"}]
    storage = {"modelsClaim": "models", "fetch": ["Qwen/Qwen3-8B@main", "a/b"]}
    return one(render("run", {"storage": storage, "hub": hub, "pods": {"env": env}}), "Job")


def test_models_are_fetched_before_any_gpu_is_asked_for():
    job = fetch_job(offline=True, secretName="hub")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    for version in KUBERNETES:
        kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]
    assert list(restricted_errors(pod)) == []
    (container,) = pod["spec"]["containers"]
    assert container["command"][-3:] == ["/models", "Qwen/Qwen3-8B@main", "a/b"]
    (models,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/models"]
    assert not models.get("readOnly"), "here they are written"
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert (env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("/tmp/huggingface", "0"), "offline are the pods that compute"
    assert env["HF_ENDPOINT"] == "https://hub.example" and "HF_TOKEN" in env
    assert not [d for d in render("run") if d["kind"] == "Job"]


def test_the_claim_is_the_one_that_the_profile_names():
    claim = yaml.safe_load((ROOT / "deploy/kuberay/models.yaml").read_text())
    kubernetes_validate.validate(claim, KUBERNETES[0], strict=True)
    assert claim["metadata"]["name"] == profile_values("teacher-70b")["storage"]["modelsClaim"]


FILES = {
    "config.json": b"{}", "model.safetensors": b"weights", "tokenizer.model": b"words", "LICENSE": b"mine",
    "original/consolidated.00.pth": b"the same", "consolidated.safetensors": b"again",
    "pytorch_model.bin": b"again",
}  # fmt: skip
TAKEN = {"config.json", "model.safetensors", "tokenizer.model", "LICENSE"}


def fetched(hub, folder, *wanted):
    """Run what the Job runs, as it runs it."""
    command = fetch_job()["spec"]["template"]["spec"]["containers"][0]["command"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", command[2], str(folder / "models"), *wanted],
        env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_model_is_there_whole_or_not_at_all(tmp_path):
    target, partial = tmp_path / "models/a/b", tmp_path / "models/.partial/a/b"
    with hub_server(Hub("a/b", FILES, breaks_at="model.safetensors")) as hub:
        broken = fetched(hub, tmp_path, "a/b@main")
        assert broken.returncode == 1 and "410" in broken.stderr, broken.stderr[-2000:]
        assert not target.exists() and partial.is_dir(), "a retry goes on there"
        hub.breaks_at = ""
        done = fetched(hub, tmp_path, "a/b@main")
        assert done.returncode == 0 and f"{target}: fetched, commit {COMMIT}" in done.stdout, done.stderr[-2000:]
        found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        assert {k: v for k, v in found.items() if not k.startswith(".")} == {k: FILES[k] for k in TAKEN}
        assert not partial.exists()
        hub.asked.clear()
        same = fetched(hub, tmp_path, "a/b", "a/b@main", f"a/b@{COMMIT}")
        assert same.stdout.splitlines() == [f"{target}: is there"] * 3 and hub.asked == [], "not fetched again"
        other = fetched(hub, tmp_path, "a/b@v2")
    assert other.returncode == 1 and f"{target}: is there, of revision {COMMIT} main, not v2" in other.stderr


def test_the_script_is_what_the_job_runs():
    command = fetch_job()["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[2].strip() == (CHART / "files/fetch_models.py").read_text().strip()
