"""Who may write a run in a bucket: one process at a time, the one with the newest claim.

There is no lock that ends with its process. A claim is an object that exactly one process creates: `.claims/1`,
`.claims/2`, ... Its holder rewrites it every `BEAT_SECONDS`, and says so when it is done. Who wants the run
looks whether that goes on: a claim that does not change while it is watched belongs to a process that is gone,
or cut off. Whoever then creates the next number has the run, and only one can. The holder before looks at the
numbers before it completes anything, and gives up once there is a higher one than its own.

No clocks are compared: the one who waits measures by its own.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kat_ray.storage.bucket import Bucket, Exists, StoreError

FOLDER = ".claims"
BEAT_SECONDS = 10.0
WATCH_SECONDS = 4 * BEAT_SECONDS  # a claim that does not change for so long is nobody's


@dataclass(frozen=True)
class Holder:
    """What a claim says of its process."""

    id: str
    host: str
    machine: str  # the boot and the table of processes in which `pid` means something
    pid: int
    beat: int = 0
    released: bool = False

    @classmethod
    def here(cls) -> Holder:
        """Of this process, under an id of its own."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid())

    def is_dead(self) -> bool:
        """Whether it was a process of this machine, and of this container, that is no longer there."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, content: bytes | None) -> Holder | None:
        """What `to_bytes` gave; None for anything else."""
        try:
            tree: dict[str, Any] = json.loads(content or b"")
            return cls(**tree)
        except (ValueError, TypeError):
            return None


class Claim:
    """The claim that this process has of a run."""

    def __init__(self, bucket: Bucket, number: int, holder: Holder) -> None:
        self._bucket, self.number, self._holder = bucket, number, holder

    @classmethod
    def new(cls, bucket: Bucket) -> Claim | None:
        """Of a run that nobody has had; None where somebody has."""
        holder = Holder.here()
        if bucket.sizes():
            return None
        try:
            bucket.create(f"{FOLDER}/1", holder.to_bytes())
        except Exists:
            return None
        return cls(bucket, 1, holder)

    @classmethod
    def take(
        cls, bucket: Bucket, say: Callable[[str], object], sleep: Callable[[float], object] = time.sleep
    ) -> Claim:
        """Of a run that is there, once its holder is found gone; `StoreError` where it is not."""
        number = newest_number(bucket)
        if number:
            _wait_until_free(bucket, number, say, sleep)
        holder = Holder.here()
        try:
            bucket.create(f"{FOLDER}/{number + 1}", holder.to_bytes())
        except Exists as error:
            raise StoreError(f"{bucket.address}: another process has just taken this run") from error
        return cls(bucket, number + 1, holder)

    def beat(self) -> None:
        """Show that this process is there."""
        self._holder = replace(self._holder, beat=self._holder.beat + 1)
        self._bucket.within(BEAT_SECONDS).write(f"{FOLDER}/{self.number}", self._holder.to_bytes())

    def check(self, seconds: float = math.inf) -> None:
        """`StoreError` where another process has the run by now, or the store does not answer for so long."""
        bucket = self._bucket.within(seconds)
        if (newest := newest_number(bucket)) > self.number:
            other = Holder.of(bucket.read(f"{FOLDER}/{newest}"))
            raise StoreError(
                f"{self._bucket.address}: {_who(other)} has taken this run, since this process did not show itself "
                f"for {WATCH_SECONDS:g} s; nothing more is written here"
            )

    def release(self) -> None:
        """Say that this process is done with the run. Claims before this one are not needed any more."""
        self._holder = replace(self._holder, released=True)
        self._bucket.write(f"{FOLDER}/{self.number}", self._holder.to_bytes())
        self._bucket.delete(name for name in self._bucket.sizes(FOLDER) if _number(name) < self.number)


def newest_number(bucket: Bucket) -> int:
    """The highest claim; 0 where there is none."""
    return max((_number(name) for name in bucket.sizes(FOLDER)), default=0)


def is_released(bucket: Bucket) -> bool:
    """Whether the last process that wrote the run said that it was done."""
    number = newest_number(bucket)
    holder = Holder.of(bucket.read(f"{FOLDER}/{number}")) if number else None
    return holder is not None and holder.released


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # nobody's: its claims are watched


def _number(name: str) -> int:
    text = name.rpartition("/")[2]
    return int(text) if text.isdigit() else 0


def _wait_until_free(
    bucket: Bucket, number: int, say: Callable[[str], object], sleep: Callable[[float], object]
) -> None:
    name = f"{FOLDER}/{number}"
    first = Holder.of(bucket.read(name))
    if first is None or first.released or first.is_dead():
        return
    say(f"{bucket.address}: waiting {WATCH_SECONDS:g} s to see whether {_who(first)} still writes this run")
    for _ in range(round(WATCH_SECONDS / BEAT_SECONDS)):
        sleep(BEAT_SECONDS)
        now = Holder.of(bucket.read(name))
        if now is not None and now.released:
            return
        if now != first or newest_number(bucket) != number:
            raise StoreError(f"{bucket.address}: {_who(now)} is writing this run; end it first, or wait for it")


def _who(holder: Holder | None) -> str:
    return "another process" if holder is None else f"another process (pid {holder.pid} on {holder.host})"
