"""What Prometheus' operator and Grafana read, against schemas: unknown fields and wrong types refused."""

import copy

import pytest
import yaml

from tests.deploy.crd import crd_errors, has_crd, written_errors
from tests.deploy.manifests import PROFILES, one, render
from tests.deploy.monitoring import dashboard

KINDS = ("PodMonitor", "PrometheusRule")
MONITORED = [name for name, path in PROFILES.items() if "monitoring" in yaml.safe_load(path.read_text())]


@pytest.fixture(scope="module")
def documents():
    """Schema's name -> what is checked by it."""
    docs = render("run")
    return {kind.lower(): one(docs, kind) for kind in KINDS} | {"dashboard": dashboard()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", MONITORED)
def test_what_the_operator_reads_is_valid(profile, kind):
    doc = one(render(profile, {"monitoring": {"interval": "1m"}}), kind)
    assert written_errors(doc, kind.lower()) == []


def test_the_dashboard_is_valid(documents):
    assert {p["type"] for p in documents["dashboard"]["panels"]} == {"row", "timeseries", "stat"}
    assert written_errors(documents["dashboard"], "dashboard") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_crd_agrees(kind, crds, documents):
    """Where the folder of CRDs holds that of Prometheus' operator: docs/kubernetes.md says how to get it."""
    if not has_crd(kind, crds):
        pytest.skip(f"no CRD of {kind} in {crds}")
    assert crd_errors(documents[kind.lower()], crds) == []
    wrong = changed(documents[kind.lower()], "spec.intervall", "15s")
    assert crd_errors(wrong, crds), "it closes its objects"


def changed(doc, path, value):
    """A copy with one field set; `path` is dotted, or a tuple of names and numbers."""
    out = copy.deepcopy(doc)
    at = out
    if isinstance(path, str):
        path = tuple(int(name) if name.isdigit() else name for name in path.split("."))
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return out


def every_field(node, path=()):
    """Path and value of each field and item below a node."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in pairs:
        yield (*path, name), value
        yield from every_field(value, (*path, name))


def without_repetition(doc):
    """The same with one item of each shape in its lists: thirty panels are checked as three."""
    if isinstance(doc, dict):
        return {name: without_repetition(value) for name, value in doc.items()}
    if not isinstance(doc, list):
        return doc
    shapes = {str([path for path, _ in every_field(item)]) + str(type(item)): item for item in doc}
    return [without_repetition(item) for item in shapes.values()]


# Mappings in which any name may stand: of labels, not of fields.
FREE = ("labels", "annotations", "matchLabels")


@pytest.mark.parametrize("name", ["podmonitor", "prometheusrule", "dashboard"])
def test_no_field_takes_another_type_or_name(name, documents):
    """Each field of the document in turn: with a value of another type, and with a neighbour that nobody knows."""
    doc = without_repetition(documents[name])
    assert written_errors(doc, name) == []
    closed = 0
    for path, value in [((), doc), *every_field(doc)]:
        if path:
            wrong = 7.5 if isinstance(value, dict | list | str) else {"x": {}}
            assert written_errors(changed(doc, path, wrong), name), f"{path} = {wrong} is taken"
        if isinstance(value, dict) and not (path and path[-1] in FREE and name != "dashboard"):
            closed += 1
            assert written_errors(changed(doc, (*path, "namee"), "x"), name), f"{path} takes an unknown field"
    assert closed >= 5


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("podmonitor", "spec.podMetricsEndpoints.0.interval", "15 s", "does not match"),
        ("podmonitor", "spec.podMetricsEndpoints.0.port", 8080, "is not of type 'string'"),
        ("podmonitor", "spec.podMetricsEndpoints", [], "should be non-empty"),
        ("podmonitor", "spec.selector", {}, "'matchLabels' is a required property"),
        ("podmonitor", "apiVersion", "monitoring.coreos.com/v1alpha1", "was expected"),
        ("prometheusrule", "spec.groups.0.rules.0.for", "five minutes", "does not match"),
        ("prometheusrule", "spec.groups.0.rules.0.labels.severity", 1, "is not of type 'string'"),
        ("prometheusrule", "spec.groups.0.rules.0", {"alert": "A"}, "'expr' is a required property"),
        ("dashboard", "panels.0.gridPos.w", 25, "greater than the maximum"),
        ("dashboard", "panels.1.type", "graph", "is not one of"),
        ("dashboard", "panels.1.options", {}, "'legend' is a required property"),
        ("dashboard", "panels.1.targets.0.expr", "", "should be non-empty"),
        ("dashboard", "templating.list.0.hide", 4, "is not one of"),
    ],
)
def test_it_is_said_what_is_wrong(name, path, value, said, documents):
    errors = written_errors(changed(documents[name], path, value), name)
    assert any(said in error for error in errors), errors
