"""What a run shows, in a pipe and in a terminal."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from kat_ray.observability.progress import Progress, StepLine
from tests.support.terminal import Terminal

LINE = StepLine(
    step=7, kl=0.1234, generated_tokens=5120, trapped_share=0.25, threshold=None, tokens_per_second=2345.6
)
EVALUATION = {"avg_at_k": 0.125, "pass_at_k": 0.5, "k": 4, "problems": 200, "mean_length": 91.7}
SUMMARY = {
    "eval_before": EVALUATION, "eval_after": EVALUATION | {"avg_at_k": 0.75}, "eval_teacher": None,
    "rollouts_started": 4800, "rollouts_ended": {"eos": 3600, "max_tokens": 0, "trapped": 1200, "failed": 0},
    "generated_tokens": 160_000, "kept_tokens": 120_000, "cut_back_tokens": 30_000, "overshoot_tokens": 10_000,
    "trained_tokens": 120_000, "wall_seconds": 321.4,
}  # fmt: skip


def shown(stream):
    with Progress(100, stream) as progress:
        progress.phase("loading models")
        progress.training()
        progress.step(LINE)
        progress.note("a note that stays")
        progress.finish(SUMMARY, {"checkpoint": Path("runs/demo/checkpoints/step-100")})
    return stream.getvalue()


def test_a_pipe_gets_plain_lines():
    text = shown(io.StringIO())
    assert "\x1b" not in text
    assert "loading models: 0 s" in text
    assert "step   7/100  KL 0.1234   5,120 tokens  trapped  25%  threshold -   2,346 tok/s  ETA 0:00" in text
    assert "12.5%" in text and "75.0%" in text and "avg@4" in text and "teacher" not in text
    assert "160,000" in text and "4,800 (25% trapped)" in text and "321 s" in text
    assert "runs/demo/checkpoints/step-100" in text


def test_time_left_comes_from_the_last_steps():
    progress = Progress(100, io.StringIO())
    progress._durations = [2.0, 4.0]
    assert progress.describe(LINE).endswith("ETA 4:39")  # 93 steps of 3 s
    progress._durations = [360.0]
    assert progress.describe(LINE).endswith("ETA 9:18:00"), "hours, from one on"
    assert "KL -" in progress.describe(StepLine(1, None, 0, 0.0, 0.5, 0.0))


def test_rewards_are_shown_where_there_are_any():
    progress = Progress(100, io.StringIO())
    assert "reward" not in progress.describe(LINE)
    assert "  KL 0.1234  reward -0.500   5,120 tokens  " in progress.describe(replace(LINE, reward=-0.5))


def test_a_run_without_evaluation_still_ends_with_its_paths():
    stream = io.StringIO()
    summary = SUMMARY | {"eval_before": None, "eval_after": None}
    Progress(1, stream).finish(summary, {"log": Path("runs/demo/run.log")})
    assert "runs/demo/run.log" in stream.getvalue() and "avg@" not in stream.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    """Of a width; `kind` is TERM, and `more` further variables."""

    def made(width, kind="xterm-256color", encoding="utf-8", **more):
        for name, value in {"TERM": kind, "COLUMNS": str(width), "LINES": "40", **more}.items():
            monkeypatch.setenv(name, value)
        return Terminal(width, encoding)

    return made


def stepped(progress, steps):
    """Steps with rewards, and a held-out accuracy after every second one."""
    progress.start(0)
    progress.accuracy(0, 0.125)
    for done in range(1, steps + 1):
        progress.training()
        progress.step(replace(LINE, step=done, kl=1 / done, reward=done / 10, threshold=0.0625))
        if done % 2 == 0:
            progress.note("evaluated")
            progress.accuracy(done, done / 10)


@pytest.mark.parametrize("width", [120, 80, 60, 40, 12])
@pytest.mark.parametrize("more", [{}, {"NO_COLOR": "1"}], ids=["colours", "no-colours"])
def test_a_terminal_has_a_bar_and_courses_below_what_stays(terminal, width, more):
    out = terminal(width, **more)
    with Progress(8, out) as progress:
        stepped(progress, 6)
        progress.phase("saving")
        progress._live.refresh()
        lines = out.screen()
    assert out.wrapped == [] and lines[:3] == ["evaluated"] * 3
    head, bar, *rows, last, phase = lines[3:]
    assert [head, last, phase] == [
        cut("step 6/8  75%  0.0 s a step  ETA 0:00", width),
        cut("5,120 tokens  2,346 tok/s  trapped 25%  threshold 0.0625", width),
        cut("saving ... 0 s", width),
    ]
    assert set(bar) == {"━", "─"} and bar.count("━") == len(bar) * 6 // 8
    assert [row[:6] for row in rows] == ["KL    ", "reward", "accura"]
    if width >= 40:
        assert "0.1667  █" in rows[0] and "0.600  ▁" in rows[1] and "60.0%  ▁▂▅█" in rows[2]
    if width >= 80:
        assert rows[2].endswith("  12.5% → 60.0%")
    assert ("\x1b[32m" in out.getvalue()) is not bool(more), "green"
    assert out.screen() == ["evaluated"] * 3, "of the rest nothing is left"


def test_nothing_is_drawn_below_the_results(terminal):
    out = terminal(120)
    with Progress(8, out) as progress:
        stepped(progress, 8)
        progress.finish(SUMMARY, {"log": Path("run.log")})
        at_the_end = out.screen()
        progress.phase("removing what is old")
        assert at_the_end[-1].split() == ["log", "run.log"]
    assert "step 8/8" not in out.getvalue().rpartition("run.log")[2] and "removing" not in out.getvalue()


def cut(text, width):
    return text if len(text) <= width else text[: width - 1] + "…"


def test_a_terminal_without_unicode_gets_plain_characters(terminal):
    out = terminal(80, encoding="ascii")
    with Progress(8, out) as progress:
        stepped(progress, 6)
        assert "#########" in out.screen()[4]
    assert out.getvalue().isascii()


def test_a_terminal_that_draws_nothing_anew_gets_lines(terminal):
    out = terminal(80, kind="dumb")
    with Progress(8, out) as progress:
        stepped(progress, 6)
    assert "step 6/8  KL 0.1667  reward 0.600" in out.getvalue() and "\x1b" not in out.getvalue()


def test_rewards_alone_have_no_rule_in_a_terminal(terminal):
    out = terminal(80)
    with Progress(8, out) as progress:
        progress.step(replace(LINE, kl=None, reward=0.5))
        text = "\n".join(out.screen())
    assert "reward" in text and "KL" not in text and "trapped" not in text and "accuracy" not in text


def test_a_run_that_goes_back_takes_its_figures_back(terminal):
    out = terminal(80)
    with Progress(8, out) as progress:
        stepped(progress, 6)
        progress.start(3)
        progress._live.refresh()
        text = "\n".join(out.screen())
    assert "step 3/8  38%" in text and "0.3333" in text and "0.1667" not in text and "20.0%" in text


def test_a_course_has_the_last_values(terminal):
    out = terminal(120)
    with Progress(200, out) as progress:
        for done in range(1, 101):
            progress.step(replace(LINE, step=done, kl=float(done)))
        assert "41.0000 → 100.0000" in "\n".join(out.screen()), "60 of them"


def test_rewards_alone_say_nothing_of_a_teacher():
    line = Progress(100, io.StringIO()).describe(replace(LINE, kl=None, trapped_share=0.0, reward=0.5))
    assert line == "step   7/100  reward 0.500   5,120 tokens   2,346 tok/s  ETA 0:00"
