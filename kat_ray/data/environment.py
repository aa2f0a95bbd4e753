"""The rows of an environment: made at the start by a child process, the same for the same settings."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kat_ray.config import EnvironmentConfig
from kat_ray.config.environment import SPLITS
from kat_ray.errors import DataError
from kat_ray.rewards.child import START_SECONDS, GradingChild
from kat_ray.rewards.limits import Call, Fault, GradingLimits
from kat_ray.rewards.problems import Problem

PROBLEM = "problem"  # the column of what an answer is held against
FAMILY = "family"  # and of what it is from
LEVEL = "level"  # and of how hard it is, in a curriculum
_PAGE = 100  # problems of one call

Columns = Mapping[str, Any]


def columns_of(environment: EnvironmentConfig, split: str) -> Sequence[Columns]:
    """The columns of a split's rows: `id`, `prompt`, `answer`, `family`, `problem` (JSON); of a curriculum `level`.

    No question is in both splits, nor twice in one. `UserError` names what is wrong with a family, its settings, or
    the installation. What one process asks for again is not made again.
    """
    return _splits(environment.model_dump_json())[split]


@functools.lru_cache(4)
def _splits(settings: str) -> dict[str, Sequence[Columns]]:
    environment = EnvironmentConfig.model_validate_json(settings)
    counts = environment.counts("train")
    seconds = environment.seconds
    limits = GradingLimits(1, seconds, seconds, environment.memory_gib, "environment.")
    found: dict[str, list[Sequence[Columns]]] = {split: [] for split in SPLITS}
    with GradingChild(limits, ["problems"]) as child:
        child.start(START_SECONDS)
        end = time.monotonic() + seconds
        for name in environment.families:
            for level, first in enumerate(_levels(child, environment, name, end)):
                # Those held out come first: they are the same however many there are for training, but of one that
                # draws by its size (acre).
                heldout = environment.heldout_of(name, level)
                rows = _made(child, environment, first, level, heldout + counts[name], end)
                found["heldout"].append(rows[:heldout])
                found["train"].append(rows[heldout:])
    return {split: _mixed(rows) for split, rows in found.items()}


def _levels(child: GradingChild, environment: EnvironmentConfig, name: str, end: float) -> list[Problem]:
    """The first problem of each of a family's levels."""
    curriculum = environment.curriculum
    if curriculum is None:
        return [environment.first(name)]
    arguments = {"problem": environment.first(name).to_json(), "levels": curriculum.levels}
    reply = child.ask(Call("problems", arguments), max(0.0, end - time.monotonic()))
    if reply.fault is not None:
        raise DataError(_words(name, reply.error))
    return [replace(environment.first(name, i), settings=settings) for i, settings in enumerate(reply.value)]


def _words(name: str, error: str) -> str:
    ours = error.startswith("environment.")
    return error if ours else f"environment.families.{name}: its problems cannot be made: {error}"


def _made(
    child: GradingChild, environment: EnvironmentConfig, first: Problem, level: int, count: int, end: float
) -> list[Columns]:
    """The first `count` rows of a family's level, made before `end`, a time of `time.monotonic`."""
    rows: list[Columns] = []
    while len(rows) < count:
        arguments = {"problem": first.to_json(), "count": min(_PAGE, count - len(rows))}
        reply = child.ask(Call("problems", arguments), max(0.0, end - time.monotonic()))
        if reply.fault in (Fault.TIME, Fault.NOT_REACHED):
            raise DataError(
                f"environment.families.{first.family}: {len(rows)} of its {count} problems were made within "
                f"environment.seconds = {environment.seconds:g}, which all families share; raise it, or ask for "
                "fewer (environment.train, environment.heldout)"
            )
        if reply.fault is not None:
            raise DataError(_words(first.family, reply.error))
        rows += [_columns(environment, first, level, *made) for made in reply.value]
    return rows


def _columns(
    environment: EnvironmentConfig, first: Problem, level: int, index: int, question: str, answer: str
) -> Columns:
    of_level = {} if environment.curriculum is None else {LEVEL: level}
    return {
        "id": f"{first.family}:{index}" if not of_level else f"{first.family}:{level}:{index}",
        "prompt": environment.asked(question),
        "answer": answer,
        FAMILY: first.family,
        PROBLEM: first.at(index).to_json(),
    } | of_level


def _mixed(rows: Sequence[Sequence[Columns]]) -> Sequence[Columns]:
    """The rows of all families and levels, each spread over the whole in its own order."""
    placed = [
        ((place + 0.5) / len(of_family), number, columns)
        for number, of_family in enumerate(rows)
        for place, columns in enumerate(of_family)
    ]
    return [columns for _, _, columns in sorted(placed, key=lambda row: row[:2])]
