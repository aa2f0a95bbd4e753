"""What the tests need beside Python; CI requires it, elsewhere a test says what it lacks."""

import os

import pytest

REQUIRED = bool(os.environ.get("KAT_RAY_REQUIRE_DEPLOY"))  # set by .ci/run


def lacking(what: str) -> None:
    """Skip, or fail where everything must be there."""
    if REQUIRED:
        pytest.fail(what)
    pytest.skip(what)
