"""Which device a role computes on: what its `num_gpus` says, and nothing that a process finds by itself.

A role without GPUs sees none: its processes are started with `HIDDEN`, since Ray leaves CUDA_VISIBLE_DEVICES as it
is where an actor asks for none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kat_ray.errors import UserError

if TYPE_CHECKING:
    import torch

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # environment of a process without GPUs
_DRIVER = Path("/proc/driver/nvidia/version")


def environment_of(num_gpus: float) -> dict[str, str]:
    """What a role's processes need in their environment to see no GPU but its own; Ray shows those it asked for."""
    return {} if num_gpus else dict(HIDDEN)


def device_of(num_gpus: float, role: str) -> torch.device:
    """The device of this process, which is one of `role`'s: the first GPU that it sees, or the CPU.

    `UserError` names `<role>.num_gpus` where it asks for GPUs and no CUDA device can be used.
    """
    import torch

    if not num_gpus:
        return torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count():
        return torch.device("cuda", 0)
    raise UserError(
        f"{role}.num_gpus = {num_gpus:g}: this process sees no usable CUDA device ({_found()}). Use a newer driver "
        f"or a torch that is built for this one, or compute on the CPU with {role}.num_gpus = 0"
    )


def _found() -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "is not set" if visible is None else f"= {visible!r}"
    return f"torch {torch.__version__}, {built}; driver {_driver()}; CUDA_VISIBLE_DEVICES {shown}"


def _driver() -> str:
    """Version of NVIDIA's kernel driver, as it tells it."""
    try:
        words = _DRIVER.read_text().split("Module", 1)[-1].split()
    except OSError:
        return "none"
    return next((w for w in words if w[0].isdigit() and "." in w), "unknown")
