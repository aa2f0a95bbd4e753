"""Requests to a store: what is tried again, what is not, what is said, and that no credential is in it."""

import asyncio
import builtins

import pytest
from fsspec.asyn import AsyncFileSystem

from kat_ray.storage.address import Address
from kat_ray.storage.bucket import EXTRAS, Bucket, Exists, StoreError
from tests.support.memory_bucket import MemoryStore

RUN = Address("s3://my-bucket/runs/one")


class NoCredentialsError(Exception):
    """As botocore's, which is not installed here."""


@pytest.fixture
def store():
    return MemoryStore()


def bucket(store, seconds=300.0, waits=None):
    return Bucket(RUN, seconds, store, sleep=(waits if waits is not None else []).append)


def test_objects_are_written_whole_listed_and_deleted(store, tmp_path):
    b = bucket(store)
    (tmp_path / "file").write_bytes(b"abc")
    assert b.put("a/file", tmp_path / "file") and b.read("a/file") == b"abc"
    b.write("a/file", b"other")
    b.write("ab", b"1")
    assert b.sizes() == {"a/file": 5, "ab": 1} and b.sizes("a") == {"a/file": 5}
    assert b.below("a").sizes() == {"file": 5}
    assert bucket(store).below("../run").sizes() == {}
    assert b.get("a/file", tmp_path / "back") and (tmp_path / "back").read_bytes() == b"other"
    b.delete(["ab", "not there"])
    assert b.sizes() == {"a/file": 5}
    assert b.read("ab") is None and not b.get("ab", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "file"], "nothing half is left"
    assert not b.put("gone", tmp_path / "gone"), "a file that was taken back meanwhile"


def test_an_object_is_created_once(store):
    b = bucket(store)
    b.create("claim", b"mine")
    b.create("claim", b"mine")  # as after an answer that was lost
    with pytest.raises(Exists):
        b.create("claim", b"another's")
    assert b.read("claim") == b"mine"


def test_a_condition_that_is_refused_by_its_number(store):
    b = bucket(store)
    b.create("claim", b"another's")
    refused = OSError("conditionNotMet")
    refused.code = 412
    store.failures = [refused]
    with pytest.raises(Exists):
        b.create("claim", b"mine")


def test_a_store_that_does_not_know_the_condition_is_found_out(store):
    b = bucket(store)
    b.create("claim", b"mine")
    store.failures = []
    plain = type("Plain", (), {"pipe_file": lambda *a, **k: None, "cat_file": lambda *a: b"another's"})()
    with pytest.raises(Exists):
        Bucket(RUN, 1.0, plain).create("claim", b"mine")


def test_a_store_that_does_not_answer_is_asked_again_with_longer_waits(store):
    waits = []
    store.failures = [ConnectionError("refused"), TimeoutError(), OSError("500")]
    bucket(store, waits=waits).write("a", b"1")
    assert store.content() == {"my-bucket/runs/one/a": b"1"}
    assert len(waits) == 3 and all(0 < wait <= 10 for wait in waits) and waits[2] > waits[0]


def test_it_is_given_up_after_its_time_with_what_to_do(store):
    store.failures = [ConnectionError("refused")] * 100
    with pytest.raises(
        StoreError, match=r"run\.dir = 's3://my-bucket/runs/one'.*0\.1 s \(run\.store_timeout\).*refused"
    ):
        bucket(store, 0.1).write("a", b"1")
    assert len(store.failures) > 90


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Access Denied"), r"Access Denied.*read, list, write and delete.*AWS_ACCESS_KEY_ID"),
        (NoCredentialsError("Unable to locate credentials"), r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"),
        (FileNotFoundError("The specified bucket does not exist"), r"make the bucket 'my-bucket' first"),
        (ValueError("Invalid bucket name"), r"Invalid bucket name"),
        (OSError(22, "The specified bucket is not valid"), r"The specified bucket is not valid"),
    ],
)
def test_what_another_try_does_not_mend_is_said_at_once(store, error, words):
    for request in (lambda b: b.write("a", b""), lambda b: b.sizes(), lambda b: b.read("a")):
        waits = []
        store.failures = [error]
        with pytest.raises(StoreError, match=words):
            request(bucket(store, waits=waits))
        assert waits == []


def test_no_credential_is_in_a_message(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    store.failures = [PermissionError("signed with wJalrXUtnFEMI/K7MDENG for https://me:pass@host/")]
    with pytest.raises(StoreError) as said:
        bucket(store).write("a", b"")
    assert "wJalr" not in str(said.value) and "pass@" not in str(said.value)


@pytest.mark.parametrize(("scheme", "package"), EXTRAS.items())
def test_the_extra_that_is_missing_is_named(monkeypatch, scheme, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"no {package}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(StoreError, match=rf"{package} is not installed: pip install 'kat-ray\[{scheme}\]'"):
        Bucket(Address(f"{scheme}://my-bucket/runs"), 1.0)


class Silent(AsyncFileSystem):
    """Takes requests and never answers."""

    async def _pipe_file(self, path, value, mode="overwrite", **kwargs):
        await asyncio.Event().wait()


def test_a_request_that_is_never_answered_is_ended(monkeypatch):
    monkeypatch.setitem(Bucket._call.__kwdefaults__, "seconds", 0.02)
    silent = bucket(Silent(skip_instance_cache=True), seconds=0.0)
    with pytest.raises(StoreError, match=r"cannot write a: no good answer for 0 s .*FSTimeoutError"):
        silent.write("a", b"1")
