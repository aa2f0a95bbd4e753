"""Whether this machine's NVIDIA driver fits the CUDA that torch was built for."""

from __future__ import annotations

import re
import shutil
import subprocess

from kat_ray.cli.checks import Check, fail, ok, warn

# The oldest driver that runs programs of a major release of CUDA (NVIDIA, "CUDA Compatibility", minor versions).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_SECONDS = 20.0  # that nvidia-smi may take: the first call wakes the driver


def driver_version() -> str | None:
    """What nvidia-smi says, such as `580.65.06`; None where it is not there, or reaches no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d+(\.\d+)+", done.stdout.strip())
    return found[0] if done.returncode == 0 and found else None


def driver_check(cuda: str | None, driver: str | None, usable: int) -> Check | None:
    """`cuda` is what torch was built for, `usable` how many GPUs it sees; None where there is nothing to say."""
    if driver is None:
        return None
    if cuda is None:
        return warn(
            "driver",
            f"NVIDIA's {driver} is installed, but torch is built for the CPU: no role can use a GPU (num_gpus)",
        )
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest is not None and int(driver.split(".")[0]) < oldest:
        return fail(
            "driver",
            f"NVIDIA's {driver} is too old: torch is built for CUDA {cuda}, which needs {oldest} or newer. No role "
            f"can use a GPU (num_gpus > 0) until it is updated",
        )
    if not usable:
        return warn(
            "driver",
            f"NVIDIA's {driver} fits CUDA {cuda}, but torch sees no GPU: is one hidden (CUDA_VISIBLE_DEVICES), or "
            "not given to this container?",
        )
    return ok("driver", f"NVIDIA's {driver} fits CUDA {cuda}")
