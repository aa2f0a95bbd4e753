"""Whole runs on real engines with other objectives than plain distillation: what is counted; resumes to the bit."""

import json
import shutil
from functools import partial
from itertools import islice

import numpy as np
import pytest

from actors.driver.train import train
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.data.prompt_order import given_places
from kat_ray.demo.problems import problems
from kat_ray.records.traces import read_traces
from kat_ray.run.resume import resumed_config
from tests.cluster.disturb import AtSteps, kill_named, named
from tests.support.runs import everything

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]
STEPS, PROMPTS = 3, 6
CASES = {
    "distillation": {
        "opd": {
            "divergence": "skewed_forward", "support": "teacher", "teacher_temperature": 0.8,
            "student_temperature": 1.5,
        },
        "off_policy": {"share": 0.4},
    },
    "jsd": {"opd": {"divergence": "jsd", "beta": 0.3}, "off_policy": {"share": 0.4}},
    "forward": {"opd": {"divergence": "forward"}, "off_policy": {"share": 0.4}},
    "sft": {"off_policy": {"share": 0.5, "loss": "sft", "weight": 0.5, "steps": 2}},
}  # fmt: skip


def config_of(folder, objective, steps=STEPS):
    rows = [
        {"id": f"p{i}", "prompt": p.prompt, "answer": str(p.answer), "solution": p.solution()}
        for i, p in enumerate(islice(problems("train", 5), 40))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = load_config("demo").model_dump(mode="json")
    tree["run"] |= {
        "dir": str(folder), "name": "run", "steps": steps, "checkpoint_every": 2, "deterministic": True,
        "tensorboard": False, "check_agreement": False,
    }  # fmt: skip
    tree["data"] |= {"path": str(folder / "prompts.jsonl"), "completion_column": "solution"}
    tree["rollout"] |= {"prompts_per_step": PROMPTS, "rollouts_per_prompt": 2, "max_tokens": 48}
    tree["termination"] |= {"min_samples": 8, "min_steps": 1, "probe_share": 0.3}
    tree["scorer"] |= {"num_cpus": 0.5}
    tree["sampler"] |= {"num_cpus": 0.5, "max_num_seqs": 32}
    tree["learner"] |= {"num_cpus": 0.5, "threads": 1}
    tree["evaluation"]["data"] = None
    for section, values in objective.items():
        tree["objective"][section] |= values
    return Config.model_validate(tree)


@pytest.mark.parametrize("case", CASES)
def test_a_run_counts_its_completions_apart_and_resumes_to_the_bit(tmp_path, case):
    config = config_of(tmp_path, CASES[case])
    path = train(config)
    steps = [m for m in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "learner/loss" in m]
    summary, traces = json.loads((path / "summary.json").read_text()), read_traces(path)
    places = [given_places(config, step) for step in range(STEPS)]
    assert [m.get("offpolicy/completions", 0) for m in steps] == [len(p) for p in places]
    assert [len(p) for p in places][:2] != [0, 0] and (case == "sft") == (not places[2])
    for step, own in enumerate(places):
        ids = [
            i
            for i, s in zip(traces["rollout_id"].to_pylist(), traces["step"].to_pylist(), strict=True)
            if s == step
        ]
        first = step * PROMPTS * 2
        assert ids == [first + i for i in range(PROMPTS * 2) if i // 2 not in own], "no completion is a rollout"
    with_some = [m for m in steps if "offpolicy/tokens" in m]
    assert all(np.isfinite(m["learner/loss"]) and m["learner/loss"] >= 0 for m in steps)
    assert all(0 < m["offpolicy/loss"] < 20 and not m["offpolicy/dropped_tokens"] for m in with_some)
    assert summary["given_tokens"] == sum(m["offpolicy/tokens"] for m in with_some) > 0
    assert (summary.get("given_scored_tokens", 0) > 0) == (case != "sft")
    assert summary["generated_tokens"] == sum(summary[f"{n}_tokens"] for n in ("kept", "overshoot", "cut_back"))
    assert summary["rollouts_started"] == 2 * (STEPS * PROMPTS - sum(map(len, places))) == len(traces)
    assert summary["scored_tokens"] == sum(len(d) for d in traces["d"].to_pylist()), (
        "no completion's are among them"
    )
    if case == "sft":
        assert all(m["offpolicy/loss"] == pytest.approx(m["offpolicy/nll"], rel=1e-5) for m in with_some)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")
    (copy / "summary.json").unlink()
    train(resumed_config(copy, []), resume=copy)
    assert everything(copy) == everything(path)


def test_a_scorer_dies_and_the_next_one_scores_what_is_left(tmp_path):
    """Of forward KL, with completions beside the rollouts: nothing of either is lost."""
    config, steps = config_of(tmp_path, CASES["forward"], steps=8), range(8)
    metrics, ended = tmp_path / "run" / "metrics.jsonl", named("kat:scorer:0")
    with AtSteps(metrics, (2, partial(kill_named, "kat:scorer:0", ended))) as killed:
        path = train(config)
    lines = [m for m in map(json.loads, metrics.read_text().splitlines()) if "learner/loss" in m]
    assert killed.done and killed.done[0] < 7 and sum(m["pool/restarts"] for m in lines) >= 1
    places = [len(given_places(config, step)) for step in steps]
    assert [m.get("offpolicy/completions", 0) for m in lines] == places
    assert all(np.isfinite(m["learner/loss"]) and not m["offpolicy/dropped_tokens"] for m in lines)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["rollouts_ended"]["failed"] == 0
    assert summary["rollouts_started"] == 2 * (len(steps) * PROMPTS - sum(places))
    assert summary["given_tokens"] == sum(m["offpolicy/tokens"] for m in lines)
