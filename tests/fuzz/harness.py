"""How a fuzzed command is run and what it may do: succeed, or say one message and return 2."""

import io
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, reproduce_failure, seed, settings
from hypothesis import strategies as st

from kat_ray.cli import main as cli

# A case takes a tenth of a second; past this it hangs.
SECONDS = 60
THIRDS = 3
SEED = "KAT_RAY_FUZZ_SEED"  # of the first tier's cases; the nightly tier draws from 0, 1 and 2
CASE = "KAT_RAY_FUZZ_CASE"  # one case, as a failure names it


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code and both streams."""

    code: int
    out: str
    err: str


def sizes(whole):
    """All cases of a test in the nightly tier, and in the first the third whose turn it is: each has a seed."""
    third = -(-whole // THIRDS)
    return pytest.mark.parametrize(
        "cases",
        [
            pytest.param((third, None), id="third"),
            pytest.param((third, range(THIRDS)), id="all", marks=pytest.mark.nightly),
        ],
    )


def fuzz(check, cases, *strategies):
    """Call `check` with drawn examples. Of one that fails, the error says the command that draws it again."""
    number, seeds = cases
    profile = settings(
        max_examples=number,
        database=None,
        phases=[Phase.generate],  # a case is small as it is, and to shrink one takes minutes
        report_multiple_bugs=False,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    if CASE in os.environ:
        again = reproduce_failure(hypothesis.__version__, os.environ[CASE].encode())
        again(profile(given(*strategies)(check)))()
    for number in [_turn()] if seeds is None else seeds:
        try:
            seed(number)(profile(given(*strategies)(check)))()
        except Exception as error:
            error.add_note(_how_to_replay(number, error))
            raise


def _turn():
    """The seed of this run's third: another one each day, so that three days see every case."""
    today = datetime.now(UTC).date().toordinal()
    return int(os.environ.get(SEED, today % THIRDS))


def _how_to_replay(number, error):
    # Not by the seed: Hypothesis also draws from the constants of whatever modules are loaded.
    case = re.search(r"@reproduce_failure\('[^']*', b'([^']*)'\)", "\n".join(error.__notes__))
    test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
    variable = f"{CASE}={case[1]}" if case else f"{SEED}={number}"
    return f"Seed {number} drew this. Once more:\n\n    {variable} .venv/bin/python -m pytest -m '' '{test}'\n"


@contextmanager
def streams():
    """Standard streams as a terminal's: strict UTF-8 out, errors that can show anything."""
    kept = sys.stdout, sys.stderr
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    try:
        yield sys.stdout.buffer, sys.stderr.buffer
    finally:
        sys.stdout, sys.stderr = kept


@contextmanager
def deadline():
    """Interrupt what hangs."""

    def late(number, frame):
        where = "".join(traceback.format_stack(frame)[-4:])
        raise AssertionError(f"hangs for {SECONDS} s:\n{where}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*argv):
    """Run the command line in this process; whatever escapes it fails the test."""
    with streams() as (out, err), deadline():
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as end:
            code = end.code
        return Outcome(code, out.getvalue().decode(), err.getvalue().decode())


def check(outcome, codes=(0, 2)):
    """The promise of issue 5: success, or a message and 2; no traceback either way."""
    assert outcome.code in codes, outcome
    assert "Traceback" not in outcome.err and "Traceback" not in outcome.out, outcome
    if outcome.code == 2:
        lines = outcome.err.splitlines()
        assert lines, "an error without a message"
        assert lines[0].startswith("usage:") or all(line.startswith("error: ") for line in lines), outcome
        assert len(outcome.err) < 20_000, "a message that nobody reads"


def inside(path):
    """Whether a path of a fuzzed configuration stays in the working directory, so that a test may write there."""
    try:
        return Path(path).resolve().is_relative_to(Path.cwd())
    except (OSError, ValueError):
        return False


# --- bytes ---------------------------------------------------------------------------------------------------

_NASTY = (
    b"\x00", b"\t", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\xed\xa0\x80", b"\\ud800", b"\\u0000",
    b"[" * 3000, b"{" * 3000, b'{"a":' * 2000, b"- " * 2000, b"9" * 5000, b"-1", b"0", b"1e999", b"NaN", b".nan",
    b"-Infinity", b".inf", b"null", b"true", b"''", b"[]", b"{}", b"~", b"&a ", b"*a", b"<<: *a\n", b"&a [*a]",
    b"? ", b"---\n", b"!!python/object/apply:os.system [x]", b"!!binary AAAA", b"!!int x", b"!!float '1'",
    b"!!timestamp 1",
    b"%YAML 9\n", b"\n", b"\r", b"\xc2\x85", b"'", b'"', b"#", b": ", b",", b"18446744073709551616",
    b"\xe2\x80\xa8",
)  # fmt: skip

_edit = st.one_of(
    st.tuples(st.just("insert"), st.floats(0, 1), st.one_of(st.sampled_from(_NASTY), st.binary(max_size=12))),
    st.tuples(st.just("replace"), st.floats(0, 1), st.one_of(st.sampled_from(_NASTY), st.binary(max_size=12))),
    st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
)


def mutated(content, most=3):
    """A strategy of `content` (bytes) with one to `most` edits."""
    return st.lists(_edit, min_size=1, max_size=most).map(lambda edits: _edited(content, edits))


def _edited(content, edits):
    for kind, where, what in edits:
        at = int(where * len(content))
        if kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "replace":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "delete":
            content = content[:at] + content[at + what :]
        elif kind == "repeat":
            content = content[: at + what] + content[at : at + what] + content[at + what :]
        else:
            content = content[:at]
    return content


# --- values --------------------------------------------------------------------------------------------------

PATHS = (
    "",
    " ",
    "demo:student",
    "demo:train",
    "demo:nothing",
    ".",
    "x" * 5000,
    "a\0b",
    "\ud800",
    "../..",
    "~nobody",
)
texts = st.one_of(st.text(max_size=12), st.sampled_from(PATHS))
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, 0.5, 1e-320]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
trees = st.recursive(
    scalars,
    lambda below: st.one_of(st.lists(below, max_size=4), st.dictionaries(texts, below, max_size=4)),
    max_leaves=12,
)
