"""What a teacher is told in place of the prompt: text over the columns of a row, `{column}` for each."""

from __future__ import annotations

import string
from collections.abc import Sequence

PROMPT = "prompt"  # the column's name that stands for the prompt, whichever column that is in


def parts_of(template: str) -> Sequence[tuple[str, str | None]]:
    """Text, and the column that follows it (a name or a dotted path; None at the end), piece by piece.

    ValueError where the template is none: braces that do not belong together, or what `str.format` would make of a
    value (`{a!r}`, `{a:>5}`), which has no meaning here. `{{` and `}}` are braces.
    """
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; a column is {{name}}, and a brace of the text is written twice") from None
    for _, column, spec, conversion in found:
        if spec or conversion:
            raise ValueError(f"{{{column}...}}: only names of columns may stand in braces, without `!` or `:`")
        if column is not None and not column.strip():
            raise ValueError("{}: names no column; a brace of the text is written twice")
    return [(text, column) for text, column, _, _ in found]


def check_context(template: str) -> str:
    """The template; ValueError where it is none, or would tell the teacher nothing that depends on the row."""
    if all(column is None for _, column in parts_of(template)):
        raise ValueError("names no column: write {solution}, or {prompt} for the prompt itself")
    return template
