"""Log lines on standard error: whose they are, and how they stand beside what a run shows."""

import io
import logging
import re
import sys

import pytest

from kat_ray.config import RunConfig
from kat_ray.observability import logs
from kat_ray.observability.progress import Progress, StepLine
from kat_ray.run.directory import RunDirectory

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING (\[[^]]*\]) kat_ray\.pools: (.*)\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(monkeypatch):
    """The driver's, as the command line sets it up, on a root that holds nothing else."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("kat_ray"), "level", logging.WARNING)
    logs.log_to_terminal(logging.WARNING)
    return logging.getLogger("kat_ray.pools")


def test_a_drivers_line_names_its_run_and_role(log, tmp_path, capsys):
    settings = RunConfig(name="night", dir=str(tmp_path), tensorboard=False)
    log.warning("before")
    for _ in range(2):
        with RunDirectory.create(settings, "") as run:
            log.warning("sampler:0 was lost")
            log.info("step 1")
    log.warning("after")
    out, err = capsys.readouterr()
    assert LINE.findall(err) == [
        ("[- driver]", "before"),
        ("[night driver]", "sampler:0 was lost"),
        ("[night-2 driver]", "sampler:0 was lost"),
        ("[- driver]", "after"),
    ]
    assert LINE.sub("", err) == "" == out
    kept = (run.path / "run.log").read_text()
    assert "WARNING [night-2 driver] kat_ray.pools: sampler:0 was lost\n" in kept and "step 1" in kept


def test_it_has_the_form_of_an_actors_line(log, monkeypatch, capsys):
    logs.name_driver("night")
    log.warning("a word")
    theirs = logging.getLogger("kat_ray")
    for name, value in logs.labels("night", "scorer:0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(theirs, "handlers", [])
    monkeypatch.setattr(theirs, "propagate", True)
    logs.label_logs()
    log.warning("a word")
    assert LINE.findall(capsys.readouterr().err) == [("[night driver]", "a word"), ("[night scorer:0]", "a word")]


def test_a_second_command_of_one_process_does_not_log_twice(log, capsys):
    logs.log_to_terminal(logging.INFO)
    log.warning("once")
    assert capsys.readouterr().err.count("once") == 1


def show(log, stdout):
    with Progress(9, stdout) as progress:
        progress.training()
        progress.step(StepLine(1, 0.5, 100, 0.0, None, 10.0))
        log.warning("sampler:0 was lost (its node is gone, and nothing of what it was at is to be had any more)")
        progress._live.refresh()  # as twice a second
        log.warning("again")
        progress.note("a note")


def test_a_pipe_keeps_progress_and_log_apart(log, monkeypatch):
    stdout, stderr = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    show(log, stdout)
    assert len(LINE.findall(stderr.getvalue())) == 2 and not LINE.sub("", stderr.getvalue())
    assert [line.split()[0] for line in stdout.getvalue().splitlines()] == ["step", "a"]


def test_a_line_of_the_log_stands_above_the_live_line(log, monkeypatch):
    """Both are one terminal's: the live lines go, the log's line stands alone and whole, and so does the next."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show(log, terminal)
    first, second = LINE.finditer(terminal.getvalue())
    assert first[1] == second[1] == "[- driver]" and first[2].endswith("any more)") and second[2] == "again"
    between = terminal.getvalue()[first.end() : second.start()]
    assert "0.5000" in between and between.endswith("\x1b[2K"), "the live lines, and a line that was cleared"


def test_a_log_that_is_redirected_is_not_drawn_on_the_terminal(log, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, stderr = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    show(log, terminal)
    assert len(LINE.findall(stderr.getvalue())) == 2 and "was lost" not in terminal.getvalue()
