"""What a reward function is told of a prompt, and of an answer to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """A prompt as its row of the data has it."""

    prompt: str | list[Any]  # text, or messages
    prompt_text: str  # what the student was given
    answer: Any = None  # the gold answer, None without one
    columns: Mapping[str, Any] = field(default_factory=dict)  # all others of its row that JSON can hold
    source: str = ""  # the data's name

    def arguments(self, text: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """Those of a call about one answer to it."""
        return {
            "prompt": self.prompt,
            "prompt_text": self.prompt_text,
            "answer": self.answer,
            "columns": self.columns,
            "source": self.source,
            "text": text,
            "token_ids": list(token_ids),
        }


def plain_columns(row: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """The columns of a row that JSON can hold (no pictures), but for those in `without`."""
    return {name: value for name, value in row.items() if name not in without and is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
