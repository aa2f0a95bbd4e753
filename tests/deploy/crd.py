"""Documents checked against KubeRay's CRDs as an API server does: unknown fields refused, defaults filled in."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

ENVIRONMENT = "KAT_RAY_CRDS"


def crd_folder() -> Path | None:
    """Folder with crd-*.yaml of KubeRay 1.7, named by the environment; None where it is not."""
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
            key = (crd["spec"]["names"]["kind"], f"ray.io/{version['name']}")
            found[key] = Draft7Validator(schema)
    assert found, f"{ENVIRONMENT} = {str(folder)!r}: no crd-*.yaml there"
    return found


def crd_errors(doc: dict[str, Any], folder: Path) -> list[str]:
    """`path: message` of each mistake in a document of group ray.io."""
    validator = _validators(folder)[doc["kind"], doc["apiVersion"]]
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(doc)]
