"""Which layers of a student get adapters (`learner.lora.targets`), found before any weights are loaded.

torch is imported where it is needed: whoever checks a machine asks this too.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kat_ray.config import LoraConfig
from kat_ray.errors import ModelError, UserError
from kat_ray.models.text_model import text_decoder

if TYPE_CHECKING:
    from torch import nn

MERGE_FIRST = "make one of them and their base first: kat-ray export CHECKPOINT DIR"
_SHOWN = 12  # names in a message


def require_peft() -> None:
    """`UserError` where peft is not installed."""
    if find_spec("peft") is None:
        raise UserError("learner.lora: needs peft, which is not installed: pip install 'kat-ray[lora]'")


def target_layers(network: Any, lora: LoraConfig, name: str) -> dict[str, nn.Linear]:
    """The layers of `learner.lora.targets` by their names; `ModelError` for a target that is none.

    `name` is the student's field and value.
    """
    layers = _linear_layers(network)
    if lora.targets == "all-linear":
        return layers
    found: dict[str, nn.Linear] = {}
    for target in lora.targets:
        chosen = {n: layer for n, layer in layers.items() if n == target or n.endswith(f".{target}")}
        if not chosen:
            raise ModelError(_no_target(network, target, layers, name))
        found |= chosen
    return {n: layer for n, layer in layers.items() if n in found}


def _linear_layers(network: Any) -> dict[str, nn.Linear]:
    """Those of the text model; the output layer, which the loss takes as one matrix, is not among them."""
    from torch import nn

    inside = {id(module) for module in text_decoder(network).modules()}
    head = network.get_output_embeddings()
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) in inside
    }


def _no_target(network: Any, target: str, layers: Mapping[str, nn.Linear], name: str) -> str:
    which = f"learner.lora.targets: {target!r}"
    modules = [m for n, m in network.named_modules() if n == target or n.endswith(f".{target}")]
    embeddings = network.get_input_embeddings(), network.get_output_embeddings()
    if any(m is e for m in modules for e in embeddings):
        tied = getattr(network.config.get_text_config(), "tie_word_embeddings", False)
        why = (
            f"it is tied in {name}: one matrix is embedding and output layer, and an adapter would change one"
            if tied
            else "the loss takes the output layer as one matrix, and the samplers the embedding as it is"
        )
        return f"{which} can have no adapter: {why}; take layers between them: {_names(layers)}"
    if modules:
        return f"{which} is a {type(modules[0]).__name__} in {name}; take linear layers: {_names(layers)}"
    return f"{which} is no layer of {name}, whose linear layers are {_names(layers)}"


def _names(layers: Mapping[str, nn.Linear]) -> str:
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    more = f" and {len(last) - _SHOWN} more" if len(last) > _SHOWN else ""
    return ", ".join(last[:_SHOWN]) + more


def skeleton(config: Any) -> Any:
    """A model of transformers' configuration without memory for its weights; None for a model's own code."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_targets(config: Any, lora: LoraConfig, name: str) -> None:
    """`target_layers` before any weights are loaded, from transformers' configuration of the student."""
    if (network := skeleton(config)) is not None:
        target_layers(network, lora, name)


def adapter_parameters(config: Any, lora: LoraConfig) -> int | None:
    """Number of parameters of all adapters; None where the model brings its own code."""
    if (network := skeleton(config)) is None:
        return None
    layers = target_layers(network, lora, "the student").values()
    return sum(lora.rank * (m.in_features + m.out_features) + lora.dora * m.out_features for m in layers)
