"""Write dashboard.json, and copy it and the alerts into the chart, whose files Helm reads from there only.

`python deploy/monitoring/make_dashboard.py` after a change here or in alerts.yaml: a test compares.

The dashboard answers questions, a row each: is it learning, do rewards rise, from which prompts and teachers does
it learn, is it healthy, where does the time go, what does KAT save.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_ray.observability.prometheus import exported_name

OUT = Path(__file__).with_name("dashboard.json")
CHART = OUT.parents[1] / "kuberay" / "chart" / "files"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, COLUMNS, HEIGHT = 24, 3, 7
# Grafana's own defaults, stated: its schema requires them of whoever writes a dashboard.
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    },
    "stat": {
        "graphMode": "area",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
}


def of(metric: str) -> str:
    """The newest value of one of our metrics, per run; WorkerId and node are aggregated away."""
    return f'max by (run) ({exported_name(metric)}{{run=~"$run"}})'


@dataclass(frozen=True)
class Panel:
    """One picture: `queries` are (legend, expression)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str
    kind: str = "timeseries"
    stacked: bool = False


def lines(title: str, unit: str, help: str, *metrics: str, stacked: bool = False) -> Panel:
    """Metrics of ours over time; the legend is the metric's own name."""
    return Panel(title, unit, tuple((m, of(m)) for m in metrics), help, stacked=stacked)


def family(title: str, unit: str, help: str, prefix: str) -> Panel:
    """All metrics that begin so, a line each: one for every source, reward function, teacher or held-out set."""
    expression = f'max by (run, __name__) ({{__name__=~"{exported_name(prefix)}.+",run=~"$run"}})'
    return Panel(title, unit, (("{{run}} {{__name__}}", expression),), help)


