"""What transformers 4.57 reads of a model whose files transformers 5 wrote: older names beside the newer ones.

5 has all of a model's positions in one field, `rope_parameters`. 4.57 passes over it without a word, and computes
another model from its own defaults. The older names say the same once more: 5, and vLLM with it, reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kat_ray.models.export_files import meaning, read_object, write_object

ROPE = "rope_parameters"
_BASE, _SHARE, _SCALING = "rope_theta", "partial_rotary_factor", "rope_scaling"
# Families whose older names for the base of positions and the share of a head that turns are others.
_OTHERS: Mapping[str, tuple[str, str]] = {
    name: ("rotary_emb_base", "rotary_pct") for name in ("gpt_neox", "gpt_neox_japanese")
}
# Families with positions of their own in sliding layers: older names of the bases, in full layers and in those.
_SLIDING: Mapping[str, tuple[str, str]] = {
    "gemma3_text": (_BASE, "rope_local_base_freq"),
    "gemma3n_text": (_BASE, "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": (_BASE, _BASE),
}
_THREE_FIELDS = frozenset(("phi3", "phi4_multimodal"))  # 4.57 refuses a fourth in their longrope
_RENAMED: Mapping[str, Mapping[str, str]] = {"qwen3_moe": {"num_experts": "num_local_experts"}}


def add_older_names(model: Path, trust_remote_code: bool = False) -> str | None:
    """Write them into config.json and tokenizer_config.json of a model directory, where they are missing.

    What this transformers makes of config.json is the same as before. Where it would not be, or is not known,
    config.json stays as it is, and that is returned in words.
    """
    tokenizer, config = model / "tokenizer_config.json", model / "config.json"
    if tokenizer.is_file() and (older := older_tokenizer(own := read_object(tokenizer))) != own:
        write_object(tokenizer, older)
    if not config.is_file() or (more := with_older_names(own := read_object(config))) == own:
        return None
    text = config.read_bytes()
    try:
        before = _meant(meaning(model, trust_remote_code))
        write_object(config, more)
        reason = "" if _meant(meaning(model, trust_remote_code)) == before else "they would mean another model"
    except (OSError, ValueError, KeyError, TypeError) as error:  # whatever a class makes of a configuration
        reason = f"it cannot be read here: {str(error).splitlines()[0]}" if str(error) else "it cannot be read here"
    if reason:
        config.write_bytes(text)
        return f"config.json is without the names by which transformers 4 knows positions ({ROPE}): {reason}"
    return None


def older_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that both know: the class by its older name, further special tokens by theirs."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        found.pop("backend", None)  # of 5 alone
    if isinstance(found.get("extra_special_tokens"), list):  # 4.57 wants a mapping there, as 5 does of some models
        more = found.pop("extra_special_tokens")
        found |= {"additional_special_tokens": more} if more else {}
    return found


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content and its parts' with the older names, where one is missing or null."""
    parts = {n: with_older_names(v) if isinstance(v, Mapping) and n != ROPE else v for n, v in config.items()}
    family = str(config.get("model_type"))
    names = {older: config[newer] for older, newer in _RENAMED.get(family, {}).items() if newer in config}
    rope = config.get(ROPE)
    if isinstance(rope, Mapping) and rope:
        names |= _older_rope(family, rope, config)
    return parts | {name: value for name, value in names.items() if parts.get(name) is None}


def _older_rope(family: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if not any(isinstance(value, Mapping) for value in rope.values()):
        base, share = _OTHERS.get(family, (_BASE, _SHARE))
        there = {base: rope.get(_BASE), share: rope.get(_SHARE)}
        found = {name: value for name, value in there.items() if value is not None}
        return found | {_SCALING: _scaling(family, rope, config)}
    if family not in _SLIDING:  # 4.57 knows no other family with several
        return {}
    full, sliding = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    everywhere, near = _SLIDING[family]
    bases = {near: sliding.get(_BASE), everywhere: full.get(_BASE)}
    return {n: v for n, v in bases.items() if v is not None} | {_SCALING: _scaling(family, full, config)}


def _scaling(family: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All but base and share; null, which is no default of every family, where positions are plain."""
    found = {name: value for name, value in rope.items() if name not in (_BASE, _SHARE)}
    if family in _THREE_FIELDS and found.get("rope_type") == "longrope":
        original = "original_max_position_embeddings"
        if found.get(original) == config.get(original):
            found.pop(original, None)
        found["type"] = found.pop("rope_type")
    return None if found in ({}, {"rope_type": "default"}) else found


def _meant(value: Any, in_rope: bool = False) -> Any:
    """Without what 5 keeps of the older names as it came: bases and shares beside positions, `type` inside."""
    if not isinstance(value, Mapping):
        return value
    kept = ("type",) if in_rope else (_BASE, _SHARE)
    return {n: _meant(v, in_rope or n == ROPE) for n, v in value.items() if n not in kept}
