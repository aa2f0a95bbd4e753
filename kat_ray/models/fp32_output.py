"""Logits in float32 of a model in half precision (`numerics.fp32_output_layer`), on the sides that round them.

The learner's loss and a transformers scorer take float32 products whatever is set (`kat_ray.losses.output_layer`).
Two others compute logits by the model's own code, in its data type: vLLM, and a plain forward pass of transformers,
which every engine is compared with at the start of a run.

What vLLM 0.32 does (read in `model_executor/layers/logits_processor.py` and `config/model.py`): where its model's
configuration says `head_dtype`, the output layer's hidden states and weight are multiplied in that type, on a GPU
with a float32 result of half-precision operands, elsewhere on a float32 copy of the weight. Hidden states and
weight are of the model's type before that, so published weights need nothing else. A platform without the type
makes it the model's again, with no more than a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from kat_ray.errors import UserError


def vllm_arguments(fp32_output: bool) -> dict[str, Any]:
    """Arguments of a vLLM engine for the type of its logits."""
    return {"hf_overrides": {"head_dtype": "float32"}} if fp32_output else {}


def type_name(dtype: Any) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def output_dtypes(worker: Any) -> frozenset[str]:
    """Run by vLLM in a worker: the types in which its model's output layers are multiplied; empty without one."""
    layers = (layer for layer in worker.get_model().modules() if hasattr(layer, "head_dtype"))
    return frozenset(type_name(layer.head_dtype) for layer in layers)


def require_fp32_output(of_workers: Iterable[frozenset[str]], model: str) -> None:
    """`UserError` unless every worker's output layers are float32; `model` is a field and its value.

    `of_workers` are their `output_dtypes`.
    """
    for found in of_workers:
        if found != {"float32"}:
            told = (
                f"computes logits in {', '.join(sorted(found))}" if found else "does not say how it computes logits"
            )
            raise UserError(
                f"numerics.fp32_output_layer = true: vLLM's model of {model} {told}; sampler, scorers and learner "
                "must do the same: set it to false, take another model, or float32 throughout (student.dtype, "
                "teacher.dtype)"
            )


@contextmanager
def fp32_output(model: Any) -> Iterator[None]:
    """Inside, a causal language model of transformers multiplies its output layer in float32; its weight stays.

    Its own scales and caps come after that, as ever.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return linear(hidden.float(), head.weight.float(), bias)

    # Not a hook: under ZeRO 3 the weight is whole between the module's own hooks only.
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
