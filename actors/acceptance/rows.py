"""One line of the acceptance check, and the table and JSON file of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "FAIL", "info", "skipped"]


@dataclass(frozen=True)
class Row:
    """A figure with the bound it has to keep; without a bound it is information, without a value it was skipped."""

    part: str
    name: str
    value: float | None = None
    bound: float | None = None
    unit: str = ""
    note: str = ""
    failed: bool = False  # for another reason than its bound: `note` says which

    @property
    def verdict(self) -> Verdict:
        """A value that is not finite keeps no bound."""
        if self.failed:
            return "FAIL"
        if self.value is None:
            return "skipped"
        if self.bound is None:
            return "info"
        return "pass" if self.value <= self.bound else "FAIL"

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return {**asdict(self), "verdict": self.verdict}


def row_of(fields: Mapping[str, Any]) -> Row:
    """The row that `as_dict` was of."""
    return Row(**{k: v for k, v in fields.items() if k != "verdict"})


def table(rows: Sequence[Row]) -> str:
    """All rows in columns, a line each."""
    lines = [(r.verdict, r.part, r.name, _value(r), _bound(r), r.note) for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(5)] if lines else []
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5]]).rstrip()
        for line in lines
    )


def document(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The JSON file: what was checked where, and each row."""
    return json.dumps({**about, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n"


def _value(row: Row) -> str:
    return "-" if row.value is None else f"{row.value:.3g} {row.unit}".rstrip()


def _bound(row: Row) -> str:
    return "" if row.bound is None else f"<= {row.bound:g}"
