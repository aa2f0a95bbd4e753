"""Checkpoints of a run: complete or absent, verified by checksums, JSON and safetensors only.

`checkpoints/step-N/` is a Hugging Face model directory with two things more: `training/`, all that a resume needs
beside the model, and `manifest.json`, size and SHA-256 of every other file. It is written as `step-N.partial` and
renamed when every byte is on disk. docs/recovery.md describes each file. Nothing here knows of Ray or DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from kat_ray.errors import UserError
from kat_ray.storage.address import Place

FORMAT = 1
MANIFEST = "manifest.json"
TRAINING = "training"  # folder with what a resume needs beside the model
STATE = f"{TRAINING}/state.json"
_PARTIAL, _REPLACED = ".partial", ".replaced"
STEP_NAME = re.compile(r"step-(0|[1-9]\d{0,17})")

_BLOCK = 4 * 2**20  # bytes that are read at once
# Seconds for which a file that another machine has just written may not be seen: NFS keeps what it knows of a
# folder for up to a minute.
LISTING_SECONDS = 75.0

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint cannot be used, or could not be written; the message names it and what is wrong."""


@dataclass(frozen=True)
class FileDigest:
    """What a file holds: bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, beat: Callable[[], object] = lambda: None) -> FileDigest:
        """Read a file to its end; `beat` is called after each part of it."""
        sha256, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                sha256.update(block[:size])
                beat()
            return cls(file.tell(), sha256.hexdigest())

    @classmethod
    def synced(cls, path: Path) -> FileDigest:
        """Read a file that was just written, and wait until it is on disk."""
        digest = cls.of(path)
        _sync(path)
        return digest


# Checkpoint and files -> what is wrong with the first whose bytes are not those that were written; None: nothing.
FindDamage = Callable[[Any, Mapping[str, FileDigest]], str | None]


def damage_in(path: Path, files: Mapping[str, FileDigest], beat: Callable[[], object] = lambda: None) -> str | None:
    """A `FindDamage` that reads the files to their end, here and now."""
    for name, expected in sorted(files.items()):
        try:
            found = FileDigest.of(path / name, beat)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != expected:
            return f"{name} is damaged: its bytes are not those that were written"
    return None


def unread(path: Place, files: Mapping[str, FileDigest]) -> str | None:
    """A `FindDamage` that finds none: whoever loads the checkpoint reads the files first."""
    return None


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose files were found to be what its manifest says."""

    path: Place
    step: int  # optimiser steps done
    metric: float | None  # by which the best is kept; higher is better
    state: dict[str, Any]

    def state_as(self, kind: type[T]) -> T:
        """The state as a pydantic model or dataclass; `CheckpointError` names the field that does not fit."""
        try:
            return TypeAdapter(kind).validate_python(self.state)
        except ValidationError as error:
            raise CheckpointError(f"{self.path / STATE}: {_first_of(error)}; it is of another version") from error

    @classmethod
    def of(cls, path: Place, manifest: Manifest, state: bytes) -> Loaded:
        """From the parts that are read on their own; `CheckpointError` where the state is no JSON object."""
        return cls(path, manifest.step, manifest.metric, _object(state, path, STATE))


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """A checkpoint's files with their digests: what makes a checkpoint of them."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    format: Literal[1]
    step: int = Field(ge=0)
    metric: float | None
    files: dict[str, _File]

    @model_validator(mode="after")
    def _files_lie_inside(self) -> Manifest:
        for name in self.files:
            path = PurePosixPath(name)
            written = name.isprintable() and str(path) == name and name not in (".", MANIFEST)
            if not written or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"files: {name!r} is no file of a checkpoint")
        if STATE not in self.files:
            raise ValueError(f"files: {STATE} is not among them")
        return self

    @classmethod
    def of(cls, content: bytes, path: Place) -> Manifest:
        """The manifest of the checkpoint at `path`, from its text; `CheckpointError` where it is none."""
        tree = _object(content, path, MANIFEST)
        if tree.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: is of format {str(tree.get('format'))[:40]!r}, this version reads format {FORMAT}"
            )
        try:
            manifest = cls.model_validate(tree)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {MANIFEST} is damaged: {_first_of(error)}") from error
        name = STEP_NAME.fullmatch(path.name)
        if name and int(name[1]) != manifest.step:
            raise CheckpointError(f"{path}: its {MANIFEST} is of step {manifest.step}")
        return manifest

    def digests(self) -> dict[str, FileDigest]:
        """Of each file, by its name."""
        return {name: FileDigest(file.size, file.sha256) for name, file in self.files.items()}


def checkpoint_names(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, whole or not, in their order."""
    steps = [int(name[1]) for path in folder.glob("step-*") if (name := STEP_NAME.fullmatch(path.name))]
    return [f"step-{step}" for step in sorted(steps)]


