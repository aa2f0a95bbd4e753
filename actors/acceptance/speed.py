"""Tokens per second of each stage beside its bare library, and the memory that it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from actors.acceptance.rows import Row
from actors.bench import learner, sampler, teacher
from actors.bench.figure import Figure
from actors.bench.pairs import Pair, make_pair

STAGES: Mapping[str, Callable[[Pair, int, float], list[Figure]]] = {
    "sampler": sampler.measure,
    "teacher": teacher.measure,
    "learner": learner.measure,
    "learner, packed": partial(learner.measure, batching="packed"),
}


def speed(stage: str, device: torch.device, folder: Path, pair_name: str) -> list[Row]:
    """Of one stage, in this process: ratios are information, since no GPU has shown yet what to demand."""
    threads = torch.get_num_threads()
    rows = []
    for figure in STAGES[stage](make_pair(pair_name, folder), threads, 1.0 if device.type == "cuda" else 0.0):
        rates = [
            f"{k.removesuffix('_tokens_per_s')} {v:,} tokens/s"
            for k, v in figure.detail.items()
            if k.endswith("tokens_per_s")
        ]
        rows.append(Row("speed", figure.name, figure.value, None, "", ", ".join(rates)))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        rows.append(Row("speed", f"{stage}: peak memory", peak, None, "GiB"))
    return rows
