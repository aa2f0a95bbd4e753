"""Which run is gone on with, under which configuration, and what of its records is kept."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest

from kat_ray.config.load import config_yaml, load_config
from kat_ray.config.schema import configuration_markdown
from kat_ray.data.prompts import PromptSet
from kat_ray.errors import UserError
from kat_ray.observability.trackers import TensorBoardTracker, Trackers
from kat_ray.run.directory import RunDirectory
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.lock import RecordError
from kat_ray.run.resume import changes, check_prompts, finished_steps, resumable, resumed_config, unfinished_run
from kat_ray.types.records import Prompt


def config_in(tmp_path, *overrides):
    return load_config("demo", [f"run.dir={tmp_path}", "run.tensorboard=false", *overrides])


@pytest.fixture
def run(tmp_path):
    """An unfinished run's directory."""
    config = config_in(tmp_path)
    with RunDirectory.create(config.run, config_yaml(config)) as records:
        return records.path


def test_what_a_resume_may_change_is_what_it_was_when_it_was_a_list():
    """The list of commit 3aa4268: a field added to or taken from it changes what users rely on."""
    run = "name dir steps overwrite tensorboard profile resume checkpoint_every keep_checkpoints keep_best"
    learner = (
        "world_size zero_stage num_cpus num_gpus resources labels threads micro_batch_tokens logits_chunk_tokens "
        "gradient_checkpointing max_skipped_steps"
    )
    expected = {f"run.{name}" for name in [*run.split(), "grace_seconds"]}
    expected |= {f"learner.{name}" for name in learner.split()}
    expected |= {"sampler", "scorer", "monitor", "guards", "pools", "cluster"}
    # Added since: the check before the first step, bounds of grading.
    expected |= {"run.check_agreement"}
    expected |= {f"evaluation.grading_{name}" for name in ("processes", "seconds", "step_seconds", "memory_gib")}
    expected |= {f"reward.{n}" for n in ("workers", "calls_at_once", "seconds", "step_seconds")}
    expected |= {f"reward.{n}" for n in ("memory_gib", "max_error_share")}
    expected |= {"learner.batching"}  # as `micro_batch_tokens`: what shares a pass
    expected |= {"learner.reduce_dtype"}  # as `zero_stage`: how sums are rounded
    expected |= {"evaluation.every_k"}  # as `every`: how often and how well it is looked at, not what is done
    expected |= {"teachers.*.scorer"}  # as `scorer`
    # Where a teacher's server is, and how it is asked: as `cluster`, and `scorer`.
    expected |= {f"{section}.{name}" for section in ("teacher", "teachers.*") for name in ("url", "http")}
    expected |= {"tracking.to", "tracking.online"}  # where metrics go beside the records
    expected |= {"run.local_dir", "run.store_timeout"}  # as `run.dir`: where and how, not what
    # Marked since they were made, and refused until sections that may be left out were looked into.
    expected |= {"environment.seconds", "environment.memory_gib"}
    assert set(resumable()) == expected | {"rollout.max_chunks_ahead", "evaluation.every"}


def test_the_page_of_fields_says_what_a_resume_may_change():
    rows = re.findall(r"^\| `([a-z_.]+)` \| .*? \| (yes|) \| [^|]*\|$", configuration_markdown(), re.M)
    said = dict(rows)
    assert (said["run.steps"], said["run.seed"], said["learner.lr"], said["learner.labels"]) == (
        "yes",
        "",
        "",
        "yes",
    )
    assert said["sampler.replicas"] == said["cluster.address"] == said["guards.patience"] == "yes"
    assert said["termination.eta"] == ""


def test_how_and_how_far_may_change_but_not_what(run):
    assert resumed_config(run, ["run.steps=300", "learner.zero_stage=2", "cluster.num_cpus=3"]).run.steps == 300
    with pytest.raises(UserError, match=r"cannot change learner.lr, run.seed: the steps so far"):
        resumed_config(run, ["run.seed=1", "learner.lr=1e-9", "run.steps=300"])
    with pytest.raises(UserError, match="not a run directory"):
        resumed_config(run.parent / "nothing", [])


def test_another_cluster_may_place_and_size_otherwise(run):
    there = ["learner.labels={zone: b}", "learner.resources={fast: 1}", "pools.grow_after=4"]
    config = resumed_config(run, there)
    assert config.learner.labels == {"zone": "b"} and config.pools.grow_after == 4


def test_another_rule_is_another_run(tmp_path):
    before, after = config_in(tmp_path), config_in(tmp_path, "termination.rule=none")
    assert "termination.rule" in changes(before, after) and "termination.eta" in changes(before, after)
    assert changes(before, before) == []


