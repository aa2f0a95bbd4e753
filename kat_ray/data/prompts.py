"""Prompts from JSONL, Parquet or a Hugging Face data set: read, checked, tokenised, and assigned to steps.

Every error names file and line (row, for formats without lines). The order of prompts, the seeds of rollouts and
the choice of probes depend on (run seed, place in the order, rollout id) alone, so that a run can resume at any
step.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kat_ray.config import DataConfig, EnvironmentConfig
from kat_ray.config.environment import is_environment
from kat_ray.config.teachers import section_of
from kat_ray.data.chat import ChatTemplate, chat_template_of, encode, messages_of, teachers_own, with_instruction
from kat_ray.data.completions import CompletionLimits, Completions
from kat_ray.data.environment import FAMILY, LEVEL, PROBLEM
from kat_ray.data.mixture import epoch, open_all, weights_of
from kat_ray.data.routing import Route, Routing
from kat_ray.data.rows import BATCH, Row, kind, names_of
from kat_ray.errors import DataError
from kat_ray.rewards.task import Task, is_plain, plain_columns
from kat_ray.types.records import DEFAULT_TEACHER, Prompt

ID_COLUMN = "id"
_MOST_SOURCES = 50
Ids = tuple[int, ...]
# Of rows that teach the same: the teacher, and the tokens of prompt, context and completion.
_Alike = tuple[str, Ids, Ids | None, Ids | None]


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one split, in the file's order."""

    prompts: tuple[Prompt, ...]
    skipped_too_long: int
    source: str
    tasks: Mapping[str, Task] = field(default_factory=dict)  # by prompt id, where reward functions are told of them
    repeated: int = 0  # rows that were left out as the repetition of another
    contradicting: int = 0  # of these, with another answer than the one that was kept
    origins: tuple[str, ...] = ()  # of several data sets, that of each prompt
    weights: Mapping[str, float] = field(default_factory=dict)  # of several data sets

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.token_ids) for p in self.prompts)

    @property
    def longest_scored(self) -> int:
        """Tokens of the longest that a teacher is given in place of a prompt, or as it."""
        return max(len(p.token_ids if p.context_ids is None else p.context_ids) for p in self.prompts)

    @functools.cached_property
    def drawn(self) -> tuple[Prompt, ...]:
        """The prompts of an epoch: each once, or of several data sets as often as their weights say."""
        return epoch(self.prompts, self.origins, self.weights) if self.weights else self.prompts

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of every prompt's id, token ids, answer, problem, teacher, context and completion, in order, and
        of its columns where rewards may depend on them. A resumed run must find the same.
        """
        sums = hashlib.sha256()
        for p in self.prompts:
            sums.update(json.dumps([p.prompt_id, p.token_ids, p.answer]).encode())
            sums.update((p.problem or "").encode())
            # Where neither is said, digests are those of before it could be.
            if p.teacher != DEFAULT_TEACHER:
                sums.update(json.dumps(["teacher", p.teacher]).encode())
            if p.context_ids is not None:
                sums.update(json.dumps(["context", p.context_ids]).encode())
            if p.completion_ids is not None:
                sums.update(json.dumps(["completion", p.completion_ids]).encode())
            if (task := self.tasks.get(p.prompt_id)) is not None:
                sums.update(json.dumps([task.answer, task.columns], sort_keys=True).encode())
        if self.weights:
            sums.update(json.dumps(["weights", dict(self.weights)]).encode())
        return sums.hexdigest()


def load_prompts(
    data: DataConfig,
    tokenizer: Any,
    max_prompt_tokens: int | None,
    *,
    graded: bool = False,
    teacher: Any = None,
    with_tasks: bool = False,
    environment: EnvironmentConfig | None = None,
    teachers: Mapping[str, str | None] | None = None,
    completions: CompletionLimits | None = None,
    renderers: Mapping[str, Any] | None = None,
    section: str | None = None,
) -> PromptSet:
    """Read, check and tokenise a split. If `graded`, every row must have an answer.

    Prompts with more than `max_prompt_tokens` tokens are skipped and counted, or refused (`data.too_long`); None
    sets no limit. `data.limit` counts rows of the source, before any is skipped. `teacher` is the teacher's
    tokenizer, for its chat template. `with_tasks` keeps what reward functions are told of each row; an answer may
    then be anything, and one that is neither text nor number is theirs alone. `environment` makes the rows where
    `data.path` says so. `teachers` are those that are asked, with the template of what each is told in place of the
    prompt, None for the prompt; their names are those that `data.teacher_column` may hold, and each must be in it.
    With `completions` those of `data.completion_column` are read. `renderers` are tokenizers by the names of
    teachers whose own templates render what they are told. `section` is where the configuration has `data`, for
    messages; None: as one would think.
    """
    section = section or ("evaluation.data" if graded else "data")
    template = chat_template_of(data, tokenizer, teacher)
    theirs = {name: teachers_own(data, own, section_of(name)) for name, own in (renderers or {}).items()}
    routing = Routing(data, teachers or {}, template, theirs)
    given = None
    if completions is not None and data.completion_column is not None:
        given = Completions(data, tokenizer, template, completions)
    source, rows = open_all(data, environment)
    kept = _Kept(data, max_prompt_tokens, with_tasks, Path(source).stem)
    count, columns = 0, dict[str, None]()
    while batch := list(islice(rows, BATCH)):
        count += len(batch)
        columns |= dict.fromkeys(name for row in batch for name in row.columns)
        answers = [_answer(row, data, graded, section, anything=with_tasks) for row in batch]
        texts = [_text(row, data, template, section) for row in batch]
        routes = [routing.of(row) for row in batch]
        encoded = [ids or () for ids in encode(tokenizer, template, texts)]
        told = routing.encoded(tokenizer, routes)
        completed = _completed(tokenizer, given, batch, texts)
        for parts in zip(batch, texts, encoded, answers, routes, told, completed, strict=True):
            kept.add(*parts)
    if not count:
        raise DataError(f"{source}: holds no prompts")
    if not kept.prompts:
        raise DataError(
            f"{source}: every one of {count} prompts is longer than the {max_prompt_tokens} tokens the models take "
            "beside the longest answer; lower rollout.max_tokens, or use shorter prompts"
        )
    found = kept.found(source)
    _ = found.drawn  # a mixture that cannot be drawn from is refused here
    _refuse_unanswered(data, found, columns)
    _refuse_too_many_sources(data, found)
    _refuse_empty_levels(found, environment if is_environment(data.path) and not graded else None)
    routing.refuse_unused(source, {p.teacher for p in found.prompts}, kept.skipped)
    return found


@dataclass
class _Kept:
    """What is kept of the rows that were read, and how many were not."""

    data: DataConfig
    limit: int | None  # tokens of a prompt
    with_tasks: bool
    stem: str  # of ids for rows without one
    prompts: list[Prompt] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    first: dict[_Alike, str | None] = field(default_factory=dict)  # answers
    skipped: int = 0
    repeated: int = 0
    contradicting: int = 0

    def add(
        self,
        row: Row,
        text: str,
        ids: Ids,
        answer: str | None,
        route: Route,
        context_ids: Ids | None,
        completion: Ids | None,
    ) -> None:
        """Keep a row, unless it is too long or repeats another; `DataError` where it gives no token."""
        data, prompt_id = self.data, _prompt_id(row, self.stem, self.seen)
        if not ids:
            raise DataError(f"{row.where}: the prompt gives no token")
        if context_ids == ():
            raise DataError(f"{row.where}: {section_of(route.teacher)}.context gives no token")
        if _is_too_long(data, row, self.limit, ids, context_ids, route):
            self.skipped += 1
            return
        alike = (route.teacher, ids, context_ids, completion)
        if data.dedupe and alike in self.first:
            self.repeated += 1
            self.contradicting += self.first[alike] != answer
            return
        self.first[alike] = answer
        self.origins.append(row.origin or "")
        problem = row.columns[PROBLEM] if is_environment(data.path) else None
        source, level = _source(row, data), row.columns.get(LEVEL, 0) if problem is not None else 0
        self.prompts.append(
            Prompt(prompt_id, ids, answer, route.teacher, problem, context_ids, source, level, completion)
        )
        if self.with_tasks:
            self.tasks[prompt_id] = _task(row, data, text)

    def found(self, source: str) -> PromptSet:
        """All of it."""
        weights = weights_of(self.data)
        return PromptSet(
            tuple(self.prompts), self.skipped, source, self.tasks, self.repeated, self.contradicting,
            tuple(self.origins) if weights else (), weights,
        )  # fmt: skip


def check_row(row: Row, data: DataConfig, template: ChatTemplate | None, graded: bool) -> None:
    """`DataError` where a row cannot be used."""
    section = "evaluation.data" if graded else "data"
    _text(row, data, template, section)
    _answer(row, data, graded, section)


def _refuse_unanswered(data: DataConfig, found: PromptSet, columns: Mapping[str, None]) -> None:
    answers = (*(p.answer for p in found.prompts), *(t.answer for t in found.tasks.values()))
    if data.names_answers and all(answer is None for answer in answers):
        raise DataError(
            f"{found.source}: no row has an answer in column {data.answer_column!r}; there are {names_of(columns)} "
            "(data.answer_column chooses; null where answers are not graded)"
        )


def _completed(
    tokenizer: Any, given: Completions | None, rows: Sequence[Row], prompts: Sequence[str]
) -> list[Ids | None]:
    """The tokens of the rows' completions; None of each where none are read."""
    if given is None:
        return [None] * len(rows)
    texts = [given.text(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    return [given.ids(tuple(ids)) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _is_too_long(
    data: DataConfig, row: Row, limit: int | None, ids: Ids, context_ids: Ids | None, route: Route
) -> bool:
    """Whether a prompt has to be left out, by itself or by what its teacher is told; `DataError` as `data` says."""
    length = max(len(ids), len(context_ids or ()))
    if limit is None or length <= limit:
        return False
    if data.too_long == "refuse":
        what = "the prompt" if len(ids) > limit else f"{section_of(route.teacher)}.context"
        raise DataError(
            f"{row.where}: {what} has {length} tokens, the models take {limit} beside the longest answer; "
            "lower rollout.max_tokens, shorten the prompt, or set data.too_long = skip"
        )
    return True


def _prompt_id(row: Row, stem: str, seen: dict[str, str]) -> str:
    given = row.value(ID_COLUMN)
    prompt_id = f"{row.origin or stem}:{row.number if given is None else given}"
    if given is not None and row.origin is None:
        prompt_id = str(given)
    if prompt_id in seen:
        raise DataError(f"{row.where}: the id {prompt_id!r} is also that of {seen[prompt_id]}; ids must be unique")
    seen[prompt_id] = row.where
    return prompt_id


def _source(row: Row, data: DataConfig) -> str | None:
    """What a row's prompt is from, where that is asked."""
    column = data.source_column
    if column is None:
        return str(row.columns[FAMILY]) if is_environment(data.path) else None
    value = row.value(column)
    if value is None:
        raise DataError(f"{row.where}: {row.lacks(column, 'data.source_column')}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{row.where}: {column} is empty")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{row.where}: {column} is {kind(value)}; a source is a name or a whole number")
    return str(value).strip()


def _refuse_too_many_sources(data: DataConfig, found: PromptSet) -> None:
    """Each one is a handful of metrics; a column of ids would be thousands."""
    names = {p.source for p in found.prompts if p.source is not None}
    if len(names) > _MOST_SOURCES and data.source_column is not None:
        raise DataError(
            f"{found.source}: column {data.source_column!r} has {len(names)} different values, such as "
            f"{min(names)!r}; metrics are shown for at most {_MOST_SOURCES} (data.source_column; null: none)"
        )


def _refuse_empty_levels(found: PromptSet, environment: EnvironmentConfig | None) -> None:
    """A level that a curriculum may come to has problems."""
    levels = 1 if environment is None or environment.curriculum is None else environment.curriculum.levels
    there = {(p.source, p.level) for p in found.prompts}
    for family in environment.families if environment is not None and levels > 1 else ():
        for level in range(levels):
            if (family, level) not in there:
                raise DataError(
                    f"environment.curriculum: {family} has no problem of level {level} among the "
                    f"{len(found.prompts)} of {found.source}: {found.skipped_too_long} are too long, and "
                    "data.limit may leave out others"
                )


def _task(row: Row, data: DataConfig, text: str) -> Task:
    answer = None if data.answer_column is None else row.value(data.answer_column)
    prompt = row.value(data.prompt_column)
    if not is_plain(prompt):
        raise DataError(
            f"{row.where}: {data.prompt_column} holds what reward functions cannot be told of (no JSON): leave it "
            "out of the messages, or make text of it"
        )
    columns = plain_columns(row.columns, (data.prompt_column,))
    return Task(prompt, text, answer if is_plain(answer) else None, columns, data.path)


def _answer(row: Row, data: DataConfig, graded: bool, section: str, anything: bool = False) -> str | None:
    value = None if data.answer_column is None else row.value(data.answer_column)
    if value is None and not graded:
        return None
    if value is None:
        raise DataError(f"{row.where}: {row.lacks(data.answer_column or '', f'{section}.answer_column')}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        if anything and not graded:
            return None
        raise DataError(f"{row.where}: {data.answer_column} is {kind(value)}; an answer is text or a number")
    text = str(value).strip()
    if data.answer_after is not None:
        _, mark, text = text.rpartition(data.answer_after)
        text = text.strip()
        if not mark and graded:
            raise DataError(
                f"{row.where}: {data.answer_column} holds no {data.answer_after!r} ({section}.answer_after)"
            )
        if not mark:
            return None
    if graded and not text:
        raise DataError(f"{row.where}: {data.answer_column} is empty")
    return text


def _text(row: Row, data: DataConfig, template: ChatTemplate | None, section: str) -> str:
    column, value = data.prompt_column, row.value(data.prompt_column)
    if value is None:
        raise DataError(f"{row.where}: {row.lacks(column, f'{section}.prompt_column')}")
    if not isinstance(value, str | list):
        raise DataError(f"{row.where}: {column} is {kind(value)}; a prompt is text or a list of messages")
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: {column} is empty")
    value = with_instruction(value, data)
    if template is not None:
        where = f"{row.where}: {column}"
        return template.render(messages_of(value, data.system_prompt, where), row.where)
    if isinstance(value, str):
        return value
    raise DataError(f"{row.where}: {column} is a list of messages; set data.chat_template = true")
