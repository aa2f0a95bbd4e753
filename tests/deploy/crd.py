"""Documents checked against CRDs as an API server does: unknown fields refused, defaults filled in.

KubeRay's, and those of Prometheus' operator where they lie in the same folder. Of what has no CRD file here, or
none at all (Grafana's dashboard), schemas/ holds the fields that we use.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

ENVIRONMENT = "KAT_RAY_CRDS"
WRITTEN = Path(__file__).with_name("schemas")


def crd_folder() -> Path | None:
    """Folder with crd-*.yaml, named by the environment; None where it is not."""
    folder = os.environ.get(ENVIRONMENT)
    return Path(folder) if folder else None


def json_schema(node: Any) -> Any:
    """An openAPIV3Schema as JSON schema: objects with properties closed, `required` without what has a default."""
    if isinstance(node, list):
        return [json_schema(n) for n in node]
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":  # names of fields, some of which are also keywords
            out[key] = {name: json_schema(field) for name, field in value.items()}
        elif key not in ("format", "default", "description") and not key.startswith("x-kubernetes"):
            out[key] = json_schema(value)
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    fields = node.get("properties")
    if isinstance(fields, dict) and node.get("type") == "object":
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
        if "required" in out:
            out["required"] = [name for name in out["required"] if "default" not in fields.get(name, {})]
    return out


@cache
def _validators(folder: Path) -> dict[tuple[str, str], Draft7Validator]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for path in sorted(folder.glob("crd-*.yaml")):
        crd = yaml.load(path.read_text(), Loader=loader)
        for version in crd["spec"]["versions"]:
            schema = json_schema(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, not the CRD's
            key = (crd["spec"]["names"]["kind"], f"{crd['spec']['group']}/{version['name']}")
            found[key] = Draft7Validator(schema)
    assert found, f"{ENVIRONMENT} = {str(folder)!r}: no crd-*.yaml there"
    return found


def has_crd(kind: str, folder: Path) -> bool:
    """Whether the folder holds the CRD of a kind."""
    return any(kind == known for known, _ in _validators(folder))


def crd_errors(doc: dict[str, Any], folder: Path) -> list[str]:
    """`path: message` of each mistake in a custom resource."""
    return _errors(_validators(folder)[doc["kind"], doc["apiVersion"]], doc)


@cache
def _written(name: str) -> Draft7Validator:
    schema = yaml.safe_load((WRITTEN / f"{name}.yaml").read_text())
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def written_errors(doc: dict[str, Any], name: str) -> list[str]:
    """The same for schemas/NAME.yaml."""
    return _errors(_written(name), doc)


def _errors(validator: Draft7Validator, doc: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(doc)]
