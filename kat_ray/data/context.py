"""What a teacher is told in place of the prompt, made of a row's columns: privileged context.

The teacher's text is rendered as the student's is, with the start of an answer at its end: what the student
generates follows on both, and its i-th token is the i-th behind either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kat_ray.config import DataConfig
from kat_ray.config.context import PROMPT, parts_of
from kat_ray.data.chat import ChatTemplate, messages_of, with_instruction
from kat_ray.data.rows import Row, kind
from kat_ray.errors import DataError


class Context:
    """The template of one teacher; `section` is where the configuration names the teacher."""

    def __init__(self, template: str, section: str) -> None:
        self._parts = parts_of(template)
        self._field = f"{section}.context"

    def text(self, row: Row, data: DataConfig, template: ChatTemplate | None) -> str:
        """What the teacher is given for a row; `DataError` where a column has no text to give.

        With a chat template it takes the place of the last message's text; without, of the prompt.
        """
        prompt = with_instruction(row.value(data.prompt_column), data)
        if template is None:
            return self._filled(row, str(prompt))
        messages = messages_of(prompt, data.system_prompt, row.where)
        last: Mapping[str, Any] = messages[-1]
        told = {**last, "content": self._filled(row, str(last["content"]))}
        return template.render([*messages[:-1], told], row.where)

    def _filled(self, row: Row, prompt: str) -> str:
        return "".join(
            text + ("" if column is None else prompt if column == PROMPT else self._value(row, column))
            for text, column in self._parts
        )

    def _value(self, row: Row, column: str) -> str:
        value = row.value(column)
        if value is None:
            raise DataError(f"{row.where}: {row.lacks(column, self._field)}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{row.where}: {column} is {kind(value)}; {self._field} is made of text and numbers")
        if not str(value).strip():
            raise DataError(f"{row.where}: {column} is empty; {self._field} would tell the teacher nothing by it")
        return str(value)
