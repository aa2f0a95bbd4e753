"""Checkpoints of a run in a bucket: whole once their manifest is there, which is written last.

`checkpoints/step-N/` has the files of a local checkpoint. Each learner rank uploads its own; the driver
compares their sizes with the digests, has the run's records uploaded, and then writes the manifest: one object,
there or not there. Whatever is to be replaced or removed loses its manifest first, so there is no moment at
which a manifest names files that are not its own; should a process that was cut off write one nevertheless, the
checksums tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from kat_ray.run.checkpoint import (
    MANIFEST,
    STATE,
    STEP_NAME,
    CheckpointError,
    FileDigest,
    FindDamage,
    Loaded,
    Manifest,
    check_state,
    kept_steps,
    manifest_text,
)
from kat_ray.storage.address import Address
from kat_ray.storage.bucket import Bucket

FOLDER = "checkpoints"


class StoredCheckpoints:
    """As `Checkpoints`, of a run in a bucket; it is `bucket`. One writer at a time."""

    def __init__(
        self, bucket: Bucket, keep: int, keep_best: bool,
        check: Callable[[], object] = lambda: None, upload_records: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """`check` raises where another process has the run by now; `upload_records` returns once they are there."""
        assert keep >= 1
        self._run, self._bucket = bucket, bucket.below(FOLDER)
        self._keep, self._keep_best = keep, keep_best
        self._check, self._upload_records = check, upload_records

    def begin(self, step: int) -> Address:
        """Where the files of a checkpoint go; what was there under its name, or is not whole, is removed."""
        self._check()
        found = self._found()
        for n, files in found.items():
            if n == step or MANIFEST not in files:
                self._remove(n, files)
        return self._bucket.address / f"step-{step}"

    def commit(
        self, step: int, state: Mapping[str, Any], files: Mapping[str, FileDigest], metric: float | None
    ) -> Address:
        """Make a checkpoint of what was uploaded since `begin`, and remove what need not be kept.

        As `Checkpoints.commit`. Records are uploaded before the manifest: a resume cuts them back to what `state`
        says.
        """
        check_state(state)
        self._check()
        content, name = json.dumps(state).encode(), f"step-{step}"
        self._bucket.write(f"{name}/{STATE}", content)
        files = {**files, STATE: FileDigest(len(content), hashlib.sha256(content).hexdigest())}
        self._check_sizes(name, files)
        self._upload_records()
        self._check()
        self._bucket.write(f"{name}/{MANIFEST}", manifest_text(step, files, metric).encode())
        self._prune(step)
        return self._bucket.address / name

    def newest(self, find_damage: FindDamage) -> tuple[Loaded | None, list[str]]:
        """The newest checkpoint that is whole, and a note for each newer one that is not.

        Manifest, sizes and state are looked at here, the bytes of all other files by `find_damage`.
        """
        notes: list[str] = []
        for step, sizes in sorted(self._found().items(), reverse=True):
            if MANIFEST not in sizes:
                continue
            try:
                return self._verify(step, sizes, find_damage), notes
            except CheckpointError as error:
                notes.append(str(error))
        return None, notes

    def rewind(self, done: int) -> None:
        """The run goes on after `done` steps: later checkpoints are of a past that was given up.

        What a process that was killed had not completed, or had still to remove, goes too.
        """
        for step, files in self._found().items():
            if step > done or MANIFEST not in files:
                self._remove(step, files)
        self._prune(done)

    def _found(self) -> dict[int, dict[str, int]]:
        """Bytes by name of the files of each step."""
        found: dict[int, dict[str, int]] = {}
        for name, size in self._bucket.sizes().items():
            folder, _, file = name.partition("/")
            if (match := STEP_NAME.fullmatch(folder)) and file:
                found.setdefault(int(match[1]), {})[file] = size
        return found

    def _remove(self, step: int, files: Mapping[str, int]) -> None:
        ordered = sorted(files, key=lambda name: (name != MANIFEST, name))
        self._bucket.delete(f"step-{step}/{name}" for name in ordered)

    def _check_sizes(self, name: str, files: Mapping[str, FileDigest]) -> None:
        found = self._bucket.sizes(name)
        for file, digest in sorted(files.items()):
            if found.get(f"{name}/{file}") != digest.size:
                raise CheckpointError(
                    f"{self._bucket.address / name}: {file} is not there with the {digest.size} bytes that were "
                    "uploaded: another process writes there, or the store does not show at once what was written"
                )
        more = {n.removeprefix(f"{name}/") for n in found} - files.keys()
        for file in sorted(more):
            raise CheckpointError(
                f"{self._bucket.address / name}: {file} is of another process, which writes there"
            )

    def _verify(self, step: int, sizes: Mapping[str, int], find_damage: FindDamage) -> Loaded:
        path, name = self._bucket.address / f"step-{step}", f"step-{step}"
        manifest = Manifest.of(self._bucket.read(f"{name}/{MANIFEST}") or b"", path)
        files = manifest.digests()
        for file, digest in sorted(files.items()):
            if sizes.get(file) != digest.size:
                there = f"has {sizes[file]} bytes instead of {digest.size}" if file in sizes else "is missing"
                raise CheckpointError(f"{path}: {file} {there}")
        state = self._bucket.read(f"{name}/{STATE}") or b""
        if hashlib.sha256(state).hexdigest() != files.pop(STATE).sha256:
            raise CheckpointError(f"{path}: {STATE} is damaged: its bytes are not those that were written")
        if damage := find_damage(path, files):
            raise CheckpointError(f"{path}: {damage}")
        return Loaded.of(path, manifest, state)

    def _prune(self, step: int) -> None:
        found = {n: files for n, files in self._found().items() if MANIFEST in files}
        for n in found.keys() - kept_steps(found, step, self._keep, self._keep_best, self._metric):
            self._remove(n, found[n])

    def _metric(self, step: int) -> float | None:
        path, name = self._bucket.address / f"step-{step}", f"step-{step}"
        try:
            return Manifest.of(self._bucket.read(f"{name}/{MANIFEST}") or b"", path).metric
        except CheckpointError:
            return None  # damaged: it is the best of nothing
