"""The rows of an environment: made at the start by a child process, the same for the same settings."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

from kat_ray.config import EnvironmentConfig
from kat_ray.config.environment import SPLITS
from kat_ray.errors import DataError
from kat_ray.rewards.child import START_SECONDS, GradingChild
from kat_ray.rewards.limits import Call, Fault, GradingLimits
from kat_ray.rewards.problems import Problem

PROBLEM = "problem"  # the column of what an answer is held against
_PAGE = 100  # problems of one call

Columns = Mapping[str, str]


def columns_of(environment: EnvironmentConfig, split: str) -> Sequence[Columns]:
    """The columns of a split's rows: `id`, `prompt`, `answer`, `family` and `problem` (JSON).

    No question is in both splits, nor twice in one. `UserError` names what is wrong with a family, its settings, or
    the installation. What one process asks for again is not made again.
    """
    return _splits(environment.model_dump_json())[split]


@functools.lru_cache(4)
def _splits(settings: str) -> dict[str, Sequence[Columns]]:
    environment = EnvironmentConfig.model_validate_json(settings)
    counts = {split: environment.counts(split) for split in SPLITS}
    seconds = environment.seconds
    limits = GradingLimits(1, seconds, seconds, environment.memory_gib, "environment.")
    by_family: dict[str, dict[str, list[Columns]]] = {split: {} for split in SPLITS}
    with GradingChild(limits, ["problems"]) as child:
        child.start(START_SECONDS)
        end = time.monotonic() + seconds
        for name in environment.families:
            # Those held out come first: they are the same however many there are for training, but of one that
            # draws by its size (acre).
            heldout = counts["heldout"][name]
            rows = _made(child, environment, name, heldout + counts["train"][name], end)
            by_family["heldout"][name], by_family["train"][name] = rows[:heldout], rows[heldout:]
    return {split: _mixed(rows) for split, rows in by_family.items()}


def _made(child: GradingChild, environment: EnvironmentConfig, name: str, count: int, end: float) -> list[Columns]:
    """The first `count` rows of a family, made before `end`, a time of `time.monotonic`."""
    first = environment.first(name)
    rows: list[Columns] = []
    while len(rows) < count:
        arguments = {"problem": first.to_json(), "count": min(_PAGE, count - len(rows))}
        reply = child.ask(Call("problems", arguments), max(0.0, end - time.monotonic()))
        if reply.fault in (Fault.TIME, Fault.NOT_REACHED):
            raise DataError(
                f"environment.families.{name}: {len(rows)} of its {count} problems were made within "
                f"environment.seconds = {environment.seconds:g}, which all families share; raise it, or ask for "
                "fewer (environment.train, environment.heldout)"
            )
        if reply.fault is Fault.RAISED and reply.error.startswith("environment."):
            raise DataError(reply.error)
        if reply.fault is not None:
            raise DataError(f"environment.families.{name}: its problems cannot be made: {reply.error}")
        rows += [_columns(environment, first, *made) for made in reply.value]
    return rows


def _columns(environment: EnvironmentConfig, first: Problem, index: int, question: str, answer: str) -> Columns:
    return {
        "id": f"{first.family}:{index}",
        "prompt": environment.asked(question),
        "answer": answer,
        "family": first.family,
        PROBLEM: first.at(index).to_json(),
    }


def _mixed(rows: Mapping[str, Sequence[Columns]]) -> Sequence[Columns]:
    """The rows of all families, each spread over the whole in its own order."""
    placed = [
        ((place + 0.5) / len(of_family), number, columns)
        for number, of_family in enumerate(rows.values())
        for place, columns in enumerate(of_family)
    ]
    return [columns for _, _, columns in sorted(placed, key=lambda row: row[:2])]
