"""Published adapters put into vLLM's workers beside the weights that they were started with (LoRA), in memory.

vLLM's front door takes a directory. What it does with one is done here with arrays, by the classes that it uses;
`load_adapters` is run by vLLM inside each worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from actors.sampler.weight_loading import LoadReport, SharedWeights, shared_tensors
from kat_ray.config import LoraConfig, ModelConfig
from kat_ray.models.lora_targets import skeleton, target_layers

_ID = 1  # of the only adapters that an engine has
# What vLLM takes as the largest rank of an engine: it allocates for it.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def engine_arguments(lora: LoraConfig | None, model: ModelConfig, directory: str) -> dict[str, Any]:
    """Arguments of a vLLM engine that is given adapters of the model in a directory or of a hub id."""
    if lora is None:
        return {}
    rank = next(rank for rank in _RANKS if rank >= lora.rank)
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "lora_target_modules": _targets(lora, model, directory),
    }


def _targets(lora: LoraConfig, model: ModelConfig, directory: str) -> list[str] | None:
    """Last parts of the names of the layers that vLLM keeps room for; None: of all, for a model's own code.

    By itself it would for the output layer too, whose adapters are as long as the vocabulary, and with which it
    gives no log-probabilities of a prompt on a CPU (`PunicaWrapperCPU.add_lora_logits` of 0.32: one row a request).
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        directory, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    if (network := skeleton(config)) is None:
        return None
    layers = target_layers(network, lora, f"student.path = {model.path!r}")
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def request() -> Any:
    """What a request says that is to be answered with the adapters; they must have been loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", _ID, "published")  # the path is not read: adapters of this id are there


def load_shared_adapters(worker: Any, weights: SharedWeights, lora: LoraConfig) -> LoadReport:
    """Run in a worker process: as `load_adapters`, from shared memory."""
    return load_adapters(worker, shared_tensors(weights), lora)


def load_adapters(worker: Any, weights: Iterable[tuple[str, torch.Tensor]], lora: LoraConfig) -> LoadReport:
    """Run in a worker: replace its adapters by these, which are named as in peft's files."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    adapters = manager._adapter_manager
    helper = PEFTHelper.from_dict({"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": []})
    helper.validate_legal(manager.lora_config)
    renamed = getattr(adapters.model, "hf_to_vllm_mapper", None)
    # A copy in any case: vLLM multiplies the second matrices by alpha / rank, in place.
    tensors = {name: tensor.clone() for name, tensor in weights}
    model = LoRAModel.from_lora_tensors(
        _ID,
        tensors,
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if renamed is None else renamed.get_rename_mapper(),
    )
    places = set(_places(adapters))
    ignored = frozenset(name for name in model.loras if name not in places)
    adapters.remove_adapter(_ID)
    adapters.add_adapter(model)
    adapters.activate_adapter(_ID)
    return LoadReport(ignored, frozenset())


def _places(adapters: Any) -> Iterator[str]:
    """Layers that take an adapter, by the names of a checkpoint: vLLM packs some of them into one."""
    for name in adapters.modules:
        yield name
        yield from adapters.packed_modules.get(name, ())