def test_only_a_ray_job_goes_on_by_itself(run, tmp_path, monkeypatch):
    config = config_in(tmp_path)
    assert unfinished_run(config) is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "a"}}))
    assert unfinished_run(config) == run
    assert unfinished_run(config_in(tmp_path, "run.resume=never")) is None
    assert unfinished_run(config_in(tmp_path, "run.seed=3")) is None
    assert unfinished_run(config_in(tmp_path, "run.name=other")) is None
    (run / "summary.json").write_text(json.dumps({"steps": config.run.steps}))
    assert finished_steps(run) == config.run.steps and unfinished_run(config) is None
    further = config_in(tmp_path, f"run.steps={config.run.steps + 1}")
    assert unfinished_run(further) == run


def test_records_are_taken_back_to_a_step(tmp_path):
    config = config_in(tmp_path)
    with RunDirectory.create(config.run, "a: 1\n") as records:
        for step in range(3):
            records.write_traces(step, [])
            with Trackers([JsonlTracker(records.path)]) as trackers:
                trackers.step(step + 1, {"kl/mean": step / 3})
            if step == 1:
                kept = records.positions()
        records.write_summary({"steps": 3})
    with RunDirectory.reopen(records.path, "a: 2\n") as again, Trackers([JsonlTracker(again.path)]) as trackers:
        again.begin()
        again.rewind(2, kept)
        trackers.start(2)
        trackers.step(3, {"kl/mean": 0.5})
    lines = [json.loads(line) for line in (records.path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["kl/mean"]) for m in lines] == [(1, 0.0), (2, 1 / 3), (3, 0.5)]
    assert (
        sorted(p.name for p in records.path.glob("traces/**/*.parquet"))
        == ["step-000000.parquet"] * 2 + ["step-000001.parquet"] * 2
    )
    assert not (records.path / "summary.json").exists()
    assert (records.path / "config.yaml").read_text() == "a: 2\n"


def check_events(folder, steps, last):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder))
    seen.Reload()
    events = seen.Scalars("kl/mean")
    assert [e.step for e in events] == steps and events[-1].value == last


@pytest.mark.parametrize("back_to, steps", [(2, [1, 2, 3]), (0, [1])])
def test_tensorboard_forgets_what_was_taken_back(tmp_path, back_to, steps):
    """Read as TensorBoard reads it: each step once, with the value of the last time."""
    folder = tmp_path / "tensorboard"
    with Trackers([TensorBoardTracker(folder, "a: 1")]) as trackers:
        trackers.start(0)
        for step in range(1, 5):
            trackers.step(step, {"kl/mean": step / 3})
        trackers.start(back_to)
        trackers.step(back_to + 1, {"kl/mean": 9.0})
    check_events(folder, steps, 9.0)

    # A process that was killed has left more than its checkpoint knows; another goes on.
    with Trackers([TensorBoardTracker(folder, "a: 1")]) as trackers:
        trackers.start(back_to)
        for step in range(back_to + 1, back_to + 3):
            trackers.step(step, {"kl/mean": 10.0 + step})
    check_events(folder, [*steps, back_to + 2], 12.0 + back_to)


def prompts_of(*answers):
    prompts = tuple(Prompt(str(i), (1, 2 + i), answer) for i, answer in enumerate(answers))
    return PromptSet(prompts, 0, "prompts.jsonl")


def test_other_prompts_are_another_run(run):
    before = {"data": prompts_of("1", None).digest}
    check_prompts(run, before, {"data": prompts_of("1", None), "evaluation.data": prompts_of("3")})
    check_prompts(run, {}, {"data": prompts_of("3")})  # a checkpoint from before this was kept
    for other in (prompts_of("1", "2"), prompts_of("1"), prompts_of(None, "1")):
        with pytest.raises(
            UserError, match=r"demo: data.path = prompts.jsonl: these are not the prompts.*Put back"
        ):
            check_prompts(run, before, {"data": other})


@pytest.mark.parametrize("known", [True, False])
def test_a_run_whose_file_of_prompts_was_changed_is_not_resumed(tmp_path, known, monkeypatch):
    """Before Ray is started or a record taken back; a run of a version that kept no digest is let through."""
    from actors.driver.train import checkpoints_of, prepare, train

    def no_ray(*_):
        raise UserError("let through")

    monkeypatch.setattr("actors.driver.train.ray_session", no_ray)

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "2 + 1 = "}\n')
    config = config_in(tmp_path, f"data.path={file}", "evaluation.data=null")
    run = tmp_path / config.run.name
    run.mkdir()
    (run / "config.yaml").write_text(config_yaml(config))
    (run / "metrics.jsonl").write_text("{}\n")
    sets = prepare(config).prompt_sets()
    assert list(sets) == ["data"]
    state = {"prompts": {name: prompts.digest for name, prompts in sets.items()}} if known else {}
    checkpoints = checkpoints_of(run, config.run)
    checkpoints.begin(1)
    checkpoints.commit(1, state, {}, None)

    file.write_text('{"prompt": "2 + 3 = "}\n')
    words = rf"demo: data.path = {file}: these are not the prompts" if known else "let through"
    with pytest.raises(UserError, match=words):
        train(resumed_config(run, []), run)
    assert (run / "metrics.jsonl").read_text() == "{}\n"


