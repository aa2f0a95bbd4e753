"""What a run shows: a live line in a terminal, one line a step elsewhere, and a short table at its end.

The same lines go to the run's log.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

log = logging.getLogger("kat_ray.progress")


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


class Progress:
    """Shows phases and steps on `stream` (standard output unless given)."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._steps = steps
        self._phase = ""
        self._phase_started = time.monotonic()
        self._line = ""
        self._durations: list[float] = []
        self._last_step: float | None = None
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def phase(self, text: str) -> None:
        """What is being done now; said with its duration when it is over."""
        self._end_phase()
        self._phase, self._phase_started = text, time.monotonic()

    def training(self) -> None:
        """The steps go on: no other phase."""
        self._end_phase()
        self._last_step = time.monotonic()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._end_phase()
        log.info(text)
        self._console.print(Text(text))

    def step(self, line: StepLine) -> None:
        now = time.monotonic()
        if self._last_step is not None:
            self._durations = [*self._durations[-9:], now - self._last_step]
        self._line = self.describe(line)
        log.info(self._line)
        if not self._live.is_started:
            self._console.print(Text(self._line))

    def describe(self, line: StepLine) -> str:
        """A step in one line; the time left is estimated from the last ten steps."""
        left = sum(self._durations) / max(1, len(self._durations)) * (self._steps - line.step)
        kl = _nats(line.kl)
        threshold = ", ".join(f"{name} {_nats(value)}" for name, value in line.thresholds.items())
        threshold = threshold or _nats(line.threshold)
        reward = "" if line.reward is None else f"reward {line.reward:.3f}  "
        with_teacher = line.kl is not None or line.reward is None  # without one there is nothing to say of it
        rule = f"trapped {line.trapped_share:>4.0%}  threshold {threshold}  "
        return (
            f"step {line.step:>{len(str(self._steps))}}/{self._steps}  {f'KL {kl}  ' * with_teacher}{reward}"
            f"{line.generated_tokens:>6,} tokens  {rule * with_teacher}"
            f"{line.tokens_per_second:>6,.0f} tok/s  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """The table of results and where everything lies."""
        self._end_phase()
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

    def _end_phase(self) -> None:
        if self._phase:
            text = f"{self._phase}: {time.monotonic() - self._phase_started:.0f} s"
            log.info(text)
            self._console.print(Text(text))
            self._phase = ""

    def _render(self) -> Text:
        if self._phase:
            return Text(f"{self._phase} ... {time.monotonic() - self._phase_started:.0f} s")
        return Text(self._line, overflow="ellipsis", no_wrap=True)


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
