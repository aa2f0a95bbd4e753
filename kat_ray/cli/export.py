"""`kat-ray export`: the whole model that a checkpoint's adapters make of their base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kat_ray.config.load import load_config
from kat_ray.errors import UserError


def export(source: Path, out: Path, base: str | None, dtype: str | None) -> str:
    """Write the model and say where it is; `source` is a checkpoint, or a run, whose newest is taken."""
    from kat_ray.models.adapter_files import is_adapter, write_merged

    if not source.is_dir():
        raise UserError(f"{source}: no such directory; name a run, such as runs/latest, or one of its checkpoints")
    is_run = (source / "config.yaml").is_file()
    checkpoint = newest_checkpoint(source) if is_run else source
    if not is_adapter(checkpoint):
        whole = ": it is a whole model as it is" if (checkpoint / "config.json").is_file() else ""
        raise UserError(f"{checkpoint}: holds no adapters (adapter_config.json){whole}")
    trusted = is_run and load_config(source / "config.yaml", []).student.trust_remote_code
    write_merged(checkpoint, out, base, dtype, trusted)
    return f"{out}: the model of {checkpoint}, whose own files are the adapters alone"


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
