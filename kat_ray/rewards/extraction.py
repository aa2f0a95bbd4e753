r"""The answer that a text gives, where an environment's own scorer wants the answer alone.

| reading | the answer is |
| --- | --- |
| `tags` | what stands between the last `<answer>` and `</answer>` |
| `stated` | that; or else what the last `\boxed{...}` holds; or what follows the last `answer is`, `answer:` or |
| | `####` on its line; or else the last line |
| `first_line` | that of the tags; or else the first line, for a model that only continues a text |

Lines without text are passed over. Only tags and boxes can hold an answer of several lines.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal

Reading = Literal["tags", "stated", "first_line"]

_TAGS_RE = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX_RE = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_WORDS_RE = re.compile(
    r"(?:\banswer\b[*\s]{0,4}(?:is\b[*\s]{0,4}:?|[:=])|^####)[*\s]{0,4}(?=\S)", re.IGNORECASE | re.M
)
_DRESS = " \t\r\n*`$"  # of Markdown and LaTeX around an answer


def extract_answer(text: str, reading: Reading) -> str | None:
    """The answer that a text gives; None where it gives none."""
    if (found := _last(_TAGS_RE, text)) is not None:
        return found.group(1).strip() or None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if reading == "tags" or not lines:
        return None
    if reading == "first_line":
        return lines[0]
    if (found := _last(_BOX_RE, text)) is not None:
        return found.group(1).strip() or None
    if (found := _last(_WORDS_RE, text)) is not None:
        line = text[found.end() :].partition("\n")[0]
        return line.strip(_DRESS).removesuffix(".").strip(_DRESS) or None
    return lines[-1].strip(_DRESS) or None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
