"""What a run shows: in a terminal a bar and courses of its figures, elsewhere a line a step; at its end a table.

The lines go to the run's log in any case.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kat_ray.observability.drawing import COURSE, Figure, cut_to, duration, progress_bar, row

log = logging.getLogger("kat_ray.progress")

_WRITTEN: dict[str, Callable[[float], str]] = {  # what has a course, if the run has it, and how a value is written
    "KL": "{:.4f}".format,
    "reward": "{:.3f}".format,
    "accuracy": "{:.1%}".format,
}
_Values = tuple[tuple[int, float], ...]  # of a figure: steps that were done, and what it was


@dataclass(frozen=True)
class StepLine:
    """Figures of one step. KL and threshold in nats."""

    step: int
    kl: float | None
    generated_tokens: int
    trapped_share: float
    threshold: float | None
    tokens_per_second: float
    reward: float | None = None  # mean of the rollouts that have one; None without rewards
    thresholds: Mapping[str, float | None] = field(default_factory=dict)  # of each teacher, if there are several

    @property
    def has_teacher(self) -> bool:
        """Without one there is nothing to say of KL and rule."""
        return self.kl is not None or self.reward is None

    def threshold_words(self) -> str:
        """The threshold, or each teacher's."""
        by_teacher = ", ".join(f"{name} {_nats(value)}" for name, value in self.thresholds.items())
        return by_teacher or _nats(self.threshold)


