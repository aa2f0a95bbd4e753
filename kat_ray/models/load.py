"""Causal language models as transformers loads them, for the learner's student and the scorer's teacher."""

from __future__ import annotations

from typing import Any

import torch

from kat_ray.config import ModelConfig
from kat_ray.errors import UserError
from kat_ray.models.text_model import text_decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_causal_lm(model: ModelConfig, directory: str, dtype: str, role: str) -> Any:
    """The model of a directory or hub id; refused where its logits are not those of its output layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        directory, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    # transformers' default attention passes over a cap on the scores (Gemma 2), without a word.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    loaded = AutoModelForCausalLM.from_pretrained(
        directory,
        revision=model.revision,
        dtype=DTYPES[dtype],
        trust_remote_code=model.trust_remote_code,
        use_safetensors=None if model.allow_pickle else True,
        attn_implementation="eager" if capped else None,
    ).eval()
    check_output_layer(loaded, f"{role}.path = {model.path!r}")
    return loaded


@torch.no_grad()
def check_output_layer(model: Any, name: str) -> None:
    """Refuse a model that changes its logits after the output layer: loss and scores take them from there."""
    parts = [hasattr(model, part) for part in ("model", "lm_head")]
    ids = torch.arange(4)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits
    if torch.isnan(logits).any():
        raise UserError(
            f"{name}: its logits are NaN for the first four token ids: the weights are broken, or overflow in "
            f"{str(model.dtype).removeprefix('torch.')}; try another dtype"
        )
    if not all(parts) or not torch.allclose(
        model.lm_head(text_decoder(model)(input_ids=ids, use_cache=False)[0]), logits, rtol=1e-3, atol=1e-3
    ):
        raise UserError(
            f"{name}: {type(model).__name__} has no `lm_head` over a `model`, or scales or caps the logits behind "
            "it; the distribution would be another one. docs/models.md lists families that fit."
        )
