"""Completions of prompts that the data give: the tokens that the student would have generated to say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kat_ray.config import DataConfig
from kat_ray.data.chat import ChatTemplate, messages_of
from kat_ray.data.rows import Row, kind
from kat_ray.errors import DataError

_FIELD = "data.completion_column"


@dataclass(frozen=True)
class CompletionLimits:
    """Where a completion ends."""

    end_ids: tuple[int, ...]  # that end a rollout of the student
    max_tokens: int  # of a rollout


class Completions:
    """Reads the completions of a split."""

    def __init__(
        self, data: DataConfig, tokenizer: Any, template: ChatTemplate | None, limits: CompletionLimits
    ) -> None:
        self._data, self._template, self._limits = data, template, limits
        own = tokenizer.eos_token_id
        self._end = own if own in limits.end_ids else next(iter(limits.end_ids), None)

    def text(self, row: Row, prompt: str) -> str:
        """What follows the prompt, whose text is `prompt`; `DataError` where a row has none.

        With a chat template it is what the template makes of a conversation that goes on with the completion,
        behind the prompt; without one the column as it is.
        """
        given = self._given(row)
        if self._template is None:
            return given
        value = row.value(self._data.prompt_column)
        where = f"{row.where}: {self._data.prompt_column}"
        messages = [*messages_of(value, self._data.system_prompt, where), {"role": "assistant", "content": given}]
        whole = self._template.render(messages, row.where, answered=True)
        if not whole.startswith(prompt) or len(whole) == len(prompt):
            raise DataError(
                f"{row.where}: the chat template does not go on from the prompt where it is given the completion: "
                f"no student could have generated it ({_FIELD}); use another template (data.chat_template), or "
                "other arguments of it (data.chat_template_kwargs)"
            )
        return whole[len(prompt) :]

    def _given(self, row: Row) -> str:
        column = self._data.completion_column or ""
        value = row.value(column)
        if value is None:
            raise DataError(f"{row.where}: {row.lacks(column, _FIELD)}")
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
            (message,) = value
            if isinstance(message, Mapping) and message.get("role") == "assistant":
                value = message.get("content")
        if not isinstance(value, str):
            raise DataError(
                f"{row.where}: {column} is {kind(value)}; a completion is text, or a list with one message of the "
                "assistant"
            )
        if not value.strip():
            raise DataError(f"{row.where}: {column} is empty")
        return value

    def ids(self, encoded: Sequence[int]) -> tuple[int, ...]:
        """The tokens of a completion: up to its first stop id, which is put at its end where it has none.

        As a rollout, it has at most `rollout.max_tokens`, and no end where it would be longer.
        """
        ends = (i for i, token in enumerate(encoded) if token in self._limits.end_ids)
        first = next(ends, None)
        own = (*encoded, *(() if self._end is None else (self._end,))) if first is None else encoded[: first + 1]
        return tuple(own[: self._limits.max_tokens])
