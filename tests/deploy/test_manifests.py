"""Every profile against the schemas of Kubernetes and KubeRay, and the operator's own rules; wrong ones refused."""

import copy

import kubernetes_validate
import pytest
import yaml

from tests.deploy.crd import crd_errors
from tests.deploy.manifests import (
    CHART,
    KUBERNETES,
    PROFILES,
    ROOT,
    helm,
    one,
    profile_values,
    ray_cluster,
    ray_pods,
    render,
)
from tests.deploy.operator_rules import APPLICATION, operator_errors

PROMETHEUS_KINDS = {"PodMonitor", "PrometheusRule"}

every_profile = pytest.mark.parametrize("profile", PROFILES)


@every_profile
def test_core_kinds_are_valid(profile):
    docs = [d for d in render(profile) if not d["apiVersion"].startswith("ray.io/")]
    core = [d for d in docs if d["kind"] not in PROMETHEUS_KINDS]
    assert {d["kind"] for d in core} >= {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget"}
    for doc in core:
        for version in KUBERNETES:
            kubernetes_validate.validate(doc, version, strict=True)


@every_profile
def test_pod_templates_are_valid_pods(profile):
    cluster = ray_cluster(render(profile))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)


def test_the_namespace_is_valid():
    docs = list(yaml.safe_load_all((ROOT / "deploy/kuberay/namespace.yaml").read_text()))
    assert [d["kind"] for d in docs] == ["Namespace", "PersistentVolumeClaim", "NetworkPolicy"]
    for doc in docs:
        kubernetes_validate.validate(doc, KUBERNETES[0], strict=True)
    claim = docs[1]["metadata"]["name"]
    assert claim == yaml.safe_load((CHART / "values.yaml").read_text())["storage"]["claim"]


def test_the_pod_for_files_is_valid():
    pod = yaml.safe_load((ROOT / "deploy/kuberay/files.yaml").read_text())
    for version in KUBERNETES:
        kubernetes_validate.validate(pod, version, strict=True)
    assert pod["spec"]["securityContext"] == ray_pods(render("run"))["head"]["spec"]["securityContext"]


@every_profile
def test_ray_kinds_are_valid(profile, crds):
    ray = [d for d in render(profile) if d["apiVersion"].startswith("ray.io/")]
    assert len(ray) == 1
    assert crd_errors(ray[0], crds) == []
    assert operator_errors(ray[0]) == []


@every_profile
def test_the_chart_lints(profile):
    report = helm.lint(CHART, profile_values(profile), strict=True)
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def changed(path, value, profile="run"):
    """A profile's RayJob with one field changed; `path` is dotted, numbers index lists."""
    doc = copy.deepcopy(one(render(profile), "RayJob"))
    at = doc
    *parents, last = path.split(".")
    for name in parents:
        at = at[int(name)] if name.isdigit() else at.setdefault(name, {})
    at[last] = value
    return doc


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.entrypiont", "x", "Additional properties"),
        ("spec.backoffLimit", "2", "is not of type 'integer'"),
        ("spec.rayClusterSpec.authOptions.mode", "password", "is not one of"),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3", "is not one of"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resource", {}, "Additional properties"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", 1.5, "is not of type 'integer'"),
        ("spec.rayClusterSpec.headGroupSpec.template", None, "is not of type 'object'"),
    ],
)
def test_the_crd_refuses(path, value, said, crds):
    doc = changed(path, value)
    (error,) = crd_errors(doc, crds)
    assert said in error


CLUSTER = "spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metadata.name", "x" * 48, "at most 47"),
        ("metadata.name", "1run", "begins with a letter"),
        ("spec.submissionMode", "K8sJob", "none of"),
        ("spec.submissionMode", "SidecarMode", "submitterPodTemplate"),
        ("spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished"),
        ("spec.deletionStrategy.deletionRules", [{"policy": "DeleteSelf"}], "deletionRules"),
        ("spec.activeDeadlineSeconds", 0, "must be positive"),
        (f"{CLUSTER}.authOptions.enableK8sTokenAuth", True, "not for a RayJob"),
        (f"{CLUSTER}.rayVersion", "2.51.0", "2.52.0 or later"),
        (f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}, "feature gates"),
        (f"{CLUSTER}.headGroupSpec.template.metadata.labels", {APPLICATION: "x"}, "selects the head by kuberay"),
        (f"{CLUSTER}.headGroupSpec.rayStartParams", {"num-cpus": "0"}, "together with rayStartParams"),
        (f"{CLUSTER}.headGroupSpec.template.spec.restartPolicy", "Always", "takes only Never"),
        (f"{GROUP}.rayStartParams", {"labels": "a=b"}, "use labels"),
        (f"{GROUP}.labels", {"kat.ray/role": "a b"}, "not a Kubernetes label"),
        (f"{GROUP}.minReplicas", 9, "> maxReplicas"),
        (f"{GROUP}.template.spec.restartPolicy", "OnFailure", "takes only Never"),
        (f"{GROUP}.template.spec.containers", [], "no container"),
        (f"{CLUSTER}.autoscalerOptions.version", "v1", "needs autoscaler v2"),
    ],
)
def test_the_operator_would_refuse(path, value, said):
    errors = operator_errors(changed(path, value))
    assert errors and all(said in e or path.endswith(("Mode", "version")) for e in errors)
    assert any(said in e for e in errors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"imagee": {}}, "imagee"),
        ({"workers": {"sampler": {"gpu": 1}}}, "gpu"),
        ({"workers": {"Sampler!": {}}}, "Sampler!"),
        ({"run": {"overrides": ["run.name=a; rm -rf /runs"]}}, "overrides"),
        ({"networkPolicy": {"operatorNamespace": ""}}, "operatorNamespace"),
        ({"security": {"userId": 0}}, "userId"),
        ({"head": {"memory": "8 GB"}}, "memory"),
    ],
)
def test_the_values_schema_refuses(changes, said):
    with pytest.raises(helm.HelmValuesError, match=said):
        render("run", changes)


@pytest.mark.parametrize(
    ("profile", "changes", "name", "said"),
    [
        ("run", {}, "r" * 48, "at most 47"),
        ("run", {}, "1run", "begin with a letter"),
        ("run", {"job": {"queue": "q"}}, "r", "Kueue cannot suspend an autoscaled job"),
        ("run", {"run": {"demo": True}}, "r", "leave run.config empty"),
        ("smoke", {"run": {"demo": False}}, "r", "run.config is empty"),
        ("queue", {"workers": {"sampler": {"maxReplicas": 3}}}, "r", "workers.sampler: without autoscaling"),
        ("run", {"workers": {"sampler": {"minReplicas": 9}}}, "r", "minReplicas 9 is larger"),
        ("smoke", {"run": {"overrides": ["run.grace_seconds=1e3"]}}, "r", "run.grace_seconds = 1e3"),
        ("run", {"run": {"overrides": ["run.grace_seconds=0"]}}, "r", "a number above 0"),
        ("run", {"run": {"config": {"run": {"grace_seconds": "long"}}}}, "r", "config.run.grace_seconds = long"),
        ("interactive", {"gcsFaultTolerance": {"redisAddress": ""}}, "r", "redisAddress is empty"),
    ],
)
def test_the_chart_refuses(profile, changes, name, said):
    with pytest.raises(helm.HelmRenderError, match=said):
        render(profile, changes, name)