def contents(folder):
    """All files below a folder but locks, with what they hold."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


HOLDER = rf"another process \(pid {os.getpid()} on .+\) is writing this run; end it first"


def test_two_processes_do_not_write_one_run(tmp_path):
    config = config_in(tmp_path)
    with RunDirectory.create(config.run, "") as records, pytest.raises(RecordError, match=HOLDER):
        RunDirectory.reopen(records.path, "")
    with RunDirectory.reopen(records.path, ""):
        pass


def test_a_run_that_is_being_written_is_not_replaced(tmp_path):
    config = config_in(tmp_path, "run.overwrite=true")
    with RunDirectory.create(config.run, "a: 1\n") as records:
        records.begin()
        before = contents(records.path)
        with pytest.raises(RecordError, match=HOLDER):
            RunDirectory.create(config.run, "a: 2\n")
        assert contents(records.path) == before


def test_a_run_that_is_being_written_keeps_the_checkpoint_that_it_is_writing(tmp_path):
    """A resume looks for checkpoints, and tidies what killed processes left, once the run is its own."""
    from actors.driver.train import checkpoints_of, train

    config = config_in(tmp_path, "evaluation.data=null")
    with RunDirectory.create(config.run, config_yaml(config)) as records:
        partial = checkpoints_of(records.path, config.run).begin(1)
        with pytest.raises(RecordError, match=HOLDER):
            train(config, records.path)
        assert partial.is_dir()


@pytest.mark.parametrize("how", ["resumed", "replaced"])
def test_what_fails_before_the_first_step_leaves_a_run_that_exists_as_it_was(tmp_path, how, monkeypatch):
    """The real driver, ended where it would start Ray; records that a resume would take back are among them."""
    from actors.driver.train import train

    def no_ray(*_):
        raise UserError("the engines disagree")

    monkeypatch.setattr("actors.driver.train.ray_session", no_ray)
    config = config_in(tmp_path, "evaluation.data=null", "run.profile=true")
    with RunDirectory.create(config.run, config_yaml(config)) as records:
        records.begin()
        records.write_summary({"steps": 1})
        (records.path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(records.path)
    changed = config_in(tmp_path, "evaluation.data=null", "run.steps=300", f"run.overwrite={how == 'replaced'}")
    with pytest.raises(UserError, match="the engines disagree"):
        train(changed, records.path if how == "resumed" else None)
    assert contents(records.path) == before
    failed = tmp_path / f"{config.run.name}.failed.log"
    assert failed.exists() == (how == "replaced")
    assert sorted(p.name for p in tmp_path.iterdir() if p != failed) == [records.path.name, "latest"]
    with RunDirectory.reopen(records.path, "a: 1\n"):  # nobody holds it any more
        pass


def test_a_run_is_replaced_once_the_next_one_begins(tmp_path):
    config = config_in(tmp_path, "run.overwrite=true")
    for text in ("a: 1\n", "a: 2\n"):
        with RunDirectory.create(config.run, text) as records:
            records.begin()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()] == [records.path.name]
    assert (records.path / "config.yaml").read_text() == "a: 2\n"


def test_a_run_outlives_the_process_that_was_killed_before_it_replaced_it(tmp_path):
    config = config_in(tmp_path, "run.overwrite=true")
    with RunDirectory.create(config.run, "a: 1\n") as records:
        records.begin()
    code = (
        "import os, sys; from kat_ray.config.load import load_config; "
        "from kat_ray.run.directory import RunDirectory; "
        "RunDirectory.create(load_config('demo', sys.argv[1:]).run, 'a: 2\\n'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, f"run.dir={tmp_path}", "run.overwrite=true"], check=False)
    assert done.returncode == 9 and (records.path / "config.yaml").read_text() == "a: 2\n"
    with pytest.raises(KeyError), RunDirectory.create(config.run, "a: 3\n"):
        raise KeyError
    assert (records.path / "config.yaml").read_text() == "a: 1\n"


def test_a_run_that_was_gone_on_with_is_not_taken_for_one_that_never_began(tmp_path):
    """Its process was killed before it replaced another; a later one resumed it."""
    config = config_in(tmp_path, "run.overwrite=true")
    with RunDirectory.create(config.run, "a: 1\n") as records:
        records.begin()
    records.path.rename(tmp_path / f".{config.run.name}.replaced")
    with RunDirectory.create(config_in(tmp_path).run, "a: 2\n"):
        pass
    with RunDirectory.reopen(records.path, "a: 2\n") as again:
        again.begin()
    with pytest.raises(KeyError), RunDirectory.create(config.run, "a: 3\n"):
        raise KeyError
    assert (records.path / "config.yaml").read_text() == "a: 2\n"


def test_what_was_said_before_a_resumed_run_begins_is_in_its_log(run):
    with RunDirectory.reopen(run, "") as records:
        logging.getLogger("kat_ray.test").info("said early")
        assert "said early" not in (run / "run.log").read_text()
        records.begin()
        logging.getLogger("kat_ray.test").info("said late")
    said = (run / "run.log").read_text()
    assert said.count("said early") == 1 and said.index("said early") < said.index("said late")
