"""The command a user types, where it says no; where it trains: test_nobody_let_in."""

import os
import subprocess
import sys

import pytest

from kat_ray.cli.main import main


def kat_ray(*arguments, cwd):
    """Run the command line; returns the finished process."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "kat_ray.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("termination.eta=1", "termination.eta"),
        ("rollout.max_tokens=4000", "rollout.max_tokens"),
        ("rollout.top_k_logprobs=170", "rollout.top_k_logprobs = 170: must be <= 166"),
        ("student.path=/no/such/model", "/no/such/model"),
        ("data.path=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("sampler.replicas=none", "sampler.replicas"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", change]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_command_that_says_no_has_nothing_else_to_say(tmp_path):
    done = kat_ray("train", "demo", "student.path=/no/such/model", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert "/no/such/model" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.nightly  # in the process of the test: test_run
def test_what_the_machine_lacks_is_said_before_models_are_loaded(own_ray, tmp_path):
    done = kat_ray("train", "demo", "cluster.num_cpus=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "the cluster has 2 CPU, the roles ask for 3.1" in done.stderr and "Traceback" not in done.stderr
