"""Pod security, network, storage and grace of every profile's pods."""

import pytest
import yaml

from tests.deploy.manifests import CHART, PROFILES, ROOT, job_config, one, ray_cluster, ray_pods, render
from tests.deploy.pod_security import restricted_errors

every_profile = pytest.mark.parametrize("profile", PROFILES)


@every_profile
def test_pods_are_restricted(profile):
    for name, pod in ray_pods(render(profile)).items():
        assert list(restricted_errors(pod)) == [], name


def test_the_pod_for_files_is_restricted():
    pod = yaml.safe_load((ROOT / "deploy/kuberay/files.yaml").read_text())
    assert list(restricted_errors(pod)) == []


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("pod", "hostNetwork", True),
        ("context", "readOnlyRootFilesystem", False),
        ("context", "runAsUser", 0),
        ("context", "capabilities", {"add": ["SYS_ADMIN"]}),
        ("context", "seccompProfile", {"type": "Unconfined"}),
        ("context", "allowPrivilegeEscalation", True),
    ],
)
def test_a_pod_that_is_not_is_noticed(where, field, value):
    pod = ray_pods(render("smoke"))["head"]
    spec = pod["spec"]
    (spec if where == "pod" else spec["containers"][0]["securityContext"])[field] = value
    assert len(list(restricted_errors(pod))) == 1


@every_profile
def test_whatever_is_written_is_on_a_volume(profile):
    for name, pod in ray_pods(render(profile)).items():
        (container,) = pod["spec"]["containers"]
        mounts = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        paths = [e["value"] for e in container["env"] if str(e.get("value", "")).startswith("/")]
        assert paths, name
        assert all(any(p == m or p.startswith(m + "/") for m in mounts) for p in paths), name
        assert "/tmp" in mounts
        volumes = {v["name"] for v in pod["spec"]["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == volumes


@every_profile
def test_the_autoscaler_is_confined_too(profile):
    cluster = ray_cluster(render(profile))
    if not cluster["enableInTreeAutoscaling"]:
        assert "autoscalerOptions" not in cluster
        return
    options = cluster["autoscalerOptions"]
    pod = cluster["headGroupSpec"]["template"]
    autoscaler = {"name": "autoscaler", "securityContext": options["securityContext"]}
    pod["spec"]["containers"] = [autoscaler]
    assert list(restricted_errors(pod)) == []
    assert options["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert "tmp" in {v["name"] for v in pod["spec"]["volumes"]}


@every_profile
def test_only_the_autoscaler_gets_a_kubernetes_token(profile):
    docs = render(profile)
    autoscaled = ray_cluster(docs)["enableInTreeAutoscaling"]
    for name, pod in ray_pods(docs).items():
        mounted = pod["spec"].get("automountServiceAccountToken", True)
        assert mounted == (name == "head" and autoscaled), name


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items()


def open_ports(docs, labels):
    """Who may reach which ports of a pod with these labels: {peer: ports or None for all}."""
    out = {}
    policies = [d["spec"] for d in docs if d["kind"] == "NetworkPolicy"]
    selecting = [p for p in policies if selects(p["podSelector"], labels)]
    assert selecting, f"no policy selects {labels}: all its ports are open"
    for rule in (rule for p in selecting for rule in p.get("ingress", [])):
        ports = frozenset(port["port"] for port in rule["ports"]) if "ports" in rule else None
        for peer in rule["from"]:
            labels_of_peer = peer["podSelector"]["matchLabels"]
            name = labels_of_peer.get("app.kubernetes.io/component") or labels_of_peer.get("app.kubernetes.io/name")
            out[name or "nodes"] = ports
    return out


@every_profile
def test_ports_are_open_to_their_users_only(profile):
    docs = render(profile)
    for name, pod in ray_pods(docs).items():
        labels = dict(pod["metadata"]["labels"])
        if name == "submitter":
            assert open_ports(docs, labels) == {}
            continue
        labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head" if name == "head" else "worker"}
        expected = {"nodes": None, "prometheus": {8080, 44217, 44227}}
        if name == "head":
            expected |= {"submitter": {8265}, "kuberay-operator": {8265}}
        assert open_ports(docs, labels) == expected


def test_a_client_can_be_let_in():
    peer = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "notebook"}}}
    docs = render("interactive", {"networkPolicy": {"clients": [peer]}})
    labels = ray_pods(docs)["head"]["metadata"]["labels"] | {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head",
    }
    assert open_ports(docs, labels)["notebook"] == {8265}


