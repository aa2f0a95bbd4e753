"""What commands read of a run in a bucket: copied to a folder of this machine first. Nothing is written there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from kat_ray.errors import UserError
from kat_ray.run.checkpoint import MANIFEST, STEP_NAME, CheckpointError, Manifest, is_of_model, unread
from kat_ray.run.checkpoint_parts import fetch
from kat_ray.run.directory import EVALUATIONS, METRICS
from kat_ray.run.stored_checkpoints import StoredCheckpoints
from kat_ray.storage.address import Address
from kat_ray.storage.bucket import Bucket
from kat_ray.storage.claim import is_released
from kat_ray.storage.local_folders import folder_of

READ_SECONDS = 60.0  # for which a request of a command is tried again
LATEST = "latest"
WATCHED = ("config.yaml", METRICS, "summary.json", "run.log")
RECORDS = (*WATCHED, EVALUATIONS, "tracking/run_id")


def resolved(address: Address) -> Address:
    """The run that `URL/latest` stands for; any other address is its own."""
    if address.name != LATEST:
        return address
    name = _bucket(address.parent).read(LATEST)
    if name is None:
        raise UserError(f"{address}: no run has begun there; name a run: {address.parent}/NAME")
    return address.parent / name.decode(errors="replace").strip()


def copied(run: Address, names: Iterable[str]) -> Path:
    """A folder with these files of a run, as they are now; one that is not in the bucket is not in it either."""
    bucket, folder = _bucket(run), folder_of(run, None, "read")
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not bucket.get(name, file):
            file.unlink(missing_ok=True)
    return folder


def copied_records(run: Address) -> Path:
    """A folder with a run's records and traces, as they are now. `UserError` where there is no run."""
    folder, bucket = copied(run, RECORDS), _bucket(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{run}: no run there (no config.yaml); name one, such as {run.parent}/{LATEST}")
    shutil.rmtree(folder / "traces", ignore_errors=True)
    for name in bucket.sizes("traces"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        bucket.get(name, folder / name)
    return folder


def copied_model(source: Address) -> Path:
    """A folder with the model of a checkpoint, or of a run's newest whole one; its bytes are checked."""
    checkpoint, manifest = _checkpoint(source)
    folder = folder_of(checkpoint.parent.parent, None, "read") / "checkpoints" / checkpoint.name
    bucket, files = _bucket(checkpoint), manifest.digests()
    if folder.is_dir() and (folder / MANIFEST).read_bytes() != bucket.read(MANIFEST):
        shutil.rmtree(folder)  # of a checkpoint of this name that was replaced since
    copied(checkpoint.parent.parent, ("config.yaml",))
    for name in filter(is_of_model, files):
        fetch(bucket, name, files[name], folder)
    bucket.get(MANIFEST, folder / MANIFEST)
    return folder


def has_ended(run: Address) -> bool:
    """Whether the last process that wrote a run said that it was done."""
    return is_released(_bucket(run))


def _checkpoint(source: Address) -> tuple[Address, Manifest]:
    if STEP_NAME.fullmatch(source.name):
        text = _bucket(source).read(MANIFEST)
        if text is None:
            raise CheckpointError(f"{source}: no checkpoint there (no {MANIFEST})")
        return source, Manifest.of(text, source)
    loaded, notes = StoredCheckpoints(_bucket(source), 1, False).newest(unread)
    if loaded is None:
        raise UserError("; ".join([f"{source}: holds no checkpoint (checkpoints/step-*)", *notes]))
    assert isinstance(loaded.path, Address)
    return _checkpoint(loaded.path)


def _bucket(address: Address) -> Bucket:
    return Bucket(address, READ_SECONDS)
