"""Checkpoints: whole or absent, found again by their checksums, kept by number and by metric."""

import json
import math
import os
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.run import checkpoint
from kat_ray.run.checkpoint import CheckpointError, Checkpoints, FileDigest, check_state, verify

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 20,
    "training/learner-0-of-1.safetensors": b"x",
}


def write(checkpoints, step, metric=None, state=None):
    """One checkpoint as the driver and the learner make it."""
    partial = checkpoints.begin(step)
    for name, content in FILES.items():
        (partial / name).write_bytes(content)
    digests = {name: FileDigest.of(partial / name) for name in FILES}
    return checkpoints.commit(step, state or {"step": step}, digests, metric)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_what_was_written(folder):
    checkpoints = Checkpoints(folder, keep=2, keep_best=False)
    assert checkpoints.newest() == (None, [])
    path = write(checkpoints, 10, 0.25, {"a": [0.1, None, True], "b": {"c": "\u00e9"}})
    assert path == folder / "step-10" and names(folder) == ["step-10"]
    assert {n: (path / n).read_bytes() for n in FILES} == FILES
    loaded, notes = checkpoints.newest()
    assert (loaded.path, loaded.step, loaded.metric, notes) == (path, 10, 0.25, [])
    assert loaded.state == {"a": [0.1, None, True], "b": {"c": "\u00e9"}}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 10)
    assert set(manifest["files"]) == {*FILES, "training/state.json"}


def test_the_digest_by_hand(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert FileDigest.of(tmp_path / "abc") == FileDigest.synced(tmp_path / "abc") == FileDigest(3, sha256)


@given(st.lists(st.floats(), max_size=20), st.integers(-(2**70), 2**70))
@settings(max_examples=200, deadline=None)
def test_numbers_come_back_to_the_bit(values, number):
    state = {"values": values, "number": number}
    check_state(state)
    again = json.loads(json.dumps(state))
    assert again["number"] == number
    assert [v.hex() for v in again["values"]] == [v.hex() for v in values]  # nan, inf, -0.0 among them


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, (2,)]}}, r"state\.a\.b\[1\] is a tuple"),
        ({"a": {1: 2}}, r"state\.a: key 1 is no string"),
        ({"a": Path("x")}, r"state\.a is a PosixPath"),
    ],
)
def test_what_json_would_change_is_refused(folder, state, words):
    checkpoints = Checkpoints(folder, 1, False)
    checkpoints.begin(1)
    with pytest.raises(TypeError, match=words):
        checkpoints.commit(1, state, {}, None)


@dataclass
class Kept:
    step: int
    thresholds: list[float]


def test_a_state_is_read_as_what_it_should_be(folder):
    checkpoints = Checkpoints(folder, 3, False)
    write(checkpoints, 1, state={"step": 1, "thresholds": [0.5]})
    assert checkpoints.newest()[0].state_as(Kept) == Kept(1, [0.5])
    write(checkpoints, 2, state={"step": 2, "thresholds": [0.5, "low"]})
    with pytest.raises(CheckpointError, match=r"step-2/training/state\.json: thresholds\.1: .*of another version"):
        checkpoints.newest()[0].state_as(Kept)