_ROLLOUTS = f"{of('rollout/generated_tokens')} / {of('rollout/mean_length')}"
_SAVED = (
    f"{of('rollout/trapped_share')} * {_ROLLOUTS} * {of('probe/tokens_after_cut')}"
    f" - {of('rollout/cut_back_tokens')} - {of('rollout/overshoot_tokens')}"
)
_WASTED = f"({of('rollout/cut_back_tokens')} + {of('rollout/overshoot_tokens')}) / {of('rollout/generated_tokens')}"
_STORE_SHARE = "ray_object_store_used_memory / (ray_object_store_used_memory + ray_object_store_available_memory)"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it learning?",
        (
            lines("Held-out accuracy", "percentunit", "Is the student better?", "eval/avg_at_k", "eval/pass_at_k"),
            lines("Reverse KL", "none", "Nats a token; it should fall.", "kl/mean", "kl/kept_mean", "learner/loss"),
            lines("Gradient norm", "none", "Before clipping.", "learner/grad_norm"),
            lines("Overlap of the top 16", "percentunit", "Among the teacher's.", "health/overlap"),
            lines(
                "Entropy", "none", "Nats. The student's falling far below the teacher's is a collapse.",
                "health/student_entropy", "health/teacher_entropy",
            ),
            lines(
                "Length", "none", "Tokens of a rollout and of a held-out answer.",
                "rollout/mean_length", "eval/mean_length",
            ),
        ),
    ),
    (
        "Do rewards rise?",
        (
            lines(
                "Reward", "none", "Of rollouts that count, and its spread within a prompt's group.",
                "reward/mean", "group/std",
            ),
            lines(
                "Groups that teach nothing", "percentunit", "All rewards the same; those without a right one.",
                "group/constant_share", "group/all_wrong_share",
            ),
            lines(
                "Length of answers", "none", "Tokens. Wrong ones that grow fill their limit.",
                "rl/length_right", "rl/length_wrong",
            ),
            lines(
                "Tokens of the policy", "percentunit", "Without advantage; cut rollouts'; of those at their limit.",
                "advantage/zero_share", "rl/cut_share", "rl/truncated_share",
            ),
            lines(
                "Ratio of learner to sampler", "none", "1 while both hold the same weights.",
                "rl/ratio_mean", "rl/ratio_max",
            ),
            lines(
                "Held or taken by the ratio", "percentunit", "Of the policy's tokens; effective is what is left.",
                "rl/clip_low_share", "rl/clip_high_share", "rl/effective_share",
            ),
            lines(
                "Learner and sampler apart, policy's tokens", "none", "Nats; and what the correction leaves out.",
                "rl/log_ratio_max", "rl/masked_share",
            ),
            lines("Advantages", "none", "Their mean size, and the largest.", "advantage/abs_mean", "advantage/max"),
            lines("Loss and entropy of the policy", "none", "Entropy in nats.", "rl/loss", "rl/entropy"),
            lines(
                "Rewards and teacher in the gradient", "percentunit",
                "Share of rewards; cosine of both, above 0 where they want the same.",
                "rl/grad_share", "rl/grad_cosine",
            ),
            lines(
                "Weights of the losses", "none", "Where they change along the run.",
                "objective/rl_weight", "objective/opd_weight",
            ),
            lines(
                "Left out of their groups", "none", "Rollouts without a reward or a weight.",
                "reward/left_out_cut", "reward/left_out_truncated", "reward/left_out_failed",
                "reward/left_out_not_graded", "reward/left_out_constant_group",
            ),
            lines(
                "Reward functions", "none", "Rollouts without a verdict, and seconds that the step waited for one.",
                "reward/errors", "reward/timeouts", "reward/seconds",
            ),
            lines(
                "Other prompts for constant groups", "none", "Batches sampled, groups missing, the smallest group.",
                "group/gen_batches", "group/missing", "group/size_min",
            ),
        ),
    ),
    (
        "From which prompts and teachers?",
        (
            family("Right answers by source", "percentunit", "Of graded rollouts.", "source/pass_rate/"),
            family("Reward by source", "none", "Mean.", "source/reward/"),
            family("Level by source", "none", "Of the curriculum's problems.", "source/level/"),
            family("Parts of the reward", "none", "Each function's mean, before its weight.", "reward/part/"),
            family("KL by teacher", "none", "Nats a token, of several teachers.", "teacher/kl_mean/"),
            family("Trapped by teacher", "percentunit", "Rollouts that the rule ended.", "teacher/trapped_share/"),
            family("Further held-out sets", "percentunit", "evaluation.sets.", "eval/avg_at_k/"),
            lines(
                "Completions of the data", "none", "Nats a token, of those that were not generated.",
                "offpolicy/loss", "offpolicy/nll",
            ),
            lines(
                "How many of them", "none", "Completions of a step, and those without an end within max_tokens.",
                "offpolicy/completions", "offpolicy/cut_off",
            ),
        ),
    ),
    (
        "Is it healthy?",
        (
            Panel("Steps done", "none", (("{{run}}", of("run/step")), ("of", of("run/steps"))), "", "stat"),
            Panel(
                "Since the last step", "s", (("{{run}}", f"time() - {of('run/step_time')}"),),
                "Alert KatNoProgress.", "stat",
            ),
            Panel(
                "Age of the newest checkpoint", "s", (("{{run}}", f"time() - {of('run/checkpoint_time')}"),),
                "What would be lost with the learner. Alert KatCheckpointTooOld.", "stat",
            ),
            lines(
                "How rollouts end", "percentunit", "Alert KatTrapRateRunsAway.",
                "rollout/eos_share", "rollout/max_tokens_share", "rollout/trapped_share", stacked=True,
            ),
            lines(
                "Mass on stop ids, and in the tail", "percentunit", "Alert KatEosCollapse.",
                "learner/stop_mass", "health/tail_mass", "learner/tail_mass",
            ),
            lines(
                "Learner and sampler apart", "none", "Nats; look here first when a run goes wrong.",
                "learner/logprob_diff_mean", "learner/logprob_diff_max",
            ),
            lines(
                "What went wrong", "none", "Guards, skipped steps, failed rollouts, dead actors.",
                "guards/fired", "learner/skipped", "rollout/failed", "run/restarts",
            ),
            Panel(
                "Actors by state", "none",
                (("{{Name}} {{State}}", 'sum by (Name, State) (ray_actors{Source="gcs"})'),),
                "Ray's count.",
            ),
            Panel(
                "Object store in use", "percentunit",
                (
                    ("{{NodeAddress}}", f"max by (NodeAddress) ({_STORE_SHARE})"),
                ),
                "Alerts KatObjectStoreFull and KatObjectsSpilled.",
            ),
        ),
    ),
    (
        "Where does the time go?",
        (
            lines(
                "A step", "s", "What the driver waited for.",
                "time/sample", "time/learn", "time/publish", "time/checkpoint", stacked=True,
            ),
            lines("Throughput", "none", "Tokens generated a second, whole steps.", "throughput/tokens_per_second"),
            lines(
                "Throughput by stage", "none", "Tokens a second of a busy sampler, a busy scorer, the learner.",
                "throughput/sampler", "throughput/scorer", "throughput/learner",
            ),
            lines("Stages", "s", "How long each was busy.", "time/sampler_busy", "time/scorer_busy", "time/learn"),
            lines("Idle", "percentunit", "Of the busiest stage: what is not overlapped.", "time/idle_share"),
            lines(
                "Decisions", "s", "From building a chunk to applying the decision on it.",
                "time/decision_mean", "time/decision_max", "time/score_wait",
            ),
            lines(
                "Bytes of a step", "bytes", "Of rollouts' records in the object store, and to teachers' servers.",
                "transfer/chunk_bytes", "transfer/score_bytes", "transfer/row_bytes", "transfer/http_sent_bytes",
                "transfer/http_received_bytes",
            ),
            lines("Staleness", "none", "Versions.", "rollout/staleness"),
            lines(
                "Pools", "none", "Samplers and scorers at work; the configuration may let them grow and shrink.",
                "pools/sampler_replicas", "pools/scorer_replicas",
            ),
            Panel(
                "CPU of the nodes", "percent", (("{{ip}}", "max by (ip) (ray_node_cpu_utilization)"),), "",
            ),
            Panel(
                "Memory of the nodes", "percentunit",
                (("{{ip}}", "max by (ip) (ray_node_mem_used / ray_node_mem_total)"),), "",
            ),
            Panel(
                "GPUs", "percent",
                (("{{ip}} {{GpuIndex}}", "max by (ip, GpuIndex) (ray_node_gpus_utilization)"),),
                "Where there are any.",
            ),
        ),
    ),
    (
        "What does KAT save?",
        (
            lines(
                "Tokens of a step", "none", "Kept, cut back, and generated before the abort took hold.",
                "rollout/kept_tokens", "rollout/cut_back_tokens", "rollout/overshoot_tokens", stacked=True,
            ),
            Panel(
                "Tokens saved in a step", "none", (("{{run}}", _SAVED),),
                "Estimate: trapped rollouts x what probes go on to generate after a cut, less what was cut back.",
            ),
            Panel(
                "Generated in vain", "percentunit", (("{{run}}", _WASTED),), "Cut back and overshoot.",
            ),
            lines("Threshold", "none", "Nats.", "kat/threshold", "kat/window_min_mean"),
            lines(
                "What probes say", "percentunit", "A false cut would have removed a right answer.",
                "probe/would_cut_share", "probe/false_cut_share", "probe/right_share", "probe/kl_lost_share",
            ),
            lines("KL after a cut", "none", "Nats a token; low means that nothing was lost.", "probe/kl_after_cut"),
        ),
    ),
)  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        stacked = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
        defaults["custom"] = stacked if panel.stacked else {"fillOpacity": 0}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH // COLUMNS, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": OPTIONS[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend if "{{" in legend else f"{{{{run}}}} {legend}",
            }
            for i, (legend, expression) in enumerate(panel.queries)
        ],
    }


def _variable(name: str, kind: str, query: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "query": query, "label": name, "hide": 0, **more}


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place})
        panels[-1]["panels"] = []
        y += 1
        for i, panel in enumerate(row):
            x = i % COLUMNS * (WIDTH // COLUMNS)
            panels.append(_panel(panel, len(panels) + 1, x, y + i // COLUMNS * HEIGHT))
        y += -(-len(row) // COLUMNS) * HEIGHT
    runs = f"label_values({exported_name('run/step')}, run)"
    return {
        "uid": "kat-ray",
        "title": "kat-ray",
        "tags": ["kat-ray", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                _variable("datasource", "datasource", "prometheus"),
                _variable(
                    "run", "query", runs, datasource=SOURCE, includeAll=True, multi=True, refresh=2, allValue=".*"
                ),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
    for shipped in (OUT, OUT.with_name("alerts.yaml")):
        shutil.copy(shipped, CHART)
    print(OUT)
