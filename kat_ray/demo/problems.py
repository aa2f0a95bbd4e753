"""The embedded task: a start value and a chain of small operations, solved step by step.

    start 37 add 5 take 8 double solve
    37 + 5 = 42
    42 - 8 = 34
    34 * 2 = 68
    answer 68

Every value stays within 0..MAX_VALUE. Train and held-out problems are disjoint by construction: a hash of the
problem's text decides the split, so no seed can bring one into the other.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_VALUE = 149
MIN_STEPS, MAX_STEPS = 5, 8
HELDOUT_SHARE = 16  # one problem in so many is held out

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Operation:
    """One operation: `symbol` is +, - or *."""

    symbol: str
    operand: int

    def apply(self, value: int) -> int:
        """The value after this operation."""
        if self.symbol == "+":
            return value + self.operand
        if self.symbol == "-":
            return value - self.operand
        return value * self.operand

    def words(self) -> str:
        """The operation as the prompt says it."""
        if self.symbol == "*":
            return {2: "double", 3: "triple"}[self.operand]
        return f"{'add' if self.symbol == '+' else 'take'} {self.operand}"

    def line(self, value: int, result: int) -> str:
        """One written-out step; `result` need not be right."""
        return f"{value} {self.symbol} {self.operand} = {result}\n"


@dataclass(frozen=True)
class Problem:
    """A start value and the operations on it, in order."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"start {self.start} {' '.join(o.words() for o in self.operations)} solve\n"

    @property
    def answer(self) -> int:
        """The gold answer."""
        value = self.start
        for operation in self.operations:
            value = operation.apply(value)
        return value

    @property
    def split(self) -> Split:
        """Which split this problem belongs to, from a hash of its text."""
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"

    def solution(self) -> str:
        """The clean written-out solution."""
        value, lines = self.start, []
        for operation in self.operations:
            result = operation.apply(value)
            lines.append(operation.line(value, result))
            value = result
        return "".join(lines) + f"answer {value}\n"


def random_problem(rng: random.Random) -> Problem:
    """A problem of either split."""
    value = start = rng.randint(1, 99)
    operations = []
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        operation = _random_operation(rng, value)
        value = operation.apply(value)
        operations.append(operation)
    return Problem(start, tuple(operations))


def _random_operation(rng: random.Random, value: int) -> Operation:
    while True:
        if rng.random() < 0.12:
            operation = Operation("*", rng.choice((2, 3)))
        else:
            operation = Operation(rng.choice("+-"), rng.randint(1, 9))
        if 0 <= operation.apply(value) <= MAX_VALUE:
            return operation


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split; the same seed gives the same stream."""
    rng = random.Random(f"{split}:{seed}")
    seen: set[str] = set()
    while True:
        problem = random_problem(rng)
        if problem.split == split and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def write_jsonl(path: Path, split: Split, count: int, seed: int, solutions: bool = False) -> None:
    """Write `count` problems as lines of `{"id", "prompt", "answer"}`, and "solution" where asked for."""
    stream = problems(split, seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            problem = next(stream)
            row = {"id": f"{split}:{i}", "prompt": problem.prompt, "answer": str(problem.answer)}
            if solutions:
                row["solution"] = problem.solution()
            file.write(json.dumps(row) + "\n")
