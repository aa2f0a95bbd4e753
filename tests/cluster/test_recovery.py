"""Actors of a run are killed and frozen while it goes on; what comes out must not show it."""

import signal

import pytest

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.driver import training_run as job_module
from actors.testing.stub_engine import STUB_RATE, small_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.errors import UserError
from tests.cluster.disturb import CLASSES, Disturber, newest_of
from tests.cluster.paced import paced, seen_file
from tests.support.runs import ALONE, QUICK, SINGLE, check_alike, check_books, config_of, records_of, stub_config

pytestmark = pytest.mark.integration
STUBS = Engines(small_stub_engine, stub_teacher, StubLearner)
VICTIMS = (*CLASSES, "sampler", "scorer", "monitor")  # all roles, the learner least: each time it costs the steps


@pytest.mark.parametrize(
    ("steps", "kills"), [(9, 6), pytest.param(18, 32, marks=pytest.mark.nightly)], ids=["gate", "long"]
)
def test_a_run_survives_kills_and_gives_what_it_gives_without(ray_local, files, tmp_path, steps, kills):
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


@pytest.mark.nightly  # in virtual time: test_control_plane_without_teacher
def test_rewards_alone_survive_kills(ray_local, files, tmp_path):
    """Without scorers and monitors: stubs, and a sampler and the learner that die."""
    run = {"steps": 6, "checkpoint_every": 2, "deterministic": True}
    rollout = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "top_p": 1.0, "top_k_logprobs": 16}
    quiet, config = (
        stub_config(files, tmp_path / name, steps=6, run=run, rollout=rollout, **ALONE)
        for name in ("quiet", "chaos")
    )
    quiet_path = job.train(quiet, engines=QUICK)
    metrics = tmp_path / "chaos" / "run" / "metrics.jsonl"
    with Disturber(metrics, ("sampler", "learner"), 2, then=seen_file(config).touch) as disturber:
        path = job.train(config, engines=paced(config, STUB_RATE))
    assert {role for role, _ in disturber.killed} == {"sampler", "learner"}
    check_alike(config, path, (quiet, quiet_path))


REWARDS = {
    "objective": {"rl": {"weight": 1.0}}, "student": {"path": "demo:student"}, "data": {"path": "demo:train"},
    "rollout": {"top_k_logprobs": 16, "prompts_per_step": 4, "rollouts_per_prompt": 6, "top_p": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("victims", "ranks", "sections"),
    [
        (["sampler", "learner"], 1, {}),
        pytest.param([*CLASSES], 2, {}, marks=pytest.mark.nightly),
        pytest.param(
            ["learner", "sampler"], 2, {"learner": {"lora": {"rank": 4, "publish": "adapters"}}},
            marks=pytest.mark.nightly,
        ),
        pytest.param(["learner", "sampler"], 1, {"learner": {"lora": {"dora": True}}}, marks=pytest.mark.nightly),
        pytest.param(
            ["learner", "scorer"], 2, {"learner": {"batching": "packed", "micro_batch_tokens": 256}},
            marks=pytest.mark.nightly,
        ),
        pytest.param([*CLASSES], 1, REWARDS, marks=pytest.mark.nightly),
    ],
    ids=["gate", "long", "adapters", "dora", "packed", "rewards"],
)  # fmt: skip
def test_real_engines_die_one_after_the_other(ray_local, files, tmp_path, victims, ranks, sections):
    # Engines load their models for longer on a slow machine, and none is frozen here: a limit that nobody meets.
    config = config_of(
        files, tmp_path, run={"steps": 6, "checkpoint_every": 2}, cluster={"max_restarts": 100, "hang_timeout": 30},
        evaluation={"data": None}, sampler={"replicas": ranks}, scorer={"replicas": ranks},
        **sections | {"learner": {"world_size": ranks} | sections.get("learner", {})},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Disturber(metrics, victims, kills=len(victims), pauses=(0.5, 2.0)) as disturber:
        path = job.train(config)
    assert [role for role, _ in disturber.killed] == victims
    _, traces, steps = check_books(config, path)
    assert all(m["learner/logprob_diff_max"] < 1e-3 for m in steps), "samplers came back with the right weights"
    assert any(t["cut"] is not None for t in traces)
    if "objective" in sections:
        assert any(m["advantage/abs_mean"] for m in steps) and not any(m["reward/errors"] for m in steps)


def test_an_actor_that_keeps_dying_stops_the_run(ray_local, files, tmp_path):
    config = stub_config(
        files, tmp_path, steps=30, sampler={"replicas": 1}, cluster={"max_restarts": 0, "hang_timeout": 30}
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (
        Disturber(metrics, ["sampler"], kills=1000, pauses=(0.1, 0.3)),
        pytest.raises(UserError, match=r"sampler:0 was lost 1 times in one step \(cluster.max_restarts = 0\)"),
    ):
        job.train(config, engines=STUBS)


@pytest.mark.nightly  # in virtual time: test_control_plane
def test_a_step_that_always_kills_the_learner_stops_the_run(ray_local, files, tmp_path, monkeypatch):
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


@pytest.mark.nightly  # in virtual time: test_control_plane
def test_a_learners_death_is_counted(ray_local, files, tmp_path, monkeypatch):
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
