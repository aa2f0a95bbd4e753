"""`make gpu-check`: every part in a process of its own, so that one that dies costs its own rows only."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from actors.acceptance import arithmetic
from actors.acceptance.rows import Row, document, row_of, table

_MARK = "ROWS "  # before the JSON on stdout: libraries print there too
_SECONDS = 480.0  # for all parts together


@dataclass(frozen=True)
class Part:
    """One part: the packages it needs, the GPUs, and what it runs with the device and a folder for models."""

    needs: tuple[str, ...]
    run: Callable[[torch.device, Path], list[Row]]
    gpus: int = 0


def _size(device: torch.device) -> arithmetic.Size:
    return arithmetic.LARGE if device.type == "cuda" else arithmetic.SMALL


def _pair(device: torch.device) -> str:
    return "large" if device.type == "cuda" else "tiny"


def _engine(name: str, device: torch.device, folder: Path) -> list[Row]:
    from actors.acceptance import engines

    if name == "tensor parallelism":
        return engines.agreement(device, folder, _pair(device), tensor_parallel=2)
    run: Callable[[torch.device, Path, str], list[Row]] = getattr(engines, name)
    return run(device, folder, _pair(device))


def _speed(stage: str, device: torch.device, folder: Path) -> list[Row]:
    from actors.acceptance.speed import speed

    return speed(stage, device, folder, _pair(device))


PARTS = {
    "columns": Part((), lambda device, _: arithmetic.columns(device, _size(device))),
    "loss": Part((), lambda device, _: arithmetic.loss(device, _size(device))),
    "teacher": Part(("transformers",), partial(_engine, "teacher")),
    "learner": Part(("transformers", "deepspeed"), partial(_engine, "learner")),
    "learner, packed": Part(("transformers", "deepspeed"), partial(_engine, "packed")),
    "agreement": Part(("transformers", "deepspeed", "vllm", "ray"), partial(_engine, "agreement")),
    "tensor parallelism": Part(
        ("transformers", "deepspeed", "vllm", "ray"), partial(_engine, "tensor parallelism"), gpus=2
    ),
    "speed of the sampler": Part(("transformers", "vllm"), partial(_speed, "sampler")),
    "speed of the teacher": Part(("transformers",), partial(_speed, "teacher")),
    "speed of the learner": Part(("transformers", "deepspeed"), partial(_speed, "learner")),
    "speed of the learner, packed": Part(("transformers", "deepspeed"), partial(_speed, "learner, packed")),
}


def device_here() -> torch.device:
    """The GPU of this machine where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lacking(part: Part) -> str:
    """Why a part cannot run here; empty where it can."""
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return (
        f"needs {part.gpus} GPUs, {torch.cuda.device_count()} here" if torch.cuda.device_count() < part.gpus else ""
    )


def check(name: str, folder: Path, seconds: float) -> list[Row]:
    """The rows of one part, run in a process of its own."""
    if why := lacking(PARTS[name]):
        return [Row(name, "not run", note=why)]
    if seconds <= 0:
        return [Row(name, "not run", failed=True, note=f"no time is left of {_SECONDS:g} s")]
    command = [sys.executable, "-m", "actors.acceptance", "--part", name, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Row(name, "did not end", failed=True, note=f"within the {seconds:.0f} s that were left")]
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return [row_of(fields) for fields in json.loads(line.removeprefix(_MARK))]
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1][:300]
    return [Row(name, "did not end", failed=True, note=f"exit code {done.returncode}: {last}")]


def main() -> int:
    """Run the parts that were asked for; 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description="Check what is computed on a GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; default: all", default=[*PARTS])
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check.json"), help="JSON file to write")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = device_here()
    if arguments.part:
        rows = PARTS[arguments.part].run(device, arguments.folder)
        print(_MARK + json.dumps([row.as_dict() for row in rows]), flush=True)
        return 0
    where = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    print(f"on {where}, torch {torch.__version__}", flush=True)
    rows, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            part_started = time.monotonic()
            new = check(name, Path(folder), _SECONDS - (time.monotonic() - started))
            print(f"{name}: {time.monotonic() - part_started:.0f} s", flush=True)
            rows += new
    print(table(rows))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": where, "torch": torch.__version__, "seconds": round(time.monotonic() - started)}
    arguments.out.write_text(document(rows, about), encoding="utf-8")
    failed = sum(row.verdict == "FAIL" for row in rows)
    print(f"{failed} failed; {arguments.out}" if failed else f"nothing failed; {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
