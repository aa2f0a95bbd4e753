"""Prompts from JSONL, Parquet or a Hugging Face data set: read, checked, tokenised, and assigned to steps.

Every error names file and line (row, for formats without lines). The order of prompts, the seeds of rollouts and
the choice of probes depend on (run seed, place in the order, rollout id) alone, so that a run can resume at any
step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.config import Config, DataConfig, EnvironmentConfig
from kat_ray.config.environment import is_environment
from kat_ray.config.off_policy import most_given
from kat_ray.config.teachers import section_of
from kat_ray.data.chat import ChatTemplate, chat_template_of, encode, messages_of, teachers_own
from kat_ray.data.completions import CompletionLimits, Completions
from kat_ray.data.environment import FAMILY, LEVEL, PROBLEM
from kat_ray.data.given import GivenCompletion
from kat_ray.data.mixture import epoch, open_all, weights_of
from kat_ray.data.routing import Route, Routing
from kat_ray.data.rows import BATCH, Row, kind, names_of
from kat_ray.errors import DataError
from kat_ray.rewards.task import Task, is_plain, plain_columns
from kat_ray.types.records import DEFAULT_TEACHER, Prompt, RolloutSpec, StepStart

ID_COLUMN = "id"
_MOST_SOURCES = 50
Ids = tuple[int, ...]

# Domains of the run seed: independent random streams.
_ORDER, _SAMPLING, _PROBE, _GIVEN = 1, 2, 3, 4


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
    teacher_renders: bool = False,
) -> PromptSet:
    """Read, check and tokenise a split. If `graded`, every row must have an answer.

    Prompts with more than `max_prompt_tokens` tokens are skipped and counted, or refused (`data.too_long`); None
    sets no limit. `data.limit` counts rows of the source, before any is skipped. `teacher` is the teacher's
    tokenizer, for its chat template. `with_tasks` keeps what reward functions are told of each row; an answer may
    then be anything, and one that is neither text nor number is theirs alone. `environment` makes the rows where
    `data.path` says so. `teachers` are those that are asked, with the template of what each is told in place of the
    prompt, None for the prompt; their names are those that `data.teacher_column` may hold, and each must be in it.
    With `completions` those of `data.completion_column` are read. Where it `teacher_renders`, the teacher's own
    template renders what it is told.
    """
    template = chat_template_of(data, tokenizer, teacher)
    theirs = teachers_own(data, teacher) if teacher_renders else None
    routing = Routing(data, teachers or {}, template, theirs)
    given = None
    if completions is not None and data.completion_column is not None:
        given = Completions(data, tokenizer, template, completions)
    source, rows = open_all(data, environment)
    stem = Path(source).stem
    prompts: list[Prompt] = []
    tasks: dict[str, Task] = {}
    seen: dict[str, str] = {}
    origins: list[str] = []
    first: dict[tuple[str, Ids], str | None] = {}  # answers by teacher and tokens
    count = skipped = repeated = contradicting = 0
    columns: dict[str, None] = {}
    while batch := list(islice(rows, BATCH)):
        count += len(batch)
        columns |= dict.fromkeys(name for row in batch for name in row.columns)
        answers = [_answer(row, data, graded, anything=with_tasks) for row in batch]
        texts = [_text(row, data, template) for row in batch]
        routes = [routing.of(row) for row in batch]
        encoded = [ids or () for ids in encode(tokenizer, template, texts)]
        told = routing.encoded(tokenizer, routes)
        completed = _completed(tokenizer, given, batch, texts)
        rows_of_batch = zip(batch, texts, encoded, answers, routes, told, completed, strict=True)
        for row, text, ids, answer, route, context_ids, completion in rows_of_batch:
            prompt_id = _prompt_id(row, stem, seen)
            if not ids:
                raise DataError(f"{row.where}: the prompt gives no token")
            if context_ids == ():
                raise DataError(f"{row.where}: {section_of(route.teacher)}.context gives no token")
            if _is_too_long(data, row, max_prompt_tokens, ids, context_ids, route):
                skipped += 1
            elif data.dedupe and (alike := (route.teacher, ids)) in first:
                repeated += 1
                contradicting += first[alike] != answer
            else:
                first[route.teacher, ids] = answer
                origins.append(row.origin or "")
                problem = row.columns[PROBLEM] if is_environment(data.path) else None
                source_of, level = _source(row, data), row.columns.get(LEVEL, 0) if problem is not None else 0
                prompts.append(
                    Prompt(
                        prompt_id, ids, answer, route.teacher, problem, context_ids, source_of, level, completion
                    )
                )
                if with_tasks:
                    tasks[prompt_id] = _task(row, data, text)
    if not count:
        raise DataError(f"{source}: holds no prompts")
    if not prompts:
        raise DataError(
            f"{source}: every one of {count} prompts is longer than the {max_prompt_tokens} tokens the models take "
            "beside the longest answer; lower rollout.max_tokens, or use shorter prompts"
        )
    weights = weights_of(data)
    found = PromptSet(
        tuple(prompts), skipped, source, tasks, repeated, contradicting, tuple(origins) if weights else (), weights
    )
    _ = found.drawn  # a mixture that cannot be drawn from is refused here
    _refuse_unanswered(data, found, columns)
    _refuse_too_many_sources(data, found)
    _refuse_empty_levels(found, environment if is_environment(data.path) and not graded else None)
    routing.refuse_unused(source, {p.teacher for p in found.prompts}, skipped)
    return found


def check_row(row: Row, data: DataConfig, template: ChatTemplate | None, graded: bool) -> None:
    """`DataError` where a row cannot be used."""
    _text(row, data, template)
    _answer(row, data, graded)


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
    given = row.columns.get(ID_COLUMN)
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
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: what pandas makes of a gap
        raise DataError(f"{row.where}: {row.lacks(column, 'data.source_column')}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{row.where}: {column} is empty")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{row.where}: {column} is {kind(value)}; what a prompt is from is a name or a number")
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
    if isinstance(answer, float) and math.isnan(answer):  # what pandas makes of a gap
        answer = None
    prompt = row.value(data.prompt_column)
    if not is_plain(prompt):
        raise DataError(
            f"{row.where}: {data.prompt_column} holds what reward functions cannot be told of (no JSON): leave it "
            "out of the messages, or make text of it"
        )
    columns = plain_columns(row.columns, (data.prompt_column,))
    return Task(prompt, text, answer if is_plain(answer) else None, columns, data.path)


def _answer(row: Row, data: DataConfig, graded: bool, anything: bool = False) -> str | None:
    value = None if data.answer_column is None else row.value(data.answer_column)
    if isinstance(value, float) and math.isnan(value):  # what pandas makes of a gap
        if graded:
            raise DataError(f"{row.where}: {data.answer_column} is missing (NaN)")
        return None
    if value is None and not graded:
        return None
    if value is None:
        raise DataError(f"{row.where}: {row.lacks(data.answer_column or '', 'data.answer_column')}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        if anything and not graded:
            return None
        raise DataError(f"{row.where}: {data.answer_column} is {kind(value)}; an answer is text or a number")
    text = str(value).strip()
    if data.answer_after is not None:
        _, mark, text = text.rpartition(data.answer_after)
        text = text.strip()
        if not mark and graded:
            raise DataError(f"{row.where}: {data.answer_column} holds no {data.answer_after!r} (data.answer_after)")
        if not mark:
            return None
    if graded and not text:
        raise DataError(f"{row.where}: {data.answer_column} is empty")
    return text


def _text(row: Row, data: DataConfig, template: ChatTemplate | None) -> str:
    column, value = data.prompt_column, row.value(data.prompt_column)
    if value is None:
        raise DataError(f"{row.where}: {row.lacks(column, 'data.prompt_column')}")
    if not isinstance(value, str | list):
        raise DataError(f"{row.where}: {column} is {kind(value)}; a prompt is text or a list of messages")
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: {column} is empty")
    if isinstance(value, str) and data.instruction is not None:
        value = f"{value}\n\n{data.instruction}"
    if template is not None:
        where = f"{row.where}: {column}"
        return template.render(messages_of(value, data.system_prompt, where), row.where)
    if isinstance(value, str):
        return value
    raise DataError(f"{row.where}: {column} is a list of messages; set data.chat_template = true")


# --- order -----------------------------------------------------------------------------------------------


class PromptOrder:
    """An endless order of prompts, epoch after epoch, each a permutation drawn from (seed, epoch).

    It keeps no position: `take` is a pure function. Prompts of other levels than 0 are not in the order: they stand
    in for those of level 0 of their source, one for each as far as there are as many.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts = tuple(p for p in prompts if not p.level)
        assert self._prompts, "an order needs at least one prompt"
        self._by_level: dict[tuple[str | None, int], list[Prompt]] = {}
        self._number: dict[str, int] = {}  # of a prompt among those of its source and level
        for prompt in prompts:
            alike = self._by_level.setdefault((prompt.source, prompt.level), [])
            self._number[prompt.prompt_id] = len(alike)
            alike.append(prompt)
        self._permutation = functools.lru_cache(maxsize=2)(
            functools.partial(_permutation, len(self._prompts), seed, shuffle)
        )

    def take(self, places: range, levels: Mapping[str, int] | None = None) -> list[Prompt]:
        """The prompts at these places of the order, from 0; `levels` are by source, 0 where nothing is said."""
        size = len(self._prompts)
        first = [self._prompts[self._permutation(place // size)[place % size]] for place in places]
        return [self._at(prompt, levels.get(prompt.source or "", 0)) for prompt in first] if levels else first

    def _at(self, prompt: Prompt, level: int) -> Prompt:
        alike = self._by_level[prompt.source, level]
        return alike[self._number[prompt.prompt_id] % len(alike)]


def _permutation(size: int, seed: int, shuffle: bool, epoch: int) -> list[int]:
    if not shuffle:
        return list(range(size))
    order: list[int] = np.random.default_rng([seed, _ORDER, epoch]).permutation(size).tolist()
    return order


def rollout_specs(
    order: PromptOrder,
    config: Config,
    places: range,
    start: StepStart | None = None,
    levels: Mapping[str, int] | None = None,
    given: Collection[int] = (),
) -> list[RolloutSpec]:
    """The rollouts of the prompts at these places of the order: those of one prompt are adjacent, and ids are
    consecutive over the run, since each follows from its prompt's place, but for those of prompts whose completions
    are `given`, counted from the first place.

    Each rollout is a probe with the probability that its teacher's rule says in `start`, by default
    `termination.probe_share`, independently; a larger share only adds probes. Others are no longer than its budget.
    `levels` are those of a curriculum.
    """
    rollout, seed = config.rollout, config.run.seed
    start = start or StepStart(None, None)
    prompts, each = order.take(places, levels), rollout.rollouts_per_prompt
    first, specs = places.start * each, []
    for rollout_id, prompt in enumerate((p for p in prompts for _ in range(each)), first):
        if (rollout_id - first) // each in given:
            continue
        limits = start.of(prompt.teacher)
        probe = is_probe(seed, rollout_id, probe_share(config, limits))
        budget = None if probe else limits.budget
        specs.append(
            RolloutSpec(
                rollout_id=rollout_id,
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                seed=_draw(seed, _SAMPLING, rollout_id) >> 1,  # 31 bits: a seed that every engine takes
                probe=probe,
                max_tokens=rollout.max_tokens if budget is None else max(1, min(budget, rollout.max_tokens)),
                teacher=prompt.teacher,
                context_ids=prompt.context_ids,
            )
        )
    return specs


@functools.lru_cache(maxsize=4)
def _given_places(seed: int, step: int, share: float, prompts: int) -> frozenset[int]:
    """Places of a step's prompts, drawn from (run seed, step); their mean number is share x prompts."""
    generator = np.random.default_rng([seed, _GIVEN, step])
    count = math.floor(share * prompts + generator.random())
    return frozenset(generator.permutation(prompts)[: min(count, most_given(share, prompts))].tolist())


def given_places(config: Config, step: int) -> frozenset[int]:
    """Which of a step's prompts have their completion from the data; a function of seed and step alone."""
    objective = config.objective.off_policy
    if not objective.share or (objective.steps is not None and step >= objective.steps):
        return frozenset()
    return _given_places(config.run.seed, step, objective.share, config.rollout.prompts_per_step)


def given_completions(order: PromptOrder, config: Config, step: int) -> list[GivenCompletion]:
    """The completions that a step learns from in place of rollouts, each under the id of its prompt's first one."""
    rollout = config.rollout
    begin = step * rollout.prompts_per_step  # with completions of the data no step draws other prompts
    prompts = order.take(range(begin, begin + rollout.prompts_per_step))
    first = begin * rollout.rollouts_per_prompt
    return [
        GivenCompletion(first + place * rollout.rollouts_per_prompt, prompts[place])
        for place in sorted(given_places(config, step))
    ]


def probe_share(config: Config, start: StepStart) -> float:
    """The chance with which a rollout under these limits is a probe."""
    if start.probe_share is not None:
        return start.probe_share
    return getattr(config.termination, "probe_share", 0.0)  # rule none has no probes


def is_probe(seed: int, rollout_id: int, share: float) -> bool:
    """Whether a rollout is a probe: a draw from (run seed, rollout id)."""
    return _draw(seed, _PROBE, rollout_id) < share * 2**32


def _draw(seed: int, domain: int, rollout_id: int) -> int:
    """32 random bits that depend on the three numbers only; the same on every machine."""
    return int(np.random.SeedSequence([seed, domain, rollout_id]).generate_state(1)[0])
