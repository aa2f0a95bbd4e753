"""Actors of a run are killed and frozen while it goes on; what comes out must not show it."""

import json
import signal
from collections import Counter

import pytest
from safetensors.numpy import load_file

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.driver import training_run as job_module
from actors.testing.stub_engine import STUB_RATE, small_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.data.prompts import PromptOrder, load_prompts
from kat_ray.errors import UserError
from kat_ray.models.inspect import load_tokenizer
from kat_ray.records.traces import read_traces
from tests.cluster.disturb import CLASSES, Disturber, newest_of
from tests.cluster.paced import paced, seen_file
from tests.cluster.test_run import QUICK, SINGLE, config_of, files  # noqa: F401 (a fixture)

pytestmark = pytest.mark.integration
STUBS = Engines(small_stub_engine, stub_teacher, StubLearner)
PATIENT = {"max_restarts": 100, "hang_timeout": 10, "start_timeout": 180}
VICTIMS = (*CLASSES, "sampler", "scorer", "monitor")  # all roles, the learner least: each time it costs the steps


def stub_config(files, tmp_path, steps, **sections):  # noqa: F811
    return config_of(
        files, tmp_path,
        **{
            "run": {"steps": steps, "checkpoint_every": 5, "deterministic": True},
            "rollout": {"top_k_logprobs": 16}, "evaluation": {"data": None}, "learner": {"world_size": 1},
            "cluster": PATIENT, **sections,
        },
    )  # fmt: skip


