"""What the ranks of a learner do together: find each other, and reduce numbers over all of them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def rendezvous(
    host: str, port: int, listener: socket.socket | None, rank: int, world_size: int, device: torch.device
) -> None:
    """Form the process group at this address; rank 0 brings the `listener` there, which its store closes.

    Ranks on GPUs speak NCCL, others gloo.
    """
    on_gpu = device.type == "cuda"
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK="0",  # Ray shows an actor its own GPUs only
        WORLD_SIZE=str(world_size),
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        # Its shared-memory collective needs a compiler and a minute at the first start; gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if on_gpu else "gloo"
    listening = None if listener is None else listener.detach()
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.TCPStore(host, port, world_size, is_master=rank == 0, master_listen_fd=listening),
        rank=rank,
        world_size=world_size,
        timeout=deepspeed.constants.default_pg_timeout,
        # As DeepSpeed does it: NCCL connects now, not in the first collective.
        device_id=device if on_gpu and world_size > 1 else None,
    )
    deepspeed.init_distributed(backend, verbose=False)


def sum_over_ranks(values: Sequence[float] | NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Element by element, float64. All ranks must call it with as many values."""
    return _reduce(values, device, torch.distributed.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float] | NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Element by element, float64. All ranks must call it with as many values."""
    return _reduce(values, device, torch.distributed.ReduceOp.MAX)


def _reduce(
    values: Sequence[float] | NDArray[np.float64], device: torch.device, op: torch.distributed.ReduceOp.RedOpType
) -> NDArray[np.float64]:
    tensor = torch.tensor(np.asarray(values, dtype=np.float64), device=device)
    torch.distributed.all_reduce(tensor, op=op)
    reduced: NDArray[np.float64] = tensor.cpu().numpy()
    return reduced
