"""`kat-ray export`: a checkpoint as a model for others, in a folder or in a repository of the hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kat_ray.config import Config, ModelConfig
from kat_ray.config.load import load_config, usable_path
from kat_ray.errors import UserError, writing
from kat_ray.models.hub_upload import PREFIX, HubRepository
from kat_ray.run.checkpoint import MANIFEST, check_model, checkpoint_names

_MODELS = ("config.json", "adapter_config.json")  # what a folder that may be replaced holds


@dataclass(frozen=True)
class Options:
    """What `kat-ray export` was asked for beside source and target."""

    base: str | None = None  # where the student before training is now
    dtype: str | None = None  # of the weights
    adapter: bool = False  # the adapters alone
    overwrite: bool = False
    private: bool = False


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the run that it is of, where that is known."""

    checkpoint: Path
    run: Path | None
    config: Config | None

    @property
    def step(self) -> int | None:
        """Optimiser steps, as its name says."""
        number = self.checkpoint.name.removeprefix("step-")
        return int(number) if number.isdigit() else None

    def student(self, base: str | None) -> ModelConfig | None:
        """The student before training; None where nobody says which it was."""
        from kat_ray.models.adapter_files import is_adapter, read_base

        trusted = self.config is not None and self.config.student.trust_remote_code
        if base is not None:
            return ModelConfig(path=base, trust_remote_code=trusted)
        if self.config is not None:
            return self.config.student
        if is_adapter(self.checkpoint):
            facts = read_base(self.checkpoint)
            return ModelConfig(path=facts.path, revision=facts.revision)
        return None


def export(source: Path, to: str, options: Options) -> list[str]:
    """Write the model and say where it is; `source` is a checkpoint, or a run, whose newest is taken.

    `to` is a folder or hub:owner/name. Nothing is left at a folder before the model is whole.
    """
    found = find_source(source)
    if (found.checkpoint / MANIFEST).is_file():
        check_model(found.checkpoint)
    if to.startswith(PREFIX):
        return _to_hub(found, HubRepository(to, options.private, options.overwrite), options)
    if options.private:
        raise UserError("--private: is of a repository (--to hub:owner/name); leave it out")
    out = usable_path(to)
    check_folder(out, found, options.overwrite)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    with folder as staging, writing(out):
        model = Path(staging) / out.name
        notes = _write(found, model, out.name, shown_command(source, out.name, options), options)
        _put(model, out, Path(staging) / "replaced")
    return [f"{out}: the model of {found.checkpoint}", *notes]


def _put(model: Path, out: Path, aside: Path) -> None:
    """Rename the model into place; what was there is moved aside, and back where that fails."""
    if not out.exists():
        model.rename(out)
        return
    out.rename(aside)
    try:
        model.rename(out)
    except OSError:
        aside.rename(out)
        raise


def find_source(source: Path) -> Source:
    """The checkpoint that is meant; `UserError` where there is none."""
    if not source.is_dir():
        there = checkpoint_names(source.parent) if source.parent.name == "checkpoints" else []
        instead = f"there are {', '.join(there)}" if there else "name a run, such as runs/latest, or a checkpoint"
        raise UserError(f"{source}: no such directory; {instead}")
    if (source / "config.yaml").is_file():
        return Source(newest_checkpoint(source), source, load_config(source / "config.yaml", []))
    run = source.resolve().parent.parent
    if source.resolve().parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return Source(source, run, load_config(run / "config.yaml", []))
    return Source(source, None, None)


def check_folder(out: Path, source: Source, overwrite: bool) -> None:
    """`UserError` where a folder may not be written, or may not be replaced."""
    own, checkpoint = out.resolve(), source.checkpoint.resolve()
    if own in (checkpoint, *checkpoint.parents) or checkpoint in own.parents:
        raise UserError(f"{out}: is where the checkpoint lies; name another directory")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"{out}: is there already, and is no directory of its own; name another one")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: is there already; name a directory that is not, or add --overwrite")
    if not any((out / name).is_file() for name in _MODELS) or (out / "training").exists():
        raise UserError(
            f"{out}: holds something else than an exported model, which --overwrite does not remove; name another "
            "directory"
        )


