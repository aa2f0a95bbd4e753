"""Whether the Ray node in this container is well: exit code 0 if its raylet says so, or if there is none."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SESSION = Path(os.environ.get("RAY_TMPDIR", "/tmp/ray")) / "session_latest"  # noqa: S108 (Ray's own place)
PORT = os.environ.get("KAT_RAY_AGENT_PORT", "52365")  # the default of `ray start --dashboard-agent-listen-port`


def main() -> int:
    """0 healthy, 1 not."""
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
