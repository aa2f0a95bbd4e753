"""Bytes that move when weights are published: a learner's node and two nodes of samplers, each a real Ray node.

Ray pulls an object once to every node that asks for it, however many samplers run there.
"""

from __future__ import annotations

import os
from typing import Any

from actors.bench.child import print_figures
from actors.bench.figure import Figure
from actors.bench.pairs import random_model
from actors.learner.model import StudentModel

_NODES, _SAMPLERS = 2, 3  # sampler nodes, samplers on each
_NAME = "bytes that arrive at a node of samplers per byte of weights"
OWED = (Figure("publication", _NAME, None, goal=1.1, sense="<="),)


class _Publisher:
    """Holds the student and hands it out as the learner does."""

    def __init__(self, vocabulary: int) -> None:
        self._student = StudentModel(random_model("student", vocabulary))

    def weight_bytes(self) -> int:
        """Bytes of the parameters, each tied one once."""
        return sum(p.numel() * p.element_size() for _, p in self._student.trained_parameters())

    def weights(self, version: int) -> Any:
        """The record that travels."""
        import torch

        return self._student.weight_update(version, torch.float32)


class _Reader:
    """What a sampler does with an update, without an engine: it reads every array."""

    def read(self, update: Any) -> int:
        """Bytes read."""
        return sum(int(a.nbytes) for a in update.arrays if a.sum() is not None)


def publication_figures(vocabulary: int = 32_000) -> list[Figure]:
    """Bytes that arrive at each sampler node per byte of weights, measured in the nodes' object stores."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 2**30, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"learner": 1}, **store})
    try:
        for i in range(_NODES):
            cluster.add_node(num_cpus=_SAMPLERS, resources={f"samplers-{i}": _SAMPLERS}, **store)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        publisher = ray.remote(_Publisher).options(resources={"learner": 1}).remote(vocabulary)
        readers = [
            ray.remote(_Reader).options(resources={f"samplers-{i}": 1}).remote()
            for i in range(_NODES)
            for _ in range(_SAMPLERS)
        ]
        weights = ray.get(publisher.weight_bytes.remote())
        before = _stored()
        update = publisher.weights.remote(1)
        ray.get([r.read.remote(update) for r in readers])
        moved = {node: used - before[node] for node, used in _stored().items()}
    finally:
        ray.shutdown()
        cluster.shutdown()
    arrived = sorted(moved.values())[-_NODES:]
    return [
        Figure(
            "publication",
            _NAME,
            max(arrived) / weights,
            goal=1.1,
            sense="<=",
            detail={"weight_bytes": weights, "store_bytes_by_node": moved, "samplers_per_node": _SAMPLERS},
        )
    ]


def _stored() -> dict[str, int]:
    """Bytes in the object store of every node, by node id."""
    import ray
    from ray._private.internal_api import node_stats

    found = {}
    for node in ray.nodes():
        if node["Alive"]:
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            found[node["NodeID"][:8]] = int(stats.store_stats.object_store_bytes_used)
    return found


if __name__ == "__main__":
    print_figures(publication_figures())
