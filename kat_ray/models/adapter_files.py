"""Adapters on disk: a directory in peft's own format, and the whole model that it makes of its base.

`base_model.json` beside peft's two files names the model that the adapters belong to, and how to know it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kat_ray.config import ModelConfig
from kat_ray.errors import ModelError
from kat_ray.models.inspect import resolve_model
from kat_ray.models.load import DTYPES, load_causal_lm
from kat_ray.models.lora import Adapter, base_digest, merged_weight

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
PREFIX = "base_model.model."  # of every name in peft's file


class BaseModelFacts(BaseModel):
    """The model that adapters belong to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str = Field(min_length=1)  # directory or hub id
    revision: str | None
    dtype: Literal["float32", "bfloat16"]  # in which the learner held it
    digest: str  # `base_digest` of it in this type

    def name(self) -> str:
        """For messages."""
        return self.path + (f" at {self.revision}" if self.revision else "")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters instead of a model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def write_adapter(path: Path, peft_config: Any, tensors: Mapping[str, Tensor], base: BaseModelFacts) -> None:
    """Write a directory that peft, transformers and vLLM load; `tensors` are named as peft names them.

    A full disk is an `OSError` that names the directory.
    """
    own = copy.copy(peft_config)
    own.base_model_name_or_path, own.revision, own.inference_mode = base.path, base.revision, True
    own.target_modules = sorted(own.target_modules)  # a set, whose order would change from process to process
    own.save_pretrained(str(path))
    (path / BASE).write_text(base.model_dump_json(indent=1) + "\n", encoding="utf-8")
    try:
        save_file(dict(tensors), path / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def read_base(path: Path) -> BaseModelFacts:
    """The model that a directory's adapters belong to; `ModelError` where it does not say."""
    try:
        return BaseModelFacts.model_validate_json((path / BASE).read_bytes())
    except OSError as error:
        raise ModelError(f"{path / BASE}: {error.strerror or error}; only kat-ray's checkpoints have it") from error
    except ValidationError as error:
        raise ModelError(f"{path / BASE}: is damaged: {error.errors()[0]['msg']}") from error


def read_adapter(path: Path) -> dict[str, Adapter]:
    """A directory's adapters by the name of their layer."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scale = config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: its adapters cannot be read: {error}") from error
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name: Adapter(
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scale,
            tensors.get(f"{name}.lora_magnitude_vector"),
        )
        for name in layers
    }  # fmt: skip


@torch.no_grad()
def write_merged(
    checkpoint: Path, out: Path, base: str | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write the model that a checkpoint's adapters make of their base: a directory like any other model's.

    `base` says where that model is now, if not where it was; `dtype` is that of the weights, which is the learner's
    otherwise. ModelError where it is another model, or `out` is there already.
    """
    facts, adapters = read_base(checkpoint), read_adapter(checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: is there already; name a directory that is not")
    model = ModelConfig(
        path=base or facts.path, revision=None if base else facts.revision, trust_remote_code=trust_remote_code
    )
    network = load_causal_lm(model, resolve_model(model), facts.dtype, "base")
    if base_digest(network) != facts.digest:
        raise ModelError(
            f"{model.path}: its weights are not those that {checkpoint} was trained on, of {facts.name()}; name a "
            "directory that has them with --base"
        )
    own = DTYPES[dtype or facts.dtype]
    merged = {f"{n}.weight": merged_weight(network.get_submodule(n).weight, a).to(own) for n, a in adapters.items()}
    network.config.use_cache = True
    save_model(network, network.to(own).state_dict() | merged, out)
    _copy_beside(checkpoint, out)


def save_model(network: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    """A Hugging Face directory of these weights; a full disk is an `OSError` that names it."""
    try:
        network.save_pretrained(path, state_dict=dict(weights))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _copy_beside(checkpoint: Path, out: Path) -> None:
    """What the checkpoint holds of tokenizer and generation: all but adapters and training."""
    own = {CONFIG, WEIGHTS, BASE, "manifest.json"}
    for file in checkpoint.iterdir():
        if file.is_file() and file.name not in own:
            (out / file.name).write_bytes(file.read_bytes())
