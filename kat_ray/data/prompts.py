"""Prompts from JSONL, Parquet or a Hugging Face data set: read, checked, tokenised, and assigned to steps.

Every error names file and line (row, for formats without lines). The order of prompts, the seeds of rollouts and
the choice of probes depend on (run seed, step, rollout id) alone, so that a run can resume at any step.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.config import Config, DataConfig
from kat_ray.config.load import resolve_path
from kat_ray.errors import DataError
from kat_ray.types.records import Prompt, RolloutSpec

ID_COLUMN = "id"

_BATCH = 1000  # texts tokenised in one call
# Domains of the run seed: independent random streams.
_ORDER, _SAMPLING, _PROBE = 1, 2, 3


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one split, in the file's order."""

    prompts: tuple[Prompt, ...]
    skipped_too_long: int
    source: str

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.token_ids) for p in self.prompts)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of every prompt's id, token ids and answer, in order. A resumed run must find the same."""
        sums = hashlib.sha256()
        for p in self.prompts:
            sums.update(json.dumps([p.prompt_id, p.token_ids, p.answer]).encode())
        return sums.hexdigest()


@dataclass(frozen=True)
class _Row:
    """One row of the source: its place, for messages, its number from 1, and its columns."""

    where: str  # "file.jsonl:3"
    number: int
    columns: Mapping[str, Any]


def load_prompts(
    data: DataConfig, tokenizer: Any, max_prompt_tokens: int | None, *, graded: bool = False
) -> PromptSet:
    """Read, check and tokenise a split. If `graded`, every row must have an answer.

    Prompts with more than `max_prompt_tokens` tokens are skipped and counted, or refused (`data.too_long`); None
    sets no limit. `data.limit` counts rows of the source, before any is skipped.
    """
    if data.chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError("data.chat_template = true: the student's tokenizer has no chat template")
    source, rows = _open(data)
    stem = Path(source).stem
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    count = skipped = 0
    rows = islice(rows, data.limit)
    while batch := list(islice(rows, _BATCH)):
        count += len(batch)
        answers = [_answer(row, data, graded) for row in batch]
        texts = [_text(row, data, tokenizer) for row in batch]
        encoded = tokenizer(texts, add_special_tokens=not data.chat_template)["input_ids"]
        for row, ids, answer in zip(batch, encoded, answers, strict=True):
            prompt_id = _prompt_id(row, stem, seen)
            if not ids:
                raise DataError(f"{row.where}: the prompt gives no token")
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                skipped += 1
                _refuse_too_long(data, row, len(ids), max_prompt_tokens)
            else:
                prompts.append(Prompt(prompt_id, tuple(ids), answer))
    if not count:
        raise DataError(f"{source}: holds no prompts")
    if not prompts:
        raise DataError(
            f"{source}: every one of {count} prompts is longer than the {max_prompt_tokens} tokens the models take "
            "beside the longest answer; lower rollout.max_tokens, or use shorter prompts"
        )
    return PromptSet(tuple(prompts), skipped, source)


def _refuse_too_long(data: DataConfig, row: _Row, length: int, limit: int) -> None:
    if data.too_long == "refuse":
        raise DataError(
            f"{row.where}: the prompt has {length} tokens, the models take {limit} beside the longest answer; "
            "lower rollout.max_tokens, shorten the prompt, or set data.too_long = skip"
        )


def _prompt_id(row: _Row, stem: str, seen: dict[str, str]) -> str:
    given = row.columns.get(ID_COLUMN)
    prompt_id = f"{stem}:{row.number}" if given is None else str(given)
    if prompt_id in seen:
        raise DataError(f"{row.where}: the id {prompt_id!r} is also that of {seen[prompt_id]}; ids must be unique")
    seen[prompt_id] = row.where
    return prompt_id


def _answer(row: _Row, data: DataConfig, graded: bool) -> str | None:
    value = None if data.answer_column is None else row.columns.get(data.answer_column)
    if value is None and not graded:
        return None
    if value is None:
        raise DataError(f"{row.where}: {_no_column(row, 'answer_column', data.answer_column or '')}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: {data.answer_column} is {_kind(value)}; an answer is text or a number")
    text = str(value).strip()
    if graded and not text:
        raise DataError(f"{row.where}: {data.answer_column} is empty")
    return text


def _text(row: _Row, data: DataConfig, tokenizer: Any) -> str:
    value = row.columns.get(data.prompt_column)
    if value is None:
        raise DataError(f"{row.where}: {_no_column(row, 'prompt_column', data.prompt_column)}")
    if not isinstance(value, str | list):
        raise DataError(
            f"{row.where}: {data.prompt_column} is {_kind(value)}; a prompt is text or a list of messages"
        )
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: {data.prompt_column} is empty")
    if not data.chat_template:
        if isinstance(value, str):
            return value
        raise DataError(f"{row.where}: {data.prompt_column} is a list of messages; set data.chat_template = true")
    return _chat(row, data, tokenizer, value)


