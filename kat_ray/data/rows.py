"""Rows of JSONL and Parquet files and of Hugging Face data sets, and their columns by name.

Every error names file and line (row, for formats without lines).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kat_ray.config import DataConfig, EnvironmentConfig
from kat_ray.config.environment import PREFIX, is_environment
from kat_ray.config.load import resolve_path
from kat_ray.data.environment import columns_of
from kat_ray.errors import DataError

BATCH = 1000  # rows that are worked on at once
_SLICE_RE = re.compile(r"(?P<split>[\w.-]+)(\[(?P<first>\d*):(?P<last>\d*)\])?")
_LONGEST_REASON = 300  # characters of another library's message


@dataclass(frozen=True)
class Row:
    """One row of the source: its place, for messages, its number from 1, and its columns."""

    where: str  # "file.jsonl:3"
    number: int
    columns: Mapping[str, Any]
    origin: str | None = None  # which of several data sets it is of

    def value(self, column: str) -> Any:
        """What is in a column; None where it is not there, or is a gap (null, NaN).

        A column of this very name, or else the field at the end of a dotted path (`reward_model.ground_truth`).
        """
        value: Any = self.columns
        for part in (column,) if column in self.columns else column.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return None if _is_nan(value) else value

    def lacks(self, column: str, field: str) -> str:
        """Why a column has no value: it is a gap, or what there is in its place. `field` chooses it."""
        there: Mapping[str, Any] = self.columns
        *parents, last = [column] if column in self.columns else column.split(".")
        inside = ""
        for part in parents:
            below = there.get(part)
            if not isinstance(below, Mapping):
                break
            there, inside = below, f"{inside}{part}."
        else:
            if last in there:
                return f"{column} is missing (NaN)" if _is_nan(there[last]) else f"{column} is null"
        where = f"in {inside[:-1]} " if inside else ""
        return f"there is no column {column!r}; {where}there are {names_of(there)} ({field} chooses)"


def _is_nan(value: Any) -> bool:
    """Whether a value is what pandas makes of a gap in a column of numbers."""
    return isinstance(value, float) and math.isnan(value)


def names_of(columns: Mapping[str, Any]) -> str:
    """The first names of columns, for a message."""
    return ", ".join(n if len(n) <= 40 else f"{n[:37]}..." for n in islice(map(str, columns), 20)) or "none"


def kind(value: Any) -> str:
    """What a value is, in words, for a message."""
    return {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}.get(
        type(value), "an object" if isinstance(value, Mapping) else type(value).__name__
    )


def open_rows(data: DataConfig, environment: EnvironmentConfig | None = None) -> tuple[str, Iterator[Row]]:
    """The name of the source, and its rows, read as they are asked for, or made by the environment."""
    if is_environment(data.path):
        assert environment is not None, "what is read with a path of it has it, by its validator"
        made = columns_of(environment, data.path.removeprefix(PREFIX))
        return data.path, (Row(f"{data.path}, row {n}", n, columns) for n, columns in enumerate(made, 1))
    path = resolve_path(data.path)
    readers: dict[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    if reader := readers.get(path.suffix):
        return data.path, reader(path, data.path)
    if path.is_file():
        raise DataError(f"{data.path}: prompts are read from .jsonl and .parquet files, or from a data set")
    return data.path, _hugging_face(data, path)


def renamed(rows: Iterator[Row], names: Mapping[str, str]) -> Iterator[Row]:
    """The rows with columns by new names; a new name of a dotted path is one more column. `DataError` names the row
    that has no such column, or has the new name already.
    """
    for row in rows if names else ():
        columns = {name: value for name, value in row.columns.items() if name not in names}
        for old, new in names.items():
            if old not in row.columns and row.value(old) is None:
                raise DataError(f"{row.where}: {row.lacks(old, 'data.rename')}")
            if new in columns:
                raise DataError(f"{row.where}: data.rename: there is a column {new!r} already, beside {old!r}")
            columns[new] = row.value(old)
        yield replace(row, columns=columns)
    if not names:
        yield from rows


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if line.strip():
                    yield Row(f"{name}:{number}", number, _json_object(line, f"{name}:{number}"))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise DataError(f"{where}: not a row: a number of more digits than Python converts") from error
    except RecursionError as error:
        raise DataError(f"{where}: not a row: nested too deeply") from error
    if b"\\ud" in line.lower():
        _refuse_half_characters(value, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row is a JSON object with columns, this is {kind(value)}")
    return value


def _refuse_half_characters(value: Any, where: str) -> None:
    r"""JSON can encode half of a surrogate pair (`\ud800`), which is not valid text: tokenizers fail on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a character (a lone surrogate such as \\ud800)") from error


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                batch.validate(full=True)
                for columns in _python_rows(batch, f"{name}, rows {number + 1} to {number + len(batch)}"):
                    number += 1
                    yield Row(f"{name}, row {number}", number, columns)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a Parquet file: {error}") from error


def _python_rows(batch: Any, where: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a date beyond the year 9999, for example
        raise DataError(f"{where}: a value has no like in Python: {error}") from error
    return rows


def _hugging_face(data: DataConfig, path: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.path = {data.path}: no such file, and data sets from the hub need the package `datasets` "
            "(pip install 'kat-ray[hub]')"
        ) from error
    what = f"{data.path} ({'' if data.name is None else f'name {data.name}, '}split {data.split})"
    split, first, last = _slice(data) if data.streaming else (data.split, 0, None)
    try:
        table = datasets.load_dataset(
            str(path) if path.is_dir() else data.path, data.name, split=split, revision=data.revision,
            streaming=data.streaming,
        )  # fmt: skip
        for number, columns in enumerate(islice(table, first, last), 1):
            yield Row(f"{what}, row {number}", number, columns)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            reason += " (data.name chooses)"
        raise DataError(f"{what}: no such file, and no data set to be had: {reason[:_LONGEST_REASON]}") from error


def _slice(data: DataConfig) -> tuple[str, int, int | None]:
    """The split of a stream, and the numbers of its first row and of the one behind its last."""
    found = _SLICE_RE.fullmatch(data.split)
    if found is None:
        raise DataError(
            f"data.split = {data.split}: with data.streaming = true it is one split, or rows of it counted from "
            "its beginning, such as train[:1000] or train[500:1000]"
        )
    return found["split"], int(found["first"] or 0), int(found["last"]) if found["last"] else None
