"""A checkpoint as a model for others: its weights, and beside them the student's files as they came.

A checkpoint's tokenizer and config.json were written by the transformers of the run. What the student came with is
read by older ones too, and by who compares it with the student.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kat_ray.config import ModelConfig
from kat_ray.errors import ModelError
from kat_ray.models.adapter_files import BASE, CONFIG, WEIGHTS, read_base
from kat_ray.models.inspect import files_of
from kat_ray.models.load import DTYPES

_NAMES = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
     "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json")
)  # fmt: skip
_ENDINGS = (".model", ".tiktoken")
_TEMPLATES = "additional_chat_templates"  # folder of those that a tokenizer has beside its default
_TERMS = ("LICENSE", "NOTICE", "USE_POLICY")
# Fields of config.json that say nothing of what the model computes.
_SAID_ELSEWHERE = frozenset(("dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"))


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model directory belongs to its tokenizer."""
    return name in _NAMES or name.endswith(_ENDINGS) or (name.startswith("tokenization_") and name.endswith(".py"))


def copy_model(checkpoint: Path, out: Path, dtype: str | None) -> None:
    """Copy a checkpoint that holds a whole model into the folder `out`; `dtype` converts its weights.

    Shards are converted one at a time: no more than the largest of them is in memory. Tensors that are not of
    floating point stay as they are.
    """
    files = _model_files(checkpoint)
    written = read_object(checkpoint / "config.json")
    own = written.get("dtype", written.get("torch_dtype"))
    for file in files:
        if dtype not in (None, own) and file.suffix == ".safetensors":
            _convert(file, out / file.name, DTYPES[str(dtype)])
        else:
            shutil.copyfile(file, out / file.name)
    if dtype not in (None, own):
        write_object(out / "config.json", _with_dtype(written, str(dtype)))
        _count_again(out)


def copy_adapter(checkpoint: Path, out: Path, base: str | None) -> None:
    """Copy a checkpoint's adapters into the folder `out`; `base` names the model that they go beside."""
    facts = read_base(checkpoint)
    for file in _model_files(checkpoint):
        shutil.copyfile(file, out / file.name)
    if base is not None:
        config = read_object(out / CONFIG) | {"base_model_name_or_path": base, "revision": None}
        write_object(out / CONFIG, config)
        named = facts.model_copy(update={"path": base, "revision": None})
        (out / BASE).write_text(named.model_dump_json(indent=1) + "\n", encoding="utf-8")


def take_students_files(student: ModelConfig, out: Path) -> bool:
    """Put the student's own tokenizer files, terms of use and config.json in place of what a checkpoint has.

    The configuration only where it means what the checkpoint's means; the type of the weights is that of `out`.
    Returns whether it was taken. `ModelError` where the student is not to be had.
    """
    directory, names = files_of(student)
    if not any(map(is_tokenizer_file, names)):
        raise ModelError(f"{student.path}: there is no tokenizer in it")
    for file in list(out.iterdir()):
        if is_tokenizer_file(file.name):
            file.unlink()
    shutil.rmtree(out / _TEMPLATES, ignore_errors=True)
    for name in sorted(names):
        if (is_tokenizer_file(name) or name.upper().startswith(_TERMS)) and (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)
    if (directory / _TEMPLATES).is_dir():
        shutil.copytree(directory / _TEMPLATES, out / _TEMPLATES)
    return _take_config(student, directory, out)


def _take_config(student: ModelConfig, directory: Path, out: Path) -> bool:
    written = out / "config.json"
    if not written.is_file():  # adapters
        return False
    ours = read_object(written)
    theirs = read_object(directory / "config.json")
    trusted = student.trust_remote_code
    if meaning(directory, trusted) != meaning(out, trusted):
        return False
    dtype = ours.get("dtype", ours.get("torch_dtype"))
    write_object(written, theirs if dtype is None else _with_dtype(theirs, str(dtype)))
    for code in directory.glob("*.py") if theirs.get("auto_map") else ():
        shutil.copyfile(code, out / code.name)
    return True


def meaning(directory: Path, trust_remote_code: bool) -> Any:
    """What transformers makes of a config.json, to be compared."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    return _without(config.to_dict())


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without(v) for k, v in value.items() if k not in _SAID_ELSEWHERE}
    return value


def _model_files(checkpoint: Path) -> list[Path]:
    """All that is not the run's: weights, configuration, what ends a text, the tokenizer."""
    if not any((checkpoint / name).is_file() for name in ("config.json", WEIGHTS)):
        raise ModelError(f"{checkpoint}: holds neither a model (config.json) nor adapters ({CONFIG})")
    return sorted(f for f in checkpoint.iterdir() if f.is_file() and f.name != "manifest.json")


def _convert(file: Path, out: Path, dtype: torch.dtype) -> None:
    try:
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        converted = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(converted, out, {"format": "pt"})
    except SafetensorError as error:
        raise ModelError(f"{file}: cannot be read, or {out} not be written: {error}") from error


def _count_again(out: Path) -> None:
    """The index of several shards says how many bytes they hold."""
    index = out / "model.safetensors.index.json"
    if not index.is_file():
        return
    content, total = read_object(index), 0
    for name in set(content["weight_map"].values()):
        with safe_open(out / name, framework="pt") as shard:
            total += sum(shard.get_tensor(key).nbytes for key in shard.keys())  # noqa: SIM118
    content.setdefault("metadata", {})["total_size"] = total
    write_object(index, content)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that names this type wherever it names one, and at the top."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            inside = "dtype" in value or "torch_dtype" in value
            changed[name] = _with_dtype(value, dtype) if inside else value
        else:
            changed[name] = dtype if name in ("dtype", "torch_dtype") else value
    if "torch_dtype" not in changed:
        changed["dtype"] = dtype
    return changed


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; `ModelError` where it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return value


def write_object(file: Path, value: Mapping[str, Any]) -> None:
    """As transformers writes one."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