def _chat(row: _Row, data: DataConfig, tokenizer: Any, value: str | list[Any]) -> str:
    import jinja2

    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(
                f"{row.where}: {data.prompt_column}: a message has role and content, this is {str(message)[:80]}"
            )
    if data.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"{row.where}: the chat template refuses the messages: {error}") from error
    return str(text)


def _no_column(row: _Row, field: str, column: str) -> str:
    if column in row.columns:
        return f"{column} is null"
    there = ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in islice(row.columns, 20)) or "none"
    return f"there is no column {column!r}; there are {there} (data.{field} chooses)"


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}.get(
        type(value), "an object" if isinstance(value, Mapping) else type(value).__name__
    )


# --- sources ---------------------------------------------------------------------------------------------


def _open(data: DataConfig) -> tuple[str, Iterator[_Row]]:
    path = resolve_path(data.path)
    readers: dict[str, Callable[[Path, str], Iterator[_Row]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    if reader := readers.get(path.suffix):
        return data.path, reader(path, data.path)
    if path.is_file():
        raise DataError(f"{data.path}: prompts are read from .jsonl and .parquet files, or from a data set")
    return data.path, _hugging_face(data, path)


def _jsonl(path: Path, name: str) -> Iterator[_Row]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if line.strip():
                    yield _Row(f"{name}:{number}", number, _json_object(line, f"{name}:{number}"))
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
        raise DataError(f"{where}: a row is a JSON object with columns, this is {_kind(value)}")
    return value


def _refuse_half_characters(value: Any, where: str) -> None:
    r"""JSON can encode half of a surrogate pair (`\ud800`), which is not valid text: tokenizers fail on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a character (a lone surrogate such as \\ud800)") from error


def _parquet(path: Path, name: str) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                batch.validate(full=True)
                for columns in _python_rows(batch, f"{name}, rows {number + 1} to {number + len(batch)}"):
                    number += 1
                    yield _Row(f"{name}, row {number}", number, columns)
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


def _hugging_face(data: DataConfig, path: Path) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.path = {data.path}: no such file, and data sets from the hub need the package `datasets` "
            "(pip install 'kat-ray[hub]')"
        ) from error
    try:
        table = datasets.load_dataset(str(path) if path.is_dir() else data.path, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise DataError(
            f"{data.path} (split {data.split}): no such file, and no data set to be had: {reason.splitlines()[0]}"
        ) from error
    for number, columns in enumerate(table, 1):
        yield _Row(f"{data.path} (split {data.split}), row {number}", number, columns)


# --- order -----------------------------------------------------------------------------------------------


class PromptOrder:
    """An endless order of prompts, epoch after epoch, each a permutation drawn from (seed, epoch).

    It keeps no position: `batch` is a pure function.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        assert prompts, "an order needs at least one prompt"
        self._prompts = tuple(prompts)
        self._permutation = functools.lru_cache(maxsize=2)(
            functools.partial(_permutation, len(self._prompts), seed, shuffle)
        )

    def batch(self, step: int, n: int) -> list[Prompt]:
        """Prompts n * step to n * (step + 1) of the order; `step` counts from 0."""
        size = len(self._prompts)
        return [
            self._prompts[self._permutation(position // size)[position % size]]
            for position in range(step * n, (step + 1) * n)
        ]


def _permutation(size: int, seed: int, shuffle: bool, epoch: int) -> list[int]:
    if not shuffle:
        return list(range(size))
    order: list[int] = np.random.default_rng([seed, _ORDER, epoch]).permutation(size).tolist()
    return order


def rollout_specs(order: PromptOrder, config: Config, step: int) -> list[RolloutSpec]:
    """The rollouts of a step (from 0): those of one prompt are adjacent, ids are consecutive over the run.

    Each rollout is a probe with probability `termination.probe_share`, independently; a larger share only adds
    probes.
    """
    rollout, seed = config.rollout, config.run.seed
    share = getattr(config.termination, "probe_share", 0.0)  # rule none has no probes
    prompts = order.batch(step, rollout.prompts_per_step)
    first = step * rollout.rollouts_per_step
    return [
        RolloutSpec(
            rollout_id=rollout_id,
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            seed=_draw(seed, _SAMPLING, rollout_id) >> 1,  # 31 bits: a seed that every engine takes
            probe=is_probe(seed, rollout_id, share),
            max_tokens=rollout.max_tokens,
            teacher=prompt.teacher,
        )
        for rollout_id, prompt in enumerate((p for p in prompts for _ in range(rollout.rollouts_per_prompt)), first)
    ]


def is_probe(seed: int, rollout_id: int, share: float) -> bool:
    """Whether a rollout is a probe: a draw from (run seed, rollout id)."""
    return _draw(seed, _PROBE, rollout_id) < share * 2**32


def _draw(seed: int, domain: int, rollout_id: int) -> int:
    """32 random bits that depend on the three numbers only; the same on every machine."""
    return int(np.random.SeedSequence([seed, domain, rollout_id]).generate_state(1)[0])
