"""One part of the benchmark in a process of its own: a set thread count, and a failure costs only its figures."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.bench.figure import Figure
from actors.bench.pairs import make_pair

_MARK = "FIGURES "  # before the JSON on stdout: libraries print there too


def child_env(threads: int) -> dict[str, str]:
    """What Ray gives the actors (actors/cluster/placement.py), and no cluster of another job."""
    return {
        **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def run_child(
    module: str, arguments: Sequence[object], threads: int, owed: Sequence[Figure], timeout: float
) -> list[Figure]:
    """The figures that `python -m module arguments` prints; if it fails, those it owes, with the reason as note."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(command, env=child_env(threads), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [replace(f, value=None, note=f"no result after {timeout:g} s") for f in owed]
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return [_figure(fields) for fields in json.loads(line.removeprefix(_MARK))]
    reason = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1][:300]
    return [replace(f, value=None, note=f"exit code {done.returncode}: {reason}") for f in owed]


def print_figures(figures: Sequence[Figure]) -> None:
    """A child's answer to its parent, on stdout."""
    print(_MARK + json.dumps([f.as_dict() for f in figures]), flush=True)


def pair_main(measure: Callable[..., list[Figure]], *more: str) -> None:
    """`python -m MODULE FOLDER PAIR THREADS`: what `measure` says of one pair, as a child's answer.

    `more` are names of further arguments, strings that `measure` is given after the number of threads.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("pair")
    parser.add_argument("threads", type=int)
    for name in more:
        parser.add_argument(name)
    arguments = parser.parse_args()
    pair = make_pair(arguments.pair, arguments.folder)
    print_figures(measure(pair, arguments.threads, *(getattr(arguments, name) for name in more)))


def _figure(fields: dict[str, Any]) -> Figure:
    return Figure(**{k: v for k, v in fields.items() if k != "met"})


@dataclass(frozen=True)
class Times:
    """Every run of one side: seconds on the clock, and seconds of processor time of all its threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def detail(self, name: str) -> dict[str, list[float]]:
        """Both as they stand in a figure's detail."""
        return {
            f"{name}_s": [round(v, 4) for v in self.wall],
            f"{name}_cpu_s": [round(v, 4) for v in self.cpu],
        }


def alternate(sides: Sequence[Callable[[], object]], turns: int) -> list[Times]:
    """Time each side, in turns, so that a busy minute of the machine hits all of them."""
    times = [Times() for _ in sides]
    for _ in range(turns):
        for side, own in zip(sides, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            own.wall.append(time.perf_counter() - wall)
            own.cpu.append(time.process_time() - cpu)
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over turns of the ratio of two sides' seconds."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))
