"""Causal language models as transformers loads them, for the learner's student and the scorer's teacher."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kat_ray.config import ModelConfig
from kat_ray.errors import UserError
from kat_ray.models.fp32_output import fp32_output
from kat_ray.models.output_layer import output_layer, token_ids
from kat_ray.models.text_model import text_decoder
from kat_ray.types.records import FloatArray

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of the largest logit: our products are float32, the model's are in its own type.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_SHOWN = 4  # names in a message


def load_causal_lm(model: ModelConfig, directory: str, dtype: str, role: str) -> Any:
    """The model of a directory or hub id; refused where it lacks weights, or where its logits are not those of its
    output layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if (Path(directory) / "adapter_config.json").is_file() and not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory}: holds adapters, not a model: make one of them first, with `kat-ray export`")
    config = AutoConfig.from_pretrained(
        directory, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    # transformers' default attention passes over a cap on the scores (Gemma 2), without a word.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory,
        revision=model.revision,
        dtype=DTYPES[dtype],
        trust_remote_code=model.trust_remote_code,
        use_safetensors=None if model.allow_pickle else True,
        attn_implementation="eager" if capped else None,
        output_loading_info=True,
    )
    name = f"{role}.path = {model.path!r}"
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{name}: its files have no weights for {', '.join(missing[:_SHOWN])}{more}, for which transformers "
            "takes random numbers, with a warning; is a file missing, or config.json another model's?"
        )
    check_output_layer(loaded.eval(), name)
    return loaded


@torch.no_grad()
def check_output_layer(model: Any, name: str) -> None:
    """Refuse a model whose logits are not those of `output_layer`, on which loss and scores rest."""
    ids = token_ids(model)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    if torch.isnan(logits).any():
        raise UserError(
            f"{name}: its logits are NaN for the first four token ids: the weights are broken, or overflow in "
            f"{str(model.dtype).removeprefix('torch.')}; try another dtype"
        )
    try:
        layer = output_layer(model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    own = layer.logits(text_decoder(model)(input_ids=ids, use_cache=False)[0][0])
    largest = max(float(logits.abs().max()), 1.0)
    if (difference := float((own - logits).abs().max())) > _TOLERANCE[model.dtype] * largest:
        raise UserError(
            f"{name}: the logits of {type(model).__name__} differ from its output layer over its hidden states "
            f"by up to {difference:.3g}; the distribution would be another one"
        )


@torch.no_grad()
def plain_logprobs(
    model: Any, prompt: Sequence[int], answer: Sequence[int], device: torch.device, wide: bool = False
) -> FloatArray:
    """Log-probabilities [tokens] float32 of an answer by the model's own forward pass.

    One sequence, no padding, no cache: what every other way of computing them is compared with. `wide` has the
    output layer multiplied in float32 (`numerics.fp32_output_layer`).
    """
    ids = torch.tensor([[*prompt, *answer][:-1]], dtype=torch.long, device=device)
    # Of a long prompt the logits over the whole vocabulary would take gigabytes.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": len(answer)} if keeps else {}
    with fp32_output(model) if wide else nullcontext():
        logits = model(input_ids=ids, use_cache=False, **kept).logits[0, -len(answer) :]
    chosen = torch.tensor(list(answer), dtype=torch.long, device=device)
    values: FloatArray = torch.log_softmax(logits.float(), dim=-1).gather(-1, chosen[:, None])[:, 0].cpu().numpy()
    return values
