"""Before a pod ends: `stop` ends the cluster's jobs and waits for them, `wait` only waits for them.

python drain.py stop|wait SECONDS, as a preStop hook. The head runs `stop`: the driver gets SIGTERM, writes its
checkpoint and ends. Learners run `wait`: until then they are needed. Both give up after SECONDS, and at once where
no dashboard answers any more.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

POLL_SECONDS = 1.0


def unfinished(client: Any) -> list[str] | None:
    """Submission ids of jobs that have not ended, none if no dashboard answers; None if it reports an error."""
    try:
        jobs = client.list_jobs()
    except OSError as error:  # requests' and Python's own: there is no server any more
        print(f"drain: no dashboard any more: {error}", file=sys.stderr)
        return []
    except RuntimeError as error:  # the SDK's for every other status: ask again
        print(f"drain: {error}", file=sys.stderr)
        return None
    return [job.submission_id for job in jobs if job.submission_id and not job.status.is_terminal()]


def stop_job(client: Any, submission_id: str) -> bool:
    """SIGTERM to a job's driver; whether the dashboard took the order."""
    print(f"drain: stopping {submission_id}", file=sys.stderr)
    try:
        client.stop_job(submission_id)
    except (OSError, RuntimeError) as error:
        print(f"drain: {error}", file=sys.stderr)
        return False
    return True


def drain(client: Any, stop: bool, seconds: float) -> bool:
    """Stop (or not) and wait for all jobs; whether they have ended in time."""
    deadline = time.monotonic() + seconds
    stopped: set[str] = set()
    while (ids := unfinished(client)) != []:
        for submission_id in ids or ():
            if stop and submission_id not in stopped and stop_job(client, submission_id):
                stopped.add(submission_id)
        if time.monotonic() >= deadline:
            print(f"drain: still running after {seconds:g} s: {ids}", file=sys.stderr)
            return False
        time.sleep(POLL_SECONDS)
    return True


def main() -> int:
    """Exit code 0 if all jobs have ended."""
    from ray.job_submission import JobSubmissionClient

    mode, seconds = sys.argv[1], float(sys.argv[2])
    address = os.environ.get("KAT_RAY_DASHBOARD") or f"http://{os.environ.get('FQ_RAY_IP', '127.0.0.1')}:8265"
    try:
        client = JobSubmissionClient(address)
    except OSError as error:
        print(f"drain: no dashboard at {address}: {error}", file=sys.stderr)
        return 0
    return 0 if drain(client, mode == "stop", seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
