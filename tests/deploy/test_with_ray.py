"""Against real servers: a run trains on a local cluster, Prometheus scrapes it and answers every query."""

import json
import shutil
import sys
import urllib.parse
import urllib.request

import pytest
import yaml

from kat_ray.observability.metric_catalog import METRICS
from kat_ray.observability.prometheus import RUN_METRICS, exported_name
from tests.cluster.disturb import role_of
from tests.cluster.local_cluster import local_cluster, outside_port
from tests.deploy.monitoring import FOLDER, alerts, dashboard_queries, names_in
from tests.deploy.ray_process import free_port, process, until
from tests.support.lacking import lacking

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]

# What this run cannot have, and why; everything else must be there.
WITHOUT = {
    exported_name("rollout/budget"): "rule kat sets no budget",
    exported_name("reward/left_out_cut"): "a rollout that is cut has the reward of probes",
    exported_name("reward/left_out_failed"): "no engine gives a rollout up",
    exported_name("reward/left_out_not_graded"): "every prompt has a gold answer",
    exported_name("transfer/http_sent_bytes"): "the teacher is behind no server",
    exported_name("transfer/http_received_bytes"): "the teacher is behind no server",
    **{exported_name(name): "no completions are given" for name in METRICS if name.startswith("offpolicy/")},
    "ray_node_gpus_utilization": "no GPU here",
}

# The embedded pair in short steps: evaluated, rewarded, cut by KAT, checkpointed. It goes on until told to end.
# Elastic pools (that never change) report what they would decide on; one guard's limit is passed at once.
RUN = (
    "run.name=proof", "run.steps=100000", "run.checkpoint_every=1", "run.tensorboard=false", "evaluation.k=1",
    "evaluation.data.limit=4", "evaluation.teacher=false", "rollout.max_tokens=96", "rollout.prompts_per_step=6",
    "rollout.rollouts_per_prompt=4", "rollout.top_p=1.0", "objective.rl.weight=1.0",
    "objective.rl.cut_reward=probe_mean", "objective.rl.truncated=exclude",
    "objective.rl.filter_constant_groups=true", "objective.opd.final_weight=0.1",
    "objective.opd.anneal_steps=100000", "reward.functions={integer: 1.0}",
    "termination.min_steps=1", "termination.min_samples=16", "termination.probe_share=0.4",
    "sampler.kv_cache_gib=0.1", "sampler.max_replicas=2", "scorer.max_replicas=2", "pools.grow_after=100000",
    "pools.shrink_after=100000", "learner.threads=1", "guards.max_tokens_share=0", "guards.patience=1",
    "guards.constant_groups=null",
)  # fmt: skip
REPORTS = {"RAY_metrics_report_interval_ms": "5000"}  # instead of 10 s
KEPT = 20  # seconds after which what was set once must still be there; Ray alone forgets it after 10 to 15


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
def run(tmp_path_factory):
    """`kat-ray train` at work on a local cluster: the run's directory, the cluster, the driver's process."""
    folder = tmp_path_factory.mktemp("runs")
    with local_cluster(**REPORTS) as cluster:
        cluster.start_head(6, dashboard=True, options=[f"--metrics-export-port={outside_port()}"])
        where = [f"run.dir={folder}", f"cluster.address={cluster.address}"]
        command = [sys.executable, "-m", "kat_ray.cli", "train", "demo", *RUN, *where]
        with process(command, folder / "train.log", **REPORTS) as driver:
            yield folder / "proof", cluster, driver


@pytest.fixture(scope="module")
def watched(run, tmp_path_factory):
    """A Prometheus that has the run's metrics."""
    if shutil.which("prometheus") is None:
        lacking("prometheus is not installed (Debian: apt install prometheus)")
    _, cluster, driver = run
    folder = tmp_path_factory.mktemp("prometheus")
    # The shipped configuration, in a hurry and with this Ray's list of ports.
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yaml")]
    (source,) = config["scrape_configs"][0]["file_sd_configs"]
    (listed,) = source["files"]
    source["files"] = [listed.replace("/tmp/ray", str(cluster.folder))]
    source["refresh_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with process(command, folder / "prometheus.log"):
        prometheus = Prometheus(port)
        until(prometheus.up, 30, "Prometheus answers")

        def trains():
            assert driver.poll() is None, "the run ended early"
            return max(prometheus.values(exported_name("run/step")), default=0) >= 3

        until(trains, 240, "three steps of the run are scraped")
        yield prometheus


def recorded(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_every_metric_arrives_as_the_run_recorded_it(run, watched):
    path, *_ = run
    for name in [*METRICS, *RUN_METRICS]:
        query = f'{exported_name(name)}{{run="proof",role="driver"}}'
        if exported_name(name) in WITHOUT:
            assert watched.values(query) == []
            continue
        until(lambda query=query: watched.values(query), 60, query)
    (kl,) = watched.values(f"max by (run) ({exported_name('kl/mean')})")
    assert any(m.get("kl/mean") == pytest.approx(kl, rel=1e-9) for m in recorded(path))


def test_every_query_of_the_dashboard_returns_data(watched):
    for where, expression in dashboard_queries().items():
        if names_in(expression) & WITHOUT.keys():
            assert watched.values(expression) == []
            continue
        until(lambda e=expression: watched.values(e), 60, f"{where}: {expression}")


def test_every_metric_of_the_alerts_is_there(watched):
    for rule in alerts():
        watched.values(rule["expr"])  # HTTP 400 where Prometheus cannot evaluate it
        for name in names_in(rule["expr"]):
            until(lambda name=name: watched.values(name), 60, f"{rule['alert']}: {name}")
    assert watched.values('sum by (NodeAddress) (ray_spill_manager_objects_bytes{State="Spilled"})') == [0]


def test_the_actors_are_counted_by_state(watched):
    alive = watched.values('sum(ray_actors{Source="gcs",State=~"ALIVE.*",Name=~"StudentSampler|TeacherScorer"})')
    assert alive and alive[0] >= 2


def test_an_alert_fires(run, watched):
    *_, driver = run
    alert = until(lambda: watched.firing().get("KatGuardFired"), 60, "KatGuardFired fires")
    assert alert["annotations"]["summary"] == "1 collapse guards of proof have fired"
    assert "KatNoProgress" not in watched.firing()
    assert driver.poll() is None, "it fired for a run that goes on"


def test_a_run_that_stands_still_is_seen_to(run, watched):
    """What was set last is there however long ago that was: else KatNoProgress would have nothing to compare."""
    path, cluster, driver = run
    (sampler,) = [p for p in cluster.processes() if role_of(p) == "sampler"]
    sampler.suspend()
    try:
        since = f"time() - max by (run) ({exported_name('run/step_time')})"
        seen = until(lambda: [s for s in watched.values(since) if s > KEPT], 3 * KEPT, f"{since} > {KEPT}")
        checkpoint = watched.values(exported_name("run/checkpoint_time"))
        assert watched.values(exported_name("run/steps")) == [100_000]
    finally:
        sampler.resume()
    evaluation = recorded(path)[0]
    assert watched.values(exported_name("eval/avg_at_k")) == [pytest.approx(evaluation["eval/avg_at_k"])]
    assert len(seen) == 1 and driver.poll() is None
    assert checkpoint[0] > evaluation["time"] and list((path / "checkpoints").glob("step-*"))
