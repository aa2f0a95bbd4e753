"""Workers of the tests' Rays are set up as Ray's own script sets them up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tests.support import setup_worker

SHOW = "import json, os, sys; print(json.dumps([sys.executable, sys.argv[1:], os.environ['A'], os.environ['B']]))"
OWN = Path(ray.__file__).parent / "_private/workers/setup_worker.py"


@pytest.mark.parametrize("more", [{}, {"command_prefix": ["echo", "first", "&&"]}], ids=["plain", "left to Ray"])
def test_a_worker_becomes_what_rays_script_makes_of_it(more):
    variables = {"A": "one two 'three' ${HOME}${NOT_THERE}", "B": "$PATH:/x"}
    context = {"env_vars": variables, "py_executable": sys.executable}
    given = [
        "-c", SHOW, "--node=a b", "--language=PYTHON",
        f"--serialized-runtime-env-context={json.dumps(context | more)}", "--flag", "$HOME",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "NOT_THERE"}
    expected, found = (
        subprocess.run([sys.executable, script, *given], capture_output=True, text=True, env=environment)
        for script in (str(OWN), setup_worker.__file__)
    )
    assert expected.returncode == found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout and "--flag" in found.stdout
