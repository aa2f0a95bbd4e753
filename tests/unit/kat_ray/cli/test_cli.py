"""The command line: what it prints, where, and with which exit code."""

import errno
import json
import subprocess
import sys

import pytest

from kat_ray.cli import main as cli
from kat_ray.config.load import load_config
from kat_ray.errors import Stopped, UserError
from tests.support.paths import ROOT


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("student: {path: a}\nteacher: {path: b}\ndata: {path: c.jsonl}\n")
    return path


def run(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "kat_ray.cli", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
        **kwargs,
    )


def test_help_names_a_first_command_and_the_exit_codes():
    done = run("--help")
    assert done.returncode == 0
    assert "kat-ray train demo" in done.stdout and "exit codes:" in done.stdout


@pytest.mark.parametrize("command", ["train", "eval", "doctor", "config"])
def test_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"kat-ray {command} " in capsys.readouterr().out.split("examples:")[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("kat-ray ")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["eval"], ["train", "x", "--nothing"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "x", "--budget", "abc"], "abc: must be a number above 0 and at most 1"),
        (["replay", "x", "--budget", "nan"], "nan: must be a number above 0 and at most 1"),
        (["report", "x", "--rollouts", "x"], "x: must be a whole number, at least 1"),
        (["report", "x", "--rollouts", "0"], "0: must be a whole number, at least 1"),
    ],
)
def test_numbers_out_of_range_are_said_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_are_messages_on_stderr_and_no_traceback(config):
    done = run("train", config, "run.stpes=3", "learner.lr=-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: override run.stpes=3: run.stpes: unknown field; did you mean steps?",
        "error: override learner.lr=-1: learner.lr = -1: must be a number > 0",
    ]


def test_config_prints_what_loads_back_equal(config, tmp_path, capsys):
    assert cli.main(["config", str(config), "learner.lr=1e-4", "termination.rule=none"]) == 0
    (tmp_path / "out.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "out.yaml") == load_config(config, ["learner.lr=1e-4", "termination.rule=none"])


def test_config_docs(capsys):
    assert cli.main(["config", "--docs"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()
    assert cli.main(["config"]) == 2


def test_a_reader_that_goes_away_is_no_error(config):
    done = subprocess.run(
        f"{sys.executable} -m kat_ray.cli config {config} | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stderr == ""


def fake_actors(monkeypatch, **functions):
    """Stand in for the cluster package, which a unit test does not start."""
    import types

    module = types.ModuleType("actors.driver.train")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "actors.driver.train", module)


def test_train_hands_over_the_configuration(config, monkeypatch):
    seen = []
    fake_actors(monkeypatch, train=lambda *args: seen.append(args))
    assert cli.main(["train", str(config), "run.steps=7", "-v", "run.seed=3"]) == 0
    assert seen == [(load_config(config, ["run.steps=7", "run.seed=3"]), None)]


def test_resume_takes_the_configuration_of_the_run(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.read_text())
    seen = []
    fake_actors(monkeypatch, train=lambda *args: seen.append(args))
    assert cli.main(["train", "--resume", str(run), "run.steps=7", "run.profile=true"]) == 0
    assert seen == [(load_config(config, ["run.steps=7", "run.profile=true"]), run)]
    assert cli.main(["train", str(config), "--resume", str(run)]) == 2
    assert cli.main(["train", "--resume", str(run), "run.seed=9"]) == 2
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert cli.main(["train"]) == 2
    errors = capsys.readouterr().err.splitlines()
    words = (
        "the run's own configuration",
        "cannot change run.seed",
        "not a run directory",
        "or a run to resume",
    )
    assert all(w in e for w, e in zip(words, errors, strict=True))
    (run / "summary.json").write_text('{"steps": 7}')
    for steps in (7, 5):
        assert cli.main(["train", "--resume", str(run), f"run.steps={steps}"]) == 0
        assert "all 7 steps are done" in capsys.readouterr().out and len(seen) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            UserError("the cluster has 2 CPU,\nlower sampler.replicas"),
            2,
            "error: the cluster has 2 CPU,\nerror: lower",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("stopped; go on with: kat-ray train --resume runs/x", 143), 143, "stopped; go on with"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            2,
            "error: the disk is full (/runs/x): free some",
        ),
    ],
)
def test_what_ends_a_run(config, monkeypatch, capsys, error, code, words):
    def train(*_):
        raise error

    fake_actors(monkeypatch, train=train)
    assert cli.main(["train", str(config)]) == code
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("a bug")])
def test_other_errors_keep_their_traceback(config, monkeypatch, error):
    def train(*_):
        raise error

    fake_actors(monkeypatch, train=train)
    with pytest.raises(type(error)):
        cli.main(["train", str(config)])


