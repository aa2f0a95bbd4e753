"""The student as the learner holds it; all that depends on how it is made up of parameters is here."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.packed_attention import ATTENTION, packed_pass
from kat_ray.config import LearnerConfig, ModelConfig
from kat_ray.models.adapter_files import BaseModelFacts, save_model
from kat_ray.models.load import load_causal_lm
from kat_ray.models.lora import base_digest
from kat_ray.models.output_layer import output_layer
from kat_ray.models.support import learner_role, require_directory
from kat_ray.models.text_model import text_decoder
from kat_ray.types.records import WeightUpdate

# Makes parameters whole inside, which ZeRO 3 holds in pieces; all ranks enter it.
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]


class StudentModel:
    """A causal language model of transformers of which every parameter is trained; of a multimodal one, the text
    model's.
    """

    def __init__(self, network: Any) -> None:
        self.network = network  # for DeepSpeed; who trains, publishes or saves goes through the methods
        self.output_layer = output_layer(network)
        self._plain: str | None = None  # the attention that the model was loaded with, where it has another one

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return self.output_layer.vocabulary

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser updates and a checkpoint holds, by the names that it has there; tied ones once."""
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def hidden_states(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """Last hidden states [B, L, H] of a batch; see `ModelInputs.arguments`."""
        position_ids = arguments.get("position_ids")
        with contextlib.nullcontext() if position_ids is None else packed_pass(position_ids):
            hidden_BLH: Tensor = text_decoder(self.network)(**arguments, use_cache=False)[0]
        return hidden_BLH

    def saved_parameters(self) -> Iterable[nn.Parameter]:
        """Those that `copy_for_saving` reads."""
        return self.network.parameters()

    def changed(self, name: str, parameter: Tensor, noise: Tensor) -> Tensor:
        """A trained parameter, each element of which moves by a share `noise` of itself."""
        return parameter * (1 + noise).to(parameter.dtype)

    def check_base(self, checkpoint: Path) -> None:
        """`CheckpointError` where a checkpoint holds only a part of a student, and of another one."""

    def collect_update(
        self, gather: Gather, policy_version: int, dtype: torch.dtype, keep: bool
    ) -> WeightUpdate | None:
        """`weight_update` on ranks that `keep` it, else None; all ranks must call it."""
        with gather(self.network.parameters()):
            return self.weight_update(policy_version, dtype) if keep else None

    def pack(self) -> None:
        """From now on `hidden_states` takes packed rows, and nothing else outside of `plain_attention`."""
        decoder = text_decoder(self.network)
        self._plain = decoder.config._attn_implementation
        decoder.set_attn_implementation(ATTENTION)

    def unpack(self) -> None:
        """Take `pack` back."""
        text_decoder(self.network).set_attn_implementation(self._plain)
        self._plain = None

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[None]:
        """The model's own attention inside, for passes whose gradient is not asked for."""
        if self._plain is None:
            yield
            return
        decoder = text_decoder(self.network)
        decoder.set_attn_implementation(self._plain)
        try:
            yield
        finally:
            decoder.set_attn_implementation(ATTENTION)

    def weight_update(self, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
        """The whole student as contiguous arrays, in the data type in which samplers run it.

        Names and shapes are those of a checkpoint on disk: transformers holds the experts of a mixture in one
        tensor, and some weights under names of its own, which readers of checkpoints do not know.
        """
        return update_of(self.network, dict(self.network.state_dict()), policy_version, dtype)

    def copy_for_saving(
        self, copy_to_host: Callable[[str, Tensor], Tensor], dtype: torch.dtype, stop_ids: Sequence[int]
    ) -> Callable[[Path], None]:
        """Copy the weights; returns what writes the copy to a directory, in Hugging Face format.

        `copy_to_host` is called with a name and a tensor. Tied weights stay one tensor under both names. Who
        generates with the copy stops at `stop_ids`, those of them that the student has.
        """
        copies: dict[tuple[int, torch.Size], Tensor] = {}
        weights = {}
        for name, tensor in self.network.state_dict().items():
            where = (tensor.data_ptr(), tensor.shape)
            if where not in copies:
                copies[where] = copy_to_host(name, tensor.to(dtype))
            weights[name] = copies[where]
        # Saving changes the configuration of what it saves; the student in training keeps its own.
        network = copy.copy(self.network)
        network.config = copy.deepcopy(self.network.config)
        network.config.use_cache = True
        network.generation_config = self.generation(stop_ids)
        return lambda path: save_model(network, weights, path)

    def generation(self, stop_ids: Sequence[int]) -> Any:
        """What who generates with the student goes by (`GenerationConfig`)."""
        found = copy.deepcopy(self.network.generation_config)
        found.eos_token_id = [i for i in stop_ids if i < self.vocabulary]
        return found


def update_of(
    network: Any, state: dict[str, Tensor], policy_version: int, dtype: torch.dtype, copied: bool = False
) -> WeightUpdate:
    """The record of a network's weights; those that are `copied` are in host memory of their own, of this type."""
    from transformers.core_model_loading import revert_weight_conversion

    if "lm_head.weight" not in state and network.get_output_embeddings() is not None:
        state["lm_head.weight"] = network.get_output_embeddings().weight
    return record_of(revert_weight_conversion(network, state), policy_version, dtype, copied)


def record_of(
    tensors: Mapping[str, Tensor], policy_version: int, dtype: torch.dtype, copied: bool = True
) -> WeightUpdate:
    """The record of named tensors; see `update_of`."""
    names, dtypes, arrays = [], [], []
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Any] = {}
    for name, tensor in tensors.items():
        # Tied weights share one array under both names: an array that a record holds twice travels once.
        where = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if where not in copies:
            # A copy in any case: the record is frozen, the learner's parameters are not.
            plain = tensor.detach().to(device="cpu", dtype=dtype, copy=not copied).contiguous()
            copies[where] = (plain.view(torch.uint16) if dtype == torch.bfloat16 else plain).numpy()
        names.append(name)
        dtypes.append(str(dtype).removeprefix("torch."))
        arrays.append(copies[where])
    return WeightUpdate(policy_version, tuple(names), tuple(dtypes), tuple(arrays))


def load_student(
    model: ModelConfig, directory: str, learner: LearnerConfig, max_length: int | None = None, seed: int = 0
) -> StudentModel:
    """The model of a directory or hub id in the learner's data type, without dropout or any other noise.

    `max_length` is that of the longest prompt and answer together; adapters are drawn from `seed`. UserError names
    a model that cannot be trained.
    """
    name = f"student.path = {model.path!r}"
    require_directory(model, directory, learner_role(learner), name, max_length)
    network = load_causal_lm(model, directory, learner.dtype, "student")
    network.config.use_cache = False
    if learner.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    if learner.lora is None:
        student = StudentModel(network)
        prepare_for_training(network)
        return student
    from actors.learner.adapters import adapted_student

    base = BaseModelFacts(path=directory, revision=model.revision, dtype=learner.dtype, digest=base_digest(network))
    return adapted_student(network, learner.lora, base, name, seed)


def prepare_for_training(network: Any) -> None:
    """Leave the model to compute what the sampler's does: in training mode, experts are routed with noise."""
    network.eval()
    for layer in network.modules():
        # Where activations are computed again in the backward pass, transformers asks the layer for its mode.
        layer.training = bool(getattr(layer, "gradient_checkpointing", False))
    switch_dropout_off(network)
    train_every_embedding(network)
    of_text = {
        id(p) for part in (text_decoder(network), network.get_output_embeddings()) for p in part.parameters()
    }
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in of_text)


def train_every_embedding(network: nn.Module) -> None:
    """Torch gives the padding id's embedding no gradient; here no id is padding, and a prompt may hold that one."""
    for layer in network.modules():
        if isinstance(layer, nn.Embedding):
            layer.padding_idx = None


def switch_dropout_off(network: nn.Module) -> None:
    """With dropout the student would not be the sampler's. Attention layers keep their rate as a plain number."""
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(layer, name, 0.0)
