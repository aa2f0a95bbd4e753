"""Where a run's figures go: every place is told everything, and only the run's own records can end it."""

import io
import json
import math
import os

import pytest

from kat_ray.observability.progress import Progress
from kat_ray.observability.trackers import ConsoleTracker, TensorBoardTracker, Tracker, Trackers
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.run.lock import RecordError
from tests.support.terminal import Terminal

STEP = {
    "kl/mean": 0.5, "rollout/generated_tokens": 5120.0, "rollout/trapped_share": 0.25, "kat/threshold": 0.125,
    "throughput/tokens_per_second": 10.0,
}  # fmt: skip
EVALUATION = {
    "avg_at_k": 0.5, "pass_at_k": 1.0, "k": 2, "problems": 1, "mean_length": 7.4, "truncated_share": 0.0,
    "right": (1,), "ran_out": 0,
}  # fmt: skip


class Told(Tracker):
    """Keeps what it is told."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name in ("start", "step", "evaluation", "checkpoint", "finish", "close"):
            return lambda *args: self.calls.append((name, *args))
        return super().__getattribute__(name)


class Broken(Tracker):
    """A service that is not there."""

    def step(self, done, metrics):
        raise ConnectionError("no route to host")

    def close(self):
        raise ConnectionError("still none")


def test_every_tracker_is_told_everything_in_order(tmp_path):
    first, second = Told(), Told()
    with Trackers([first, second]) as trackers:
        trackers.start(2)
        trackers.step(3, STEP)
        trackers.evaluation(3, EVALUATION)
        trackers.checkpoint(3, tmp_path)
        trackers.finish({"steps": 3}, {"log": tmp_path})
    metrics = {"eval/avg_at_k": 0.5, "eval/pass_at_k": 1.0, "eval/mean_length": 7.4, "eval/ran_out": 0.0}
    assert first.calls == second.calls == [
        ("start", 2), ("step", 3, STEP), ("evaluation", 3, EVALUATION, metrics), ("checkpoint", 3, tmp_path),
        ("finish", {"steps": 3}, {"log": tmp_path}), ("close",),
    ]  # fmt: skip


def test_a_tracker_that_fails_is_said_once_and_costs_the_others_nothing(caplog):
    told = Told()
    with Trackers([Broken(), told]) as trackers:
        trackers.step(1, STEP)
        trackers.step(2, STEP)
    assert [call[:2] for call in told.calls] == [("step", 1), ("step", 2), ("close",)]
    (record,) = caplog.records
    assert record.getMessage().startswith("Broken failed (ConnectionError: no route to host)")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_run(tmp_path):
    told = Told()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RecordError, match=r"metrics\.jsonl: cannot be written: No space left on device; earlier"):  # noqa: SIM117
        with Trackers([Broken(), JsonlTracker(tmp_path), told]) as trackers:
            trackers.step(1, STEP)
    assert told.calls == [("close",)], "it is closed all the same"


def test_a_metric_of_no_description_is_refused():
    told = Told()
    with Trackers([told]) as trackers, pytest.raises(AssertionError, match="kl/meen"):
        trackers.step(1, {"kl/meen": 1.0})
    assert told.calls == [("close",)]


def test_metrics_are_whole_lines_and_odd_numbers_are_named(tmp_path):
    with Trackers([JsonlTracker(tmp_path)]) as trackers:
        trackers.step(1, {"kl/mean": 0.5, "learner/grad_norm": math.inf})
        trackers.step(2, {"kl/mean": 0.25})
        trackers.evaluation(2, EVALUATION)
    first, second, third = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["kl/mean"], first["learner/grad_norm"]) == (1, 0.5, None)
    assert first["non_finite"] == ["learner/grad_norm"] and "non_finite" not in second
    assert (third["step"], third["eval/pass_at_k"]) == (2, 1.0)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2} | EVALUATION | {"right": [1]}


def test_tensorboard_gets_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers([TensorBoardTracker(tmp_path, "run:\n  steps: 4\n")]) as trackers:
        trackers.start(0)
        trackers.step(4, {"kl/mean": 0.5})
        trackers.evaluation(4, EVALUATION)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl/mean")] == [(4, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/pass_at_k")] == [(4, 1.0)]


def test_tensorboard_shows_configuration_and_summary(tmp_path):
    """Those of the last process that went on with the run, each once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.text.metadata import PLUGIN_NAME

    def texts(name):
        (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors(f"{name}/text_summary")[-1:]
        (text,) = event.tensor_proto.string_val
        return event.step, text.decode()

    with Trackers([TensorBoardTracker(tmp_path, "run:\n  steps: 2\n")]) as trackers:
        trackers.start(0)
        trackers.step(1, {"kl/mean": 0.5})
    assert texts("configuration") == (0, "    run:\n      steps: 2\n")
    with Trackers([TensorBoardTracker(tmp_path, "run:\n  steps: 4\n")]) as trackers:
        trackers.start(1)
        trackers.step(2, {"kl/mean": 0.5})
        trackers.finish({"steps": 2, "wall_seconds": 1.5}, {})
    assert texts("configuration") == (2, "    run:\n      steps: 4\n")
    step, text = texts("summary")
    assert step == 2 and json.loads(text) == {"steps": 2, "wall_seconds": 1.5}
    assert text.startswith("    {"), "preformatted"
    metadata = EventAccumulator(str(tmp_path)).Reload().SummaryMetadata("summary/text_summary")
    assert metadata.plugin_data.plugin_name == PLUGIN_NAME


def test_the_console_shows_steps_and_evaluations():
    stream = io.StringIO()
    with Progress(9, stream) as progress:
        trackers = Trackers([ConsoleTracker(progress, 9)])
        for done in (0, 4, 9):
            trackers.evaluation(done, EVALUATION)
        trackers.step(7, STEP)
        trackers.step(8, {name: v for name, v in STEP.items() if name not in ("kl/mean", "kat/threshold")})
    text = stream.getvalue()
    for when in ("before training", "after step 4", "after training"):
        assert f"evaluation {when}: avg@2 50.0%, pass@2 100.0%, mean length 7\n" in text
    assert "step 7/9  KL 0.5000   5,120 tokens  trapped  25%  threshold 0.1250" in text
    assert "step 8/9  KL -   5,120 tokens  trapped  25%  threshold -" in text


def test_a_terminal_shows_what_was_held_out_and_forgets_what_is_taken_again(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal(100)
    with Progress(9, out) as progress:
        trackers = Trackers([ConsoleTracker(progress, 9)])
        trackers.start(4)
        for done in (5, 6):
            trackers.step(done, STEP | {"kl/mean": 1 / done})
            trackers.evaluation(done, EVALUATION | {"avg_at_k": done / 10})
        rows = {line.split()[0]: line for line in out.screen()}
        assert rows["KL"].endswith("0.2000 → 0.1667") and rows["accuracy"].split()[1] == "60.0%"
        trackers.start(5)
        trackers.step(6, STEP)
        rows = {line.split()[0]: line for line in out.screen()}
    assert rows["KL"].endswith("0.2000 → 0.5000") and "60.0%" not in rows["accuracy"]


def test_the_console_shows_the_threshold_of_each_teacher():
    stream = io.StringIO()
    several = {name: value for name, value in STEP.items() if name != "kat/threshold"} | {
        "teacher/rollouts/maths": 8.0, "teacher/threshold/maths": 0.125, "teacher/rollouts/code": 4.0,
    }  # fmt: skip
    with Progress(9, stream) as progress:
        Trackers([ConsoleTracker(progress, 9)]).step(7, several)
    assert "trapped  25%  threshold maths 0.1250, code -  " in stream.getvalue()