@pytest.mark.parametrize(
    ("keep", "keep_best", "left"),
    [
        (2, False, [4, 5]),
        (2, True, [2, 4, 5]),
        (9, True, [1, 2, 3, 4, 5]),
        (1, True, [2, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(folder, keep, keep_best, left):
    checkpoints = Checkpoints(folder, keep, keep_best)
    for step, metric in enumerate([0.1, 0.6, math.nan, 0.6 - 1e-9, None], 1):
        write(checkpoints, step, metric)
    assert names(folder) == [f"step-{n}" for n in left]


def test_of_equals_the_newer_is_the_best(folder):
    checkpoints = Checkpoints(folder, 1, True)
    for step in (8, 9, 10, 11):
        write(checkpoints, step, None if step == 11 else 0.5)
    assert names(folder) == ["step-10", "step-11"]


def test_what_is_not_ours_stays(folder):
    (folder / "step-1").mkdir(parents=True)
    (folder / "notes").mkdir()
    checkpoints = Checkpoints(folder, 1, True)
    for step in (2, 3):
        write(checkpoints, step)
    assert names(folder) == ["notes", "step-1", "step-3"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    r"model\.safetensors has 5119 bytes instead of 5120": lambda p: os.truncate(p / "model.safetensors", 5119),
    r"model\.safetensors is damaged: its bytes are not": lambda p: flip(p / "model.safetensors"),
    r"state\.json is damaged: its bytes": lambda p: flip(p / "training" / "state.json"),
    r"config\.json: No such file": lambda p: (p / "config.json").unlink(),
    r"manifest\.json is damaged: Unterminated string": lambda p: os.truncate(p / "manifest.json", 30),
    r"manifest\.json is damaged: Expecting value": lambda p: os.truncate(p / "manifest.json", 0),
    r"manifest\.json is damaged: it holds no JSON object": lambda p: (p / "manifest.json").write_text("[]"),
    r"manifest\.json is damaged: maximum recursion": lambda p: (p / "manifest.json").write_text("[" * 99_999),
    r"manifest\.json is damaged: 'utf-8' codec": lambda p: (p / "manifest.json").write_bytes(b'{"\xff": 1}'),
    r"is of format '2', this version reads format 1": lambda p: edit(p / "manifest.json", format=2),
    r"is of format 'None'": lambda p: (p / "manifest.json").write_text("{}"),
    r"its manifest\.json is of step 7": lambda p: edit(p / "manifest.json", step=7),
    r"damaged: step: .*greater than or equal to 0": lambda p: edit(p / "manifest.json", step=-1),
    r"damaged: metric: .*valid number": lambda p: edit(p / "manifest.json", metric="best"),
    r"'\.\./\.\./x' is no file of a checkpoint": lambda p: edit(
        p / "manifest.json", files={"../../x": digest(b"")}
    ),
    r"'/etc/passwd' is no file": lambda p: edit(p / "manifest.json", files={"/etc/passwd": digest(b"")}),
    r"files: training/state\.json is not among them": lambda p: edit(p / "manifest.json", files={}),
    r"has no manifest\.json: it holds a model only": lambda p: (p / "manifest.json").unlink(),
    r"model\.safetensors is no regular file": lambda p: as_folder(p / "model.safetensors"),
    r"'a\\x00b' is no file of a checkpoint": lambda p: edit(p / "manifest.json", files={"a\0b": digest(b"")}),
    r"'\\ud800' is no file of a checkpoint": lambda p: edit(p / "manifest.json", files={"\ud800": digest(b"")}),
    r"'\.' is no file of a checkpoint": lambda p: edit(p / "manifest.json", files={".": digest(b"")}),
}


def digest(content):
    import hashlib

    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(folder, words):
    checkpoints = Checkpoints(folder, 3, True)
    write(checkpoints, 1)
    DAMAGE[words](write(checkpoints, 2))
    with pytest.raises(CheckpointError, match=words):
        verify(folder / "step-2")
    loaded, (note,) = checkpoints.newest()
    assert loaded.step == 1 and str(folder / "step-2") in note and "\n" not in note


def test_only_whoever_is_asked_reads_the_bytes(folder):
    """The driver reads manifest and state; of a file that others find whole, nothing but the size."""
    checkpoints, asked = Checkpoints(folder, 3, True), []
    flip(write(checkpoints, 1) / "model.safetensors")
    loaded, notes = checkpoints.newest(lambda path, files: asked.append((path, {*files})))
    assert (loaded.step, notes, asked) == (1, [], [(folder / "step-1", {*FILES})])
    loaded, (note,) = checkpoints.newest(lambda path, files: "config.json is damaged")
    assert loaded is None and note == f"{folder / 'step-1'}: config.json is damaged"


def test_nothing_is_found_where_all_are_damaged(folder):
    checkpoints = Checkpoints(folder, 3, True)
    for step in (1, 2):
        flip(write(checkpoints, step) / "model.safetensors")
    loaded, notes = checkpoints.newest()
    assert loaded is None and ["step-2" in n for n in notes] == [True, False]
    with pytest.raises(CheckpointError, match="step-9"):
        verify(folder / "step-9")


def test_after_a_resume_the_checkpoints_of_the_past_that_was_given_up_are_gone(folder):
    checkpoints = Checkpoints(folder, 1, True)
    write(checkpoints, 10, 0.5)
    flip(write(Checkpoints(folder, 2, True), 20, 0.9) / "model.safetensors")
    assert checkpoints.newest()[0].step == 10
    write(checkpoints, 15, 0.4)
    assert names(folder) == ["step-10", "step-15"], "20 is neither the newest nor the best"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [None, 3])
@pytest.mark.parametrize("call", range(40))
def test_a_write_killed_anywhere_leaves_a_good_checkpoint(folder, monkeypatch, before, call):
    """Killed before its n-th change to the file system: the newest is the one before, or the new one whole."""
    checkpoints = Checkpoints(folder, 1, False)
    write(checkpoints, 2)
    if before is not None:
        write(checkpoints, before, state={"old": True})  # the same number is written again
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for owner, name in (
        (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (os, "fsync"),
        (shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    try:
        write(checkpoints, 3, state={"old": False})
        done = True
    except Killed:
        done = False
    monkeypatch.undo()
    assert done == (call >= calls) and (done or call < 39), "the last kills come after the last change"
    loaded, notes = checkpoints.newest()
    assert notes == []
    old = (2, {"step": 2}) if before is None else (3, {"old": True})
    assert (loaded.step, loaded.state) in ([(3, {"old": False})] if done else [old, (3, {"old": False})])
    write(checkpoints, 4)
    assert names(folder) == ["step-4"] and checkpoints.newest()[0].step == 4


def test_files_that_did_not_arrive_are_named(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "LISTING_SECONDS", 0.1)
    checkpoints = Checkpoints(folder, 1, False)
    partial = checkpoints.begin(1)
    (partial / "a").write_bytes(b"12")
    with pytest.raises(CheckpointError, match=r"b is not there with the 3 bytes .* file system \(run\.dir\)"):
        checkpoints.commit(1, {}, {"a": FileDigest.of(partial / "a"), "b": FileDigest(3, "0" * 64)}, None)
    with pytest.raises(CheckpointError, match="a is not there with the 3 bytes"):
        checkpoints.commit(1, {}, {"a": FileDigest(3, "0" * 64)}, None)
    assert names(folder) == ["step-1.partial"]


def test_files_that_a_listing_does_not_show_yet_are_waited_for(folder):
    """As over NFS, where the driver may know of a rank's file, or of its size, a minute later than the rank."""
    checkpoints = Checkpoints(folder, 1, False)
    partial = checkpoints.begin(1)
    for name, content in FILES.items():
        (partial / name).write_bytes(content)
    digests = {name: FileDigest.of(partial / name) for name in FILES}
    late, short = partial / "training/learner-0-of-1.safetensors", partial / "model.safetensors"
    late.rename(folder / "late")
    short.write_bytes(b"")
    looked = threading.Event()

    def arrive():
        looked.wait(60)  # until the driver has looked for them once
        (folder / "late").rename(late)
        short.write_bytes(FILES["model.safetensors"])

    def missing(*arguments):
        found = whole(*arguments)
        looked.set()
        return found

    whole, checkpoint._missing = checkpoint._missing, missing
    arriving = threading.Thread(target=arrive)
    arriving.start()
    try:
        path = checkpoints.commit(1, {"step": 1}, digests, None)
    finally:
        checkpoint._missing = whole
        arriving.join()
    assert {n: (path / n).read_bytes() for n in FILES} == FILES
    assert not list(path.rglob(".*"))
    assert checkpoints.newest()[0].step == 1


def test_others_may_read_the_bytes(folder):
    """All files but the state, which the driver needs at once; what they find is said as of any damage."""
    checkpoints = Checkpoints(folder, 2, False)
    for step in (1, 2):
        write(checkpoints, step)
    (folder / "step-2" / "model.safetensors").write_bytes(bytes(len(FILES["model.safetensors"])))
    assert checkpoints.newest(checkpoint.unread)[0].step == 2
    asked = []

    def find_damage(path, files):
        asked.append((path.name, set(files)))
        return checkpoint.damage_in(path, files)

    loaded, (note,) = checkpoints.newest(find_damage)
    assert loaded.step == 1 and "step-2: model.safetensors is damaged" in note
    assert asked == [("step-2", set(FILES)), ("step-1", set(FILES))]
    (folder / "step-1" / "training/state.json").write_text('{"step": 7}')
    assert checkpoints.newest(checkpoint.unread)[0].step == 2, "its own bytes are still right"


def test_who_reads_a_large_file_says_that_it_goes_on(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 * checkpoint._BLOCK + 1))
    beats = []
    assert checkpoint.damage_in(tmp_path, {"a": FileDigest.of(tmp_path / "a")}, lambda: beats.append(1)) is None
    assert len(beats) == 4


def test_a_full_disk_is_named(folder, monkeypatch):
    checkpoints = Checkpoints(folder, 1, False)
    write(checkpoints, 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-2\.partial: No space left on device"):
        write(checkpoints, 2)
    monkeypatch.undo()
    assert checkpoints.newest()[0].step == 1


@given(st.binary(max_size=300), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_any_bytes_anywhere_are_one_message(tmp_path_factory, content, seed):
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoints = Checkpoints(folder, 2, True)
    write(checkpoints, 1)
    path = write(checkpoints, 2)
    rng = random.Random(seed)
    file = path / rng.choice(["manifest.json", "training/state.json", "model.safetensors"])
    whole = file.read_bytes()
    at = rng.randrange(len(whole))
    damaged = rng.choice([content, whole[:at] + content, whole[:at] + content + whole[at + len(content) :]])
    file.write_bytes(damaged)
    loaded, notes = checkpoints.newest()
    if file.name == "manifest.json":  # it may say the same in other words
        assert loaded.step in (1, 2) and len(notes) == 2 - loaded.step
    else:
        assert (loaded.step, len(notes)) == ((2, 0) if damaged == whole else (1, 1))
    shutil.rmtree(folder)


def test_it_needs_neither_torch_nor_a_cluster():
    import subprocess
    import sys

    code = f"import sys; import {checkpoint.__name__}; print({{'torch', 'ray', 'deepspeed'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
