"""A run in a bucket that is killed at every single request: what is whole stays, and it comes to the same end.

The learner's ranks are two files; nothing here is started.
"""

import json
import logging
import os

import pytest

from kat_ray.config.load import load_config
from kat_ray.run import stored_run
from kat_ray.run.checkpoint import CheckpointError, FileDigest, unread
from kat_ray.run.directory import METRICS
from kat_ray.run.resume import finished_steps, run_config, unfinished_run
from kat_ray.run.stored_copy import copied_model, copied_records, resolved
from kat_ray.run.stored_run import StoredRunDirectory, open_run
from kat_ray.storage.address import Address
from kat_ray.storage.bucket import StoreError
from kat_ray.storage.claim import Holder
from tests.support.memory_bucket import Killed, memory_store
from tests.support.stored_runs import (
    RANKS,
    STEPS,
    content,
    go,
    newest,
    record,
    run_settings,
    save,
    train,
    yaml_of,
)

RUN = Address("s3://b/runs/one")
YAML = yaml_of(run_settings(RUN, "", 1.0))


@pytest.fixture
def store():
    with memory_store() as store:
        yield store


@pytest.fixture
def settings(tmp_path):
    return run_settings(RUN, tmp_path / "node", 0.2)


def killed(monkeypatch, settings, resume):
    """Whether a run died at a request; nothing of it is tidied up, as after SIGKILL."""
    opened, first = [], StoredRunDirectory.__init__

    def opening(self, *args, **kwargs):
        opened.append(self)
        first(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(StoredRunDirectory, "__init__", opening)
        m.setattr(stored_run, "_give_up", lambda claim: None)
        try:
            go(open_run(settings, resume, YAML), settings, resume)
        except Killed:
            return True
        finally:
            for run in opened:
                bury(run)
    return False


def bury(run):
    """What the system does with a process that is gone."""
    if hasattr(run, "_keeper"):
        run._keeper.stop()
    if hasattr(run, "_lock"):
        os.close(run._lock)
    logging.getLogger("kat_ray").removeHandler(getattr(run, "_log", None))


def kept(store):
    """The bucket without what names processes and their log."""
    return {k: v for k, v in store.content().items() if "/.claims/" not in k and not k.endswith("run.log")}


def test_a_run_is_in_the_bucket_and_nothing_of_it_on_the_node(store, settings, tmp_path):
    run = train(settings)
    found = kept(store)
    base = "b/runs/one/"
    assert run.home == RUN and not run.path.exists()
    steps = {key.removeprefix(base).split("/")[1] for key in found if key.startswith(f"{base}checkpoints")}
    assert steps == {"step-4", "step-6"}, "the two newest"
    assert found[f"{base}{METRICS}"].decode().splitlines() == [json.dumps({"step": s + 1}) for s in range(STEPS)]
    assert len([key for key in found if "/traces/" in key]) == STEPS
    assert json.loads(found[f"{base}summary.json"]) == {"steps": STEPS}
    assert found["b/runs/latest"] == b"one" and resolved(Address("s3://b/runs/latest")) == RUN
    assert finished_steps(RUN) == STEPS
    assert run_config(RUN).run.name == "one"
    assert [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".")] == []


def test_a_manifest_comes_after_everything_that_it_names_and_after_the_records(store, settings):
    train(settings)
    order = [key for _, key in store.changes]
    for step in (2, 4, 6):
        manifest = order.index(f"b/runs/one/checkpoints/step-{step}/manifest.json")
        parts = [i for i, key in enumerate(order) if f"/step-{step}/" in key and i != manifest and i < manifest + 1]
        assert len(parts) == RANKS + 2 and max(parts) < manifest
        assert max(i for i, key in enumerate(order[:manifest]) if key.endswith(METRICS)) < manifest
        assert any(key.endswith(f"traces/step-{step - 1:08d}.parquet") for key in order[:manifest])


def requests_of(settings):
    """How many changes a whole run makes, and what it leaves."""
    with memory_store() as counted:
        train(settings)
        return len(counted.changes), kept(counted)


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.integration, id="each"), pytest.param(9, id="some")]
)
def test_killed_at_a_request_and_resumed_from_the_bucket_alone(settings, monkeypatch, tmp_path, every):
    """The newest checkpoint whose manifest was written is there, and the end is that of the run left alone."""
    changes, straight = requests_of(settings)
    monkeypatch.setattr(Holder, "is_dead", lambda self: True)
    manifest, tried = "b/runs/one/checkpoints/step-{}/manifest.json", 0
    for number in range(5, changes, every):
        with memory_store() as store:
            store.die_at = number
            fresh = settings.model_copy(update={"local_dir": str(tmp_path / str(number))})
            if not killed(monkeypatch, fresh, None):
                break  # what is left are the requests of an orderly end
            store.die_at = None
            whole = [step for step in range(STEPS + 1) if manifest.format(step) in store.content()]
            if "b/runs/one/config.yaml" not in store.content():
                continue  # nothing has begun that could be resumed
            tried += 1
            elsewhere = settings.model_copy(update={"local_dir": str(tmp_path / f"{number}-again")})
            run = open_run(elsewhere, RUN, YAML)
            loaded, notes = newest(run, elsewhere)
            assert (loaded.step if loaded else 0) == max(whole, default=0) and notes == [], number
            if loaded:
                text = store.content()[f"b/runs/one/{METRICS}"][: loaded.state["positions"][METRICS]]
                assert [json.loads(x)["step"] for x in text.splitlines()] == list(range(1, loaded.step + 1))
            with run:
                go(run, elsewhere, RUN)
            end = kept(store)
            assert {**end, "b/runs/latest": b"one"} == straight, number
    assert tried >= 24 // every


