"""When a run is evaluated, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kat_ray.config import EvaluationConfig
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.types.records import DEFAULT_TEACHER

_NAMED = "teacher_"


def teacher_key(name: str) -> str:
    """What a teacher's result is called among those of a run."""
    return "teacher" if name == DEFAULT_TEACHER else f"{_NAMED}{name}"


def is_teacher(key: str) -> bool:
    """Whether a result is that of a teacher."""
    return key == "teacher" or key.startswith(_NAMED)


class EvaluationSchedule:
    """Before training, every so many steps, and after the last one."""

    def __init__(
        self,
        evaluate: Callable[[int], EvalResult] | None,
        evaluation: EvaluationConfig,
        *,
        steps: int,
        phase: Callable[[str], object],
        on_result: Callable[[int, EvalResult], object],
    ) -> None:
        """`evaluate(k)` scores k answers of what the samplers hold; None: there is nothing to evaluate on.

        `phase` shows what is done; `on_result(step, result)` takes what came out.
        """
        self._evaluate, self._every, self._steps = evaluate, evaluation.every, steps
        self._k, self._every_k = evaluation.k, evaluation.every_k or evaluation.k
        self._phase, self._on_result = phase, on_result
        self.results: dict[str, EvalResult] = {}  # "before", "after", and those of teachers
        self.evaluated: int | None = None  # steps done at the last one

    def teacher(self, evaluate: Callable[[int], EvalResult], key: str = "teacher") -> EvalResult:
        """A teacher's own score, under its `teacher_key`: a wrong template or grader shows there."""
        name = key.removeprefix(_NAMED)
        self._phase("evaluating the teacher" if name == key else f"evaluating the teacher {name}")
        result = self.results[key] = evaluate(self._k)
        return result

    def run_if_due(self, done: int) -> None:
        """Evaluate the student after `done` steps, where that is due and was not done."""
        last = done == self._steps
        whole = done == 0 or last
        due = whole or bool(self._every and done % self._every == 0)
        if self._evaluate is None or not due or self._is_done(done, whole):
            return
        when = "after training" if last else f"after step {done}" if done else "before training"
        self._phase(f"evaluating {when}")
        result = self.results["after"] = self._evaluate(self._k if whole else self._every_k)
        if done == 0:
            self.results["before"] = result
        self.evaluated = done
        self._on_result(done, result)

    def _is_done(self, done: int, whole: bool) -> bool:
        """Resumed with fewer steps, a run may end where it was evaluated along the way, with fewer answers."""
        newest = self.results.get("after")
        return self.evaluated == done and (not whole or newest is None or newest.k >= self._k)

    def metric(self, done: int) -> float | None:
        """What the best checkpoint is chosen by; None where these weights were not evaluated."""
        return self.results["after"].avg_at_k if self.evaluated == done and "after" in self.results else None

    def go_back(self, results: Mapping[str, EvalResult], evaluated: int | None) -> None:
        """The run goes on from a checkpoint that had these."""
        teachers = {name: result for name, result in self.results.items() if is_teacher(name)}
        self.results, self.evaluated = teachers | dict(results), evaluated  # teachers do not change
