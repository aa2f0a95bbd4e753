"""The embedded self-distillation on real engines: a teacher that is the student of the step, told the solution."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

from actors.driver.train import train
from kat_ray.analysis.replay import load_traces
from kat_ray.config.load import load_config
from kat_ray.run.resume import resumed_config
from tests.cluster.disturb import AtSteps, kill_named, named
from tests.support.runs import everything

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]
STEPS = 4


def config_of(folder, name, weights, *more):
    return load_config(
        "demo-hints",
        [
            f"run.dir={folder}", f"run.name={name}", f"run.steps={STEPS}", "run.checkpoint_every=2",
            "run.deterministic=true", "run.tensorboard=false", f"teacher.weights={weights}",
            "rollout.prompts_per_step=12", "evaluation.data.limit=6", "evaluation.k=1", "evaluation.every=2",
            "learner.threads=1", "sampler.num_cpus=0.5", "scorer.num_cpus=0.5", "learner.num_cpus=0.5", *more,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module", params=["live", "average"])
def weights(request):
    """Whose weights the teacher has: the student's of the step, or their moving average."""
    return request.param


@pytest.fixture(scope="module")
def straight(weights, tmp_path_factory):
    """A run from the first step to the last."""
    return train(config_of(tmp_path_factory.mktemp("runs"), "straight", weights))


def test_the_teacher_reads_the_solution_and_the_student_does_not(straight):
    """Told, the same weights say something else, from the first step on; sampler and learner agree meanwhile."""
    steps = [m for m in map(json.loads, (straight / "metrics.jsonl").read_text().splitlines()) if "kl/mean" in m]
    kl = [m["kl/mean"] for m in steps]
    assert len(kl) == STEPS and kl[0] > 0.05 and min(kl) > 1e-3, kl
    assert all(np.isfinite(m["learner/loss"]) and m["learner/logprob_diff_max"] < 1e-3 for m in steps)


def test_a_resumed_run_has_the_same_bits(straight, tmp_path):
    """From its second step on, in a copy: the new scorer is given the weights of then, or their average."""
    copy = tmp_path / "copy"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")
    (copy / "summary.json").unlink()
    train(resumed_config(copy, []), resume=copy)
    assert everything(copy) == everything(straight)


def test_the_scorer_dies_and_the_next_one_holds_the_students_weights(straight, weights, tmp_path):
    """With a step's rollouts under way. The steps before are those of the run without it, to the bit."""
    more = ("run.steps=8", "evaluation.data=null", "cluster.max_restarts=5")
    config = config_of(tmp_path, "killed", weights, *more)
    metrics, ended = tmp_path / "killed" / "metrics.jsonl", named("kat:scorer:0")
    with AtSteps(metrics, (2, partial(kill_named, "kat:scorer:0", ended))) as killed:
        path = train(config)
    steps = [m for m in map(json.loads, metrics.read_text().splitlines()) if "kl/mean" in m]
    assert killed.done and killed.done[0] < 7 and sum(m["pool/restarts"] for m in steps) >= 1
    traces, others = (load_traces(p)[0] for p in (path, straight))
    end = others.offsets[int((others.step < 2).sum())]
    assert end > 0 and traces.d[:end].tolist() == others.d[:end].tolist()
    assert np.isfinite(traces.d).all() and len({*traces.step.tolist()}) == 8
    summary = json.loads((path / "summary.json").read_text())
    assert summary["rollouts_ended"]["failed"] == 0 and summary["rollouts_started"] == 8 * 12
