"""Who may write a run: one at a time, also where a process is only cut off, and comes back."""

import json

import pytest

from kat_ray.storage import claim as claims
from kat_ray.storage.address import Address
from kat_ray.storage.bucket import Bucket, StoreError
from kat_ray.storage.claim import Claim, Holder, is_released
from tests.support.memory_bucket import MemoryStore


@pytest.fixture
def bucket():
    return Bucket(Address("s3://b/runs/one"), 1.0, MemoryStore())


def take(bucket, meanwhile=lambda: None):
    """`Claim.take`, with something that happens at the first wait; what was said, and seconds waited."""
    said, waited = [], []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 1:
            meanwhile()

    return Claim.take(bucket, said.append, sleep), said, sum(waited)


def test_a_new_run_is_claimed_once(bucket):
    first = Claim.new(bucket)
    assert first.number == 1 and Claim.new(bucket) is None
    first.check()
    assert not is_released(bucket)
    first.release()
    assert is_released(bucket)


def test_a_run_that_was_released_or_whose_process_is_dead_is_taken_at_once(bucket, monkeypatch):
    Claim.new(bucket).release()
    second, said, waited = take(bucket)
    assert (second.number, said, waited) == (2, [], 0)
    monkeypatch.setattr(Holder, "is_dead", lambda self: True)
    third, _, waited = take(bucket)
    assert (third.number, waited) == (3, 0)


def test_a_process_that_shows_itself_keeps_its_run(bucket):
    first = Claim.new(bucket)
    with pytest.raises(StoreError, match=r"another process \(pid \d+ on .*\) is writing this run"):
        take(bucket, first.beat)
    first.check()


def test_one_that_is_cut_off_loses_it_and_completes_nothing_more(bucket):
    first = Claim.new(bucket)
    second, said, waited = take(bucket)
    assert waited == claims.WATCH_SECONDS and "waiting 40 s to see whether" in said[0]
    with pytest.raises(StoreError, match="has taken this run, since this process did not show itself for 40 s"):
        first.check()
    first.beat()  # late, it harms nobody
    second.check()
    second.release()
    assert is_released(bucket) and list(bucket.sizes(".claims")) == [".claims/2"]


def test_of_two_that_wait_for_the_same_run_one_gets_it(bucket):
    Claim.new(bucket).release()
    number = claims.newest_number(bucket)
    bucket.create(f".claims/{number + 1}", Holder.here().to_bytes())  # the other one was faster by a request
    taken = []

    class Late(MemoryStore):
        """Lists what was there before."""

    late = Bucket(bucket.address, 1.0, bucket._fs)
    late.sizes = lambda prefix="": {f".claims/{number}": 1}
    with pytest.raises(StoreError, match="another process has just taken this run"):
        taken.append(Claim.take(late, lambda words: None))
    assert not taken


def test_released_while_it_is_watched(bucket):
    first = Claim.new(bucket)
    second, _, waited = take(bucket, first.release)
    assert second.number == 2 and waited == claims.BEAT_SECONDS


def test_a_pid_means_something_in_its_own_container_alone():
    here = Holder.here()
    assert not here.is_dead()
    gone = Holder(here.id, here.host, here.machine, 2**22 + 1)
    assert gone.is_dead()
    assert not Holder(here.id, here.host, "another boot", 2**22 + 1).is_dead()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"1", json.dumps({"id": 1, "odd": 2}).encode()])
def test_a_claim_that_cannot_be_read_is_nobodys(content):
    assert Holder.of(content) is None
