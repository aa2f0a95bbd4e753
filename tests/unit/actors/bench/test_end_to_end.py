"""The arithmetic of the end-to-end comparison; nothing is timed here."""

import json
import os
import signal
import sys

import pytest

from actors.bench import end_to_end, sides
from actors.bench.sides import SideError, Size, Step
from tests.support.paths import ROOT

KAT = [Step(9, 90, 90, 0), Step(2, 40, 30, 3, active=True), Step(3, 60, 50, 5, active=True)]
NONE = [Step(10, 100), Step(4, 100), Step(6, 100)]


def test_metrics_are_read_without_warm_up_and_evaluations():
    step = {
        "time/step": 2.5, "rollout/generated_tokens": 70.0, "rollout/kept_tokens": 60.0,
        "rollout/overshoot_tokens": 4.0,
    }  # fmt: skip
    entries = [{"eval/avg_at_k": 0.5}, step, step, {**step, "kat/threshold": 0.1}]
    assert sides.read_metrics(json.dumps(e) for e in entries) == [
        Step(2.5, 70, 60, 4, active=False),
        Step(2.5, 70, 60, 4, active=True),
    ]


def test_the_peers_steps_are_read_without_warm_up():
    result = {"steps": [{"seconds": 9.0, "tokens": 5}, {"seconds": 3.0, "tokens": 6, "cpu_seconds": 4.0}]}
    assert sides.read_peer(result) == [Step(3.0, 6)]


def test_the_peers_rewards_are_those_of_its_steps():
    steps = [{"seconds": 9.0, "tokens": 5}, {"seconds": 3.0, "tokens": 6}]
    assert sides.read_peer({"steps": steps, "rewards": [0.1, 0.25]}) == [Step(3.0, 6, reward=0.25)]


def test_rates_are_of_summed_tokens_and_seconds():
    value, detail = end_to_end.faster(NONE, [Step(10, 100), Step(20, 50)])
    assert value == pytest.approx((300 / 20) / (150 / 30))
    assert detail == {"kat_ray_tokens_per_second": 15.0, "peer_tokens_per_second": 5.0}


def test_only_steps_with_an_active_rule_are_compared():
    assert end_to_end.sooner(KAT, NONE)[0] == (4 + 6) / (2 + 3)
    value, detail = end_to_end.unsaved(KAT, NONE)
    assert (detail["time_ratio"], detail["token_ratio"]) == (5 / 10, 100 / 200)
    assert value == 0.0
    assert end_to_end.overshoot(KAT)[0] == 8 / 80
    with pytest.raises(SideError, match="not active"):
        end_to_end.unsaved(KAT[:1], NONE[:1])


def test_a_side_that_failed_leaves_its_figures_empty_and_says_why():
    runs = end_to_end.Runs(
        end_to_end.LONG, {"none": NONE, "kat": KAT}, {"peer": "no disk", "peer-vllm": "no engine"}
    )
    figures = {f.name: f for f in end_to_end._figures(runs, "")}
    empty = [f for f in figures.values() if f.value is None]
    assert len(empty) == 3 and all("no disk" in f.note or "no engine" in f.note for f in empty)
    saved = next(f for name, f in figures.items() if name.startswith("|step time"))
    assert saved.value == 0.0 and saved.met and saved.detail["kat_step_seconds"] == [9, 2, 3]


def test_a_child_that_fails_or_hangs_shows_its_last_lines(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(SideError, match=r"exit code 3; last lines:\nbad luck"):
        sides.run_child([sys.executable, "-c", "print('bad luck'); raise SystemExit(3)"], os.environ, 60, log)
    with pytest.raises(SideError, match=r"no result after 0\.5 s"):
        sides.run_child([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, 0.5, log)


def test_a_child_is_told_to_end_also_where_a_shell_started_all_in_the_background(tmp_path):
    """A shell has what it starts with & ignore SIGINT, and a child inherits that."""
    log = tmp_path / "log"
    says = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('told to end')); "
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SideError, match="no result"):
            sides.run_child(
                [sys.executable, "-ISu", "-c", says + "print('ready'); time.sleep(60)"], os.environ, 2, log
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.read_text() == "ready\ntold to end\n"


def test_the_sizes_are_those_of_the_goals():
    def work(size: Size):
        return size.pair, size.rollouts, size.max_tokens

    assert work(end_to_end.LONG) == ("tiny", 256, 512) and work(end_to_end.SHORT) == ("tiny", 48, 224)
    assert all(s.rollouts % s.micro_batch == 0 for s in (end_to_end.LONG, end_to_end.SHORT, end_to_end.LARGE))


def test_every_goal_that_is_missed_says_why():
    import json

    from actors.bench.command import markdown
    from actors.bench.limits import limit_of

    folder = ROOT / "docs"
    document = json.loads((folder / "benchmarks.json").read_text())
    missed = [f for group in document.values() for f in group["figures"] if f["met"] is False]
    assert missed and all(f["note"] or limit_of(f["name"]) for f in missed)
    assert markdown(document) == (folder / "benchmarks.md").read_text(), "write it anew: kat-ray bench"
