"""The student as the learner holds it: loaded, made equal to what the sampler runs, and handed out as arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.types import WeightUpdate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_student(config: Config, student_dir: str) -> Any:
    """The model of `student_dir` in the learner's data type, in training mode, without dropout."""
    from transformers import AutoModelForCausalLM

    model = config.student
    student = AutoModelForCausalLM.from_pretrained(
        student_dir,
        revision=model.revision,
        dtype=DTYPES[config.learner.dtype],
        trust_remote_code=model.trust_remote_code,
        use_safetensors=None if model.allow_pickle else True,
    )
    student.config.use_cache = False
    if config.learner.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    student.train()
    switch_dropout_off(student)
    check_output_layer(student, model.path)
    return student


def switch_dropout_off(student: nn.Module) -> None:
    """Dropout would make the student another one than the sampler's. Attention keeps its rate as a number."""
    for layer in student.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(layer, name, 0.0)


@torch.no_grad()
def check_output_layer(student: Any, path: str) -> None:
    """Refuse a model that changes its logits after the output layer: the loss takes them from that layer."""
    parts = [hasattr(student, name) for name in ("model", "lm_head")]
    ids = torch.arange(4)[None] % student.config.get_text_config().vocab_size
    if not all(parts) or not torch.allclose(
        student.lm_head(student.model(input_ids=ids)[0]), student(input_ids=ids).logits, rtol=1e-3, atol=1e-3
    ):
        raise UserError(
            f"student.path = {path!r}: {type(student).__name__} has no `lm_head` over a `model`, or scales or caps "
            "the logits behind it; the loss would be that of another distribution. Qwen, Llama and Mistral fit."
        )


def weight_update(student: Any, policy_version: int, dtype: torch.dtype) -> WeightUpdate:
    """A whole state dict as contiguous arrays, in the data type in which samplers run it."""
    state = dict(student.state_dict())
    if "lm_head.weight" not in state and student.get_output_embeddings() is not None:
        state["lm_head.weight"] = student.get_output_embeddings().weight
    names, dtypes, arrays = [], [], []
    for name, tensor in state.items():
        # A copy in any case: the record is frozen, the learner's parameters are not.
        plain = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        is_bf16 = plain.dtype == torch.bfloat16
        names.append(name)
        dtypes.append(str(plain.dtype).removeprefix("torch."))
        arrays.append((plain.view(torch.uint16) if is_bf16 else plain).numpy())
    return WeightUpdate(policy_version, tuple(names), tuple(dtypes), tuple(arrays))
