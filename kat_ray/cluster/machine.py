"""What this process may use of its machine: cores and memory, within its container."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")  # of a container, with control groups v2
_QUOTA = _GROUP / "cpu.max"


def own_cores(environment: Mapping[str, str] = os.environ, quota: Path = _QUOTA) -> int:
    """Cores that this process may keep busy: OMP_NUM_THREADS where it is set, else those of its machine.

    Of the machine's, those that its affinity and its container's quota leave it.
    """
    try:
        return max(1, int(environment["OMP_NUM_THREADS"]))
    except (KeyError, ValueError):  # unset, or one number for each level of nesting
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # no such groups, or no quota ("max")
        return cores


def free_memory() -> int:
    """Bytes of memory that can be had, of the machine or of the container, whichever is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = int((_GROUP / "memory.max").read_text())
        return min(available, limit - int((_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no Linux, no control group, or no limit ("max")
        return available