class Checkpoints:
    """The checkpoints of one run. One writer at a time: `begin`, files by whoever has them, `commit`."""

    def __init__(self, folder: Path, keep: int, keep_best: bool) -> None:
        assert keep >= 1
        self._folder = folder
        self._keep = keep
        self._keep_best = keep_best

    def begin(self, step: int) -> Path:
        """An empty `step-N.partial` with a `training/` in it; what a killed write left behind is removed."""
        partial = self._folder / f"step-{step}{_PARTIAL}"
        with _named(partial):
            self._tidy()
            (partial / TRAINING).mkdir(parents=True)
        return partial

    def commit(
        self, step: int, state: Mapping[str, Any], files: Mapping[str, FileDigest], metric: float | None
    ) -> Path:
        """Make `step-N` of what was written since `begin`, and remove what need not be kept.

        `files` are the digests of all files written, by path relative to the directory; `state` is what JSON can
        give back as it was. The `keep` newest stay, and the one with the highest metric. Checkpoints of later
        steps are of a past that was given up when the run resumed before them; they are removed. `CheckpointError`
        where it cannot be written: what was there before is intact.
        """
        partial, final = self._folder / f"step-{step}{_PARTIAL}", self._folder / f"step-{step}"
        check_state(state)
        with _named(partial):
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            manifest = _manifest(partial, step, {**files, STATE: FileDigest.of(partial / STATE)}, metric)
            (partial / MANIFEST).write_text(manifest, encoding="utf-8")
            _sync_tree(partial)
        with _named(final):
            replaced = self._folder / f"{final.name}{_REPLACED}"
            if final.exists():
                final.rename(replaced)  # `_tidy` renames it back if this process dies before the next line
            partial.rename(final)
            _sync(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(step)
        return final

    def newest(self, find_damage: FindDamage = damage_in) -> tuple[Loaded | None, list[str]]:
        """The newest checkpoint that is whole, and a note for each newer one that is not.

        Manifest, sizes and state are looked at here, the bytes of all other files by `find_damage`.
        """
        notes: list[str] = []
        with _named(self._folder):
            self._tidy()
            found = sorted(self._found().items(), reverse=True)
        for _, path in found:
            try:
                return verify(path, find_damage), notes
            except CheckpointError as error:
                notes.append(str(error))
        return None, notes

    def _found(self) -> dict[int, Path]:
        if not self._folder.is_dir():
            return {}
        named = ((STEP_NAME.fullmatch(path.name), path) for path in self._folder.iterdir() if path.is_dir())
        return {int(match[1]): path for match, path in named if match}

    def _tidy(self) -> None:
        """Undo or finish what a killed process was at."""
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob(f"step-*{_REPLACED}")):
            final = path.with_name(path.name.removesuffix(_REPLACED))
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in self._folder.glob(f"step-*{_PARTIAL}"):
            shutil.rmtree(path)

    def _prune(self, step: int) -> None:
        """Directories without a manifest are not of this class's making and stay."""
        complete = {n: path for n, path in self._found().items() if (path / MANIFEST).exists()}
        kept = kept_steps(complete, step, self._keep, self._keep_best, lambda n: _metric(complete[n]))
        for n in complete.keys() - kept:
            # Under its own name it would be half a checkpoint if this process died here.
            doomed = complete[n].with_name(f"{complete[n].name}{_PARTIAL}")
            complete[n].rename(doomed)
            shutil.rmtree(doomed)


def kept_steps(
    complete: Iterable[int], step: int, keep: int, keep_best: bool, metric: Callable[[int], float | None]
) -> set[int]:
    """Of the steps of complete checkpoints those that stay once `step` is complete.

    The `keep` newest, and with `keep_best` the one with the highest metric, of equals the newer. Later ones are of
    a past that was given up.
    """
    past = sorted(n for n in complete if n <= step)
    kept = set(past[-keep:])
    if keep_best:
        rated = [(value, n) for n in past if (value := metric(n)) is not None]
        kept |= {n for _, n in sorted(rated)[-1:]}
    return kept


