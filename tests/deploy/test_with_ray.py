"""Against real servers: Prometheus scrapes a Ray and answers every query."""

import json
import shutil
import urllib.parse
import urllib.request

import pytest
import yaml

from kat_ray.metrics import METRICS
from kat_ray.prometheus import RUN_METRICS, exported_name
from tests.deploy.conftest import lacking
from tests.deploy.monitoring import FOLDER, alerts, dashboard_queries, names_in
from tests.deploy.ray_process import free_port, process, ray_process, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]

GPU = "ray_node_gpus_utilization"  # no GPU here

# A driver that reports a step a second, with an actor and an object, so that Ray's own metrics say something.
DRIVER = """
import time
from actors.ray_metrics import RayMetrics
from kat_ray.metrics import METRICS

@ray.remote(num_cpus=0)
class StudentSampler:
    def ready(self): return True

actor = StudentSampler.options(name="kat:sampler:0").remote()
ray.get(actor.ready.remote())
held = ray.put(b"0" * 1_000_000)
metrics = RayMetrics("proof", steps=1000)
for step in range(1, 1000):
    metrics.step(step, {name: 0.25 for name in METRICS} | {"guards/fired": 2.0, "kl/mean": 0.125})
    if step % 10 == 0:
        metrics.checkpoint()
    time.sleep(1)
"""


class Prometheus:
    """The HTTP interface of a server on loopback."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path, **query):
        url = f"{self.base}/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, expression):
        return [float(r["value"][1]) for r in self.get("query", query=expression)["result"]]

    def firing(self):
        return {a["labels"]["alertname"]: a for a in self.get("alerts")["alerts"] if a["state"] == "firing"}

    def up(self):
        try:
            return self.get("query", query="1")
        except OSError:
            return None


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A Ray that reports, and a Prometheus that has its metrics; yields the latter."""
    if shutil.which("prometheus") is None:
        lacking("prometheus is not installed (Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    with ray_process(DRIVER, folder / "ray.log") as (_, _, ray_folder):
        # The shipped configuration, in a hurry and with this Ray's list of ports.
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / "alerts.yaml")]
        (source,) = config["scrape_configs"][0]["file_sd_configs"]
        (listed,) = source["files"]
        source["files"] = [listed.replace("/tmp/ray", str(ray_folder))]
        source["refresh_interval"] = "1s"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
        ]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        with process(command, folder / "prometheus.log"):
            prometheus = Prometheus(port)
            until(prometheus.up, 30, "Prometheus answers")
            until(lambda: prometheus.values(exported_name("run/step")), 90, "the driver's gauges are scraped")
            yield prometheus


def test_every_metric_arrives(watched):
    for name in [*METRICS, *RUN_METRICS]:
        query = f'{exported_name(name)}{{run="proof",role="driver"}}'
        until(lambda query=query: watched.values(query), 30, query)
    assert watched.values(f"max by (run) ({exported_name('kl/mean')})") == [0.125]
    assert watched.values(exported_name("run/steps")) == [1000]


def test_every_query_of_the_dashboard_returns_data(watched):
    for where, expression in dashboard_queries().items():
        if GPU in names_in(expression):
            assert watched.values(expression) == []
            continue
        until(lambda e=expression: watched.values(e), 60, f"{where}: {expression}")


def test_every_metric_of_the_alerts_is_there(watched):
    for rule in alerts():
        watched.values(rule["expr"])  # HTTP 400 where Prometheus cannot evaluate it
        for name in names_in(rule["expr"]):
            until(lambda name=name: watched.values(name), 60, f"{rule['alert']}: {name}")
    assert watched.values('sum by (NodeAddress) (ray_spill_manager_objects_bytes{State="Spilled"})') == [0]


def test_an_alert_fires(watched):
    alert = until(lambda: watched.firing().get("KatGuardFired"), 60, "KatGuardFired fires")
    assert alert["annotations"]["summary"] == "2 collapse guards of proof have fired"
    assert "KatNoProgress" not in watched.firing()
