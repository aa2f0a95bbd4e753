"""JSON that a run left behind: what is cut off or missing is named, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kat_ray.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """One object from a file; `UserError` names the file where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); the run has to be made again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged: it holds no JSON object")
    return content


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a JSON-lines file up to the first damaged line, and a note where there is one.

    A file that is missing is empty.
    """
    lines: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            return lines, [f"{path}:{number} is damaged: read up to it"]
    return lines, []
