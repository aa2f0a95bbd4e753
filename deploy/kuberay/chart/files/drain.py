"""Before a pod ends: `stop` ends the cluster's jobs and waits for them, `wait` only waits for them.

python drain.py stop|wait SECONDS, as a preStop hook. The head runs `stop`: the driver gets SIGTERM, writes its
checkpoint and ends. Learners run `wait`: until then they are needed. Both end at once where no dashboard answers,
ask again where it answers with an error or with nonsense, and give up after SECONDS.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 1.0
# The SDK waits for an answer for ever: a dashboard that takes calls and says nothing ends the hook, so much later.
SILENCE_SECONDS = 3.0

Connect = Callable[[], Any]


def answered_badly() -> tuple[type[Exception], ...]:
    """What the SDK raises of an answer: another status, a refused token, no JSON, JSON that Ray does not write."""
    from ray.exceptions import AuthenticationError

    return (RuntimeError, AuthenticationError, OSError, ValueError, KeyError, TypeError, AttributeError)


def nobody_there() -> tuple[type[Exception], ...]:
    """What the SDK and requests raise where no server is."""
    from requests.exceptions import ConnectionError as NoConnection

    return (ConnectionError, NoConnection)


def unfinished(connect: Connect) -> list[str] | None:
    """Submission ids of jobs that have not ended, none if no dashboard answers; None if it answers badly."""
    try:
        jobs = connect().list_jobs()
    except nobody_there() as error:
        print(f"drain: no dashboard any more: {error}", file=sys.stderr)
        return []
    except answered_badly() as error:
        print(f"drain: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return [job.submission_id for job in jobs if job.submission_id and not job.status.is_terminal()]


def stop_job(connect: Connect, submission_id: str) -> bool:
    """SIGTERM to a job's driver; whether the dashboard took the order."""
    print(f"drain: stopping {submission_id}", file=sys.stderr)
    try:
        connect().stop_job(submission_id)
    except answered_badly() as error:
        print(f"drain: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def drain(connect: Connect, stop: bool, deadline: float) -> bool:
    """Stop (or not) and wait for all jobs until `deadline`, of time.monotonic; whether they have ended in time."""
    stopped: set[str] = set()
    while (ids := unfinished(connect)) != []:
        for submission_id in ids or ():
            if stop and submission_id not in stopped and stop_job(connect, submission_id):
                stopped.add(submission_id)
        if time.monotonic() >= deadline:
            print(f"drain: gave up, still running: {'not known' if ids is None else ids}", file=sys.stderr)
            return False
        time.sleep(POLL_SECONDS)
    return True


def give_up() -> None:
    """End the process, whatever it waits for."""
    print("drain: gave up: the dashboard takes calls and does not answer", file=sys.stderr, flush=True)
    os._exit(1)


def connecting(address: str) -> Connect:
    """A client of the dashboard there, made at the first call that succeeds."""
    made: list[Any] = []

    def connect() -> Any:
        from ray.job_submission import JobSubmissionClient

        if not made:
            made.append(JobSubmissionClient(address))
        return made[0]

    return connect


def main() -> int:
    """Exit code 0 if all jobs have ended."""
    mode, seconds = sys.argv[1], float(sys.argv[2])
    deadline = time.monotonic() + seconds
    silence = threading.Timer(seconds + SILENCE_SECONDS, give_up)
    silence.daemon = True
    silence.start()
    address = os.environ.get("KAT_RAY_DASHBOARD") or f"http://{os.environ.get('FQ_RAY_IP', '127.0.0.1')}:8265"
    ended = drain(connecting(address), mode == "stop", deadline)
    silence.cancel()
    return 0 if ended else 1


if __name__ == "__main__":
    sys.exit(main())
