"""The failure of a fuzzed case names a command that draws the same case, and no other."""

import re

import pytest
from hypothesis import strategies as st

from tests.fuzz import harness


@pytest.fixture
def unset(monkeypatch):
    for name in (harness.SEED, harness.CASE):
        monkeypatch.delenv(name, raising=False)


def drawn(cases):
    found = []
    harness.fuzz(lambda content: found.append(content), cases, st.binary(max_size=8))
    return found


def test_a_failure_is_drawn_again_by_its_command(unset, monkeypatch):
    def refuse(content):
        seen.append(content)
        assert len(content) < 4

    seen = []
    with pytest.raises(AssertionError) as failure:
        harness.fuzz(refuse, (60, range(3)), st.binary(max_size=8))
    told = failure.value.__notes__[-1]
    name, value, test = re.search(
        r"(KAT_RAY_FUZZ_CASE)=(\S+) \.venv/bin/python -m pytest -m '' '(.*)'", told
    ).groups()
    assert test.endswith("test_harness.py::test_a_failure_is_drawn_again_by_its_command")
    failed, seen = seen[-1], []
    monkeypatch.setenv(name, value)
    with pytest.raises(AssertionError):
        harness.fuzz(refuse, (60, range(3)), st.binary(max_size=8))
    assert seen == [failed]


def test_the_thirds_make_up_the_whole(unset, monkeypatch):
    thirds = []
    for seed in range(harness.THIRDS):
        monkeypatch.setenv(harness.SEED, str(seed))
        thirds.append(drawn((20, None)))
    assert thirds[0] != thirds[1] != thirds[2]
    assert drawn((20, range(harness.THIRDS))) == [content for third in thirds for content in third]
