"""Low-rank adapters in a causal language model: where they go, what they add, and which model they belong to.

An adapted linear layer computes W x + s B A x with s = alpha / rank (LoRA, arXiv 2106.09685), A [rank, inputs] and
B [outputs, rank]; only A and B are trained, and B is 0 at first. With DoRA (arXiv 2402.09353) its weight is
m (W + s B A) / |W + s B A|, with the norm of each row, and m [outputs] is trained too. The layers are peft's.
docs/lora.md says what is kept of them and where they go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kat_ray.config import LoraConfig
from kat_ray.models.lora_targets import require_peft, target_layers

ADAPTER = "default"  # peft's own name for the only one
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
