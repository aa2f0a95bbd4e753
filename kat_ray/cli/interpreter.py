"""What is said where the Python that runs a command is too old or lacks packages: which one it is, and what to do.

A job of a cluster is started as `python` by the PATH of the head. A head that was started by the path of an
environment's `ray`, the environment not active, gives it whatever `python` comes first there.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

# What the project depends on, as it is imported; what else is missing is said by who asks for it.
REQUIRED = (
    "aiohttp", "deepspeed", "huggingface_hub", "jinja2", "matplotlib", "numpy", "packaging", "pyarrow", "pydantic",
    "ray", "rich", "safetensors", "tensorboard", "torch", "transformers", "yaml",
)  # fmt: skip
OLDEST = (3, 11)
_WORKERS = "--python_worker_command="  # of a raylet: the Python that its Ray runs under, and what it runs
_ANCESTORS = 8  # a job's shell, its supervisor, a raylet: fewer


def too_old(version: Sequence[object] = sys.version_info) -> str | None:
    """One message for a Python below `OLDEST`; it must run in one."""
    if tuple(version[:2]) >= OLDEST:
        return None
    return f"{sys.executable} (Python {platform.python_version()}) is too old: 3.11 or newer is needed{_mend()}"


def missing(error: ModuleNotFoundError) -> str | None:
    """One message for a package of the project that this Python lacks; None for any other module."""
    if (error.name or "").partition(".")[0] not in REQUIRED:
        return None
    return f"{sys.executable} (Python {platform.python_version()}) lacks {error.name}{_mend()}"


def _mend() -> str:
    rays = python_of_ray()
    if rays is None:
        return ": run kat-ray by an environment that is made for it, as `make setup` makes one: .venv/bin/kat-ray"
    if rays == sys.executable:
        return "; Ray runs under it too: install docker/*.lock there, or use the project's image"
    return (
        ", and is what `python` means on the head, where the job runs. "
        f"Ray itself runs under {rays}: end the head and start it with that environment active, or by "
        f"PATH={Path(rays).parent}:$PATH ray start --head"
    )


def python_of_ray(proc: Path = Path("/proc")) -> str | None:
    """The Python of the Ray that this process is a job of; None where no ancestor is a raylet."""
    process = "self"
    try:
        for _ in range(_ANCESTORS):
            # "PID (NAME) STATE PARENT ...", and a name may hold anything.
            process = (proc / process / "stat").read_text().rpartition(")")[2].split()[1]
            for word in (proc / process / "cmdline").read_text().split("\0"):
                if word.startswith(_WORKERS):
                    return word.removeprefix(_WORKERS).split(" ")[0]
    except (
        OSError,
        UnicodeDecodeError,
        IndexError,
    ):  # no /proc; the first process has no parent; it has just ended
        return None
    return None
