r"""LaTeX answers graded by math-verify in a child process that can be ended, within a bound of time and of memory.

`MathGrader` is the parent's side; `load` and `load_expression` are what the child runs (kat_ray.rewards.serve).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kat_ray.rewards.child import START_SECONDS, GradingChild
from kat_ray.rewards.limits import Call, Fault, GradingLimits, Outcome, Reply

_LAST_CHARACTERS = 4000  # the answer stands at the end, or in a box; a loop beside it only costs time

_BOX_RE = re.compile(r"\\boxed\s*\{")
_BRACES_RE = re.compile(r"(?<!\\)\{[^{}]*\}")
# What marks a part of a text as LaTeX. A backslash before it makes it another sign: \$ is a dollar, \\[2pt] a line.
_DELIMITED = r"(?<!\\)\$.+?(?<!\\)\$|(?<!\\)\\\(.+?(?<!\\)\\\)|(?<!\\)\\\[.+?(?<!\\)\\\]"
_DELIMITED_RE = re.compile(_DELIMITED, re.DOTALL)
# The height of a matrix's line, which math-verify takes for a factor of the next entry.
_LINE_HEIGHT_RE = re.compile(r"\\\\\s*\[\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in|mu|bp|pc)\s*\]")


class MathGrader:
    """A child process that grades, one answer after the other; ended by `close` or a `with` block.

    It is started by the first question: `UserError` where math-verify cannot be used.
    """

    def __init__(self, limits: GradingLimits | None = None) -> None:
        self._child = GradingChild(limits or GradingLimits(), ["math", "expression"])

    def grade(self, text: str, gold: str, within: float = START_SECONDS) -> Outcome:
        """Whether the text's last expression equals the gold answer; wrong where either cannot be read.

        `within` bounds the seconds in all, the child's start included. `NOT_REACHED` if that was too short.
        """
        return verdict(self._child.ask(question(text, gold), within))

    def extract(self, text: str) -> str | None:
        """The text's last expression, as it stands there; None where there is none that can be read."""
        return self._child.ask(Call("expression", {"text": readable_part(text)})).value or None

    def close(self) -> None:
        """End the child; the next question starts another."""
        self._child.close()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def question(text: str, gold: str) -> Call:
    """What a child is asked of an answer."""
    return Call("math", {"text": readable_part(text), "gold": gold})


def verdict(reply: Reply) -> Outcome:
    """What a child's reply says of the answer."""
    if reply.fault is Fault.NOT_REACHED:
        return Outcome.NOT_REACHED
    if reply.fault is not None:
        return Outcome.RAN_OUT
    return Outcome.RIGHT if reply.value else Outcome.WRONG


def readable_part(text: str) -> str:
    r"""The end of a text, after its last complete `\boxed{...}` where that stands further up."""
    start = max(0, len(text) - _LAST_CHARACTERS)
    for box in reversed(list(_BOX_RE.finditer(text))):
        end = _closing_brace(text, box.end())
        if end is not None:
            return text[start:] if box.start() >= start else f"{text[box.start() : end]}\n{text[max(start, end) :]}"
    return text[start:]


def _closing_brace(text: str, start: int) -> int | None:
    """Index behind the brace that closes the one before `start`; None where that is not near, or not there."""
    depth = 1
    for i in range(start, min(len(text), start + _LAST_CHARACTERS)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if not depth:
                return i + 1
    return None


def as_latex(gold: str) -> str:
    r"""A gold answer between delimiters: its own, or dollars around the whole.

    Its own are a pair, unescaped, at both ends, or around a part of a sentence; `\$18.90`, `\\[2pt]` in a matrix
    and a pair within braces are none. `\boxed{...}` is taken as it is.
    """
    gold = gold.strip()
    outside, deeper = gold, 1
    while deeper:
        outside, deeper = _BRACES_RE.subn("", outside)
    if _DELIMITED_RE.fullmatch(gold) or _DELIMITED_RE.search(outside) or "\\boxed" in outside:
        return gold
    escaped = re.sub(r"(?<!\\)\$", r"\\$", gold)  # a lone dollar is a price
    return f"${escaped}$"


def _equal(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    options: dict[str, Any] = {"parsing_timeout": None}
    ours, theirs = (_LINE_HEIGHT_RE.sub(r"\\\\", part) for part in (as_latex(gold), text))
    return bool(verify(parse(ours, **options), parse(theirs, **options), timeout_seconds=None))


def _expression(text: str) -> str:
    """What math-verify reads as the answer: its last alternative is the text itself."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return str(found[-1]) if found else ""


def load() -> Callable[[Mapping[str, Any]], bool]:
    """Import math-verify; what is returned grades `text` against `gold`. A MemoryError where memory ran out."""
    logging.disable(logging.WARNING)  # math-verify warns that the time limit is ours to set: it is
    _equal("1", "1")

    def grade(asked: Mapping[str, Any]) -> bool:
        right = _equal(asked["gold"], asked["text"])
        if not right:
            _check_memory()
        return right

    return grade


def load_expression() -> Callable[[Mapping[str, Any]], str]:
    """As `load`; what is returned gives the expression that would be graded, "" if there is none."""
    load()

    def extract(asked: Mapping[str, Any]) -> str:
        found = _expression(asked["text"])
        _check_memory()
        return found

    return extract


def _check_memory() -> None:
    """MemoryError where this process once held half of its memory.

    What grows by doubling fails from there on, and math-verify takes most errors, a MemoryError too, for "not
    equal".
    """
    import resource

    status = Path("/proc/self/status")
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY or not status.exists():  # no Linux
        return
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    if peak is not None and int(peak[1]) * 1024 > limit // 2:
        raise MemoryError
