"""A hub model's branch is resolved once, and everything that is loaded of it is of that commit."""

import shutil
from types import SimpleNamespace

import pytest

from actors.learner.snapshots import Snapshots
from kat_ray.config import ModelConfig
from kat_ray.config.load import config_yaml, load_config
from kat_ray.models.inspect import load_tokenizer
from kat_ray.models.load import load_causal_lm
from kat_ray.models.revisions import is_commit, pinned, pinned_like
from kat_ray.run.directory import RunDirectory
from kat_ray.run.resume import resumed_config, unfinished_run
from tests.support.configs import make_config
from tests.support.models import make_model
from tests.support.tokenizers import make_tokenizer

OLD, NEW, OTHER = ("a" * 40, "b" * 40, "c" * 40)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The hub's cache with two commits of one model: `main` is the older one, `next` the newer."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    for commit, seed, extra in ((OLD, 1, []), (NEW, 2, ["<new>"])):
        make_model(folder / "snapshots" / commit, seed=seed)
        make_tokenizer(extra=extra).save_pretrained(folder / "snapshots" / commit)
    return root


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    from huggingface_hub import constants

    shutil.copytree(files, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--org--tiny"

    def move(**branches):
        for branch, commit in branches.items():
            (folder / "refs" / branch).write_text(commit)

    move(main=OLD, next=NEW)
    return SimpleNamespace(move=move)


def config(student="org/tiny", revision=None, **sections):
    made = make_config(student, "demo:teacher", **sections)
    return made.model_copy(update={"student": made.student.model_copy(update={"revision": revision})})


def test_a_branch_becomes_the_commit_that_it_is_at(hub):
    assert pinned(config()).student.revision == OLD
    assert pinned(config(revision="next")).student.revision == NEW
    assert pinned(config(revision=NEW)).student.revision == NEW
    assert pinned(config()).teacher.revision is None, "a directory has no revision"
    assert pinned(config("org/nobody", "main")).student.revision == "main", "whoever reads it says what is wrong"
    assert [is_commit(r) for r in (None, "main", "a" * 39, OLD)] == [False, False, False, True]


def test_all_that_is_loaded_is_of_the_commit_although_the_branch_moves(hub, tmp_path):
    model = pinned(config(revision="next")).student
    hub.move(main=OLD, next=OLD)
    assert "<new>" in load_tokenizer(model).get_vocab()
    weights = load_causal_lm(model, "org/tiny", "float32", "student").state_dict()
    (tmp_path / "direct").mkdir()
    direct = make_model(tmp_path / "direct", seed=2).state_dict()
    assert all((weights[name] == direct[name]).all() for name in direct)
    # What a learner saves beside its checkpoint.
    snapshots = Snapshots.__new__(Snapshots)
    snapshots._source, snapshots._tokenizer = model, None
    snapshots._save_tokenizer("org/tiny", tmp_path / "saved")
    assert "<new>" in load_tokenizer(ModelConfig(path=str(tmp_path / "saved"))).get_vocab()


def test_a_run_goes_on_with_its_commits(hub, tmp_path, monkeypatch):
    given = config(run={"dir": str(tmp_path / "runs"), "tensorboard": False})
    made = pinned(given)
    with RunDirectory.create(made.run, config_yaml(made)) as records:
        run = records.path
    assert load_config(run / "config.yaml").student.revision == OLD, "recorded in the run"
    hub.move(main=NEW)
    assert resumed_config(run, []).student.revision == OLD
    # A retried job is given the branch again.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert unfinished_run(given) == run
    assert pinned(pinned_like(given, made)).student.revision == OLD
    run_of = given.run.model_dump()
    for other in (config(revision=OTHER, run=run_of), config("org/other", run=run_of)):
        assert unfinished_run(other) is None
        assert pinned_like(other, made).student == other.student
