"""What KubeRay's operator refuses although its CRDs accept it: the rules that this chart could break.

And one thing that it takes and that does not work: a head whose labels its own Service for a RayJob does not select
(common/job.go: BuildHeadServiceForRayJob).

From ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, Apache-2.0. Left out: RayService, RocksDB,
mTLS and the CRD's own network policies, which are alpha and which the chart does not use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
APPLICATION = "app.kubernetes.io/name"
MAX_NAME = {"RayCluster": 53, "RayJob": 47}
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_TOKEN_SINCE = (2, 52, 0)


def operator_errors(doc: Spec) -> list[str]:
    """What the operator would say of a RayJob or RayCluster."""
    return [*_name_errors(doc), *(_job_errors(doc) if doc["kind"] == "RayJob" else _cluster_errors(doc["spec"]))]


def _name_errors(doc: Spec) -> Iterator[str]:
    name, limit = doc["metadata"]["name"], MAX_NAME[doc["kind"]]
    if len(name) > limit:
        yield f"metadata.name: {len(name)} characters, at most {limit}"
    if not _DNS_LABEL.fullmatch(name):
        yield f"metadata.name: {name!r} is not a DNS label that begins with a letter"


def _job_errors(doc: Spec) -> Iterator[str]:
    spec = doc["spec"]
    mode, shutdown = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    if mode not in MODES:
        yield f"submissionMode: {mode!r} is none of {', '.join(MODES)}"
    if not shutdown and spec.get("suspend"):
        yield "suspend: needs shutdownAfterJobFinishes"
    if not shutdown and spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("deletionStrategy", {}).get("deletionRules") and shutdown:
        yield "deletionStrategy.deletionRules: not together with shutdownAfterJobFinishes"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit: not with InteractiveMode"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if field in spec:
                yield f"{field}: not with SidecarMode"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field}: must be positive"
    if not isinstance(spec.get("rayClusterSpec"), dict):
        yield "rayClusterSpec: missing, and no clusterSelector"
        return
    labels = spec["rayClusterSpec"]["headGroupSpec"]["template"].get("metadata", {}).get("labels", {})
    if labels.get(APPLICATION, "kuberay") != "kuberay":
        yield f"head: label {APPLICATION}={labels[APPLICATION]}: the RayJob's Service selects the head by kuberay"
    if spec["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: not for a RayJob"
    yield from _cluster_errors(spec["rayClusterSpec"])


def _cluster_errors(spec: Spec) -> Iterator[str]:
    autoscaled = bool(spec.get("enableInTreeAutoscaling"))
    v2 = autoscaled and spec.get("autoscalerOptions", {}).get("version") == "v2"
    head = spec["headGroupSpec"]
    yield from _group_errors("head", head, v2)
    for group in spec.get("workerGroupSpecs", []):
        name = group["groupName"]
        yield from _group_errors(name, group, v2)
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not autoscaled and (low is None or high is None):
            yield f"{name}: minReplicas and maxReplicas are needed without autoscaling"
        if low is not None and high is not None and low > high:
            yield f"{name}: minReplicas {low} > maxReplicas {high}"
        if "idleTimeoutSeconds" in group and not v2:
            yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
        if group.get("priority") and not v2:
            yield f"{name}: priority needs autoscaler v2"
        if group.get("suspend") and autoscaled:
            yield f"{name}: suspend is not possible with autoscaling"
    yield from _auth_errors(spec)
    yield from _redis_errors(spec)
    if spec.get("networkPolicy") or spec.get("tlsOptions"):
        yield "networkPolicy, tlsOptions: behind feature gates that are off by default"


def _group_errors(name: str, group: Spec, v2: bool) -> Iterator[str]:
    params = group.get("rayStartParams") or {}
    both = [p for p in ("num-cpus", "num-gpus", "memory", "resources") if p in params]
    if both and group.get("resources"):
        yield f"{name}: resources together with rayStartParams {', '.join(both)}"
    if "labels" in params:
        yield f"{name}: rayStartParams.labels; use labels"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            yield f"{name}: label {key}={value} is not a Kubernetes label"
    pod = group["template"]["spec"]
    if not pod.get("containers"):
        yield f"{name}: no container"
    if v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy {pod['restartPolicy']}; autoscaler v2 takes only Never"


def _auth_errors(spec: Spec) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") != "token":
        return
    version = spec.get("rayVersion", "")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"rayVersion: {version!r}; token mode needs one like 2.52.0"
    elif tuple(map(int, version.split("."))) < _TOKEN_SINCE:
        yield f"rayVersion: {version}; token mode needs 2.52.0 or later"


def _redis_errors(spec: Spec) -> Iterator[str]:
    head = spec["headGroupSpec"]
    container = (head["template"]["spec"].get("containers") or [{}])[0]
    env = {e["name"] for e in container.get("env", [])}
    tolerant = "gcsFaultToleranceOptions" in spec
    if not tolerant and "RAY_REDIS_ADDRESS" in env:
        yield "head: RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    if tolerant and env & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}:
        yield "head: Redis settings belong in gcsFaultToleranceOptions, not in env"
    if tolerant and (head.get("rayStartParams") or {}).keys() & {"redis-password", "redis-username"}:
        yield "head: Redis settings belong in gcsFaultToleranceOptions, not in rayStartParams"