def records_of(path):
    """Summary, traces and step metrics of a run."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    return summary, read_traces(path).to_pylist(), [m for m in metrics if "learner/loss" in m]


def check_books(config, path):
    """Every rollout of the plan ended once, every prompt was trained once an epoch, every token is accounted
    for.
    """
    summary, traces, metrics = records_of(path)
    steps, per_step = config.run.steps, config.rollout.rollouts_per_step
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    assert summary["rollouts_started"] == steps * per_step == sum(summary["rollouts_ended"].values())
    assert sorted(t["rollout_id"] for t in traces) == list(range(steps * per_step))
    assert summary["rollouts_ended"]["failed"] == 0
    books = {name: summary[f"{name}_tokens"] for name in ("generated", "kept", "overshoot", "cut_back", "trained")}
    assert books["generated"] == books["kept"] + books["overshoot"] + books["cut_back"]
    assert books["kept"] == books["trained"] == sum(m["learner/tokens"] for m in metrics)
    prompts = load_prompts(config.data, load_tokenizer(config.student), 10_000, graded=False).prompts
    order = PromptOrder(prompts, config.run.seed, config.data.shuffle)
    n = config.rollout.prompts_per_step
    planned = Counter(p.prompt_id for step in range(steps) for p in order.batch(step, n))
    trained = Counter(t["prompt_id"] for t in traces)
    assert trained == Counter({p: c * config.rollout.rollouts_per_prompt for p, c in planned.items()})
    return summary, traces, metrics


def check_alike(config, path, quiet):
    """A run that was disturbed has the records and the weights of one that was not: (configuration, directory).

    Of runs with the stub learner, whose weights are equal where it has learnt the same.
    """
    summary, traces, steps = check_books(config, path)
    expected = check_books(*quiet)
    assert summary["kept_tokens"] == expected[0]["kept_tokens"], "engines that draw by rollout draw the same again"
    for t, e in zip(traces, expected[1], strict=True):
        assert (t["rollout_id"], t["cut"], t["threshold"]) == (e["rollout_id"], e["cut"], e["threshold"])
        assert t["token_ids"][: t["cut"]] == e["token_ids"][: e["cut"]]
    assert [m["learner/loss"] for m in steps] == [m["learner/loss"] for m in expected[2]]
    weights, others = (load_file(last_checkpoint(p, config) / "model.safetensors") for p in (path, quiet[1]))
    assert weights["sum"].any() and weights["sum"].tolist() == others["sum"].tolist()
    return steps


def last_checkpoint(path, config):
    return path / "checkpoints" / f"step-{config.run.steps}"


@pytest.mark.parametrize(
    ("steps", "kills"), [(9, 6), pytest.param(18, 32, marks=pytest.mark.nightly)], ids=["gate", "long"]
)
def test_a_run_survives_kills_and_gives_what_it_gives_without(ray_local, files, tmp_path, steps, kills):  # noqa: F811
    """One of each role at least; each twelfth, from the first, is frozen instead."""
    run = {"steps": steps, "checkpoint_every": 3, "deterministic": True}
    quiet = stub_config(files, tmp_path / "quiet", steps=steps, run=run)
    quiet_path = job.train(quiet, engines=QUICK)
    config = stub_config(files, tmp_path / "chaos", steps=steps, run=run)
    metrics = tmp_path / "chaos" / "run" / "metrics.jsonl"
    with Disturber(metrics, VICTIMS, kills, freeze_every=12, then=seen_file(config).touch) as disturber:
        path = job.train(config, engines=paced(config, STUB_RATE))
    assert len(disturber.killed) == kills and {role for role, _ in disturber.killed} == set(CLASSES)
    assert [number for _, number in disturber.killed].count(signal.SIGSTOP) == -(-kills // 12)
    assert "it is killed and replaced" in (path / "run.log").read_text(), "a frozen one was noticed"
    check_alike(config, path, (quiet, quiet_path))


@pytest.mark.parametrize(
    ("victims", "ranks"),
    [(["sampler", "learner"], 1), pytest.param([*CLASSES], 2, marks=pytest.mark.nightly)],
    ids=["gate", "long"],
)
def test_real_engines_die_one_after_the_other(ray_local, files, tmp_path, victims, ranks):  # noqa: F811
    # Engines load their models for longer on a slow machine, and none is frozen here: a limit that nobody meets.
    config = config_of(
        files, tmp_path, run={"steps": 6, "checkpoint_every": 2}, cluster={"max_restarts": 100, "hang_timeout": 30},
        evaluation={"data": None}, sampler={"replicas": ranks}, scorer={"replicas": ranks},
        learner={"world_size": ranks},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Disturber(metrics, victims, kills=len(victims), pauses=(0.5, 2.0)) as disturber:
        path = job.train(config)
    assert [role for role, _ in disturber.killed] == victims
    _, traces, steps = check_books(config, path)
    assert all(m["learner/logprob_diff_max"] < 1e-3 for m in steps), "samplers came back with the right weights"
    assert any(t["cut"] is not None for t in traces)


def test_an_actor_that_keeps_dying_stops_the_run(ray_local, files, tmp_path):  # noqa: F811
    config = stub_config(
        files, tmp_path, steps=30, sampler={"replicas": 1}, cluster={"max_restarts": 0, "hang_timeout": 30}
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (
        Disturber(metrics, ["sampler"], kills=1000, pauses=(0.1, 0.3)),
        pytest.raises(UserError, match=r"sampler:0 was lost 1 times in one step \(cluster.max_restarts = 0\)"),
    ):
        job.train(config, engines=STUBS)


def test_a_step_that_always_kills_the_learner_stops_the_run(ray_local, files, tmp_path, monkeypatch):  # noqa: F811
    """Its step before, taken again each time, is no progress that would forgive the deaths."""
    config = stub_config(
        files, tmp_path, steps=6, run={"steps": 6, "checkpoint_every": 2}, cluster={"max_restarts": 1}, **SINGLE
    )
    record, taken = job_module.StepRecorder.record, []

    def killing(recorder, step, *rest):
        taken.append(step)
        if step == 3:
            newest_of("learner").kill()
        return record(recorder, step, *rest)

    monkeypatch.setattr(job_module.StepRecorder, "record", killing)
    with pytest.raises(UserError, match=r"learner:0 was lost 2 times in one step \(cluster.max_restarts = 1\)"):
        job.train(config, engines=QUICK)
    assert taken == [0, 1, 2, 3, 2, 3]


def test_a_learners_death_is_counted(ray_local, files, tmp_path, monkeypatch):  # noqa: F811
    config = stub_config(files, tmp_path, steps=2, run={"steps": 2}, **SINGLE)
    record, taken = job_module.StepRecorder.record, []

    def killing(recorder, step, *rest):
        taken.append(step)
        if taken == [0]:
            newest_of("learner").kill()
        return record(recorder, step, *rest)

    monkeypatch.setattr(job_module.StepRecorder, "record", killing)
    _, _, metrics = records_of(job.train(config, engines=QUICK))
    assert [m["pool/restarts"] for m in metrics] == [1, 0]
