"""JSON that a run left behind: what is cut off, missing or not of its kind is named, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kat_ray.errors import UserError

Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]


class Record(BaseModel):
    """Base of records: what is known of them is of its kind, what is not known stays as it is."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Figures(Record):
    """An evaluation as summary.json holds it."""

    avg_at_k: Share
    pass_at_k: Share
    mean_length: Number | None = None


class Evaluation(Record):
    """A line of evaluations.jsonl; `right` are right answers to each problem, of `k`.

    Tokens are those of training until then; earlier versions did not write them.
    """

    avg_at_k: Share = 0.0
    pass_at_k: Share = 0.0
    k: int = Field(ge=1, lt=2**31)
    step: Count = 0
    right: list[Count] = []
    prompt_tokens: Count | None = None
    generated_tokens: Count | None = None
    kept_tokens: Count | None = None
    scored_tokens: Count | None = None
    trained_tokens: Count | None = None
    learnt_tokens: Count | None = None


class Summary(Record):
    """summary.json. A comparison names what is missing of it."""

    steps: Count = 0
    rollouts_started: int = Field(1, ge=1, lt=2**53)
    prompt_tokens: Count = 0
    generated_tokens: Count = 0
    kept_tokens: Count = 0
    scored_tokens: Count = 0
    trained_tokens: Count = 0
    learnt_tokens: Count | None = None
    teacher_tokens: dict[str, Count] = {}
    given_tokens: Count = 0
    given_prompt_tokens: Count = 0
    given_scored_tokens: Count = 0
    overshoot_tokens: Count = 0
    wall_seconds: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    eval_before: Figures | None = None
    eval_after: Figures | None = None
    parameters: dict[str, Count | None] = {}
    versions: dict[str, str | None] | None = None
    git_commit: str | None = None


SUMMARY: TypeAdapter[Any] = TypeAdapter(Summary)
EVALUATION: TypeAdapter[Any] = TypeAdapter(Evaluation)
# A line of metrics.jsonl: null where a value is not finite, and then its name in the list `non_finite`.
METRICS: TypeAdapter[Any] = TypeAdapter(
    dict[str, Number | list[str] | None], config=ConfigDict(strict=True, allow_inf_nan=False)
)


def read_json(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """One object from a file; `UserError` names the file where it is damaged."""
    try:
        return _record(_text(path), kind)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({_message(error)}); the run has to be made again") from error


def read_json_lines(path: Path, kind: TypeAdapter[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a JSON-lines file up to the first damaged line, and a note where there is one.

    A file that is missing is empty.
    """
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(keepends=True) if path.is_file() else (), 1):
        try:
            lines.append(_record(line, kind))
        except (ValueError, RecursionError):
            if not line.endswith("\n"):
                return lines, [f"{path}:{number} is half a line: the run is writing it, or ended in it; left out"]
            return lines, [f"{path}:{number} is damaged: read up to it"]
    return lines, []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _record(text: str, kind: TypeAdapter[Any]) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    kind.validate_python(content)
    if kind is METRICS and not isinstance(content.get("step"), int):
        raise ValueError("it has no step")
    return content


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
