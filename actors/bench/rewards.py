"""Learning from rewards alone, kat-ray and the peer on the same work: speed, and whether both learn as much.

The embedded student, 32 prompts with 8 rollouts each, reward 1 for a right answer, GRPO: advantages by the group's
standard deviation, ratio within 0.2 and 0.28 of 1, token mean over the batch, one optimiser step a batch, the same
learning rate and its schedule. Each side runs with several seeds, so that noise has a measure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from actors.bench.end_to_end import faster, rate
from actors.bench.figure import Figure
from actors.bench.pairs import Pair, make_pair
from actors.bench.sides import SideError, Size, Step, install_peer, run_kat_ray, run_peer

GROUP = "rewards"
SIZE = Size(
    "tiny 32 x 8 x 128",
    "tiny",
    rollouts=256,
    max_tokens=128,
    steps=50,
    micro_batch=64,
    timeout=1800,
    group=8,
    lr=1e-3,
)
SEEDS = (0, 1)
_LAST = 10  # steps whose rewards are compared
_CHUNKS = ("rollout.chunk_tokens=32", "rollout.max_chunks_ahead=2")  # nobody waits for decisions

# `_peer` repairs the peer's engine; end_to_end says what of it does not run.
_SAME_ENGINE = (
    "the peer's weights handed over by vLLM's reload_weights, as in end_to_end; the same engine generates on both "
    "sides, and that is more than half of a step, so that only the rest can be faster"
)

Side = Callable[[Path, int], list[Step]]


def measure(
    folder: Path,
    peer_venv: Path,
    say: Callable[[str], None] = print,
    size: Size = SIZE,
    seeds: Sequence[int] = SEEDS,
) -> list[Figure]:
    """All figures of this part, below `folder` (models, logs); the peer's environment is made in `peer_venv`."""
    folder = folder.resolve()
    pair = make_pair(size.pair, folder / "pairs")

    def ours(where: Path, seed: int) -> list[Step]:
        return run_kat_ray(size, pair, "none", where, overrides=_CHUNKS, seed=seed)

    sides: dict[str, Side] = {"kat-ray": ours}
    failures: dict[str, str] = {}
    try:
        python = install_peer(peer_venv.resolve(), folder)
        for name, backend in (("TRL", "transformers"), ("TRL with vLLM", "vllm")):
            sides[name] = _peer(size, pair, backend, python)
    except SideError as error:
        failures = dict.fromkeys(("TRL", "TRL with vLLM"), f"the peer's environment could not be made: {error}")
    steps: dict[str, list[list[Step]]] = {name: [] for name in sides}
    for seed in seeds:
        for name, side in sides.items():
            if name in failures:
                continue
            try:
                steps[name].append(side(folder / f"rewards-{seed}", seed))
            except SideError as error:
                failures[name] = str(error)
                say(f"{name}: {error}")
                continue
            say(f"{name}, seed {seed}: {rate(steps[name][-1]):,.0f} tokens/s")
    return figures({name: runs for name, runs in steps.items() if name not in failures}, failures, size)


def _peer(size: Size, pair: Pair, backend: str, python: Path) -> Side:
    def side(where: Path, seed: int) -> list[Step]:
        # As it is the trainer cannot hand its weights to this engine; end_to_end says so of every run.
        return run_peer(size, pair, backend, where, python=python, repair=backend == "vllm", seed=seed)

    return side


def figures(runs: Mapping[str, Sequence[Sequence[Step]]], failures: Mapping[str, str], size: Size) -> list[Figure]:
    """Speed against each way in which the peer generates, and the difference of what was learnt."""
    found = []
    for name, goal in (("TRL", 1.5), ("TRL with vLLM", 1.5)):
        figure = Figure(
            GROUP, f"tokens per second from rewards alone, kat-ray / {name}, {size.name}", None, goal, ">="
        )
        if missing := failures.get(name) or failures.get("kat-ray"):
            found.append(replace(figure, note=missing))
            continue
        ratio, detail = faster(*([s for run in runs[side] for s in run] for side in ("kat-ray", name)))
        note = _SAME_ENGINE if name == "TRL with vLLM" else ""
        found.append(replace(figure, value=ratio, detail=detail, note=note))
    return [*found, _agreement(runs, failures, size)]


def _agreement(runs: Mapping[str, Sequence[Sequence[Step]]], failures: Mapping[str, str], size: Size) -> Figure:
    """|difference of the mean reward of the last steps|, against twice its standard error between seeds."""
    name = f"difference of the mean reward of the last {_LAST} steps, kat-ray - TRL, {size.name}"
    if missing := failures.get("kat-ray") or failures.get("TRL"):
        return Figure(GROUP, name, None, None, note=missing)
    means = {side: [last_reward(run) for run in runs[side]] for side in ("kat-ray", "TRL")}
    curves = {
        f"{side}_rewards_{i}": [round(s.reward or 0.0, 4) for s in run]
        for side in means
        for i, run in enumerate(runs[side])
    }
    ours, theirs = (statistics.fmean(m) for m in means.values())
    error = standard_error(list(means.values()))
    return Figure(GROUP, name, abs(ours - theirs), 2 * error, "<=", {**curves, "kat_ray": ours, "trl": theirs})


def last_reward(steps: Sequence[Step]) -> float:
    """Mean reward of the last steps of a run."""
    return statistics.fmean(s.reward or 0.0 for s in steps[-_LAST:])


def standard_error(groups: Sequence[Sequence[float]]) -> float:
    """Of the difference of two means, from the pooled spread within the groups, each of two values or more."""
    squares = sum((x - statistics.fmean(g)) ** 2 for g in groups for x in g)
    variance = squares / sum(len(g) - 1 for g in groups)
    return math.sqrt(variance * sum(1 / len(g) for g in groups))