def test_no_secret_is_in_the_chart():
    for profile in PROFILES:
        assert not [d for d in render(profile) if d["kind"] == "Secret"]
    docs = render("run", {"hub": {"secretName": "hub"}, "auth": {"secretName": "token"}})
    env = {e["name"]: e for e in ray_pods(docs)["sampler"]["spec"]["containers"][0]["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert ray_cluster(docs)["authOptions"] == {"mode": "token", "secretName": "token"}


@every_profile
def test_every_cluster_asks_for_a_token(profile):
    assert ray_cluster(render(profile))["authOptions"]["mode"] == "token"


@pytest.mark.parametrize(
    ("profile", "config", "overrides", "needed"),
    [
        ("run", {}, [], 60),
        ("run", {"grace_seconds": 200.5}, [], 200.5),
        ("run", {"grace_seconds": 200}, ["run.steps=5", "run.grace_seconds=300"], 300),
        ("run", {}, ["run.grace_seconds=900", "run.grace_seconds=30.5"], 30.5),
        ("smoke", {}, ["run.grace_seconds=120"], 120),  # the demo has no other place for it
        ("interactive", {"grace_seconds": 500}, [], 500),
    ],
)
def test_a_run_has_the_time_it_asks_for(profile, config, overrides, needed, tmp_path):
    changes = {"run": {"overrides": overrides} | ({"config": {"run": config}} if config else {})}
    docs = render(profile, changes)
    if profile != "interactive":
        assert job_config(docs, tmp_path).run.grace_seconds == needed, "the run itself asks for as much"
    for name, pod in ray_pods(docs).items():
        if name == "submitter":
            continue
        (container,) = pod["spec"]["containers"]
        env = {e["name"]: e.get("value") for e in container["env"]}
        kill = float(env["RAY_JOB_STOP_WAIT_TIME_S"])
        assert needed < kill < pod["spec"]["terminationGracePeriodSeconds"]
        if name in ("head", "learner"):
            *_, mode, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert mode == {"head": "stop", "learner": "wait"}[name]
            assert kill < float(seconds) < pod["spec"]["terminationGracePeriodSeconds"]
        else:
            assert "lifecycle" not in container


@pytest.mark.parametrize("profile", ["run", "queue", "smoke"])
def test_the_run_can_be_placed(profile, tmp_path):
    docs = render(profile, name="distill-7")
    config = job_config(docs, tmp_path)
    assert (config.run.name, config.run.dir, config.cluster.address) == ("distill-7", "/runs", "auto")
    groups = {g["groupName"]: g for g in ray_cluster(docs)["workerGroupSpecs"]}
    asked = {
        "learner": (config.learner.world_size, config.learner),
        "sampler": (config.sampler.replicas, config.sampler),
        "scorer": (config.scorer.replicas, config.scorer),
    }
    assert groups.keys() == asked.keys()
    for role, (replicas, placement) in asked.items():
        has = groups[role]["resources"]
        assert groups[role]["labels"] == {"kat.ray/role": role}
        per_node = int(float(has["CPU"]) // max(placement.num_cpus, 1))
        if placement.num_gpus:
            per_node = min(per_node, int(float(has["GPU"]) // placement.num_gpus))
        assert per_node * groups[role]["maxReplicas"] >= replicas, role


@every_profile
def test_ray_says_what_kubernetes_gives(profile):
    cluster = ray_cluster(render(profile))
    assert cluster["headGroupSpec"]["resources"]["CPU"] == "0"
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["resources"]["CPU"] == limits["cpu"]
        assert group["resources"].get("GPU") == limits.get("nvidia.com/gpu")


@every_profile
def test_no_eviction_takes_the_head_or_a_learner(profile):
    docs = render(profile)
    budgets = {d["metadata"]["name"].removeprefix("distill-"): d["spec"] for d in docs if "Budget" in d["kind"]}
    assert budgets["head"]["minAvailable"] == 1
    learners = next(g for g in ray_cluster(docs)["workerGroupSpecs"] if g["groupName"] == "learner")["minReplicas"]
    assert budgets.get("learner", {}).get("minAvailable", 0) == learners


def test_a_queue_starts_it():
    job = one(render("queue"), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "kat-ray"
    assert job["spec"]["suspend"] is True
    assert one(render("run"), "RayJob")["spec"]["suspend"] is False


def test_values_say_what_they_are():
    """Every top-level default is in the schema, and the other way round."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
