"""An exponential moving average of the student's weights, for a teacher that follows it slowly.

    average_0 = weights_0        average_t = decay * average_{t-1} + (1 - decay) * weights_t

in float32, on the first rank's host memory, after every step that was not skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kat_ray.run.checkpoint import TRAINING, CheckpointError
from kat_ray.types.records import WeightUpdate

FILE = f"{TRAINING}/average.safetensors"  # relative to a checkpoint

Arrays = Mapping[str, NDArray[np.float32]]


class WeightAverage:
    """Holds the average by the names under which weights are published; its arrays are never changed in place."""

    def __init__(self, decay: float, weights: WeightUpdate) -> None:
        """`weights` are float32, those before the first step."""
        self._decay = np.float32(decay)
        self.arrays: Arrays = dict(zip(weights.names, weights.arrays, strict=True))

    def take(self, weights: WeightUpdate) -> None:
        """The weights after one more step, float32."""
        done: dict[int, NDArray[np.float32]] = {}  # tied weights are one array under two names, and stay one
        for name, new in zip(weights.names, weights.arrays, strict=True):
            if id(new) not in done:
                mean = self._decay * self.arrays[name] + (np.float32(1.0) - self._decay) * new
                done[id(new)] = np.asarray(mean, np.float32)
            self.arrays = {**self.arrays, name: done[id(new)]}

    def weight_update(self, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
        """The average as scorers take it, in the data type in which they run the student."""
        done: dict[int, NDArray[Any]] = {}
        for array in self.arrays.values():
            if id(array) not in done:
                plain = torch.from_numpy(array).to(dtype, copy=True)
                done[id(array)] = (plain.view(torch.uint16) if dtype == torch.bfloat16 else plain).numpy()
        arrays = tuple(done[id(array)] for array in self.arrays.values())
        name = str(dtype).removeprefix("torch.")
        return WeightUpdate(policy_version, tuple(self.arrays), (name,) * len(arrays), arrays)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; `CheckpointError` where it has no average of these weights."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(checkpoint / FILE)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{checkpoint}: the average of the student's weights cannot be read: {error}"
            ) from error
        if {n: a.shape for n, a in found.items()} != {n: a.shape for n, a in self.arrays.items()}:
            raise CheckpointError(f"{checkpoint / FILE}: is the average of another student")
        self.arrays = found


def write_average(checkpoint: Path, arrays: Arrays) -> None:
    """The file of a checkpoint; a full disk is an `OSError` that names it."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, checkpoint / FILE)
    except SafetensorError as error:
        raise OSError(f"{checkpoint / FILE}: {error}") from error
