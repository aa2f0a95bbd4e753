"""`kat-ray bench`: every part of the benchmark in turn, each in a process of its own; a table and a JSON file.

Ratios are measured, both sides in one run on one machine. Absolute times on a shared processor prove nothing.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.bench.figure import Figure
from actors.bench.limits import limit_of
from kat_ray.errors import UserError
from kat_ray.run.summary import git_commit, package_versions

PEER_VENV = Path(".venv-peer")


def _sampler(folder: Path) -> list[Figure]:
    from actors.bench.sampler import figures

    return figures(folder)


def _teacher(folder: Path) -> list[Figure]:
    from actors.bench.teacher import figures

    return figures(folder)


def _learner(folder: Path) -> list[Figure]:
    from actors.bench.learner import figures

    return figures(folder)


def _memory(folder: Path) -> list[Figure]:
    from actors.bench.memory import figures

    return figures(folder)


def _publication(folder: Path) -> list[Figure]:
    from actors.bench.child import run_child
    from actors.bench.publication import OWED

    return run_child("actors.bench.publication", [], 1, OWED, timeout=300)


def _offline(folder: Path) -> list[Figure]:
    from actors.bench.offline import offline_figures

    return offline_figures()


def _end_to_end(folder: Path) -> list[Figure]:
    from actors.bench.end_to_end import measure

    return measure(folder, PEER_VENV)


def _rewards(folder: Path) -> list[Figure]:
    from actors.bench.rewards import measure

    return measure(folder, PEER_VENV)


def _pipeline(folder: Path) -> list[Figure]:
    from actors.bench.pipeline import figures

    return figures(folder)


def _checkpoint(folder: Path) -> list[Figure]:
    from actors.bench.checkpoint import figures

    return figures(folder)


GROUPS: dict[str, tuple[Callable[[Path], list[Figure]], str]] = {
    "end_to_end": (_end_to_end, "the whole pipeline, against its peer and with KAT against without"),
    "rewards": (_rewards, "learning from rewards alone, against its peer: speed, and what is learnt"),
    "pipeline": (_pipeline, "overlap, publication, decisions, bytes and start-up of whole runs"),
    "checkpoint": (_checkpoint, "what a checkpoint costs the step that goes on while it is written"),
    "sampler": (_sampler, "sampling with log-probabilities and chunks, against bare generation"),
    "teacher": (_teacher, "scoring chunk by chunk, against one forward over finished rollouts"),
    "learner": (_learner, "the learner's arithmetic, against a plain matrix product"),
    "memory": (_memory, "peak memory of learner and scorer against the vocabulary"),
    "publication": (_publication, "bytes that move when weights are published"),
    "offline": (_offline, "replay of recorded runs, report"),
}


def bench(only: Sequence[str], out: Path, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Run the groups named (all if none) and write benchmarks.md and benchmarks.json into `out`.

    Groups that are not run keep what the JSON file holds of them, with the machine and time of their own run.
    """
    if unknown := [name for name in only if name not in GROUPS]:
        raise UserError(f"--only {unknown[0]!r}: must be one of {', '.join(GROUPS)}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "benchmarks.json"
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in only or GROUPS:
        work, words = GROUPS[name]
        say(f"{name}: {words}")
        started = time.monotonic()
        figures = work(folder)
        for figure in figures:
            say(
                f"  {_value(figure.value):>8} {_goal(figure):>10}  {figure.name}"
                + (f"  ({figure.note})" if figure.note else "")
            )
        document[name] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "machine": machine(),
            "commit": git_commit(),
            "versions": package_versions(),
            "figures": [figure.as_dict() for figure in figures],
        }
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (out / "benchmarks.md").write_text(markdown(document), encoding="utf-8")
    return [out / "benchmarks.md", file]


def machine() -> str:
    """Processor and cores, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{os.cpu_count()} cores of {name}"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _goal(figure: Figure) -> str:
    return "" if figure.goal is None else f"{figure.sense} {figure.goal:g}"


def markdown(document: dict[str, dict[str, Any]]) -> str:
    """The table of every group with its goals, what was met, and the notes."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `kat-ray bench` (`make bench`); do not edit it by hand. Each row is a ratio, both sides",
        "measured in one run on one machine; what it was made from is in benchmarks.json. A goal that is not met",
        "says why.",
        "",
    ]
    for name, (_, words) in GROUPS.items():
        if name not in document:
            continue
        group = document[name]
        versions = ", ".join(f"{k} {v}" for k, v in group["versions"].items())
        lines += [
            f"## {name}: {words}",
            "",
            f"{group['date']}, {group['minutes']} minutes, {group['machine']}; `kat-ray bench --only {name}` at "
            f"{str(group['commit'])[:12]}; {versions}.",
            "",
            "| figure | measured | goal | met |",
            "| --- | --- | --- | --- |",
        ]
        notes: list[str] = []
        for fields in group["figures"]:
            figure = Figure(**{k: v for k, v in fields.items() if k != "met"})
            limit = limit_of(figure.name) if figure.met is False else ""
            own = "; ".join(words for words in (figure.note, limit) if words)
            mark = f" [{len(notes) + 1}]" if own else ""
            notes += [own] if own else []
            met = {True: "yes", False: "**no**", None: ""}[figure.met]
            lines.append(f"| {figure.name}{mark} | {_value(figure.value)} | {_goal(figure)} | {met} |")
        lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), *([""] if notes else [])]
    return "\n".join(lines).rstrip() + "\n"
