"""Where a run's figures go while it goes on: each place is a `Tracker`, and `Trackers` tells them all.

A place that cannot be reached is said once and costs the run nothing, unless the run's own records are kept there
(`essential`). Here are the console and TensorBoard; metrics.jsonl is `kat_ray.run.jsonl_tracker`, Ray's gauges are
`actors.driver.ray_metrics`, other people's trackers `kat_ray.tracking`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from types import TracebackType
from typing import Any

from kat_ray.observability.metric_catalog import check_names
from kat_ray.observability.progress import Progress, StepLine

log = logging.getLogger("kat_ray.trackers")

_SCORED = "teacher/rollouts/"
# Of an evaluation's fields, those that are metrics.
_EVALUATED = ("avg_at_k", "pass_at_k", "mean_length", "ran_out")


class Tracker:
    """Takes what a run has to tell; a subclass overrides what it has a use for.

    Calls come from one thread, in the order of the run: `start`, then steps, evaluations and checkpoints, `finish`
    if the run comes to its end, and `close` always. Metrics are those of `kat_ray.observability.metric_catalog`.
    """

    essential = False  # True: an error of this tracker ends the run
    name = ""  # in messages, in place of the class's

    def start(self, done: int) -> None:
        """The run goes on after `done` steps; what was told of later ones is taken back.

        Called at the start, of a resumed run too, and whenever a lost learner takes the run back to a checkpoint.
        """

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` steps are finished; the last one has these metrics, some perhaps not finite."""

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """After an evaluation: the fields of `EvalResult`, and those of them that are metrics.

        `record` also has the tokens that training took until then, without those of evaluations.
        """

    def checkpoint(self, done: int, path: object) -> None:
        """The checkpoint after `done` steps is complete."""

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """All steps are done: the content of summary.json, and where a user finds what."""

    def close(self) -> None:
        """Nothing more comes."""


class Trackers:
    """Tells every tracker everything, in the order given; closes them at the end of its `with`."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._failed: set[Tracker] = set()  # of each, the first failure is logged

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # every one is closed, whatever becomes of the others
            for tracker in reversed(self._trackers):
                stack.callback(self._tell, tracker, lambda t: t.close())

    @property
    def has_failed(self) -> bool:
        """Whether one of them has failed so far."""
        return bool(self._failed)

    def start(self, done: int) -> None:
        self._tell_all(lambda t: t.start(done))

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        check_names(metrics)
        self._tell_all(lambda t: t.step(done, metrics))

    def evaluation(self, done: int, record: Mapping[str, Any]) -> None:
        """See `Tracker.evaluation`."""
        metrics = {f"eval/{name}": float(record[name]) for name in _EVALUATED if name in record}
        for part, own in record.get("sets", {}).items():
            metrics |= {f"eval/{name}/{part}": float(own[name]) for name in _EVALUATED if name in own}
        self._tell_all(lambda t: t.evaluation(done, record, metrics))

    def checkpoint(self, done: int, path: object) -> None:
        self._tell_all(lambda t: t.checkpoint(done, path))

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        self._tell_all(lambda t: t.finish(summary, paths))

    def _tell_all(self, what: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            self._tell(tracker, what)

    def _tell(self, tracker: Tracker, what: Callable[[Tracker], None]) -> None:
        try:
            what(tracker)
        except Exception as error:  # whatever a service's library raises: hours of training are worth more
            if tracker.essential:
                raise
            if tracker not in self._failed:
                self._failed.add(tracker)
                log.warning(
                    "%s failed (%s: %s): it may miss figures, the run goes on; this is not said again",
                    tracker.name or type(tracker).__name__,
                    type(error).__name__,
                    error,
                )


class ConsoleTracker(Tracker):
    """What `Progress` shows: lines or a bar, and the table."""

    def __init__(self, progress: Progress, steps: int) -> None:
        """`steps` is how many the run is to have."""
        self._progress, self._steps = progress, steps

    def start(self, done: int) -> None:
        self._progress.start(done)

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._progress.step(
            StepLine(
                step=done,
                kl=metrics.get("kl/mean"),
                reward=metrics.get("reward/mean"),
                generated_tokens=int(metrics["rollout/generated_tokens"]),
                trapped_share=metrics["rollout/trapped_share"],
                threshold=metrics.get("kat/threshold"),
                thresholds=thresholds_by_teacher(metrics),
                tokens_per_second=metrics["throughput/tokens_per_second"],
            )
        )

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        when = "after training" if done == self._steps else f"after step {done}" if done else "before training"
        k = record["k"]
        self._progress.note(
            f"evaluation {when}: avg@{k} {record['avg_at_k']:.1%}, pass@{k} {record['pass_at_k']:.1%}, "
            f"mean length {record['mean_length']:.0f}"
        )
        self._progress.accuracy(done, record["avg_at_k"])

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        self._progress.finish(summary, paths)


def thresholds_by_teacher(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Of a step with several teachers, the threshold of each that scored rollouts; None while inactive."""
    names = [name.removeprefix(_SCORED) for name in metrics if name.startswith(_SCORED)]
    return {name: metrics.get(f"teacher/threshold/{name}") for name in names}


class TensorBoardTracker(Tracker):
    """Metrics as TensorBoard events. Of a step that is taken again TensorBoard shows the last time.

    Configuration and summary are texts beside them.
    """

    def __init__(self, folder: Path, configuration: str) -> None:
        """`configuration` is the run's, as YAML."""
        self._folder, self._configuration = folder, configuration
        self._events: Any = None  # opened with the first metrics
        self._purge_step: int | None = None  # from which on what was written before is forgotten

    def start(self, done: int) -> None:
        """The next file of events takes back those of later steps."""
        self.close()
        self._purge_step = done + 1 if done else 0

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """One event for each metric."""
        events = self._opened()
        for name, value in metrics.items():
            events.add_scalar(name, value, done)

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """As those of a step."""
        self.step(done, metrics)

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """The summary, at the run's last step."""
        text = json.dumps(dict(summary), indent=2)
        self._opened().add_text("summary", _preformatted(text), int(summary["steps"]))

    def close(self) -> None:
        """Write what is buffered."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _opened(self) -> Any:
        """The file of events; a new one has the configuration first, which a resume may have changed."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            self._events.add_text("configuration", _preformatted(self._configuration), self._purge_step or 0)
        return self._events


def _preformatted(text: str) -> str:
    """In Markdown, as which TensorBoard shows a text."""
    return indent(text, "    ", lambda line: True)
