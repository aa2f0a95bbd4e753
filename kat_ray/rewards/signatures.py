"""Reward functions as other projects write them, told apart by their parameters; used in grading children only.

| with the parameter | written for | called with |
| --- | --- | --- |
| `completions` | TRL | lists of one: prompts, completions, completion_ids and every column of the data by name |
| `solution_str` | verl | data_source, solution_str, ground_truth, extra_info |
| `queries` | OpenRLHF | lists of one: queries (prompt and answer), prompts, labels |

Each call is about one answer, so that what one answer does to a function is that answer's affair alone. A function
without `**kwargs` gets what it has parameters for.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kat_ray.rewards.limits import unusable


def _to_nowhere(*_: Any, **__: Any) -> None:
    """TRL logs what a function hands over here; this project has its own metrics of rewards."""


# What TRL's trainer gives to functions that ask for it, and nobody here has: a column of the data goes before it.
_OF_TRAINER = {"trainer_state": None, "log_extra": _to_nowhere, "log_metric": _to_nowhere}


class Unusable(Exception):
    """A function that cannot be called, or a value that is no reward; its text says all."""


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all calls of all functions: a client's session, which a module may hold, belongs to its loop."""
    return asyncio.new_event_loop()


class RewardFunction:
    """A function of a user's file. Called with a call's arguments (`Task.arguments`) it gives the reward.

    None is a reward that was left out on purpose.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        value_of: Callable[[Any], float | None],
    ) -> None:
        self._function, self._arguments_of, self._value_of = function, arguments_of, value_of

    @property
    def is_async(self) -> bool:
        """Whether several calls can be under way at once."""
        called = type(self._function).__call__
        return inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(called)

    def __call__(self, asked: Mapping[str, Any]) -> float | None:
        result = self._function(**self._arguments_of(asked))
        if inspect.isawaitable(result):
            result = event_loop().run_until_complete(_awaited(result))
        return self._value_of(result)

    async def awaited(self, asked: Mapping[str, Any]) -> float | None:
        """As a call, within `event_loop`."""
        return self._value_of(await self._function(**self._arguments_of(asked)))


def load(name: str) -> RewardFunction:
    """Import `file.py:name`; `Unusable` where the file lacks the name, or it cannot be called."""
    path, _, attribute = name.rpartition(":")
    module = _module(Path(path).expanduser())
    if not hasattr(module, attribute):
        raise Unusable(f"{path} defines no {attribute!r}")
    function = getattr(module, attribute)
    if not callable(function):
        raise Unusable(f"{attribute} is {type(function).__name__}, not a function")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise Unusable(f"{attribute} has no parameters that can be read: {error}") from error
    kinds = {"completions": (_for_trl, _of_list), "solution_str": (_for_verl, _of_score)}
    kinds["queries"] = (_for_openrlhf, _of_rewards)
    known = [kind for parameter, kind in kinds.items() if parameter in parameters]
    if len(known) != 1:
        raise Unusable(
            f"{attribute}({', '.join(map(str, parameters.values()))}): a reward function takes `completions` (and "
            "`prompts` and columns, as for TRL), `solution_str` (and `data_source`, `ground_truth`, `extra_info`, "
            "as for verl), or `queries` (and `prompts`, `labels`, as for OpenRLHF)"
        )
    ((arguments_of, value_of),) = known
    return RewardFunction(function, lambda asked: _fitting(parameters, arguments_of(asked)), value_of)


def _module(path: Path) -> Any:
    """The module of a file; two functions of one file share it. What lies beside the file can be imported by it."""
    name = f"reward_functions.{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Unusable(f"{path}: there is no such file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


async def _awaited(result: Any) -> Any:
    return await result


def _fitting(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of what could be given, what a function takes."""
    kinds = inspect.Parameter
    if "completions" in parameters:
        given = {name: value for name, value in _OF_TRAINER.items() if name in parameters} | dict(given)
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
        taken = given
    else:
        taken = {name: value for name, value in given.items() if name in parameters}
    variable = (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    needed = [n for n, p in parameters.items() if p.default is kinds.empty and p.kind not in variable]
    lacking = [name for name in needed if name not in given]
    if lacking:
        raise Unusable(
            f"takes {', '.join(lacking)}, and the data has no such column; what there is: {', '.join(given)}"
        )
    return taken


def _for_trl(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's completion is a list of one message, as its prompt is a list of messages."""
    is_chat = not isinstance(asked["prompt"], str)
    completion = [{"role": "assistant", "content": asked["text"]}] if is_chat else asked["text"]
    columns = {"answer": [asked["answer"]]} if asked["answer"] is not None else {}
    columns |= {name: [value] for name, value in asked["columns"].items()}
    return columns | {
        "prompts": [asked["prompt"]],
        "completions": [completion],
        "completion_ids": [asked["token_ids"]],
    }


def _for_verl(asked: Mapping[str, Any]) -> dict[str, Any]:
    columns = asked["columns"]
    return {
        "data_source": columns.get("data_source", asked["source"]),
        "solution_str": asked["text"],
        "ground_truth": asked["answer"],
        "extra_info": columns.get("extra_info"),
    }


def _for_openrlhf(asked: Mapping[str, Any]) -> dict[str, Any]:
    prompt = asked["prompt_text"]
    return {"queries": [prompt + asked["text"]], "prompts": [prompt], "labels": [asked["answer"]]}


def _of_list(result: Any) -> float | None:
    if result is None or isinstance(result, str | bytes | Mapping):
        raise Unusable(f"returned {_shown(result)}: a list with a number for each completion is needed")
    try:
        values = list(result)
    except TypeError:
        raise Unusable(f"returned {_shown(result)}: a list with a number for each completion is needed") from None
    if len(values) != 1:
        raise Unusable(f"returned {len(values)} values for 1 completion: {_shown(result)}")
    return _number(values[0])


def _of_score(result: Any) -> float | None:
    if isinstance(result, Mapping):
        if "score" not in result:
            raise Unusable(f"returned {_shown(result)}: there is no 'score' in it")
        return _number(result["score"])
    return _number(result)


def _of_rewards(result: Any) -> float | None:
    if isinstance(result, Mapping):
        if "rewards" not in result:
            raise Unusable(f"returned {_shown(result)}: there is no 'rewards' in it")
        return _of_list(result["rewards"])
    return _of_list(result)


def _number(value: Any) -> float | None:
    """A number that can be a reward, one of numpy's or torch's too; None stays None."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise Unusable(f"returned {_shown(value)}, which is no number")
    number = float(value)
    if (why := unusable(number)) is not None:
        raise Unusable(f"returned {number:g}, {why}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
