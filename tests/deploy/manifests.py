"""The chart rendered by Helm's own library, one profile at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

from kat_ray.config import Config
from kat_ray.config.load import load_config
from tests.support.paths import ROOT

CHART = ROOT / "deploy/kuberay/chart"
PROFILES = {path.stem: path for path in sorted((ROOT / "deploy/kuberay/profiles").glob("*.yaml"))}
NAMESPACE = "kat-ray"
KUBERNETES = ("1.28", "1.34")  # the oldest that the chart takes, and one of today

Manifest = dict[str, Any]


def merged(base: Manifest, changes: Manifest) -> Manifest:
    """What Helm does with several value files: mappings are merged, everything else replaced."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def profile_values(profile: str, changes: Manifest | None = None) -> Manifest:
    """The values file of a profile, with changes."""
    return merged(yaml.safe_load(PROFILES[profile].read_text()), changes or {})


def rendered(values: Manifest, name: str) -> dict[str, str]:
    """Template -> text, notes among them; helm_python's errors for values that the chart refuses."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return chart.render(values, name=name, namespace=NAMESPACE)


def render(profile: str, changes: Manifest | None = None, name: str = "distill") -> list[Manifest]:
    """Every document of a profile."""
    files = rendered(profile_values(profile, changes), name)
    texts = (text for path, text in sorted(files.items()) if path.endswith(".yaml"))
    return [doc for text in texts for doc in yaml.safe_load_all(text) if doc]


def notes(profile: str, name: str, changes: Manifest | None = None) -> str:
    """What `helm install` prints at its end."""
    files = rendered(profile_values(profile, changes), name)
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


def one(docs: list[Manifest], kind: str, suffix: str = "") -> Manifest:
    """The only document of a kind (whose name ends so)."""
    found = [d for d in docs if d["kind"] == kind and d["metadata"]["name"].endswith(suffix)]
    assert len(found) == 1, f"{len(found)} documents of kind {kind} ...{suffix}"
    return found[0]


def ray_cluster(docs: list[Manifest]) -> Manifest:
    """The RayClusterSpec of a profile, whichever kind it is."""
    ray = next(d for d in docs if d["kind"] in ("RayJob", "RayCluster"))
    spec = ray["spec"]
    return spec["rayClusterSpec"] if ray["kind"] == "RayJob" else spec


def ray_pods(docs: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by group: `head`, the worker groups, and a RayJob's `submitter`."""
    cluster = ray_cluster(docs)
    pods = {"head": cluster["headGroupSpec"]["template"]}
    pods |= {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}
    for job in (d for d in docs if d["kind"] == "RayJob"):
        pods["submitter"] = job["spec"]["submitterPodTemplate"]
    return pods


def job_config(docs: list[Manifest], folder: Path) -> Config:
    """The configuration that a job's entrypoint reads, overrides included."""
    command, mode, source, *overrides = one(docs, "RayJob")["spec"]["entrypoint"].split()
    assert (command, mode) == ("kat-ray", "train")
    if source != "demo":
        assert source == "/etc/kat-ray/config.yaml"
        text = next(d for d in docs if d["kind"] == "ConfigMap" and "config.yaml" in d["data"])
        (folder / "config.yaml").write_text(text["data"]["config.yaml"])
        source = str(folder / "config.yaml")
    return load_config(source, overrides)