def test_eval_of_a_run_takes_its_newest_checkpoint_and_configuration(config, tmp_path, monkeypatch, capsys):
    from kat_ray.rewards.verifiers import EvalResult

    run_dir = tmp_path / "run"
    for step in (9, 10):
        (run_dir / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "h.jsonl").touch()
    (run_dir / "config.yaml").write_text(
        config.read_text() + f"evaluation: {{data: {{path: {tmp_path}/h.jsonl}}}}\n"
    )
    seen = []

    def evaluate_model(config, model_dir):
        seen.append((config.evaluation.k, model_dir))
        return EvalResult(0.25, 0.5, 8, 10, 33.3, 0.1)

    fake_actors(monkeypatch, evaluate_model=evaluate_model)
    assert cli.main(["eval", str(run_dir), "--json", "evaluation.k=8"]) == 0
    assert seen == [(8, str(run_dir / "checkpoints" / "step-10"))]
    assert json.loads(capsys.readouterr().out) == {
        "model": str(run_dir / "checkpoints" / "step-10"),
        "ran_out": 0,
        "errors": 0,
        "avg_at_k": 0.25,
        "pass_at_k": 0.5,
        "k": 8,
        "problems": 10,
        "mean_length": 33.3,
        "truncated_share": 0.1,
    }
    assert cli.main(["eval", "org/model", "--config", str(run_dir / "config.yaml")]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == [
        "h.jsonl", "10", "8", "1", "25.0%", "[0.0%,", "100.0%]", "50.0%", "[23.7%,", "76.3%]", "33", "10.0%", "0",
    ]  # fmt: skip
    assert seen[-1] == (4, "org/model")


def test_eval_needs_problems_and_checkpoints(config, tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert (
        "name the problems with --data, such as gsm8k, math500, aime24, aime25, amc23, minerva, or with --config"
        in capsys.readouterr().err
    )
    assert cli.main(["eval", "org/model", "--config", str(config)]) == 2
    assert "evaluation.data = null" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(config.read_text() + "evaluation: {data: {path: h.jsonl}}\n")
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_doctor_reports_and_returns_its_verdict(config, monkeypatch, capsys):
    from kat_ray.cli import doctor

    monkeypatch.setattr(doctor, "examine", lambda c: iter([doctor.fail("disk", f"{c and c.run.steps}")]))
    assert cli.main(["doctor", str(config), "run.steps=3"]) == 1
    assert capsys.readouterr().out.startswith("FAIL  disk: 3\n")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("FAIL  disk: None\n")


@pytest.mark.parametrize(
    ("environment", "address", "expected"),
    [
        ({}, None, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, None, "disabled"),
        ({"RAY_ADDRESS": "auto"}, None, None),
        ({}, "auto", None),
    ],
)
def test_a_local_ray_gets_a_token_of_its_own(monkeypatch, environment, address, expected):
    from kat_ray.cli.main import _keep_others_out
    from tests.support.configs import make_config

    monkeypatch.setattr("os.environ", environment := dict(environment))
    _keep_others_out(make_config("a", "b", cluster={"address": address}))
    assert environment.get("RAY_AUTH_MODE") == expected
    assert len(environment.get("RAY_AUTH_TOKEN", "")) == (64 if expected == "token" else 0)


@pytest.mark.parametrize(
    "argv",
    [["train", "--resume", "hdfs://b/run"], ["report", "hdfs://b/run"], ["replay", "s3://b//run"],
     ["compare", "demo", "--out", "s3://b"], ["train", "gs://b/my.yaml"], ["eval", "hdfs://b/run"]],
)  # fmt: skip
def test_commands_refuse_other_addresses_than_of_runs(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2 and "mount it as a file system" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
