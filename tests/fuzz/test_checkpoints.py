"""Fuzzed checkpoints: what is not as it was written is skipped for the one before it, and named."""

import json
import shutil

import pytest
from hypothesis import strategies as st
from pydantic import BaseModel

from kat_ray.run.checkpoint import MANIFEST, STATE, CheckpointError, Checkpoints, FileDigest, verify
from tests.fuzz.harness import deadline, fuzz, mutated, scalars, sizes, texts, trees

FILES = {"config.json": b'{"model_type": "qwen3"}', "training/rank-0.safetensors": bytes(range(256)) * 4}


class State(BaseModel):
    """What a run would read of it."""

    step: int
    order: list[int]


def save(folder, step):
    checkpoints = Checkpoints(folder, keep=5, keep_best=False)
    partial = checkpoints.begin(step)
    for name, content in FILES.items():
        (partial / name).write_bytes(content)
    digests = {name: FileDigest.of(partial / name) for name in FILES}
    return checkpoints.commit(step, {"step": step, "order": [step, 1]}, digests, None)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "kept", 1)
    save(tmp_path / "kept", 2)
    return tmp_path / "work"


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.parent / "kept", folder)
    return folder / "step-2"


def look(folder, changed):
    """The newest is step 2 only where it is whole, else step 1 with a note that names step 2."""
    with deadline():
        loaded, notes = Checkpoints(folder, keep=5, keep_best=False).newest()
    assert loaded is not None, notes
    if loaded.step == 1:
        assert len(notes) == 1 and "step-2" in notes[0] and len(notes[0]) < 2_000
        assert loaded.state_as(State) == State(step=1, order=[1, 1])
    else:
        assert not notes and not changed, "damage was taken for a checkpoint"


@sizes(200)
def test_damaged_bytes(folder, cases):
    originals = {name: (folder.parent / "kept/step-2" / name).read_bytes() for name in (*FILES, STATE, MANIFEST)}
    drawn = st.sampled_from([*originals]).flatmap(lambda n: st.tuples(st.just(n), mutated(originals[n])))

    def one(drawn):
        name, content = drawn
        (fresh(folder) / name).write_bytes(content)
        look(folder, changed=content != originals[name] and name != MANIFEST)

    fuzz(one, cases, drawn)


paths = st.one_of(
    texts, st.sampled_from(["../step-1/config.json", "/etc/hostname", ".", "training", "a//b", MANIFEST])
)
entries = st.one_of(scalars, st.fixed_dictionaries({"size": scalars, "sha256": texts}))
places = st.sampled_from(["format", "step", "metric", "files", "more"])


@sizes(120)
def test_manifests_of_strangers(folder, cases):
    original = json.loads((folder.parent / "kept/step-2" / MANIFEST).read_text())
    changes = st.one_of(
        st.tuples(places, trees).map(lambda c: original | {c[0]: c[1]}),
        st.dictionaries(paths, entries, min_size=1, max_size=2).map(
            lambda files: original | {"files": original["files"] | files}
        ),
    )

    def one(manifest):
        text = json.dumps(manifest)
        (fresh(folder) / MANIFEST).write_text(text)
        look(folder, changed=False)

    fuzz(one, cases, changes)


@sizes(80)
def test_states_that_are_whole_and_wrong(folder, cases):
    """Whoever can write a checkpoint can write its checksums: what is in it is still only data."""

    def one(state):
        path = fresh(folder)
        (path / STATE).write_bytes(state)
        manifest = json.loads((path / MANIFEST).read_text())
        digest = FileDigest.of(path / STATE)
        manifest["files"][STATE] = {"size": digest.size, "sha256": digest.sha256}
        (path / MANIFEST).write_text(json.dumps(manifest))
        try:
            with deadline():
                assert isinstance(verify(path).state_as(State), State)
        except CheckpointError as error:
            assert "step-2" in str(error) and len(str(error)) < 2_000

    fuzz(
        one, cases, st.one_of(trees.map(lambda t: json.dumps(t).encode()), mutated(b'{"step": 2, "order": [2, 1]}'))
    )
