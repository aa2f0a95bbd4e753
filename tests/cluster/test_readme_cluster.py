"""The README's four lines that start a cluster and submit to it, as they stand, in a network of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]


def lines_of_the_readme():
    """The four lines, from the one that activates the environment."""
    (block,) = re.findall(r"(?m)^    source \.venv/bin/activate.*\n(?:    .*\n)+", (ROOT / "README.md").read_text())
    return [line.strip() for line in block.splitlines()]


def test_four_lines_start_a_cluster_and_submit_to_it(tmp_path):
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, for Ray's own ports")
    tree, home = tmp_path / "tree", tmp_path / "home"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache"))
    (tree / ".venv").symlink_to(Path(sys.prefix))
    home.mkdir()
    lines = lines_of_the_readme()
    assert len(lines) == 4 and lines[-1].startswith("kat-ray submit demo ")
    lines[-1] += " run.steps=2 evaluation.data=null data.limit=40 rollout.max_tokens=32"  # the rest is the demo's
    # Ray's folder too: what is in it would tell other Rays of this machine of a cluster that they cannot reach.
    alone = ["set -e", "ip link set lo up", "mkdir -p /tmp/ray", "mount -t tmpfs none /tmp/ray"]
    script = "\n".join([*alone, *lines, "ls runs/demo/checkpoints"])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("PYTHONPATH", "TMPDIR")}
    done = subprocess.run(
        # All that it starts ends with it: they are processes of a namespace, whose first is the shell.
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script],
        cwd=tree, env=kept | {"HOME": str(home), "PYTHONPATH": str(tree)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "job demo-1: SUCCEEDED" in done.stdout and "step-2" in done.stdout.splitlines()[-1], said[-3000:]
    noise = [line for line in done.stderr.splitlines() if "packaging.py" in line or "WebSocket" in line]
    assert noise == []
