"""A run in a bucket: it works in a folder of the driver's node, and what it needs to go on is in the bucket.

    URL/NAME/.claims/N          who writes the run (`kat_ray.storage.claim`)
    URL/NAME/config.yaml, metrics.jsonl, traces/...   records, uploaded whole (`stored_records`)
    URL/NAME/checkpoints/step-N/...                   (`stored_checkpoints`)
    URL/latest                  the name of the run that began last

The local folder is made anew by every process that takes the run: nothing is read from what another one left there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from kat_ray.config import RunConfig
from kat_ray.config.local_paths import is_url
from kat_ray.run.directory import RunDirectory, fill_new
from kat_ray.run.lock import lock_run, naming
from kat_ray.run.stored_checkpoints import StoredCheckpoints
from kat_ray.run.stored_copy import LATEST
from kat_ray.run.stored_records import StoredRecords
from kat_ray.storage.address import Address, Place
from kat_ray.storage.bucket import Bucket, StoreError
from kat_ray.storage.claim import BEAT_SECONDS, FOLDER, Claim
from kat_ray.storage.local_folders import folder_of

log = logging.getLogger("kat_ray.storage")

_RECORDS_EVERY = 3  # beats
_FIRST_SECONDS = 30.0  # before anything has begun: an address is more likely wrong than its store away
_LAST_SECONDS = 20.0  # for the records of a run that failed


class StoredRunDirectory(RunDirectory):
    """The local folder of a run in a bucket, and the run there, claimed for this process."""

    def __init__(
        self, bucket: Bucket, claim: Claim, run: RunConfig, config_yaml: str, is_new: bool, replaces: bool = False
    ) -> None:
        """`is_new`: it begins anew; `replaces`: once it does, what is in the bucket is removed."""
        self._bucket, self._claim, self._replaces = bucket, claim, replaces
        folder = _emptied(folder_of(bucket.address, run.local_dir, "run"))
        self.records = StoredRecords(bucket, folder)
        self.checkpoints = StoredCheckpoints(
            bucket, run.keep_checkpoints, run.keep_best, claim.check, self.records.upload
        )
        self._keeper = _Keeper(claim, self._upload_now_and_then)
        try:
            with naming(folder):
                if is_new:
                    fill_new(folder, config_yaml)
                    if not replaces:
                        self.records.upload()
                else:
                    self.records.download()
            super().__init__(folder, None if is_new else config_yaml)
        except BaseException:
            self._keeper.stop()
            _give_up(claim)
            raise

    @classmethod
    def create_in(cls, run: RunConfig, config_yaml: str) -> StoredRunDirectory:
        """Claim `<dir>/<name>` (or `<name>-2`, ... if it exists).

        With `run.overwrite` the run of this name is taken, and replaced once the new one begins.
        """
        root = Bucket(Address.of(run.dir), run.store_timeout)
        bucket, number, replaces = root.below(run.name), 1, False
        claim = Claim.new(bucket)
        if claim is None and run.overwrite:
            claim, replaces = Claim.take(bucket, log.warning), True
        while claim is None:
            number += 1
            bucket = root.below(f"{run.name}-{number}")
            claim = Claim.new(bucket)
        directory = cls(bucket, claim, run, config_yaml, is_new=True, replaces=replaces)
        root.write(LATEST, bucket.address.name.encode())
        return directory

    @classmethod
    def reopen_at(cls, address: Address, run: RunConfig, config_yaml: str) -> StoredRunDirectory:
        """Claim a run that exists, to go on with it; its records come into the local folder."""
        bucket = Bucket(address, run.store_timeout)
        return cls(bucket, Claim.take(bucket, log.warning), run, config_yaml, is_new=False)

    @property
    def home(self) -> Address:
        """Its address."""
        return self._bucket.address

    def begin(self) -> None:
        """As for any run; of one that is replaced the checkpoints go first, and their manifests before the rest."""
        if self.has_begun:
            return
        if self._replaces:
            self._claim.check()
            self._stored.rewind(-1)
            self._bucket.delete(name for name in self._bucket.sizes() if not name.startswith(f"{FOLDER}/"))
        super().begin()
        self.records.upload()

    def rewind(self, step: int, positions: Mapping[str, int]) -> None:
        """In the bucket as in the folder."""
        self._claim.check()
        super().rewind(step, positions)
        self._stored.rewind(step)
        self.records.rewind(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._keeper.stop()
        try:
            self._upload_last(math.inf if error is None else _LAST_SECONDS)
        except StoreError as failed:
            log.warning("%s: its last records are only in %s", self.home, self.path)
            if error is None:  # else what ended the run is what the user has to know
                raise failed
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _stored(self) -> StoredCheckpoints:
        assert self.checkpoints is not None
        return self.checkpoints

    def _upload_last(self, seconds: float) -> None:
        self._claim.check(seconds)
        if self.has_begun:
            self.records.upload(self._bucket.within(seconds))
        self._claim.release()

    def _upload_now_and_then(self) -> None:
        if self.has_begun:
            self.records.upload(self._bucket.within(BEAT_SECONDS))


class _Keeper:
    """The thread that shows that this process is there, and uploads records for those who watch."""

    def __init__(self, claim: Claim, upload: Callable[[], object]) -> None:
        self._claim, self._upload = claim, upload
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bucket", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beats += 1
            # It is tried again at the next beat; a checkpoint says what is wrong if it goes on.
            with contextlib.suppress(StoreError):
                self._claim.beat()
                if beats % _RECORDS_EVERY == 0:
                    self._upload()


def check_place(run: RunConfig) -> None:
    """`StoreError` where `run.dir` is a bucket that cannot be listed."""
    if is_url(run.dir):
        Bucket(Address.of(run.dir), min(run.store_timeout, _FIRST_SECONDS)).check()


def open_run(run: RunConfig, resume: Place | None, config_yaml: str) -> RunDirectory:
    """The run's directory, locked: a new one by `run.dir`, or that of the run `resume`, folder or address."""
    if isinstance(resume, Address):
        return StoredRunDirectory.reopen_at(resume, run, config_yaml)
    if resume is not None:
        return RunDirectory.reopen(resume, config_yaml)
    if is_url(run.dir):
        return StoredRunDirectory.create_in(run, config_yaml)
    return RunDirectory.create(run, config_yaml)


def _emptied(folder: Path) -> Path:
    """An empty folder of this name; `RecordError` where another process of this node works in it."""
    with naming(folder):
        if folder.is_dir():
            lock = lock_run(folder)
            shutil.rmtree(folder)
            os.close(lock)
        folder.mkdir(parents=True)
    return folder


def _give_up(claim: Claim) -> None:
    with contextlib.suppress(StoreError):
        claim.release()