def shown_command(source: Path, target: str, options: Options) -> str:
    """The command for a model card: of local paths the last name, of a checkpoint its run's too."""
    absolute = source.absolute()
    name = absolute.name if absolute.parent.name != "checkpoints" else "/".join(absolute.parts[-3:])
    words = ["kat-ray", "export", name, "--to", target]
    words += ["--adapter"] * options.adapter
    words += [] if options.dtype is None else ["--dtype", options.dtype]
    return shlex.join(words)


def _to_hub(source: Source, repository: HubRepository, options: Options) -> list[str]:
    repository.check()
    with writing(source.checkpoint.parent):
        folder = TemporaryDirectory(prefix="export-", dir=source.checkpoint.resolve().parent)
    with folder as staging, writing(Path(staging)):
        model = Path(staging) / "model"
        command = shown_command(source.run or source.checkpoint, f"{PREFIX}{repository.name}", options)
        notes = _write(source, model, repository.name, command, options)
        what = "Adapters" if options.adapter else "Model"
        steps = "" if source.step is None else f" after {source.step} steps"
        address = repository.upload(model, f"{what}{steps} of kat-ray")
    return [f"{address}: the model of {source.checkpoint}", *notes]


def _write(source: Source, out: Path, name: str, command: str, options: Options) -> list[str]:
    """Make the folder `out` with everything; returns what is to be said of it."""
    from kat_ray.models.export_files import take_students_files
    from kat_ray.models.older_readers import add_older_names
    from kat_ray.report.model_card import Exported, model_card

    _write_weights(source, out, options)
    student, notes = source.student(options.base), []
    try:
        if student is None:
            raise UserError("it is not said which model this was before training (--base)")
        if not take_students_files(student, out) and not options.adapter:
            notes.append("config.json is the checkpoint's: the student's own would be another model")
    except UserError as error:
        notes.append(f"the tokenizer's files and config.json are those that the run wrote: {error}")
    if source.config is not None and (note := _put_template(source.config, out)):
        notes.append(note)
    if note := add_older_names(out, student is not None and student.trust_remote_code):
        notes.append(note)
    card = model_card(Exported(name, options.adapter, source.step, source.run, source.config, command))
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


def _write_weights(source: Source, out: Path, options: Options) -> None:
    from kat_ray.models.adapter_files import is_adapter, write_merged
    from kat_ray.models.export_files import copy_adapter, copy_model

    checkpoint, adapted = source.checkpoint, is_adapter(source.checkpoint)
    if options.adapter:
        if not adapted:
            raise UserError(
                f"--adapter: {checkpoint} holds a whole model, no adapters (learner.lora); leave it out"
            )
        if options.dtype is not None:
            raise UserError("--adapter: adapters stay in the learner's type; leave --dtype out")
        out.mkdir()
        copy_adapter(checkpoint, out, options.base)
    elif adapted:
        trusted = source.config is not None and source.config.student.trust_remote_code
        write_merged(checkpoint, out, options.base, options.dtype, trusted)
    else:
        out.mkdir()
        copy_model(checkpoint, out, options.dtype)


def _put_template(config: Config, out: Path) -> str | None:
    """The chat template of training goes with the model, where it is not the student's own."""
    from kat_ray.data.chat import chat_template_of
    from kat_ray.models.inspect import load_tokenizer

    source = config.data.chat_template
    if source in (False, True, "student"):
        return None
    try:
        own = load_tokenizer(config.student)
        teacher = load_tokenizer(config.teacher) if source == "teacher" and config.teacher else None
        template = chat_template_of(config.data, own, teacher)
    except UserError as error:
        return f"the chat template of training (data.chat_template = {source}) is not in it: {error}"
    assert template is not None
    (out / "chat_template.jinja").write_text(template.text, encoding="utf-8")
    return f"chat_template.jinja is that of training (data.chat_template = {source})"


@contextmanager
def whole_model(model: str) -> Iterator[str]:
    """The directory itself, or for as long as this is entered the model that its adapters make of their base.

    That lies beside the adapters: samplers may be on other machines, which see a run's directory.
    """
    from kat_ray.models.adapter_files import is_adapter, write_merged

    path = Path(model)
    if not is_adapter(path):
        yield model
        return
    with TemporaryDirectory(prefix="merged-", dir=path.resolve().parent) as folder:
        write_merged(path, Path(folder))
        yield folder


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of the highest step in a run directory."""
    steps = {
        int(path.name.removeprefix("step-")): path
        for path in (run / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    }
    if not steps:
        raise UserError(f"{run}: holds no checkpoint (checkpoints/step-*)")
    return steps[max(steps)]
