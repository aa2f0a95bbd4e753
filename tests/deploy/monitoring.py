"""The shipped alerts and dashboard, as data."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.deploy.manifests import ROOT

FOLDER = ROOT / "deploy/monitoring"

_FAMILY = re.compile(r'__name__=~"(ray_[a-z0-9_]+)\.\+"')
_NAME = re.compile(r"\bray_[a-z0-9_]+")


def alerts() -> list[dict[str, Any]]:
    """Every alert rule."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model."""
    return json.loads((FOLDER / "dashboard.json").read_text())


def dashboard_queries() -> dict[str, str]:
    """`panel title / refId` -> expression, for all runs."""
    return {
        f"{panel['title']} / {target['refId']}": target["expr"].replace("$run", ".*")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    }


def names_in(expression: str) -> set[str]:
    """Metrics that a query reads; other string literals and labels in `by (...)` are not among them.

    Of a family, how its names begin.
    """
    return set(_FAMILY.findall(expression)) | set(_NAME.findall(re.sub(r'"[^"]*"', "", expression)))
