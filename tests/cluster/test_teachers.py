"""Runs with two teachers on real engines: the embedded task's, and a copy of it whose weights are noisy."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from actors.driver.train import train
from kat_ray.analysis.replay import load_traces
from kat_ray.analysis.replay_rules import reproduce
from kat_ray.config import Config
from kat_ray.config.load import DEMO_FILES, load_config
from kat_ray.run.resume import resumed_config
from kat_ray.termination import RunFacts
from tests.cluster.disturb import AtSteps, kill_named, named
from tests.support.runs import everything

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]
STEPS = 4


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Prompts that name `clean`, `noisy` and `also_noisy` in turn, and the directory of the noisy model."""
    root = tmp_path_factory.mktemp("teachers")
    shutil.copytree(DEMO_FILES["demo:teacher"], root / "noisy")
    weights = load_file(root / "noisy" / "model.safetensors")
    rng = np.random.default_rng(0)
    noisy = {
        name: (w + rng.normal(0, 0.1 * w.std(), w.shape).astype(w.dtype) if w.ndim > 1 else w)
        for name, w in weights.items()
    }
    save_file(noisy, root / "noisy" / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in DEMO_FILES["demo:train"].read_text().splitlines()[:60]]
    names = ("clean", "noisy", "also_noisy")
    lines = [json.dumps(row | {"of": names[i % 3]}) for i, row in enumerate(rows)]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def config_of(root, folder, name, **run):
    """The embedded task with two checkpoints under three names, one of half the weight."""
    tree = load_config("demo").model_dump(mode="json")
    tree["run"] |= {
        "dir": str(folder), "name": name, "steps": STEPS, "checkpoint_every": 2, "deterministic": True,
        "tensorboard": False, **run,
    }  # fmt: skip
    tree["teacher"] = None
    noisy = {"path": str(root / "noisy"), "dtype": "float32", "scorer": {"replicas": 2, "num_cpus": 0.5}}
    clean = {"path": "demo:teacher", "dtype": "float32"}
    tree["teachers"] = {"clean": clean, "noisy": noisy, "also_noisy": {**noisy, "weight": 0.5}}
    tree["data"] |= {"path": str(root / "prompts.jsonl"), "teacher_column": "of"}
    tree["rollout"] |= {"prompts_per_step": 24, "max_tokens": 96}
    tree["termination"] |= {"min_samples": 8, "min_steps": 1, "probe_share": 0.3}
    tree["scorer"] |= {"num_cpus": 0.5}
    tree["sampler"] |= {"num_cpus": 0.5, "max_num_seqs": 32}
    tree["learner"] |= {"num_cpus": 0.5, "threads": 1}
    tree["evaluation"] |= {"k": 1, "max_tokens": 64, "data": {"path": "demo:heldout", "limit": 6}}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def straight(teachers, tmp_path_factory):
    """A run from the first step to the last."""
    config = config_of(teachers, tmp_path_factory.mktemp("runs"), "straight")
    return config, train(config)


def test_each_teacher_scores_its_own_rollouts(straight):
    config, path = straight
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    steps = [m for m in metrics if "learner/loss" in m]
    assert len(steps) == STEPS and all(np.isfinite(m["learner/loss"]) for m in steps)
    for step in steps:
        assert step["teacher/kl_mean/clean"] != step["teacher/kl_mean/noisy"]
        assert sum(step[f"teacher/rollouts/{n}"] for n in config.teachers) == 24
    thresholds = {n: steps[-1].get(f"teacher/threshold/{n}") for n in config.teachers}
    assert None not in thresholds.values() and len({*thresholds.values()}) == 3, "each has a calibration of its own"
    assert steps[-1]["pools/scorer_replicas/clean"] == 1 and steps[-1]["pools/scorer_replicas/noisy"] == 2
    assert {*summary["parameters"]} == {"student", "teachers.clean", "teachers.noisy"} == {
        "student", *summary["teacher_tokens"]
    }  # fmt: skip
    assert summary["eval_teacher_clean"]["k"] == 1 and "eval_teacher_also_noisy" not in summary


