"""What is known of a run that is looked at: read from its records as they grow, or from the log of its job."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from kat_ray.config import plain_yaml
from kat_ray.run.directory import METRICS

_NOTES = 4  # last lines of the log that are no steps
_LOG_BYTES = 1 << 16  # of its end, in which they are looked for
_LOG_LINE = re.compile(r"^\S+ \S+ (?P<level>[A-Z]+) \[[^\]]*\] \S+: (?P<text>.*)$")
_STEP = re.compile(r"^step +\d+/\d+ ")


class State(Enum):
    """Of a run, as far as its records tell."""

    ABSENT = "not there yet"
    BEGINNING = "no step yet"
    GOING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True)
class View:
    """A run at one moment. `lines` are its metrics by step, evaluations among them; `written` in s since 1970."""

    name: str
    state: State
    steps: int | None = None  # that it is to have
    lines: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    written: float | None = None  # when the last line came

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return max((int(line["step"]) for line in self.lines), default=0)

    def series(self, name: str) -> list[float]:
        """The values of a metric, oldest first."""
        return [float(line[name]) for line in self.lines if isinstance(line.get(name), int | float)]

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names of metrics, in their order."""
        found = {name.removeprefix(prefix): None for line in self.lines for name in line if name.startswith(prefix)}
        return list(found)

    def seconds_a_step(self) -> float | None:
        """Of the last ten, by when their lines came: evaluations and checkpoints count."""
        taken = [line for line in self.lines if "time/step" in line and isinstance(line.get("time"), int | float)]
        last = taken[-11:]
        if len(last) < 2:
            return float(last[0]["time/step"]) if last else None
        return float(last[-1]["time"] - last[0]["time"]) / (len(last) - 1)


@dataclass
class RunReader:
    """Looks at a run's directory again and again; what it has read once it does not read again."""

    folder: Path
    _lines: list[dict[str, Any]] = field(default_factory=list)
    _position: int = 0
    _last: bytes = b""  # the line that ends at `_position`

    def view(self) -> View:
        """The run now. Half a line is left for the next time, and what cannot be read is passed over."""
        config = _plain(self.folder / "config.yaml")
        name = self.folder.resolve().name
        if config is None:
            return View(name, State.ABSENT)
        self._read()
        finished = (self.folder / "summary.json").is_file()
        state = State.GOING if self._lines else State.BEGINNING
        if finished or self._has_ended():
            state = State.FINISHED if finished else State.STOPPED
        times = [line["time"] for line in self._lines[-1:] if isinstance(line.get("time"), int | float)]
        run = config.get("run")
        steps = run.get("steps") if isinstance(run, dict) else None
        return View(
            name, state, steps if isinstance(steps, int) else None, tuple(self._lines), self._notes(),
            times[0] if times else None,
        )  # fmt: skip

    def _read(self) -> None:
        try:
            with (self.folder / METRICS).open("rb") as file:
                file.seek(max(0, self._position - len(self._last)))
                if (
                    file.read(len(self._last)) != self._last
                ):  # it went back to a checkpoint: written anew from there
                    self._lines, self._position = [], 0
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._position, self._last = self._position + len(line), line
                    self._take(line)
        except OSError:
            return

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            self._lines.append(record)

    def _notes(self) -> list[str]:
        try:
            with (self.folder / "run.log").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        found = [match["text"] for line in text.splitlines() if (match := _LOG_LINE.match(line))]
        return [note for note in found if not _STEP.match(note)][-_NOTES:]

    def _has_ended(self) -> bool:
        """Whether the process that wrote the run is gone; False where it was on another machine, or none tells."""
        try:
            lock = self.folder / ".lock"
            if not lock.read_text(errors="replace").strip().endswith(f" on {socket.gethostname()}"):
                return False
            inode = lock.stat().st_ino
            held = Path("/proc/locks").read_text()
        except OSError:
            return False
        return not re.search(rf":{inode} ", held)


def _plain(path: Path) -> dict[str, Any] | None:
    """A YAML file's mapping; None where there is none, or none yet."""
    try:
        node = plain_yaml.compose(path.read_text(encoding="utf-8"))
        tree = None if node is None else plain_yaml.construct(node)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None


# As `Progress.describe` writes it. A run without a teacher has no KL and no rule, one without rewards no reward.
_OF_STEP = re.compile(
    r"^step +(?P<step>\d+)/(?P<steps>\d+)  (?:KL (?P<kl>\S+)  +)?(?:reward (?P<reward>\S+)  +)?"
    r"(?P<tokens>[\d,]+) tokens  +(?:trapped +(?P<trapped>\d+)%  threshold (?P<threshold>.*?)  +)?"
    r"(?P<speed>[\d,]+) tok/s"
)
_OF_EVALUATION = re.compile(r"^evaluation (?:before|after) .*?avg@\d+ (?P<avg>[\d.]+)%")


def view_of_log(name: str, text: Iterable[str], finished: bool, over: bool) -> View:
    """A job's run by the lines that its driver prints: fewer figures than its records hold, and no times."""
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    steps = None
    for line in text:
        if match := _OF_STEP.match(line):
            steps = int(match["steps"])
            step = int(match["step"])
            lines = [old for old in lines if old["step"] < step or "eval/avg_at_k" in old]  # steps that come again
            lines.append({"step": step, **_figures(match)})
        elif line.strip():
            notes = [*notes[1 - _NOTES :], line]
            if match := _OF_EVALUATION.match(line):
                lines.append(
                    {"step": lines[-1]["step"] if lines else 0, "eval/avg_at_k": float(match["avg"]) / 100}
                )
    ended = State.FINISHED if finished else State.STOPPED
    return View(name, ended if over else State.GOING if lines else State.BEGINNING, steps, lines, notes)


def _figures(match: re.Match[str]) -> dict[str, float]:
    def number(text: str | None) -> float | None:
        try:
            return float((text or "").replace(",", ""))
        except ValueError:
            return None

    found: dict[str, float | None] = {
        "kl/mean": number(match["kl"]),
        "reward/mean": number(match["reward"]),
        "rollout/generated_tokens": number(match["tokens"]),
        "kat/threshold": number(match["threshold"]),
        "throughput/tokens_per_second": number(match["speed"]),
    }
    if match["trapped"] is not None:
        found["rollout/trapped_share"] = int(match["trapped"]) / 100
    by_teacher = re.findall(r"([^ ,]+) ([\d.]+)(?:,|$)", match["threshold"] or "")
    found |= {f"teacher/threshold/{name}": float(value) for name, value in by_teacher}
    return {name: value for name, value in found.items() if value is not None}
