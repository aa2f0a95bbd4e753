"""What `kat-ray doctor` says of the place of a run's records: a folder and its disk, or a bucket."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kat_ray.cli.checks import Check, fail, ok, warn
from kat_ray.config import Config
from kat_ray.config.local_paths import is_url
from kat_ray.errors import UserError
from kat_ray.storage.address import Address

GIB = 2**30
_LITTLE_DISK = 10 * GIB
_FULL_DISK = 200 * 2**20
_BUCKET_SECONDS = 20.0


def _bucket(config: Config) -> Iterator[Check]:
    from kat_ray.storage.bucket import Bucket
    from kat_ray.storage.local_folders import local_root

    try:
        Bucket(Address.of(config.run.dir), _BUCKET_SECONDS).check()
        yield ok("run directory", f"{config.run.dir} can be listed")
        yield disk_verdict(folder := local_root(config.run.local_dir), shutil.disk_usage(folder).free)
    except UserError as error:
        yield fail("run directory", str(error))


def run_folder(config: Config) -> Iterator[Check]:
    """Whether records can be written where the run is to be."""
    if is_url(config.run.dir):
        yield from _bucket(config)
        return
    folder = Path(config.run.dir).expanduser().absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        yield fail("run directory", f"run.dir = {config.run.dir}: {there} is a file")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield fail("run directory", f"run.dir = {config.run.dir}: {there} cannot be written to")
        return
    yield disk_verdict(folder, shutil.disk_usage(there).free)


def disk_verdict(folder: Path, free: int) -> Check:
    """Whether `free` bytes are enough for a run's records and checkpoints."""
    text = f"{free / GIB:.1f} GiB free for {folder}"
    if free < _FULL_DISK:
        return fail("disk", f"{text}: the disk is full; free some space, or choose another run.dir")
    if free < _LITTLE_DISK:
        return warn(
            "disk",
            f"{text}: not much; a checkpoint takes 14 to 16 bytes for each parameter that is trained, and "
            "run.keep_checkpoints sets how many are kept",
        )
    return ok("disk", text)
