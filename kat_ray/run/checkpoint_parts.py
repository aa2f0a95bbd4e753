"""A learner rank's side of a checkpoint that is in a bucket: its files are uploaded from its own node, and
fetched there.

For a checkpoint in a folder, which all nodes see, nothing is done here.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from kat_ray.run.checkpoint import (
    MANIFEST,
    TRAINING,
    CheckpointError,
    FileDigest,
    Manifest,
    damage_in,
)
from kat_ray.storage.address import Address
from kat_ray.storage.bucket import Bucket
from kat_ray.storage.local_folders import folder_of

T = TypeVar("T")

Beat = Callable[[], object]
_MAIN = ("base_model.json",)  # what `restore` reads beside `training/`


def is_stored(address: str) -> bool:
    """Whether a checkpoint is in a bucket."""
    return "://" in address


@dataclass(frozen=True)
class CheckpointParts:
    """How a rank on this node writes and reads checkpoints."""

    local_dir: str | None = None  # `run.local_dir`
    timeout: float = 300.0  # `run.store_timeout`

    def for_writing(self, address: str, rank: int) -> tuple[Path, Callable[[Mapping[str, FileDigest]], None]]:
        """The folder in which a rank writes, and what makes its files, once written, those of the checkpoint."""
        if not is_stored(address):
            return Path(address), lambda files: None
        place = Address(address)
        self._forget_fetched(place)
        folder = folder_of(place / f"rank-{rank}", self.local_dir, "parts")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def upload(files: Mapping[str, FileDigest]) -> None:
            bucket = Bucket(place, self.timeout)
            for name in sorted(files):
                if not bucket.put(name, folder / name):
                    raise CheckpointError(f"{folder / name}: is gone before it was uploaded to {place}")
            shutil.rmtree(folder, ignore_errors=True)

        return folder, upload

    def find_damage(self, address: str, files: Mapping[str, FileDigest], beat: Beat) -> str | None:
        """A `FindDamage`; of a checkpoint in a bucket the files are on this node afterwards."""
        if not is_stored(address):
            return damage_in(Path(address), files, beat)
        try:
            _beating(beat, partial(self._fetch, Address(address), files))
        except CheckpointError as error:
            return str(error).removeprefix(f"{address}: ")
        return None

    def for_reading(self, address: str, beat: Beat) -> Path:
        """A folder with what a rank restores; `CheckpointError` names a file that is not what its manifest says."""
        if not is_stored(address):
            return Path(address)
        return _beating(beat, partial(self._fetch_training, Address(address)))

    def _fetch_training(self, place: Address) -> Path:
        digests = Manifest.of(Bucket(place, self.timeout).read(MANIFEST) or b"", place).digests()
        needed = {n: d for n, d in digests.items() if n.startswith(f"{TRAINING}/") or n in _MAIN}
        return self._fetch(place, needed)

    def _fetch(self, place: Address, files: Mapping[str, FileDigest]) -> Path:
        folder, bucket = self._fetched(place), Bucket(place, self.timeout)
        for name, digest in sorted(files.items()):
            fetch(bucket, name, digest, folder)
        return folder

    def _fetched(self, place: Address) -> Path:
        return folder_of(place.parent, self.local_dir, "fetched") / place.name

    def _forget_fetched(self, place: Address) -> None:
        """Every rank has what it restored once a step was taken; ranks of one node share the folder."""
        shutil.rmtree(self._fetched(place).parent, ignore_errors=True)


def fetch(bucket: Bucket, name: str, digest: FileDigest, folder: Path) -> None:
    """Have a file of a checkpoint in a folder, once for all processes of a node; `CheckpointError` if damaged."""
    file = folder / name
    with _locked(file):
        if file.is_file():  # it has this name only once its bytes were found right
            return
        fresh = file.with_name(f"{file.name}.fetched")
        if not bucket.get(name, fresh):
            raise CheckpointError(f"{bucket.address}: {name} is missing")
        found = FileDigest.of(fresh)
        if found != digest:
            fresh.unlink()
            raise CheckpointError(f"{bucket.address}: {name} is damaged: its bytes are not those that were written")
        fresh.rename(file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _beating(beat: Beat, request: Callable[[], T]) -> T:
    """`request()`, with a beat every second: a slow network is limited by `cluster.step_timeout` only."""
    with ThreadPoolExecutor(1, "bucket") as thread:
        answer = thread.submit(request)
        while not wait([answer], timeout=1.0).done:
            beat()
        return answer.result()
