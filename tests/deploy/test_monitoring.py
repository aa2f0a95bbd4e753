"""Alerts and dashboard: metrics that exist, a model that Grafana reads, and every alert fires on its symptom."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from kat_ray.observability.metric_catalog import FAMILIES
from kat_ray.observability.prometheus import exported_name, exported_names
from tests.deploy.manifests import ROOT, one, render
from tests.deploy.monitoring import FOLDER, alerts, dashboard, dashboard_queries, names_in
from tests.support.lacking import lacking

RULES_TEST = ROOT / "tests/deploy/alerts_test.yaml"


def promtool(*arguments):
    if shutil.which("promtool") is None:
        lacking("promtool is not installed (Debian: apt install prometheus)")
    return subprocess.run(
        ["promtool", *map(str, arguments)], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_metric_exists():
    known = exported_names() | {exported_name(family) for family in FAMILIES}
    expressions = dashboard_queries() | {rule["alert"]: rule["expr"] for rule in alerts()}
    for where, expression in expressions.items():
        names = names_in(expression)
        assert names, f"{where}: no metric in {expression}"
        assert names <= known, f"{where}: {names - known}"


def test_a_wrong_metric_is_noticed():
    assert names_in('max by (run) (ray_kat_kl_meen{run=~"ray_x"}) / ray_actors') == {
        "ray_kat_kl_meen",
        "ray_actors",
    }
    assert names_in('max by (run) ({__name__=~"ray_kat_sauce_.+",run=~".*"})') == {"ray_kat_sauce_"}
    assert "ray_kat_kl_meen" not in exported_names()


def test_the_dashboard_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("make_dashboard", FOLDER / "make_dashboard.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    assert script.dashboard() == dashboard(), "run: python deploy/monitoring/make_dashboard.py"
    for name in ("alerts.yaml", "dashboard.json"):
        assert (script.CHART / name).read_text() == (FOLDER / name).read_text(), "run make_dashboard.py"


def test_grafana_can_read_it():
    model = dashboard()
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= model.keys()
    assert len({p["id"] for p in model["panels"]}) == len(model["panels"])
    assert [v["name"] for v in model["templating"]["list"]] == ["datasource", "run"]
    taken = set()
    for panel in model["panels"]:
        place = panel["gridPos"]
        assert panel["type"] in {"row", "timeseries", "stat"}
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
            assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    rows = [p["title"] for p in model["panels"] if p["type"] == "row"]
    assert rows == [
        "Is it learning?", "Do rewards rise?", "From which prompts and teachers?", "Is it healthy?",
        "Where does the time go?", "What does KAT save?",
    ]  # fmt: skip


def test_alerts_say_what_to_do():
    for rule in alerts():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert f"`{rule['alert']}`" in (ROOT / "docs/kubernetes.md").read_text()


def test_prometheus_takes_rules_and_config():
    for arguments in (("check", "rules", "alerts.yaml"), ("check", "config", "prometheus.yml")):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stderr


def test_prometheus_takes_every_query(tmp_path):
    """As a recording rule each: the parser is Prometheus' own."""
    rules = [{"record": f"q{i}", "expr": e} for i, e in enumerate(dashboard_queries().values())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert promtool("check", "rules", file).returncode == 0
    file.write_text(file.read_text().replace("max by (run)", "max by run", 1))
    assert promtool("check", "rules", file).returncode != 0


def test_every_alert_fires_and_keeps_silent():
    cases = yaml.safe_load(RULES_TEST.read_text())["tests"]
    expected = [(a["alertname"], bool(a.get("exp_alerts"))) for c in cases for a in c["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts()}
    assert {n for n, fires in expected if fires} == names, "each must be seen to fire"
    assert {n for n, fires in expected if not fires} == names, "and to keep silent"
    done = promtool("test", "rules", RULES_TEST)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("profile", ["run", "queue", "interactive"])
def test_the_chart_ships_the_same(profile):
    docs = render(profile)
    rule = one(docs, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    assert json.loads(one(docs, "ConfigMap", "-dashboard")["data"]["kat-ray.json"]) == dashboard()
    monitor = one(docs, "PodMonitor")
    assert rule["metadata"]["labels"]["release"] == monitor["metadata"]["labels"]["release"] == "prometheus"
    spec = monitor["spec"]
    assert spec.keys() == {"selector", "podMetricsEndpoints"}
    assert [e["port"] for e in spec["podMetricsEndpoints"]] == ["metrics", "as-metrics", "dash-metrics"]
    assert all(e.keys() == {"port", "interval", "relabelings"} for e in spec["podMetricsEndpoints"])


def test_without_the_prometheus_operator_nothing_of_it_is_made():
    assert not {d["kind"] for d in render("smoke")} & {"PodMonitor", "PrometheusRule"}
