"""Low-rank adapters in a causal language model: where they go, what they add, and which model they belong to.

An adapted linear layer computes W x + s B A x with s = alpha / rank (LoRA, arXiv 2106.09685), A [rank, inputs] and
B [outputs, rank]; only A and B are trained, and B is 0 at first. With DoRA (arXiv 2402.09353) its weight is
m (W + s B A) / |W + s B A|, with the norm of each row, and m [outputs] is trained too. The layers are peft's.
docs/lora.md says what is kept of them and where they go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kat_ray.config import LoraConfig
from kat_ray.errors import ModelError, UserError
from kat_ray.models.text_model import text_decoder

MERGE_FIRST = "make one of them and their base first: kat-ray export CHECKPOINT DIR"
ADAPTER = "default"  # peft's own name for the only one
_SHOWN = 12  # names in a message
_SAMPLE = 4096  # elements of a weight that its digest is made of


class Adapter(NamedTuple):
    """The tensors of one adapted layer."""

    a: Tensor  # [rank, inputs]
    b: Tensor  # [outputs, rank]
    scale: float
    magnitude: Tensor | None = None  # [outputs], of DoRA


def merged_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """The adapted layer's weight [outputs, inputs] in float32 or wider; `weight` stays as it is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = adapter.a.detach().to(wide), adapter.b.detach().to(wide)
    merged: Tensor = torch.addmm(weight.detach().to(wide), b, a, alpha=adapter.scale)
    if adapter.magnitude is not None:
        merged *= (adapter.magnitude.detach().to(wide) / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


def require_peft() -> None:
    """`UserError` where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"learner.lora: needs peft, which cannot be imported ({error}); install it: pip install 'kat-ray[lora]'"
        ) from error


# --- which layers ------------------------------------------------------------------------------------------


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


# --- adapters put in ---------------------------------------------------------------------------------------


def add_adapters(network: Any, lora: LoraConfig, name: str, seed: int) -> Any:
    """Put adapters beside the layers, which then compute what they did before; returns peft's configuration.

    The first matrices are drawn from `seed`, whatever else draws numbers.
    """
    require_peft()
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    targets = _patterns(network, list(target_layers(network, lora, name)))
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, use_dora=lora.dora, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    return config


def _patterns(network: Any, names: list[str]) -> list[str]:
    """The last parts of the names where these mean no other layers, which is what vLLM reads; else all of them."""
    last = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = [n for n, _ in network.named_modules() if n.rsplit(".", 1)[-1] in last]
    return last if sorted(meant) == sorted(names) else names


def adapted_layers(network: Any) -> Iterator[tuple[str, Any]]:
    """The layers of peft by the names that they had."""
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_of(layer: Any) -> Adapter:
    """What peft's layer holds: no copies."""
    dora = layer.lora_magnitude_vector
    magnitude = dora[ADAPTER].weight if ADAPTER in dora else None
    return Adapter(
        layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, float(layer.scaling[ADAPTER]), magnitude
    )


# --- which model -------------------------------------------------------------------------------------------


@torch.no_grad()
def base_digest(network: Any) -> str:
    """Tells models apart by their weights, in milliseconds: before adapters are put in, and before ZeRO 3.

    SHA-256 of names, shapes and data types, and of elements at equal distances in each weight. A model that was
    trained further has others in all of them; a single changed element may go unseen.
    """
    found = hashlib.sha256()
    for name, parameter in network.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
