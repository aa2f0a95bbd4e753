"""What a child process runs of reasoning-gym: problems made, and answers scored. Imported in grading children only.

A family's scorer is code of another project, and gets what a model wrote. So it runs in a child with limits, and
while it runs nothing that is text can be executed (`_Guard`), unless the user allowed it for that family.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from kat_ray.rewards.extraction import extract_answer
from kat_ray.rewards.limits import unusable
from kat_ray.rewards.problems import EVALUATES_ITS_OWN, VERSION, Problem
from kat_ray.rewards.signatures import Unusable

_KEPT = 2000  # problems that a child remembers: rollouts of one prompt are graded one after the other
_NONSENSE = "zzz wrong"  # an answer to no problem
_FIRST = 20  # problems after which a family that calls all their answers wrong is given up
_FRUITLESS = 500  # problems in a row that were there already
_PAGE_CHARACTERS = 100_000  # of one reply, about; JSON may write six bytes for each
_OURS = ("seed", "size")


def load_grader() -> Callable[[Mapping[str, Any]], float]:
    """Import reasoning-gym; what is returned scores `text` as an answer to `problem` (JSON), from 0 to 1."""
    _library()
    guard = _Guard()
    warm: set[str] = set()

    def grade(asked: Mapping[str, Any]) -> float:
        problem = Problem.from_json(asked["problem"])
        dataset, entry = _made(asked["problem"])
        if problem.family not in warm:  # what its scorer imports late is not the answer's doing
            dataset.score_answer(entry["answer"], entry)
            warm.add(problem.family)
        answer = extract_answer(asked["text"], problem.reading)
        if answer is None:
            return 0.0
        with guard.of(problem):
            score = _score(dataset, answer, entry)
        return score if problem.partial or score >= 1 else 0.0

    return grade


def load_maker() -> Callable[[Mapping[str, Any]], list[Any]]:
    """Import reasoning-gym; what is returned makes the next problems of a family: (index, question, answer) each.

    It is asked with `problem` (JSON of the family's first one) and `count`, and gives fewer where they are long; of
    one process's questions no two are the same. Asked with `problem` and `levels` it gives the settings of that
    many levels of its curriculum. `Unusable` says what is wrong with a family or its settings.
    """
    _library()
    seen: set[str] = set()
    streams: dict[str, Iterator[list[Any]]] = {}

    def make(asked: Mapping[str, Any]) -> list[Any]:
        name = asked["problem"]
        if "levels" in asked:
            return _levels(Problem.from_json(name), asked["levels"])
        if name not in streams:
            streams[name] = _usable(Problem.from_json(name), seen)
        page: list[list[Any]] = []
        characters = 0
        while len(page) < asked["count"] and characters < _PAGE_CHARACTERS:
            page.append(next(streams[name]))
            characters += len(page[-1][1]) + len(page[-1][2])
        return page

    return make


def _levels(problem: Problem, count: int) -> list[dict[str, Any]]:
    """The settings of a family's first `count` levels, with those of the user's that no level moves."""
    factory, where = _library(), f"environment.families.{problem.family}"
    _dataset(problem)  # says what is wrong with its name or settings
    if problem.family not in factory.CURRICULA:
        raise Unusable(
            f"{where}: reasoning-gym {VERSION} has no curriculum of this family; leave one of the two out"
        )
    curriculum = factory.create_curriculum(problem.family)
    attributes = curriculum.attributes.values()
    names = ("field_name", "lower_field_name", "upper_field_name")
    moved = {getattr(attribute, name) for attribute in attributes for name in names if hasattr(attribute, name)}
    for name in problem.settings:
        if name in moved:
            raise Unusable(f"{where}.settings.{name}: is moved by environment.curriculum; leave it out")
    most = max(len(attribute.levels) for attribute in attributes)
    if count > most:
        raise Unusable(f"environment.curriculum.levels = {count}: the curriculum of {problem.family} has {most}")
    found = []
    for level in range(count):
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration(dict(problem.settings))
        found.append({**problem.settings, **{name: getattr(made, name) for name in sorted(moved)}})
        try:
            _dataset(dataclasses.replace(problem, settings=found[-1]))
        except Unusable as error:  # of some families the library refuses what its own curriculum says
            raise Unusable(
                f"environment.curriculum: level {level} of {problem.family} cannot be made, as the library has it "
                f"({error}); take fewer levels, or leave the family out"
            ) from error
    return found


def _usable(problem: Problem, seen: set[str]) -> Iterator[list[Any]]:
    """Problems of a family whose question is new, and whose own answer its scorer calls right."""
    dataset = _dataset(problem)
    where = f"environment.families.{problem.family}"
    usable = fruitless = 0
    for index in range(problem.size):
        if fruitless > _FRUITLESS:
            break
        entry = _entry(dataset, problem, index)
        question, answer = entry["question"], entry["answer"]
        if index == _FIRST and not usable:
            raise Unusable(
                f"{where}: its scorer calls none of its own answers right, so that nothing can be checked"
            )
        if question in seen:
            fruitless += 1
            continue
        text = None if not isinstance(answer, str) else extract_answer(f"<answer>{answer}</answer>", "tags")
        if text is None or _score(dataset, text, entry) < 1:
            continue
        if not usable and _score(dataset, _NONSENSE, entry) >= 1:
            raise Unusable(f"{where}: its scorer calls the answer {_NONSENSE!r} right")
        usable, fruitless = usable + 1, 0
        seen.add(question)
        yield [index, question, answer]
    raise Unusable(
        f"{where}: gives only {usable} different problems with these settings, and more are asked for; lower "
        "environment.train and environment.heldout or the family's weight, or widen its settings"
    )


def _score(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """A family's score of an answer.

    Some scorers raise on what they cannot read. That is 0 where the problem's own answer raises nothing.
    """
    try:
        return _finite(dataset.score_answer(answer, entry))
    except (MemoryError, _Refused):
        raise
    except Exception:
        dataset.score_answer(entry["answer"], entry)
        return 0.0


def _finite(score: Any) -> float:
    value = float(score)
    if (why := unusable(value)) is not None:
        raise Unusable(f"its scorer gave {value:g}, {why}")
    return value


# --- the library ------------------------------------------------------------------------------------------


@functools.cache
def _library() -> Any:
    """The registry of families: (class of its problems, class of its settings) by name."""
    if importlib.util.find_spec("pycosat") is None:
        # It has no wheel and needs a compiler, for one family of puzzles; the package imports it all the same.
        sys.modules["pycosat"] = absent = ModuleType("pycosat")
        absent.__getattr__ = _without_solver  # type: ignore[method-assign]
    import reasoning_gym.factory

    return reasoning_gym.factory


def _without_solver(name: str) -> Any:
    raise Unusable(
        "environment.families.zebra_puzzles: needs the package pycosat, which is compiled when it is installed "
        "(pip install pycosat, with a C compiler)"
    )


@functools.lru_cache(_KEPT)
def _made(problem: str) -> tuple[Any, Mapping[str, Any]]:
    """The problems of a family, and the one that is named."""
    named = Problem.from_json(problem)
    dataset = _family(dataclasses.replace(named, index=0, reading="tags", partial=False, unsafe=False).to_json())
    return dataset, _entry(dataset, named, named.index)


def _entry(dataset: Any, problem: Problem, index: int) -> Mapping[str, Any]:
    """One problem of a family, the same in every process: `list_functions` draws from Python's own generator."""
    random.seed(problem.seed + index)
    entry: Mapping[str, Any] = dataset[index]
    return entry


@functools.cache
def _family(problem: str) -> Any:
    return _dataset(Problem.from_json(problem))


def _dataset(problem: Problem) -> Any:
    """The problems of a family; `Unusable` where there is no such family, or not with these settings."""
    factory, where = _library(), f"environment.families.{problem.family}"
    if problem.family not in factory.DATASETS:
        near = difflib.get_close_matches(problem.family, factory.DATASETS, n=3, cutoff=0.5)
        advice = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(factory.DATASETS)}"
        raise Unusable(f"{where}: reasoning-gym {VERSION} has no family of this name{advice}")
    _, settings = factory.DATASETS[problem.family]
    known = [field.name for field in dataclasses.fields(settings) if field.name not in _OURS]
    for name in problem.settings:
        if name not in known:
            raise Unusable(f"{where}.settings.{name}: is no setting of this family; there are {', '.join(known)}")
    try:
        return factory.create_dataset(problem.family, seed=problem.seed, size=problem.size, **problem.settings)
    except (AssertionError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{name} = {value!r}" for name, value in problem.settings.items()) or "none"
        raise Unusable(f"{where}.settings ({given}): are refused: {error or type(error).__name__}") from error


# --- the guard --------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A scorer was about to execute text."""


class _Guard:
    """Refuses `eval` and `exec` of text while an answer is scored; one for a process, for good.

    A list of families alone would miss what a new release does. Scorers catch what they like, so what was refused
    is raised once more at the end.
    """

    def __init__(self) -> None:
        self._armed = self._refused = False
        sys.addaudithook(self._look)

    def of(self, problem: Problem) -> _Guard:
        """Armed in a `with` block, unless the problem's family may execute text."""
        may = problem.unsafe or problem.family in EVALUATES_ITS_OWN
        self._armed, self._refused = not may, False
        self._family = problem.family
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._armed = False
        if self._refused:
            raise Unusable(f"the scorer of {self._family} was about to execute text: refused") from None

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._armed and event == "exec" and getattr(arguments[0], "co_filename", "") == "<string>":
            self._refused = True
            raise _Refused
