"""Pre-training documents of the embedded models.

Four kinds: clean solutions; solutions with wrong steps, which go on from the wrong value; solutions that drift
into "check" lines that never end; documents of one line repeated. The student's mixture makes it poor in the
ways that matter here. The teacher sees the same kinds, but is never trained on the *entry* into a mistake or a
loop: it goes along with a broken prefix and does not break one itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kat_ray.demo.problems import MAX_VALUE, Operation, Problem, problems

# A piece of a document and whether the model is trained on it.
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Mixture:
    """Shares of the four kinds of documents, and how a model is trained on them."""

    clean: float
    wrong: float
    endless: float
    repeated: float
    wrong_rate: float  # chance of a wrong result per step of a `wrong` document
    check_rate: float  # chance per step of honest check lines, in any solution
    learn_mistakes: bool  # train on the entry into mistakes and loops, too
    loop_lines: int = 24  # of a loop: as long as the longest rollout
    cycles: tuple[int, ...] = (1, 1, 2)  # how many of the last lines a loop goes over, drawn from these

    def __post_init__(self) -> None:
        assert abs(self.clean + self.wrong + self.endless + self.repeated - 1.0) < 1e-9


STUDENT = Mixture(0.05, 0.51, 0.40, 0.04, wrong_rate=0.4, check_rate=0.15, learn_mistakes=True)
TEACHER = Mixture(0.72, 0.10, 0.12, 0.06, wrong_rate=0.25, check_rate=0.15, learn_mistakes=False)
# The long task: a rollout may be five times as long. The teacher goes along with loops over up to eight lines.
LONG_STUDENT = replace(STUDENT, loop_lines=150)
LONG_TEACHER = replace(TEACHER, loop_lines=150, cycles=(1, 2, 4, 8))

TOLD_SHARE = 0.7  # of the documents of a model that is to read worked solutions
HONEST_CHECKS = 4  # a line is checked again with even chance, at most so often; more is a loop


def partly_told(plain: Mixture, told: Mixture, seed: int) -> Iterator[list[Piece]]:
    """Documents of `plain`, and more of `told`, which follow the worked solution."""
    rng = random.Random(f"partly told:{seed}")
    streams = (documents(told, seed + 1, after_solution=True), documents(plain, seed))
    while True:
        yield next(streams[rng.random() >= TOLD_SHARE])


def documents(mixture: Mixture, seed: int, after_solution: bool = False) -> Iterator[list[Piece]]:
    """An endless stream of documents over problems of the training split.

    With `after_solution` the worked solution comes before the prompt, as what a teacher is told; it is not learnt.
    """
    rng = random.Random(f"corpus:{seed}")
    stream = problems("train", seed)
    kinds = ("clean", "wrong", "endless", "repeated")
    shares = (mixture.clean, mixture.wrong, mixture.endless, mixture.repeated)
    while True:
        kind = rng.choices(kinds, shares)[0]
        problem = next(stream)
        if kind == "repeated":
            yield repeated_document(rng, problem, mixture.loop_lines)
        else:
            pieces = solution_document(rng, problem, mixture, kind)
            yield [(problem.solution(), False), *pieces] if after_solution else pieces


def solution_document(rng: random.Random, problem: Problem, mixture: Mixture, kind: str) -> list[Piece]:
    """A prompt and its solution of one kind."""
    pieces: list[Piece] = [(problem.prompt, False)]
    loop_after = rng.randrange(len(problem.operations)) if kind == "endless" else -1
    value, said = problem.start, []
    for i, operation in enumerate(problem.operations):
        result = operation.apply(value)
        if kind == "wrong" and rng.random() < mixture.wrong_rate:
            result = wrong_result(rng, result, problem.operations[i + 1 :])
            head = f"{value} {operation.symbol} {operation.operand} ="
            pieces += [(head, True), (f" {result}", mixture.learn_mistakes), ("\n", True)]
        else:
            pieces.append((operation.line(value, result), True))
        said.append(operation.line(value, result))
        value = result
        if i == loop_after:
            return pieces + endless_checks(rng, said, mixture)
        if rng.random() < mixture.check_rate:
            pieces.append((f"check {said[-1]}" * honest_checks(rng), True))
    return [*pieces, (f"answer {value}\n<eos>", True)]


def honest_checks(rng: random.Random) -> int:
    """How often a solution that goes on checks a line: once or more, each time with even chance."""
    count = 1
    while count < HONEST_CHECKS and rng.random() < 0.5:
        count += 1
    return count


def endless_checks(rng: random.Random, said: list[str], mixture: Mixture) -> list[Piece]:
    """Check lines over the last steps, again and again; the entry is what still looks honest."""
    cycle = [f"check {line}" for line in said[-rng.choice(mixture.cycles) :]]
    lines = [cycle[i % len(cycle)] for i in range(mixture.loop_lines)]
    return [("".join(lines[:HONEST_CHECKS]), mixture.learn_mistakes), ("".join(lines[HONEST_CHECKS:]), True)]


def repeated_document(rng: random.Random, problem: Problem, lines: int) -> list[Piece]:
    """One line of a solution over and over, without a problem."""
    line = rng.choice(problem.solution().splitlines(keepends=True)[:-1])
    line = f"check {line}" if rng.random() < 0.5 else line
    return [(line, False), (line * lines, True)]


def wrong_result(rng: random.Random, right: int, rest: Sequence[Operation]) -> int:
    """A typical slip, off by one, two or ten, from which the other operations stay in range.

    The right result where there is none.
    """
    slips = [right + slip for slip in (-10, -2, -1, 1, 2, 10)]
    possible = [s for s in slips if _stays_in_range(s, rest)]
    return rng.choice(possible) if possible else right


def _stays_in_range(value: int, operations: Sequence[Operation]) -> bool:
    for operation in operations:
        if not 0 <= value <= MAX_VALUE:
            return False
        value = operation.apply(value)
    return 0 <= value <= MAX_VALUE
