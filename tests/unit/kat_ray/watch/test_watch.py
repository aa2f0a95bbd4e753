"""A run on one screen: finished, going on, being written, not begun; wide, narrow, without a terminal."""

import io
import json
import os
import socket
import time

import pytest
from rich.console import Console

from kat_ray.cli import main as cli
from kat_ray.config.load import config_yaml, load_config
from kat_ray.errors import UserError
from kat_ray.observability.progress import Progress, StepLine
from kat_ray.run.lock import lock_run
from kat_ray.watch import command
from kat_ray.watch.command import watch, watch_run
from kat_ray.watch.screen import screen
from kat_ray.watch.view import RunReader, State, view_of_log

NOW = 1_000_000.0


def line(step, **more):
    values = {
        "kl/mean": 1.0 / step, "rollout/generated_tokens": 1000, "rollout/kept_tokens": 900, "guards/fired": 0,
        "rollout/trapped_share": 0.25, "throughput/tokens_per_second": 2345.6, "time/step": 2.0,
        "learner/skipped": 0, **more,
    }  # fmt: skip
    return {"step": step, "time": NOW + 3 * step, **values}


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps that has written its configuration."""
    folder = tmp_path / "night"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_yaml(load_config("demo", ["run.steps=40"])))
    (folder / "metrics.jsonl").touch()
    return folder


def write(folder, *lines, mode="a"):
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


def frame(view, width=100, now=NOW + 33, unicode=True):
    return screen(view, width, now, unicode).plain


def test_a_run_that_goes_on(run):
    write(run, *map(line, range(1, 11)), {"step": 10, "time": NOW + 31, "eval/avg_at_k": 0.5})
    text = frame(RunReader(run).view())
    assert text.startswith("night  running\nstep 10/40  25%  3.0 s a step  ETA 1:28\n")
    rows = {row.split()[0]: row for row in text.splitlines()[3:] if row}
    assert "0.1000" in rows["KL"] and "█" in rows["KL"] and rows["KL"].endswith("1.0000 → 0.1000")
    assert "50.0%" in rows["accuracy"] and "25.0%" in rows["trapped"] and "2,346" in rows["tokens/s"]
    assert rows["tokens"].endswith("10,000 generated, 90.0% kept") and rows["guards"].endswith("quiet")
    assert "reward" not in rows and "threshold" not in rows and "trouble" not in rows


def test_what_went_wrong_is_shown(run):
    more = {"guards/fired": 1, "learner/skipped": 1, "pool/restarts": 2}
    write(run, *(line(step, **more) for step in (1, 2)))
    text = frame(RunReader(run).view(), now=NOW + 200)
    assert "running  no step for 3:14" in text
    assert "1 fired (2 steps with one)" in text and "2 skipped, 4 actors restarted" in text


def test_each_teacher_has_its_threshold(run):
    write(run, line(1, **{"teacher/threshold/maths": 0.125}))
    assert "threshold ma    0.1250" in frame(RunReader(run).view())


def test_half_a_line_is_read_when_it_is_whole(run):
    write(run, line(1))
    whole = json.dumps(line(2)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[:40])
    reader = RunReader(run)
    assert reader.view().done == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[40:] + "nonsense\n[]\n")
    assert reader.view().done == 2 and reader.view().series("kl/mean") == [1.0, 0.5]


def test_a_run_that_goes_back_is_read_again(run):
    """Also where the file is longer again before anybody looks."""
    reader = RunReader(run)
    write(run, *map(line, range(1, 9)))
    assert reader.view().done == 8
    write(run, *map(line, range(1, 4)), mode="w")
    assert reader.view().done == 3
    write(run, *(line(step, **{"kl/mean": 7.0}) for step in range(1, 13)), mode="w")
    assert reader.view().series("kl/mean") == [7.0] * 12


def test_a_run_without_a_step_shows_its_log(run):
    (run / "run.log").write_text(
        "2026-11-30 00:00:01,000 INFO [night driver] kat_ray.progress: starting Ray: 4 s\n"
        "2026-11-30 00:00:02,000 INFO [night driver] kat_ray.progress: step  1/40  KL 0.1\n"
        "2026-11-30 00:00:03,000 INFO [night driver] kat_ray.progress: loading \x1b[31mmodels: 9 s\nTraceback\n"
    )
    text = frame(RunReader(run).view())
    assert text.startswith("night  no step yet\nstep 0/40  0%\n")
    assert text.endswith("starting Ray: 4 s\nloading ?[31mmodels: 9 s")


def test_a_run_is_over_with_its_summary_or_its_process(run):
    write(run, line(1))
    (run / ".lock").write_text(f"pid 1 on {socket.gethostname()}")
    assert RunReader(run).view().state is State.STOPPED
    held = lock_run(run)
    assert RunReader(run).view().state is State.GOING
    os.close(held)
    (run / ".lock").write_text("pid 1 on another-machine")
    assert RunReader(run).view().state is State.GOING, "nobody here knows"
    (run / "summary.json").write_text("{}")
    assert RunReader(run).view().state is State.FINISHED


@pytest.mark.parametrize("width", [200, 80, 46, 30, 12, 1])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_terminal(run, width, unicode):
    write(run, *map(line, range(1, 200)))
    text = frame(RunReader(run).view(), width, unicode=unicode)
    assert max(map(len, text.splitlines())) <= width
    assert unicode or text.isascii()


def test_without_a_terminal_there_is_one_frame(run):
    write(run, line(1))
    out = io.StringIO()
    assert watch_run(run, Console(file=out, width=60)) == 0
    assert out.getvalue().count("night  ") == 1 and "\x1b" not in out.getvalue()


def test_a_terminal_is_drawn_to_until_the_run_is_over(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    looks = iter([1, 2, 3])

    def look():
        step = next(looks)
        write(run, line(step))
        if step == 3:
            (run / "summary.json").write_text("{}")
        return reader.view()

    reader, out = RunReader(run), io.StringIO()
    assert watch(look, Console(file=out, width=60, force_terminal=True), seconds=0.0) == 0
    frames = out.getvalue()
    assert "step 1/40" in frames and "step 2/40" in frames and frames.rindex("finished") > frames.rindex("running")


def test_ctrl_c_leaves_a_last_frame(run, monkeypatch):
    write(run, line(1))

    def leave(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", leave)
    out = io.StringIO()
    assert watch_run(run, Console(file=out, width=60, force_terminal=True)) == 0
    assert "night" in out.getvalue().rsplit("\x1b[?1049l", 1)[1]


def test_mistakes_are_one_message(tmp_path, run, capsys):
    for given in (tmp_path / "nobody", tmp_path / "no" / "folder", run / "config.yaml", tmp_path):
        assert cli.main(["watch", str(given)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {given}: ")
    with pytest.raises(UserError):
        watch_run(tmp_path / "nobody", Console(file=io.StringIO(), force_terminal=True), once=True)
    assert cli.main(["watch", str(run), "--once"]) == 0
    assert capsys.readouterr().out.startswith("night  no step yet\n")


def test_a_job_is_shown_by_its_log():
    progress = Progress(9, io.StringIO())
    steps = [
        progress.describe(StepLine(1, None, 512, 0.0, None, 10.0)),
        progress.describe(StepLine(2, 0.5, 5120, 0.25, 0.125, 2345.6, reward=-0.5)),
        progress.describe(StepLine(2, 0.25, 5120, 0.25, None, 2345.6, thresholds={"maths": 0.5, "code": None})),
    ]
    before = "evaluation before training: avg@2 50.0%, pass@2 100.0%, mean length 7"
    view = view_of_log("night", ["loading models: 9 s", before, *steps], finished=False, over=False)
    assert (view.state, view.steps, view.done) == (State.GOING, 9, 2)
    assert view.series("kl/mean") == [0.25], "of a step that came again, the last time"
    assert view.series("eval/avg_at_k") == [0.5] and view.series("teacher/threshold/maths") == [0.5]
    assert view.series("throughput/tokens_per_second") == [10.0, 2346.0]
    text = frame(view)
    assert "step 2/9  22%\n" in text and "loading models" in text
    again = view_of_log("night", steps[:2], finished=True, over=True)
    assert again.state is State.FINISHED and again.series("reward/mean") == [-0.5]
    assert again.series("kat/threshold") == [0.125]


def test_a_job_of_rewards_alone_is_shown_by_its_log():
    progress = Progress(9, io.StringIO())
    step = StepLine(2, None, 512, 0.0, None, 10.0, reward=0.5)
    by_the_hour = "step 3/9  reward -0.250   1,512 tokens   1,010 tok/s  ETA 11:02:09"
    view = view_of_log("night", [progress.describe(step), by_the_hour], finished=False, over=False)
    assert (view.state, view.steps, view.done, view.notes) == (State.GOING, 9, 3, [])
    assert view.series("reward/mean") == [0.5, -0.25] and view.series("rollout/generated_tokens") == [512, 1512]
    assert view.series("throughput/tokens_per_second") == [10.0, 1010.0]
    assert view.names("kl/") == view.names("rollout/trapped_share") == [], "of a teacher"
    assert "reward" in frame(view) and "trapped" not in frame(view)


def test_the_time_left_counts_from_the_last_line(run):
    write(run, *map(line, range(1, 11)))
    assert time.time() > NOW
    assert "ETA 1:27" in frame(RunReader(run).view(), now=NOW + 33.5)
