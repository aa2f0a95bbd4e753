"""The records of a run in a bucket: written in a local folder, each file uploaded whole where it has changed.

What is uploaded may be ahead of the newest checkpoint, never behind it: a resume cuts metrics and evaluations
back to the checkpoint's positions, and up to there every later version of them is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from kat_ray.run.directory import EVALUATIONS, METRICS
from kat_ray.storage.bucket import Bucket

TO_GO_ON = (METRICS, EVALUATIONS, "run.log", "tracking/run_id")  # what a resumed run appends to
ONLINE = "-online.json"  # how far a service was told (`kat_ray.tracking.follow`)
_STAYS = ("checkpoints", "report", "replay")  # checkpoints go their own way, the others are made again


class StoredRecords:
    """Uploads the records below a folder. Its methods may be called from several threads."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self._bucket, self._folder = bucket, folder
        self._sent: dict[str, tuple[int, int]] = {}  # when the file was changed, and its bytes
        self._lock = threading.Lock()

    def upload(self, bucket: Bucket | None = None) -> None:
        """Upload what has changed; `StoreError` where that fails. `bucket`: the same one, with other patience."""
        with self._lock:
            for name, file in self._files():
                try:
                    facts = file.stat()
                except FileNotFoundError:
                    continue  # taken back since it was listed
                now = facts.st_mtime_ns, facts.st_size
                if self._sent.get(name) != now and (bucket or self._bucket).put(name, file):
                    self._sent[name] = now

    def rewind(self, done: int) -> None:
        """What was recorded after `done` steps is removed from the bucket: traces, and the summary."""
        with self._lock:
            later = [name for name in self._bucket.sizes("traces") if _step(name) >= done]
            self._bucket.delete(["summary.json", *later])
            for name in ("summary.json", *later):
                self._sent.pop(name, None)

    def download(self) -> None:
        """What a resumed run appends to comes into the folder."""
        told = [name for name in self._bucket.sizes("tracking") if name.endswith(ONLINE)]
        for name in (*TO_GO_ON, *told):
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._bucket.get(name, self._folder / name)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for file in sorted(self._folder.rglob("*")):
            name = file.relative_to(self._folder).as_posix()
            if _is_record(name) and file.is_file():
                yield name, file


def _is_record(name: str) -> bool:
    first = name.partition("/")[0]
    if name.endswith(".partial") or first in _STAYS or name == ".lock":
        return False
    return first != "tracking" or name in TO_GO_ON or name.endswith(ONLINE)


def _step(name: str) -> int:
    text = name.rpartition("/")[2].partition(".")[0].removeprefix("step-")
    return int(text) if text.isdigit() else -1
