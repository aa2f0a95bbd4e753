"""Which rank of a learner reads which files of a checkpoint."""

from hypothesis import given
from hypothesis import strategies as st

from actors.cluster.learners import deal
from actors.learner.optimizer_state import file_name
from kat_ray.run.checkpoint import FileDigest


def files_of(sizes):
    return {name: FileDigest(size, "0" * 64) for name, size in sizes.items()}


def test_a_rank_reads_its_own_file_and_the_rest_is_shared():
    files = files_of({file_name(0, 2): 50, file_name(1, 2): 50, "a": 30, "b": 20, "c": 10})
    first, second = deal(files, 2)
    assert set(first) == {file_name(0, 2), "a"} and set(second) == {file_name(1, 2), "b", "c"}


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 100), max_size=12), st.integers(1, 5))
def test_every_file_is_read_by_one_rank_and_none_reads_much_more(sizes, ranks):
    files = files_of(sizes)
    shares = deal(files, ranks)
    assert len(shares) == ranks and sum(map(len, shares)) == len(files)
    assert {k: v for share in shares for k, v in share.items()} == files
    read = [sum(d.size for d in share.values()) for share in shares]
    assert max(read) - min(read) <= max(sizes.values(), default=0)