def verify(path: Path, find_damage: FindDamage = damage_in) -> Loaded:
    """Look at every file of a checkpoint; `CheckpointError` names one that is not what the manifest says."""
    if path.is_dir() and not (path / MANIFEST).exists():
        raise CheckpointError(f"{path}: has no {MANIFEST}: it holds a model only and cannot be resumed")
    manifest = _read_manifest(path)
    for file, expected in sorted(manifest.files.items()):
        with _named(path / file):
            if not (path / file).is_file() and (path / file).exists():
                raise CheckpointError(f"{path}: {file} is no regular file")
            size = (path / file).stat().st_size
            if size != expected.size:
                raise CheckpointError(f"{path}: {file} has {size} bytes instead of {expected.size}")
    files = manifest.digests()
    damage = damage_in(path, {STATE: files.pop(STATE)}) or find_damage(path, files)
    if damage:
        raise CheckpointError(f"{path}: {damage}")
    return Loaded.of(path, manifest, _read(path, STATE))


def check_model(path: Path) -> None:
    """Read what a checkpoint holds beside `training/`; `CheckpointError` names a file that is not what its manifest
    says.
    """
    digests = _read_manifest(path).digests()
    files = {name: digest for name, digest in digests.items() if is_of_model(name)}
    if damage := damage_in(path, files):
        raise CheckpointError(f"{path}: {damage}")


def is_of_model(name: str) -> bool:
    """Whether a file of a checkpoint is one of the model's, and not of what a resume needs beside it."""
    return PurePosixPath(name).parts[0] != TRAINING


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what JSON would give back as something else: `TypeError` names where it stands."""
    _check_plain(dict(state), "state")


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is no string; JSON would make it one")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{where} is a {type(value).__name__}; JSON would not give it back as it is")


def _manifest(folder: Path, step: int, files: Mapping[str, FileDigest], metric: float | None) -> str:
    missing = _missing(folder, files)
    deadline = time.monotonic() + LISTING_SECONDS
    while missing and time.monotonic() < deadline:
        time.sleep(0.5)
        _refresh(folder, missing)
        missing = _missing(folder, files)
    for name in missing:
        raise CheckpointError(
            f"{folder}: {name} is not there with the {files[name].size} bytes that were written; all ranks of the "
            "learner must see the driver's file system (run.dir)"
        )
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    assert there <= files.keys(), f"{folder}: no digests of {sorted(there - files.keys())}"
    return manifest_text(step, files, metric)


def manifest_text(step: int, files: Mapping[str, FileDigest], metric: float | None) -> str:
    """What `Manifest.of` takes."""
    listed = {name: {"size": digest.size, "sha256": digest.sha256} for name, digest in sorted(files.items())}
    rated = metric if metric is not None and math.isfinite(metric) else None
    return json.dumps({"format": FORMAT, "step": step, "metric": rated, "files": listed}, indent=1)


def _missing(folder: Path, files: Mapping[str, FileDigest]) -> list[str]:
    def is_there(name: str) -> bool:
        try:
            return (folder / name).stat().st_size == files[name].size
        except FileNotFoundError:
            return False

    return [name for name in sorted(files) if not is_there(name)]


def _refresh(folder: Path, names: Sequence[str]) -> None:
    """Have a network file system ask its server for these: what changes here makes it forget what it knew."""
    for place in {(folder / name).parent for name in names}:
        place.mkdir(exist_ok=True)
        marker = place / f".look-{os.getpid()}"
        marker.touch()
        _sync(place)
        marker.unlink()


def _read_manifest(path: Path) -> Manifest:
    return Manifest.of(_read(path, MANIFEST), path)


def _read(path: Path, name: str) -> bytes:
    with _named(path / name):
        return (path / name).read_bytes()


def _object(text: bytes, path: Place, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {name} is damaged: it holds no JSON object")
    return content


def _metric(path: Path) -> float | None:
    try:
        return _read_manifest(path).metric
    except CheckpointError:
        return None  # damaged: it is the best of nothing


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part)[:80] for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
