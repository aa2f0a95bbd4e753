"""The student as the learner holds it: loaded, made equal to what the sampler runs, and handed out as arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kat_ray.config import Config
from kat_ray.models.load import load_causal_lm
from kat_ray.types.records import WeightUpdate


def load_student(config: Config, student_dir: str) -> Any:
    """The model of `student_dir` in the learner's data type, in training mode, without dropout."""
    student = load_causal_lm(config.student, student_dir, config.learner.dtype, "student")
    student.config.use_cache = False
    if config.learner.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    student.train()
    switch_dropout_off(student)
    learn_every_embedding(student)
    return student


def learn_every_embedding(student: nn.Module) -> None:
    """Torch gives the padding id's embedding no gradient; here no id is padding, and a prompt may hold that one."""
    for layer in student.modules():
        if isinstance(layer, nn.Embedding):
            layer.padding_idx = None


def switch_dropout_off(student: nn.Module) -> None:
    """Dropout would make the student another one than the sampler's. Attention keeps its rate as a number."""
    for layer in student.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(layer, name, 0.0)


def weight_update(student: Any, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
    """A whole state dict as contiguous arrays, in the data type in which samplers run it."""
    state = dict(student.state_dict())
    if "lm_head.weight" not in state and student.get_output_embeddings() is not None:
        state["lm_head.weight"] = student.get_output_embeddings().weight
    names, dtypes, arrays = [], [], []
    copies: dict[tuple[int, torch.Size], Any] = {}
    for name, tensor in state.items():
        # Tied weights share one array under both names, and an array that stands twice in a record travels once.
        where = (tensor.data_ptr(), tensor.shape)
        if where not in copies:
            # A copy in any case: the record is frozen, the learner's parameters are not.
            plain = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
            copies[where] = (plain.view(torch.uint16) if dtype == torch.bfloat16 else plain).numpy()
        names.append(name)
        dtypes.append(str(dtype).removeprefix("torch."))
        arrays.append(copies[where])
    return WeightUpdate(policy_version, tuple(names), tuple(dtypes), tuple(arrays))
