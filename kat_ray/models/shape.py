"""The sizes of a model that the memory of a pass depends on."""

from __future__ import annotations

from typing import Any, NamedTuple


class ModelShape(NamedTuple):
    """As config.json gives them."""

    layers: int
    hidden: int
    mlp: int  # width of the MLP that a token passes, all its experts together


def shape_of(text_config: Any) -> ModelShape | None:
    """The sizes in transformers' configuration of a language model; None where it has other names for them."""

    def size(name: str) -> int:
        value = getattr(text_config, name, None)
        return value if isinstance(value, int) else 0

    experts, width = size("num_experts_per_tok"), size("intermediate_size")
    mlp = experts * (size("moe_intermediate_size") or width) if experts else width
    found = ModelShape(size("num_hidden_layers"), size("hidden_size"), mlp)
    return found if all(found) else None
