"""Models of the hub at a fixed commit: a branch or a tag may move while a run goes on, or before it is resumed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from kat_ray.config import Config, ModelConfig, TeacherConfig
from kat_ray.models.inspect import resolve_model
from kat_ray.types.records import DEFAULT_TEACHER

Model = TypeVar("Model", bound=ModelConfig)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(config: Config) -> Config:
    """The configuration with the commit of each hub model in place of its branch or tag.

    All that loads a model or its tokenizer takes the revision from there, on whichever node it is. Without an
    answer from the hub (or from its cache, with HF_HUB_OFFLINE=1) a model is left as it is; whoever reads it first
    says why it cannot be had.
    """
    models: dict[str, Any] = {"student": pinned_model(config.student)}
    if config.used_teachers:
        models |= _teachers({name: pinned_model(teacher) for name, teacher in config.used_teachers.items()})
    return config.model_copy(update=models)


def pinned_like(config: Config, before: Config) -> Config:
    """The configuration with the commits that a run was made with, where it names the same models and no commit."""
    models: dict[str, Any] = {"student": _like(config.student, before.student)}
    own, others = config.all_teachers, before.all_teachers
    models |= _teachers({name: _like(own[name], others[name]) if name in others else own[name] for name in own})
    return config.model_copy(update=models)


def _teachers(by_name: Mapping[str, TeacherConfig]) -> dict[str, Any]:
    """The fields of a configuration that hold them."""
    named = {name: teacher for name, teacher in by_name.items() if name != DEFAULT_TEACHER}
    return {"teacher": by_name.get(DEFAULT_TEACHER), "teachers": named}


def _like(model: Model, before: ModelConfig) -> Model:
    floats = not is_commit(model.revision) and is_commit(before.revision) and model.path == before.path
    return model.model_copy(update={"revision": before.revision}) if floats else model


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state for ever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def pinned_model(model: Model) -> Model:
    """A hub model at the commit that its revision is now; see `pinned`."""
    if Path(resolve_model(model)).is_dir() or is_commit(model.revision):
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:  # the folder of a snapshot is named after its commit
        commit = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=["config.json"])).name
    except (HTTPError, HFValidationError, OSError):
        return model
    return model.model_copy(update={"revision": commit}) if is_commit(commit) else model
