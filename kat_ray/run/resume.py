"""Going on with a run: which one, and under which configuration.

What a run has done so far was done under its own configuration; only what leaves that true may be changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from kat_ray.config import Config, Section
from kat_ray.config.cluster import is_resumable
from kat_ray.config.load import load_config
from kat_ray.config.local_paths import is_url
from kat_ray.data.prompts import PromptSet
from kat_ray.errors import UserError
from kat_ray.models.revisions import pinned_like
from kat_ray.records.json_records import SUMMARY, read_json
from kat_ray.run.stored_copy import copied
from kat_ray.storage.address import Address, Place


def resumable(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields and whole sections that a resume may change: those declared as `Resumable`.

    A `*` stands for whatever name the user has given.
    """
    for name, field in model.model_fields.items():
        annotation = _without_none(field.annotation)
        if is_resumable(field):
            yield prefix + name
        elif _is_section(annotation):
            yield from resumable(annotation, f"{prefix}{name}.")
        elif get_origin(annotation) is dict and _is_section(of := get_args(annotation)[1]):
            yield from resumable(of, f"{prefix}{name}.*.")


def _without_none(annotation: Any) -> Any:
    """The section of one that may be left out."""
    members = [a for a in get_args(annotation) if a is not type(None)]
    return members[0] if get_origin(annotation) in (Union, UnionType) and len(members) == 1 else annotation


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def resumed_config(run: Place, overrides: Sequence[str]) -> Config:
    """A run's configuration with overrides; `UserError` names those that would make it another run."""
    before = run_config(run)
    after = load_config(_config_file(run), overrides)
    changed = changes(before, after)
    if changed:
        raise UserError(
            f"{run}: resuming cannot change {', '.join(changed)}: the steps so far were made without that. Start a "
            f"new run instead, from this one's newest checkpoint (student.path={run}/checkpoints/step-N)"
        )
    return after


def run_config(run: Place) -> Config:
    """The configuration in a run's directory, or of a run in a bucket."""
    file = _config_file(run)
    if not file.is_file():
        raise UserError(f"{run}: not a run directory (no config.yaml in it); name one, such as runs/latest")
    return load_config(file, [])


def _config_file(run: Place) -> Path:
    return (copied(run, ("config.yaml",)) if isinstance(run, Address) else run) / "config.yaml"


def check_prompts(run: Place, before: Mapping[str, str], now: Mapping[str, PromptSet]) -> None:
    """`UserError` if a file of prompts holds others than those that the run was made with so far.

    `before` holds digests by section; a checkpoint of an earlier version has none.
    """
    for section, prompts in now.items():
        if before.get(section, prompts.digest) != prompts.digest:
            raise UserError(
                f"{run}: {section}.path = {prompts.source}: these are not the prompts (or not the tokens) that the "
                "run has had so far. Put back the file and tokenizer of then, or start a new run from this one's "
                f"newest checkpoint (student.path={run}/checkpoints/step-N)"
            )


def changes(before: Config, after: Config) -> list[str]:
    """Dotted names of the fields that differ and may not."""
    old, new = dict(_leaves(before.model_dump())), dict(_leaves(after.model_dump()))
    differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    free = [name.split(".") for name in resumable()]
    return [name for name in differ if not any(_within(name.split("."), f) for f in free)]


def _within(name: Sequence[str], field: Sequence[str]) -> bool:
    return len(name) >= len(field) and all(f in ("*", n) for f, n in zip(field, name, strict=False))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, tree


def finished_steps(run: Place) -> int:
    """Steps of a run that has written its summary; 0 of another."""
    file = (copied(run, ("summary.json",)) if isinstance(run, Address) else run) / "summary.json"
    return int(read_json(file, SUMMARY).get("steps", 0)) if file.is_file() else 0


def in_ray_job() -> bool:
    """Whether this process is the driver of a submitted Ray job: it may be a retry."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def unfinished_run(config: Config) -> Place | None:
    """The run that a retried job goes on with: same name, same configuration, not finished; else None."""
    if config.run.resume == "never" or not in_ray_job():
        return None
    stored = is_url(config.run.dir)
    path: Place = (Address.of(config.run.dir) if stored else Path(config.run.dir)) / config.run.name
    file = _config_file(path)
    if not file.is_file():
        return None
    try:
        before = load_config(file, [])
    except UserError:
        return None
    config = pinned_like(config, before)
    return path if not changes(before, config) and finished_steps(path) < config.run.steps else None