def test_the_rule_applied_again_gives_each_teachers_cuts(straight):
    config, path = straight
    traces, notes = load_traces(path)
    replayed = reproduce(traces, config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))
    recorded = np.where(traces.probe, traces.would_cut, traces.cut)
    assert not notes and replayed.cut.tolist() == recorded.tolist()
    for name, rows in traces.by_teacher():
        assert len(rows) == 24 * STEPS // 3 and len(np.unique(traces.threshold[rows])) >= 2, name


def test_a_resumed_run_has_the_same_bits(straight, tmp_path):
    """From its second step on, in a copy of its directory."""
    _, path = straight
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")
    (copy / "summary.json").unlink()
    train(resumed_config(copy, []), resume=copy)
    assert everything(copy) == everything(path)


def test_a_scorer_of_the_second_group_dies(teachers, straight, tmp_path):
    """With a step's rollouts under way: the other scorer of its group takes over what it had."""
    config = config_of(teachers, tmp_path, "killed", steps=10, check_agreement=False)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"data": None})})
    metrics, ended = tmp_path / "killed" / "metrics.jsonl", named("kat:scorer-noisy:1")
    with AtSteps(metrics, (1, partial(kill_named, "kat:scorer-noisy:1", ended))) as killed:
        path = train(config)
    steps = [m for m in map(json.loads, metrics.read_text().splitlines()) if "learner/loss" in m]
    assert killed.done and killed.done[0] < 9, "it was killed before the last step"
    assert sum(m["pool/restarts"] for m in steps) >= 1
    traces, others = (load_traces(p)[0] for p in (path, straight[1]))
    assert traces.teacher[: len(others.teacher)].tolist() == others.teacher.tolist()
    (end,) = traces.offsets[[int((traces.step == 0).sum())]]
    np.testing.assert_allclose(traces.d[:end], others.d[:end], atol=1e-6)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["rollouts_ended"]["failed"] == 0 and summary["rollouts_started"] == 240
    assert summary["generated_tokens"] == sum(summary[f"{n}_tokens"] for n in ("kept", "overshoot", "cut_back"))


@pytest.mark.parametrize("weights", ["live", "average"])
def test_scorers_hold_the_students_weights_of_the_step(tmp_path, weights):
    """Rewards move the student. Told the same, the student has no KL to itself in any step, but one to its average,
    which is that of the weights at the start in the first step only.
    """
    config = load_config(
        "demo-rl",
        [
            f"run.dir={tmp_path}", "run.name=run", "run.steps=3", "run.deterministic=true", "run.tensorboard=false",
            f"teacher={{path: demo:student, dtype: float32, weights: {weights}, context: '{{prompt}}'}}",
            *(["teacher.average_decay=0.5"] if weights == "average" else []),
            "objective.opd.weight=0.001", "rollout.prompts_per_step=6", "rollout.max_tokens=64",
            "rollout.staleness=0", "termination={rule: none}", "evaluation.data=null",
            "learner.threads=1", "sampler.num_cpus=0.5", "scorer.num_cpus=0.5", "learner.num_cpus=0.5",
        ],
    )  # fmt: skip
    traces, _ = load_traces(train(config))
    largest = [float(np.nanmax(traces.d[np.repeat(traces.step == step, traces.lengths)])) for step in range(3)]
    assert largest[0] < 1e-3
    if weights == "live":
        assert max(largest) < 1e-3
    else:
        assert min(largest[1:]) > 2e-3
    tensors = load_file(tmp_path / "run" / "checkpoints" / "step-3" / "model.safetensors")
    moved = load_file(DEMO_FILES["demo:student"] / "model.safetensors")
    assert max(float(np.abs(tensors[name] - moved[name]).max()) for name in tensors if name in moved) > 1e-3
