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
from kat_ray.rewards.limits import Call, GradingLimits, Outcome, outcome_of

_LAST_CHARACTERS = 4000  # the answer stands at the end, or in a box; a loop beside it only costs time

_BOX_RE = re.compile(r"\\boxed\s*\{")
_BRACE_RE = re.compile(r"(?<!\\)[{}]")
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
        return outcome_of(self._child.ask(question(text, gold), within))

    def extract(self, text: str) -> str | None:
        """The text's last expression, as it stands there; None where there is none that can be read."""
        return self._child.ask(Call("expression", {"text": text})).value or None

    def close(self) -> None:
        """End the child; the next question starts another."""
        self._child.close()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def question(text: str, gold: str) -> Call:
    """What a child is asked of an answer."""
    return Call("math", {"text": text, "gold": gold})


def readable_part(text: str) -> str:
    r"""The end of a text, after its last complete `\boxed{...}` where that stands further up.

    A box is complete where its brace is closed within 4,000 characters. One pass over the text.
    """
    start = max(0, len(text) - _LAST_CHARACTERS)
    if (found := _last_box(text)) is None or found[0] >= start:
        return text[start:]
    return f"{text[found[0] : found[1]]}\n{text[max(start, found[1]) :]}"


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the last complete box begins, and the index behind its brace."""
    boxes = {box.end() - 1: box.start() for box in _BOX_RE.finditer(text)}  # by their braces
    last, opened = None, list[int]()
    for brace in _BRACE_RE.finditer(text) if boxes else ():
        at = brace.start()
        if brace.group() == "{":
            opened.append(at)
        elif opened:
            opening = opened.pop()
            begin = boxes.get(opening)
            if begin is not None and at - opening <= _LAST_CHARACTERS and (last is None or begin > last[0]):
                last = begin, at + 1
    return last


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
        right = _equal(asked["gold"], readable_part(asked["text"]))
        if not right:
            _check_memory()
        return right

    return grade


def load_expression() -> Callable[[Mapping[str, Any]], str]:
    """As `load`; what is returned gives the expression that would be graded, "" if there is none."""
    load()

    def extract(asked: Mapping[str, Any]) -> str:
        found = _expression(readable_part(asked["text"]))
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
