"""Published weights put into vLLM's workers, and what the workers took of them.

vLLM only logs a warning where it passes over a name or where a parameter got no new values. Here both are reported;
`actors.sampler.vllm_engine` makes an error of them. `load` and `load_shared` are run by vLLM inside each worker.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kat_ray.models.weight_updates import tensor_of
from kat_ray.types.records import WeightUpdate

_ALIGNMENT = 64  # bytes, of each array in shared memory


@dataclass(frozen=True)
class LoadReport:
    """What one worker did not take."""

    ignored: frozenset[str]  # names of the update whose values were never read
    missing: frozenset[str]  # parameters of vLLM's model, or layers, that got no new values or too few

    @classmethod
    def of_all(cls, reports: Sequence[LoadReport]) -> LoadReport:
        """Of all workers of an engine: each must have all of its parameters, and a name must have served one."""
        return cls(
            frozenset.intersection(*(r.ignored for r in reports)), frozenset().union(*(r.missing for r in reports))
        )


@dataclass(frozen=True)
class SharedWeights:
    """An update in a file of shared memory that other processes of this machine and user can open."""

    path: str
    tensors: tuple[tuple[str, str, str, tuple[int, ...], int], ...]  # name, dtype, numpy's, shape, offset in bytes


@contextmanager
def shared(update: WeightUpdate) -> Iterator[SharedWeights]:
    """A copy of an update for other processes, for as long as this is entered; it needs the memory of one.

    The memory has no name in a file system: it goes with this process, however that ends, and is not bounded by the
    size of /dev/shm.
    """
    offsets, tensors, size = {}, [], 0
    for name, dtype, array in zip(update.names, update.dtypes, update.arrays, strict=True):
        if id(array) not in offsets:  # tied weights are one array under two names
            offsets[id(array)] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        tensors.append((name, dtype, array.dtype.str, array.shape, offsets[id(array)]))
    file = os.memfd_create("kat-ray-weights")
    try:
        os.ftruncate(file, max(size, 1))
        with mmap.mmap(file, max(size, 1)) as memory:
            for array, offset in {id(a): (a, offsets[id(a)]) for a in update.arrays}.values():
                view = np.frombuffer(memory, array.dtype, array.size, offset)
                view[:] = array.reshape(-1)
                del view  # else the memory could not be unmapped
        yield SharedWeights(f"/proc/{os.getpid()}/fd/{file}", tuple(tensors))
    finally:
        os.close(file)


def load_shared(worker: Any, weights: SharedWeights) -> LoadReport:
    """Run in a worker process: as `load`, from shared memory."""
    return load(worker, shared_tensors(weights))


def shared_tensors(weights: SharedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an update in shared memory, read-only; in any process of its machine and user."""
    with open(weights.path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for name, dtype, kind, shape, offset in weights.tensors:
        yield name, tensor_of(np.frombuffer(memory, kind, int(np.prod(shape)), offset).reshape(shape), dtype)


def load(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> LoadReport:
    """Run in a worker: replace the weights of its model in place, by the names of a checkpoint."""
    model, given = worker.get_model(), dict(weights)
    expected = {name for name, _ in model.named_parameters()}
    missing: set[str] = set()
    load_weights = model.load_weights

    def load_and_look(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        loaded = load_weights(weights)
        missing.update(_incomplete_layers(model))
        if loaded is not None:
            missing.update(expected - set(loaded))
        return loaded

    model.load_weights = load_and_look  # vLLM does not pass on what it returns
    try:
        with _Reads(given) as reads:
            worker.reload_weights(weights_iterator=iter(given.items()))
    finally:
        del model.load_weights
    return LoadReport(frozenset(reads.unread), frozenset(missing))


def _incomplete_layers(model: torch.nn.Module) -> Iterator[str]:
    """Layers of which vLLM has loaded some elements and not all, such as queries without keys.

    Embeddings are padded to a round number of rows, which no checkpoint has.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        total = info.load_numel_total
        if total is None or not 0 < info.load_numel < total:
            continue
        if isinstance(layer, VocabParallelEmbedding):
            total = layer.shard_indices.num_org_elements * layer.embedding_dim
        if info.load_numel < total:
            yield f"{name} ({info.load_numel} of {total} elements)"


class _Reads(TorchDispatchMode):
    """Notes which tensors' values are read inside: by memory, since loaders take slices and views of them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}  # of the memory that was not read
        for name, tensor in tensors.items():
            if tensor.numel():
                self._names.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)

    @property
    def unread(self) -> list[str]:
        return [name for names in self._names.values() for name in names]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "is_view", False):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    self._names.pop(value.untyped_storage().data_ptr(), None)
        return func(*args, **(kwargs or {}))
