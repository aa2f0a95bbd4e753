"""Exceptions after which a process cannot go on: its GPU, its process group or its engine is lost.

What raised them is not in the arguments of the call: another process, started anew, can do the same work. So they
are treated as the death of the actor. They are known by name, since this package imports neither CUDA nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kat_ray.errors import StateLost, Stopped, UserError

# By the first part of the module that defines them, and name.
_TYPES = frozenset(
    {
        ("torch", "OutOfMemoryError"),
        ("torch", "AcceleratorError"),  # an illegal access, an ECC error, a device that is gone
        ("torch", "DistBackendError"),  # NCCL
        ("torch", "DistNetworkError"),
        ("torch", "DistStoreError"),
        ("vllm", "EngineDeadError"),
        ("vllm", "EngineGenerateError"),
    }
)
# In a RuntimeError: vLLM passes on what its worker processes raised as text, and torch has no types for the others.
_TEXT = re.compile(
    r"CUDA out of memory|CUDA (driver |kernel )?error|NCCL error|CUBLAS_STATUS_|CUDNN_STATUS_|cuDNN error"
    r"|^Executor failed|gloo/transport"
)


def fatal_reason(error: BaseException) -> str | None:
    """The first line of what ended this process's work for good; None for any other error.

    What another process died of, or a user did wrong, is never fatal to this one.
    """
    for cause in _chain(error):
        if isinstance(cause, (UserError, StateLost, Stopped)) or _module(type(cause)) == "ray":
            return None
        if _is_fatal(cause):
            return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
    return None


def _is_fatal(error: BaseException) -> bool:
    known = any((_module(kind), kind.__name__) in _TYPES for kind in type(error).__mro__)
    return known or (isinstance(error, RuntimeError) and _TEXT.search(str(error)) is not None)


def _module(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
