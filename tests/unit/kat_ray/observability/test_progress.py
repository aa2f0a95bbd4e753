"""What a run shows, in a pipe and in a terminal."""

import io
from dataclasses import replace
from pathlib import Path

from kat_ray.observability.progress import Progress, StepLine

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


def test_a_terminal_gets_a_live_line(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    text = shown(stream)
    assert "\x1b[" in text and "a note that stays" in text


def test_rewards_alone_say_nothing_of_a_teacher():
    line = Progress(100, io.StringIO()).describe(replace(LINE, kl=None, trapped_share=0.0, reward=0.5))
    assert line == "step   7/100  reward 0.500   5,120 tokens   2,346 tok/s  ETA 0:00"
