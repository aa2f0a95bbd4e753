"""From measured costs to clusters of 8, 64 and 512 GPUs: arithmetic only.

Costs are CPU seconds of this project's processes per call and per token; the speeds of GPUs and networks are
assumptions, stated as such. Utilisation is a share of the one core that a process can use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """CPU seconds per remote call (one chunk; of the driver per rollout) and per token."""

    call: float
    token: float

    def cores(self, calls_per_second: float, tokens_per_second: float) -> float:
        """Cores that this load takes."""
        return self.call * calls_per_second + self.token * tokens_per_second


def fit(calls: Sequence[float], tokens: Sequence[float], seconds: Sequence[float]) -> Cost:
    """Least squares of `seconds` on calls and tokens, relative errors, neither below 0. Needs two loads or more."""
    columns = np.array([calls, tokens], dtype=np.float64).T
    weights = 1.0 / np.array(seconds)
    scaled = columns * weights[:, None]
    solution = np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]
    for k in (0, 1):
        if solution[k] < 0:  # the other one alone
            other = scaled[:, 1 - k]
            solution[k], solution[1 - k] = 0.0, float(other.sum() / (other @ other))
    return Cost(float(solution[0]), float(solution[1]))


@dataclass(frozen=True)
class Costs:
    """What was measured."""

    sampler: Cost
    scorer: Cost
    monitor: Cost
    driver: Cost  # Steps.sample in the driver, per rollout and per token
    books_token: float  # traces, metrics and Parquet in the driver, CPU seconds per token
    bytes_token: float  # put into the object store


@dataclass(frozen=True)
class Assumptions:
    """A student of 4 B and a teacher of 8 B parameters in bf16 on nodes of 8 GPUs."""

    sampler_share: float = 0.5  # of the GPUs
    scorer_share: float = 0.25  # the rest are learner ranks
    gpus_per_node: int = 8
    sampler_tokens: float = 10_000.0  # generated tokens a second of one sampler GPU
    rollouts_per_sampler: int = 256  # at the same time, and of one step
    mean_length: int = 1000  # tokens
    chunk_tokens: int = 16
    student_bytes: float = 8e9
    node_network: float = 12.5e9  # bytes a second of a node (100 Gb/s)


@dataclass(frozen=True)
class Plan:
    """One cluster."""

    gpus: int
    nodes: int
    samplers: int
    scorers: int
    ranks: int
    tokens_per_second: float
    step_seconds: float  # sampling time of a step
    chunks_per_second: float
    chunks_if_dealt_to_all: float  # if every sampler sent to every scorer
    sampler_cores: float  # of one sampler
    scorer_cores: float  # of one scorer
    monitor_cores: float
    monitor_cores_if_dealt_to_all: float
    shards: int  # monitors at half a core each
    driver_cores: float
    books_cores: float
    store_per_node: float  # bytes held at the end of a step, samplers and scorers spread over the nodes
    node_traffic: float  # bytes a second of chunks and scores through a node
    broadcast_one: float  # seconds for the weights if every node takes them from one
    broadcast_tree: float  # if nodes that have them pass them on, doubling


def plan(gpus: int, costs: Costs, assumed: Assumptions) -> Plan:
    """The arithmetic for one cluster."""
    samplers = max(1, round(gpus * assumed.sampler_share))
    scorers = max(1, round(gpus * assumed.scorer_share))
    nodes = math.ceil(gpus / assumed.gpus_per_node)
    rate = samplers * assumed.sampler_tokens
    # One chunk a period from each pair of a sampler and a scorer that share rollouts.
    periods = assumed.sampler_tokens / assumed.rollouts_per_sampler / assumed.chunk_tokens
    pairs = samplers + scorers - math.gcd(samplers, scorers)
    chunks, all_chunks = periods * pairs, periods * samplers * scorers
    monitor = costs.monitor.cores(chunks, rate)
    weights = assumed.student_bytes / assumed.node_network
    step_tokens = samplers * assumed.rollouts_per_sampler * assumed.mean_length
    return Plan(
        gpus=gpus,
        nodes=nodes,
        samplers=samplers,
        scorers=scorers,
        ranks=gpus - samplers - scorers,
        tokens_per_second=rate,
        step_seconds=step_tokens / rate,
        chunks_per_second=chunks,
        chunks_if_dealt_to_all=all_chunks,
        sampler_cores=costs.sampler.cores(chunks / samplers, rate / samplers),
        scorer_cores=costs.scorer.cores(chunks / scorers, rate / scorers),
        monitor_cores=monitor,
        monitor_cores_if_dealt_to_all=costs.monitor.cores(all_chunks, rate),
        shards=max(1, math.ceil(monitor / 0.5)),
        driver_cores=costs.driver.cores(rate / assumed.mean_length, rate),
        books_cores=costs.books_token * rate,
        store_per_node=step_tokens * costs.bytes_token / nodes,
        node_traffic=2 * rate * costs.bytes_token / nodes,
        broadcast_one=weights * (nodes - 1),
        broadcast_tree=weights * math.ceil(math.log2(nodes)) if nodes > 1 else 0.0,
    )


def markdown(plans: Sequence[Plan]) -> str:
    """The plans side by side."""
    rows: list[tuple[str, list[str]]] = [
        ("GPUs: samplers / scorers / learner ranks", [f"{p.samplers} / {p.scorers} / {p.ranks}" for p in plans]),
        ("tokens a second", [f"{p.tokens_per_second:,.0f}" for p in plans]),
        ("sampling time of a step, s", [f"{p.step_seconds:.0f}" for p in plans]),
        ("chunks a second", [f"{p.chunks_per_second:,.0f}" for p in plans]),
        ("- if dealt to all scorers", [f"{p.chunks_if_dealt_to_all:,.0f}" for p in plans]),
        ("one sampler's control path, cores", [f"{p.sampler_cores:.2f}" for p in plans]),
        ("one scorer's control path, cores", [f"{p.scorer_cores:.2f}" for p in plans]),
        ("monitor, cores", [f"{p.monitor_cores:.2f}" for p in plans]),
        ("- if dealt to all scorers", [f"{p.monitor_cores_if_dealt_to_all:.2f}" for p in plans]),
        ("monitors at half a core each", [str(p.shards) for p in plans]),
        ("driver while sampling, cores", [f"{p.driver_cores:.2f}" for p in plans]),
        ("driver's books and traces, s a step", [f"{p.books_cores * p.step_seconds:.1f}" for p in plans]),
        ("object store of a node at a step's end, GB", [f"{p.store_per_node / 1e9:.2f}" for p in plans]),
        ("records through a node, MB/s", [f"{p.node_traffic / 1e6:.0f}" for p in plans]),
        ("weights from one node, s", [f"{p.broadcast_one:.1f}" for p in plans]),
        ("weights along a tree, s", [f"{p.broadcast_tree:.1f}" for p in plans]),
    ]
    head = ["| | " + " | ".join(f"{p.gpus} GPUs" for p in plans) + " |", "| --- |" + " ---: |" * len(plans)]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])
