"""The command line beside a cluster, and a browser for a dashboard."""

import os
import subprocess
import sys

import pytest

from tests.support.chromium import chromium
from tests.support.paths import ROOT
from tests.support.tokenizers import make_tokenizer


@pytest.fixture
def call(tmp_path):
    """The command line as on a user's machine; it must have left nothing in `tmp_path`."""

    def run(*arguments, seconds=120, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "kat_ray.cli", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=kept | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)} | variables, timeout=seconds,
        )  # fmt: skip
        assert "Traceback" not in done.stderr + done.stdout
        assert not list(tmp_path.iterdir()), "a run was started"
        return done

    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """For Ray's dashboard."""
    with chromium(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """For checkpoints, which have one beside the weights."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return str(path)
