"""Which exceptions end a process, and which are anybody's to read."""

import pytest
import torch
from ray.exceptions import RayTaskError
from torch.distributed import DistBackendError

from kat_ray.cluster.fatal_errors import fatal_reason
from kat_ray.errors import ModelError, StateLost, UserError

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def raised_from(error, cause):
    try:
        raise error from cause
    except Exception as caught:
        return caught


def raised_while_handling(error, first):
    try:
        try:
            raise first
        except Exception:
            raise error  # noqa: B904
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OUT_OF_MEMORY),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError(f"Worker failed with error '{OUT_OF_MEMORY}', please check the stack trace above"),
        RuntimeError("Executor failed."),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        raised_from(RuntimeError("the engine stopped"), torch.OutOfMemoryError(OUT_OF_MEMORY)),
        raised_while_handling(KeyError("later"), torch.OutOfMemoryError(OUT_OF_MEMORY)),
    ],
    ids=lambda error: str(error)[:25],
)
def test_a_process_that_cannot_go_on_says_why(error):
    reason = fatal_reason(error)
    assert reason and "\n" not in reason
    said = str(error.__cause__ or error.__context__ or error).splitlines()[0]
    assert reason.endswith(f"Error: {said}")


@pytest.mark.parametrize(
    "error",
    [
        UserError(f"sampler.gpu_memory_utilization = 1: {OUT_OF_MEMORY}"),
        raised_from(ModelError("too large"), torch.OutOfMemoryError(OUT_OF_MEMORY)),
        StateLost(f"its process cannot go on: {OUT_OF_MEMORY}"),
        RayTaskError("score", f"Traceback ... {OUT_OF_MEMORY}", StateLost("gone")),
        ValueError("CUDA error is a string here"),
        RuntimeError("CPU Generator does not use offset"),
        AssertionError("3 requests are running"),
        OSError(28, "No space left on device"),
        KeyError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_not_a_death(error):
    assert fatal_reason(error) is None


def test_the_first_line_is_what_is_told():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nIf reserved memory is large")
    assert fatal_reason(error) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.integration  # vLLM takes seconds to import
def test_vllms_dead_engine_is_one():
    from vllm.v1.engine.exceptions import EngineDeadError

    assert fatal_reason(EngineDeadError()).startswith("EngineDeadError: EngineCore encountered an issue")
