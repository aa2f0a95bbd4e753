"""The two sides of the end-to-end comparison, each in a child process: kat-ray itself, and the peer."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.bench.pairs import Pair
from kat_ray.config import LearnerConfig

ROOT = Path(__file__).parents[2]
PEER = Path(__file__).parent / "peer"
# The same on both sides, so small that rollouts keep their length while they are measured: both do the same work.
LEARNING_RATE = 1e-5
WARM_UP = 1  # steps at the start that are not measured: compilation, first touch of memory, KAT not yet active
GRACE = 30.0  # seconds that a child has for shutting Ray down once its time is up


class SideError(Exception):
    """A side could not be measured; the text says why."""


@dataclass(frozen=True)
class Size:
    """The work of an optimiser step, and how many steps are measured in each turn."""

    name: str
    pair: str
    rollouts: int
    max_tokens: int
    steps: int
    micro_batch: int  # rollouts of one pass in the peer: the fastest of those tried
    peer_vllm: bool = False  # also against the peer's vLLM generation
    turns: int = 2
    timeout: float = 600.0
    group: int = 1  # rollouts of a prompt; where there are several, rewards alone are learnt from
    lr: float = LEARNING_RATE


@dataclass(frozen=True)
class Step:
    """One measured step. `kept` and `overshoot` are None at the peer, which cuts nothing."""

    seconds: float
    tokens: int  # generated, padding not counted
    kept: int | None = None
    overshoot: int | None = None
    active: bool = False  # whether the KAT rule had a threshold
    reward: float | None = None  # mean of the step's rollouts, where they were graded

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, float]) -> Step:
        """From a line of metrics.jsonl."""
        return cls(
            seconds=metrics["time/step"],
            tokens=int(metrics["rollout/generated_tokens"]),
            kept=int(metrics["rollout/kept_tokens"]),
            overshoot=int(metrics["rollout/overshoot_tokens"]),
            active="kat/threshold" in metrics,
            reward=metrics.get("reward/mean"),
        )


def read_metrics(lines: Iterable[str]) -> list[Step]:
    """The steps in a run's metrics.jsonl, warm-up left out; lines of evaluations are passed over."""
    entries = [json.loads(line) for line in lines if line.strip()]
    return [Step.of_metrics(e) for e in entries if "time/step" in e][WARM_UP:]


def read_peer(result: Mapping[str, Any]) -> list[Step]:
    """The steps in the peer's JSON, warm-up left out."""
    steps = result["steps"]
    rewards = result.get("rewards") or [None] * len(steps)
    return [Step(s["seconds"], int(s["tokens"]), reward=r) for s, r in zip(steps, rewards, strict=True)][WARM_UP:]


def run_kat_ray(
    size: Size, pair: Pair, rule: str, folder: Path, *, overrides: Sequence[str] = (), seed: int = 0
) -> list[Step]:
    """Train with the embedded configuration on this work, evaluation off."""
    run = folder / rule
    settings = [
        f"run.dir={folder}", f"run.name={rule}", "run.overwrite=true", "run.tensorboard=false",
        f"run.steps={WARM_UP + size.steps}", f"student.path={pair.student}", f"teacher.path={pair.teacher}",
        f"data.path={pair.prompts}", "data.shuffle=false", "evaluation.data=null",
        f"rollout.prompts_per_step={size.rollouts // size.group}", f"rollout.max_tokens={size.max_tokens}",
        f"run.seed={seed}", f"rollout.rollouts_per_prompt={size.group}", f"learner.lr={size.lr}",
        "sampler.kv_cache_gib=0.5",
    ]  # fmt: skip
    if size.group > 1:
        settings += ["objective.opd.weight=0", "objective.rl.weight=1", "objective.rl.dual_clip=null",
                     "rollout.top_p=1", "run.tensorboard=false"]  # fmt: skip
    if rule == "kat":
        settings += ["termination.min_steps=1", "termination.min_samples=16"]  # active after the first step
    else:
        settings += [f"termination.rule={rule}"]
    command = [sys.executable, "-m", "kat_ray.cli", "train", "demo", *settings, *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    run_child(command, env, size.timeout, folder / f"{rule}.log")
    steps = read_metrics((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return _complete(steps, size, "kat-ray")


def run_peer(
    size: Size, pair: Pair, backend: str, folder: Path, *, python: Path, repair: bool = False, seed: int = 0
) -> list[Step]:
    """Train with the peer on this work."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"peer-{backend}"
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    options = {
        "student": pair.student, "prompts": pair.prompts, "out": out, "rollouts": size.rollouts,
        "max-tokens": size.max_tokens, "steps": WARM_UP + size.steps, "micro-batch": size.micro_batch,
        "lr": size.lr, "backend": backend, "group": size.group, "seed": seed,
        "warm-up": math.ceil(LearnerConfig().warmup_ratio * (WARM_UP + size.steps)),
    }  # fmt: skip
    if size.group == 1:
        options["teacher"] = pair.teacher
    command = [str(python), str(PEER / "trl_train.py"), *(f"--{k}={v}" for k, v in options.items())]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    run_child([*command, *(["--repair"] if repair else [])], env, size.timeout, folder / f"{name}.log")
    return _complete(read_peer(json.loads(out.read_text(encoding="utf-8"))), size, "the peer")


def _complete(steps: list[Step], size: Size, who: str) -> list[Step]:
    if len(steps) != size.steps:
        raise SideError(f"{who} recorded {len(steps)} steps after warm-up instead of {size.steps}")
    return steps


def install_peer(venv: Path, folder: Path) -> Path:
    """Make the peer's environment unless it is there; returns its Python. The log goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    run_child([str(PEER / "install.sh"), str(venv)], dict(os.environ), 1800.0, folder / "install-peer.log")
    return venv / "bin" / "python"


def run_child(command: Sequence[str], env: Mapping[str, str], timeout: float, log: Path) -> None:
    """Run to the end with its output in `log`; past `timeout` it is ended, with what it started."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, env=dict(env), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SideError(f"no result after {timeout:g} s; last lines:\n{_tail(log)}") from None
        finally:
            _end(child)
    if code:
        raise SideError(f"exit code {code}; last lines:\n{_tail(log)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()  # kat-ray then shuts its Ray down; what a shell started with & would ignore SIGINT
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else's processes are in it
        child.wait()


def _tail(log: Path, lines: int = 8) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, lines)).rstrip()
