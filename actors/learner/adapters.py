"""A student of which adapters alone are trained: docs/lora.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.model import Gather, StudentModel, prepare_for_training, record_of, update_of
from kat_ray.config import LoraConfig
from kat_ray.models.adapter_files import PREFIX, BaseModelFacts, read_base, write_adapter
from kat_ray.models.lora import ADAPTER, adapted_layers, adapter_of, add_adapters, merged_weight
from kat_ray.run.checkpoint import CheckpointError
from kat_ray.types.records import WeightUpdate


class AdapterStudent(StudentModel):
    """The base stays as it was loaded. It is published with the adapters merged into a copy, and never saved."""

    def __init__(self, network: Any, peft_config: Any, base: BaseModelFacts, alone: bool = False) -> None:
        """`alone`: published are the adapters, and not the whole model."""
        super().__init__(network)
        self._peft_config, self._base, self._alone = peft_config, base, alone

    def saved_parameters(self) -> Iterable[nn.Parameter]:
        return [parameter for _, parameter in self.trained_parameters()]

    def changed(self, name: str, parameter: Tensor, noise: Tensor) -> Tensor:
        # Second matrices are 0 at first: a share of them would be no change.
        return parameter + noise.to(parameter.dtype) if ".lora_B." in name else parameter

    def check_base(self, checkpoint: Path) -> None:
        saved = read_base(checkpoint)
        if saved.digest != self._base.digest:
            raise CheckpointError(
                f"{checkpoint}: its adapters belong to {saved.name()} as it was then; the weights of "
                f"{self._base.name()} are others. A checkpoint holds the adapters alone: put back that student"
            )

    def collect_update(
        self, gather: Gather, policy_version: int, dtype: torch.dtype, keep: bool
    ) -> WeightUpdate | None:
        """As for any student; of what ZeRO 3 holds in pieces, one layer is whole at a time."""
        if self._alone:
            with gather(self.saved_parameters()):
                return self._adapter_update(policy_version, dtype) if keep else None
        state: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # a tied weight is one parameter of two layers
        for own, layer in _layers(self.network):
            adapter = None if layer is None else adapter_of(layer)
            parts = [t for t in (*own.values(), *(adapter or ())) if isinstance(t, nn.Parameter)]
            with gather(parts):
                for name, tensor in own.items():
                    if keep and id(tensor) not in copies:
                        whole = tensor.detach()
                        if adapter is not None and name.endswith(".weight"):
                            whole = merged_weight(tensor, adapter)
                        copies[id(tensor)] = whole.to(device="cpu", dtype=dtype, copy=True)
                    if keep:
                        state[name] = copies[id(tensor)]
        return update_of(self.network, state, policy_version, dtype, copied=True) if keep else None

    def weight_update(self, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
        update = self.collect_update(lambda _: nullcontext(), policy_version, dtype, keep=True)
        assert update is not None
        return update

    def copy_for_saving(
        self, copy_to_host: Callable[[str, Tensor], Tensor], dtype: torch.dtype, stop_ids: Sequence[int]
    ) -> Callable[[Path], None]:
        """Copy the adapters; returns what writes them to a directory, in peft's format."""
        copies = {name: copy_to_host(name, tensor.to(dtype)) for name, tensor in self._named().items()}
        generation = self.generation(stop_ids)

        def write(path: Path) -> None:
            write_adapter(path, self._peft_config, copies, self._base)
            generation.save_pretrained(path)

        return write

    def _named(self) -> dict[str, Tensor]:
        """The adapters by the names of peft's files."""
        from peft.utils import get_peft_model_state_dict

        trained = {name: parameter.detach() for name, parameter in self.trained_parameters()}
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.network, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False
        )
        return {PREFIX + name: tensor for name, tensor in found.items()}

    def _adapter_update(self, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
        copies = {name: tensor.to(device="cpu", dtype=dtype, copy=True) for name, tensor in self._named().items()}
        return record_of(copies, policy_version, dtype)


def _layers(network: Any) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """What a checkpoint of the whole model has of each layer, by its names there, and peft's layer around it."""
    adapted = dict(adapted_layers(network))
    inside = {id(module) for layer in adapted.values() for module in layer.modules()}
    for name, module in network.named_modules():
        if id(module) in inside and name not in adapted:
            continue
        layer = adapted.get(name)
        source = module if layer is None else layer.get_base_layer()
        kept = {n: b for n, b in source.named_buffers(recurse=False) if n not in source._non_persistent_buffers_set}
        own = {**dict(source.named_parameters(recurse=False)), **kept}
        if own:
            yield {f"{name}.{n}".lstrip("."): tensor for n, tensor in own.items()}, layer


def adapted_student(network: Any, lora: LoraConfig, base: BaseModelFacts, name: str, seed: int) -> AdapterStudent:
    """Put adapters into a model that was just loaded, and leave the gradients to them; see `add_adapters`."""
    peft_config = add_adapters(network, lora, name, seed)
    prepare_for_training(network)
    parts = (part for _, layer in adapted_layers(network) for part in adapter_of(layer))
    own = {id(part) for part in parts if isinstance(part, nn.Parameter)}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in own)
    return AdapterStudent(network, peft_config, base, alone=lora.publish == "adapters")
