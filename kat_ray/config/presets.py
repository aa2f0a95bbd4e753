"""Held-out sets that many papers report, by their ids at the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

Preset = Literal["gsm8k", "math500", "aime24", "aime25", "amc23", "minerva"]

# What the verifiers read as a stated answer is asked for in every prompt.
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_PROBLEM = {"prompt_column": "problem", "instruction": _BOXED}
_QUESTION = {"prompt_column": "question", "instruction": _BOXED}

PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "verifier": "integer", "k": 1,
        "data": {
            "path": "openai/gsm8k", "name": "main", "split": "test", "prompt_column": "question",
            "answer_after": "####", "instruction": _BOXED,
        },
    },
    "math500": {
        "verifier": "math", "k": 4, "data": {"path": "HuggingFaceH4/MATH-500", "split": "test", **_PROBLEM},
    },
    "aime24": {
        "verifier": "integer", "k": 16, "data": {"path": "HuggingFaceH4/aime_2024", "split": "train", **_PROBLEM},
    },
    "aime25": {
        # `math`, since copies of these problems have an answer with a degree sign, 336^\\circ.
        "verifier": "math", "k": 16, "data": {"path": "math-ai/aime25", "split": "test", **_PROBLEM},
    },
    "amc23": {"verifier": "math", "k": 8, "data": {"path": "math-ai/amc23", "split": "test", **_QUESTION}},
    "minerva": {"verifier": "math", "k": 8, "data": {"path": "math-ai/minervamath", "split": "test", **_QUESTION}},
}  # fmt: skip


def with_preset(tree: Any) -> Any:
    """A section's tree with what its preset says beneath what is given; wrong kinds are left to be refused.

    A run's own configuration has both, and is read again as it is.
    """
    if not isinstance(tree, Mapping) or tree.get("preset") not in PRESETS:
        return tree
    preset, data = PRESETS[str(tree["preset"])], tree.get("data")
    given = data.model_dump(exclude_unset=True) if isinstance(data, BaseModel) else data or {}
    if not isinstance(given, Mapping):
        return tree
    own = {name: value for name, value in tree.items() if value is not None}
    return {**preset, **own, "data": {**preset["data"], **given}}