class Progress:
    """Shows phases and steps on `stream` (standard output unless given)."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._unicode = self._console.encoding.lower().startswith("utf")
        self._steps = steps
        self._done: int | None = None  # steps; None before the first one is begun
        self._line: StepLine | None = None
        self._values: dict[str, _Values] = dict.fromkeys(_WRITTEN, ())
        self._phase = ""
        self._phase_started = time.monotonic()
        self._durations: list[float] = []
        self._last_step: float | None = None
        self._live = Live(  # twice a second: what it shows changes once
            console=self._console, refresh_per_second=2, transient=True, get_renderable=self._render,
            vertical_overflow="crop",
        )  # fmt: skip

    def __enter__(self) -> Progress:
        if self._console.is_interactive:  # where lines can be drawn anew
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_drawing()

    def phase(self, text: str) -> None:
        """What is being done now; said with its duration when it is over."""
        self._end_phase()
        self._phase, self._phase_started = text, time.monotonic()

    def start(self, done: int) -> None:
        """The run goes on after `done` steps; what was shown of later ones is taken back."""
        self._done, self._line = done, None
        self._values = {name: tuple(v for v in values if v[0] <= done) for name, values in self._values.items()}

    def training(self) -> None:
        """The steps go on: no other phase."""
        self._end_phase()
        self._last_step = time.monotonic()

    def accuracy(self, done: int, value: float) -> None:
        """Of the held-out problems, after `done` steps: a share."""
        self._add("accuracy", done, value)
        if self._live.is_started:
            self._live.refresh()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._end_phase()
        log.info(text)
        self._console.print(Text(text))

    def step(self, line: StepLine) -> None:
        """A step is finished."""
        now = time.monotonic()
        if self._last_step is not None:
            self._durations = [*self._durations[-9:], now - self._last_step]
        self._done, self._line, self._last_step = line.step, line, now
        self._add("KL", line.step, line.kl)
        self._add("reward", line.step, line.reward)
        text = self.describe(line)
        log.info(text)
        if self._live.is_started:
            self._live.refresh()
        else:
            self._console.print(Text(text))

    def describe(self, line: StepLine) -> str:
        """A step in one line; the time left is estimated from the last ten steps."""
        kl = f"KL {_nats(line.kl)}  " * line.has_teacher
        reward = "" if line.reward is None else f"reward {line.reward:.3f}  "
        left = duration(self._seconds_a_step() * (self._steps - line.step))
        rule = f"trapped {line.trapped_share:>4.0%}  threshold {line.threshold_words()}  " * line.has_teacher
        return (
            f"step {line.step:>{len(str(self._steps))}}/{self._steps}  {kl}{reward}"
            f"{line.generated_tokens:>6,} tokens  {rule}"
            f"{line.tokens_per_second:>6,.0f} tok/s  ETA {left}"
        )

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """The table of results and where everything lies; nothing is drawn below it any more."""
        self._end_phase()
        self._stop_drawing()
        self._console.print(_evaluations(summary))
        ended, started = summary["rollouts_ended"], summary["rollouts_started"]
        rows = {
            "rollouts": f"{started:,} ({ended['trapped'] / max(1, started):.0%} trapped)",
            "tokens generated": f"{summary['generated_tokens']:,}",
            "tokens kept": f"{summary['kept_tokens']:,} (cut back {summary['cut_back_tokens']:,}, "
            f"overshoot {summary['overshoot_tokens']:,})",
            "tokens trained": f"{summary['trained_tokens']:,}",
            "wall time": f"{summary['wall_seconds']:.0f} s",
        } | {name: str(path) for name, path in paths.items()}
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name), Text(value, overflow="fold"))
        self._console.print(table)

    def _stop_drawing(self) -> None:
        if self._live.is_started:
            self._live.stop()

    def _end_phase(self) -> None:
        if self._phase:
            text = f"{self._phase}: {time.monotonic() - self._phase_started:.0f} s"
            log.info(text)
            self._console.print(Text(text))
            self._phase = ""

    def _seconds_a_step(self) -> float:
        return sum(self._durations) / max(1, len(self._durations))

    def _add(self, name: str, done: int, value: float | None) -> None:
        """A new tuple each time: another thread draws it."""
        if value is not None:
            self._values[name] = (*self._values[name], (done, value))[-COURSE[1] :]

    def _render(self) -> Text:
        """What stands below the lines that stay; from a thread of its own."""
        lines = list(self._block(self._done)) if self._done is not None else []
        if phase := self._phase:
            lines.append(Text(f"{phase} ... {time.monotonic() - self._phase_started:.0f} s"))
        return cut_to(lines, self._console.width, self._unicode)

    def _block(self, done: int) -> Iterator[Text]:
        line, width = self._line, self._console.width
        count = f"step {done}/{self._steps}  {min(done, self._steps) / self._steps:.0%}"
        if self._durations and self._last_step is not None:
            pace = self._seconds_a_step()
            since = min(time.monotonic() - self._last_step, pace)  # of the step that goes on
            count += f"  {pace:.1f} s a step  ETA {duration(pace * (self._steps - done) - since)}"
        yield Text(count)
        yield progress_bar(done, self._steps, width, self._unicode)
        for name, write in _WRITTEN.items():
            if values := self._values[name]:
                yield row(Figure(name, [value for _, value in values], write), width, self._unicode)
        if line is not None:
            rule = f"  trapped {line.trapped_share:.0%}  threshold {line.threshold_words()}" * line.has_teacher
            speed = f"{line.generated_tokens:,} tokens  {line.tokens_per_second:,.0f} tok/s"
            yield Text(speed + rule, style="dim")


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _evaluations(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    results = {
        name: result
        for name, result in (
            ("student before", summary.get("eval_before")),
            ("student after", summary.get("eval_after")),
            ("teacher", summary.get("eval_teacher")),
            *((f"teacher {name[13:]}", of) for name, of in summary.items() if name.startswith("eval_teacher_")),
        )
        if result is not None
    }
    if results:
        k = next(iter(results.values()))["k"]
        for heading in ("", f"avg@{k}", f"pass@{k}", "mean length"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, result in results.items():
            length = f"{result['mean_length']:.0f}"
            table.add_row(name, f"{result['avg_at_k']:.1%}", f"{result['pass_at_k']:.1%}", length)
    return table
