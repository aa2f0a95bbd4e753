"""Whether the Ray node in this container is well: exit code 0 if its raylet says so, or if there is none.

An NVIDIA driver that is too old for the image's CUDA is unhealthy at once: torch would see no GPU and say little.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

SESSION = Path(os.environ.get("RAY_TMPDIR", "/tmp/ray")) / "session_latest"  # noqa: S108 (Ray's own place)
PORT = os.environ.get("KAT_RAY_AGENT_PORT", "52365")  # the default of `ray start --dashboard-agent-listen-port`

DRIVER = Path(os.environ.get("KAT_RAY_DRIVER_FILE", "/proc/driver/nvidia/version"))  # the kernel's
OLDEST = os.environ.get("KAT_RAY_OLDEST_DRIVER", "")  # set by the image for GPUs, such as 580


def old_driver() -> str:
    """What is wrong with the driver; empty where it fits, or where there is none: a node without GPUs."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d+)\.\d+(?:\.\d+)?\s", text)
    if not OLDEST or found is None or int(found[1]) >= int(OLDEST):
        return ""
    return f"NVIDIA's driver {found[0].strip()} is too old for this image's CUDA: {OLDEST} or newer is needed"


def main() -> int:
    """0 healthy, 1 not."""
    if fault := old_driver():
        print(fault)
        return 1
    if not SESSION.exists():
        return 0
    url = f"http://127.0.0.1:{PORT}/api/local_raylet_healthz"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        print(f"{url}: {error}")
        return 1
    print(text)
    return 0 if "success" in text else 1


if __name__ == "__main__":
    sys.exit(main())
