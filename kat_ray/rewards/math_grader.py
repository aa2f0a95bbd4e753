"""LaTeX answers graded by math-verify in a child process that can be ended.

The parent works from any thread of any process. The child, `python -m kat_ray.rewards.math_grader`, reads
`["gold", "text"]` and writes `true` or `false`, or reads `[null, "text"]` and writes the expression it would grade
(a string, "" if there is none), one JSON line each. An answer that takes longer than `SECONDS` is wrong, and the
child is replaced.
"""

from __future__ import annotations

import json
import logging
import select
import subprocess
import sys
from types import TracebackType
from typing import Any

from kat_ray.errors import UserError

SECONDS = 5.0  # for one answer; most take a millisecond
_START_SECONDS = 120.0  # importing sympy on a busy machine
_LAST_CHARACTERS = 4000  # the answer stands at the end; a loop before it only costs time


class MathGrader:
    """A child process that grades, one answer after the other; ended by `close` or a `with` block."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._child = self._start()

    def grade(self, text: str, gold: str) -> bool:
        """Whether the text's last expression equals the gold answer; False where either cannot be read."""
        return self._ask([gold, text[-_LAST_CHARACTERS:]]) == "true"

    def extract(self, text: str) -> str | None:
        """The text's last expression, as it stands there; None where there is none that can be read."""
        reply = self._ask([None, text[-_LAST_CHARACTERS:]])
        return json.loads(reply) or None if reply else None

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.communicate()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "kat_ray.rewards.math_grader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._child = child
        ready = self._read(_START_SECONDS)
        if ready != "ready":
            self.close()
            raise UserError(
                "evaluation.verifier = math: math-verify cannot be used here "
                f"({ready or 'its process did not start'}); pip install 'kat-ray[math]'"
            )
        return child

    def _ask(self, question: list[str | None]) -> str | None:
        """The child's reply; None when it is late or gone, and another child takes its place."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            reply = self._read(self._seconds)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.close()
            self._child = self._start()
        return reply

    def _read(self, seconds: float) -> str | None:
        """The child's next line; None when it is late or gone. Replies are short, so a line comes whole."""
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], seconds)
        line = self._child.stdout.readline() if readable else ""
        return line.strip() or None


def _equal(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    # A gold answer without delimiters is LaTeX too: "\\frac{1}{2}", "(1,2)".
    wrapped = gold if "$" in gold or "\\boxed" in gold or "\\[" in gold or "\\(" in gold else f"${gold}$"
    options: dict[str, Any] = {"parsing_timeout": None}
    return bool(verify(parse(wrapped, **options), parse(text, **options), timeout_seconds=None))


def _expression(text: str) -> str:
    """What math-verify reads as the answer: its last alternative is the text itself."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return str(found[-1]) if found else ""


def _serve() -> None:
    logging.disable(logging.WARNING)  # math-verify warns that the time limit is ours to set: it is
    try:
        _equal("1", "1")
    except ImportError as error:
        print(f"{error}", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        gold, text = json.loads(line)
        print(json.dumps(_expression(text) if gold is None else _equal(gold, text)), flush=True)


if __name__ == "__main__":
    _serve()