def test_killed_again_and_again_it_comes_forward(settings, monkeypatch, tmp_path, store):
    _, straight = requests_of(settings)
    monkeypatch.setattr(Holder, "is_dead", lambda self: True)
    store.die_at, number = 7, 0
    assert killed(monkeypatch, settings, None)
    while number < 20:
        store.die_at = len(store.changes) + 16
        number += 1
        if not killed(monkeypatch, settings.model_copy(update={"local_dir": str(tmp_path / str(number))}), RUN):
            break
    store.die_at = None
    assert 1 < number < 20
    train(settings, RUN)
    assert {**kept(store), "b/runs/latest": b"one"} == straight


def test_a_process_that_was_cut_off_completes_nothing_once_another_has_the_run(
    store, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(Holder, "is_dead", lambda self: True)
    old = open_run(settings, None, YAML)
    old.begin()
    record(old, 1)
    record(old, 2)
    save(old, settings, 2)
    old.checkpoints.begin(4)
    other = settings.model_copy(update={"local_dir": str(tmp_path / "other")})
    train(other, RUN)
    before = store.content()
    with pytest.raises(StoreError, match="has taken this run"):
        old.checkpoints.commit(4, {"done": 4}, {}, None)
    with pytest.raises(StoreError, match="has taken this run"):
        old.rewind(0, {})
    with pytest.raises(StoreError, match="has taken this run"):
        old.__exit__(None, None, None)
    changed = {k for k, v in store.content().items() if before.get(k) != v}
    assert changed == set()
    loaded, notes = newest(open_again := open_run(other, RUN, YAML), other)
    bury(open_again)
    assert loaded.step == 6 and notes == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(store, settings):
    run = train(settings)
    key = f"/b/runs/one/checkpoints/step-6/training/learner-1-of-{RANKS}.safetensors"
    store._fs.pipe_file(key, b"x" * len(content(6, 1)))
    loaded, notes = newest(run, settings)
    assert loaded.step == 4
    assert notes == [f"{RUN}/checkpoints/step-6: training/learner-1-of-2.safetensors is damaged: its bytes are not "
                     "those that were written"]  # fmt: skip
    store._fs.rm_file(key)
    loaded, notes = run.checkpoints.newest(unread)
    assert loaded.step == 4 and notes == [
        f"{RUN}/checkpoints/step-6: training/learner-1-of-2.safetensors is missing"
    ]


def test_a_part_that_did_not_arrive_makes_no_checkpoint(store, settings):
    with open_run(settings, None, YAML) as run:
        run.checkpoints.begin(2)
        with pytest.raises(CheckpointError, match=r"step-2: config.json is not there with the 3 bytes"):
            run.checkpoints.commit(2, {}, {"config.json": FileDigest(3, "")}, None)
        assert run.checkpoints.newest(unread) == (None, [])


def test_two_runs_of_one_name_get_two_names(store, settings, tmp_path):
    first = open_run(settings, None, YAML)
    second = open_run(settings, None, YAML)
    assert (first.home.name, second.home.name) == ("one", "one-2")
    for run in (first, second):
        run.__exit__(None, None, None)


def test_overwriting_replaces_a_run_once_the_new_one_begins(store, settings):
    train(settings)
    before = kept(store)
    again = settings.model_copy(update={"overwrite": True, "steps": 2})
    with open_run(again, None, YAML):
        pass  # its models could not be loaded
    assert kept(store) == before
    train(again)
    found = kept(store)
    assert {key.split("/")[4] for key in found if "/checkpoints/" in key} == {"step-2"}
    assert len([key for key in found if "/traces/" in key]) == 2


def test_a_retried_job_goes_on_with_a_run_in_a_bucket(store, settings, monkeypatch):
    config = load_config("demo", ["run.dir=s3://b/runs", "run.name=one", "run.steps=9"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert unfinished_run(config) is None
    train(settings)
    assert unfinished_run(config) == RUN


def test_commands_read_copies(store, settings):
    train(settings)
    folder = copied_records(RUN)
    assert (folder / METRICS).read_text().count("\n") == STEPS and len(list((folder / "traces").iterdir())) == STEPS
    model = copied_model(RUN)
    assert model.name == "step-6" and (model / "config.json").read_bytes() == content(6, 0)
    assert not (model / "training").exists(), "what a resume needs is not downloaded"
    assert copied_model(RUN / "checkpoints" / "step-4").name == "step-4"
    assert (model.parent.parent / "config.yaml").is_file()
    with pytest.raises(ValueError, match="no run there"):
        copied_records(Address("s3://b/runs/none"))


def test_a_store_that_fails_in_between_ends_the_run_with_its_records_on_the_node(store, settings):
    run = open_run(settings, None, YAML)
    with pytest.raises(StoreError, match=r"0\.2 s \(run\.store_timeout\)"), run:
        run.begin()
        record(run, 1)
        store.failures = [ConnectionError("gone")] * 10_000
        save(run, settings, 2)
    assert (run.path / METRICS).read_text(), "they are kept where they could not be uploaded"
    store.failures = []
