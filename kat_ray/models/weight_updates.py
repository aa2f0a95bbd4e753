"""The tensors of published weights, and a model of transformers that takes them in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from kat_ray.errors import UserError
from kat_ray.types.records import WeightUpdate

_HEAD = "lm_head.weight"  # published also where it is the embedding


def tensors_of(update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an update, sharing memory with its arrays."""
    for name, dtype, array in zip(update.names, update.dtypes, update.arrays, strict=True):
        yield name, tensor_of(array, dtype)


def tensor_of(array: Any, dtype: str) -> torch.Tensor:
    """An array as a tensor of this data type, sharing its memory; bfloat16 is held as uint16."""
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, which torch cannot express; vLLM only reads them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


@torch.no_grad()
def take_weights(model: Any, update: WeightUpdate, name: str) -> None:
    """Have a model of transformers hold these weights, in the tensors that it has.

    UserError where the names are not the model's own, whose field and value `name` is: nothing is changed then.
    """
    own = dict(model.state_dict())
    given = dict(tensors_of(update))
    if _HEAD not in own:
        given.pop(_HEAD, None)
    if differ := sorted(own.keys() ^ given.keys()):
        raise UserError(
            f"{name}: published weights have other names than the model has ({differ[0]} and {len(differ) - 1} "
            "more): a model of this kind cannot be a teacher that follows the student"
        )
    for key, tensor in own.items():
        tensor.copy_(given[key])
