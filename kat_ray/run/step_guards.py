"""Checks after every step: skipped steps in a row, and the collapse guards. Ends a run that is lost.

What the KL does not see of the student is said here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.batch_dump import StepBatch, dump_batch
from kat_ray.run.collapse_guards import CollapseGuards
from kat_ray.run.held_out import HeldOutWatch
from kat_ray.run.max_rl_report import MaxRlReport
from kat_ray.run.refill import RefillReport
from kat_ray.run.skipped_steps import SkipGuard
from kat_ray.run.step_result import StepResult
from kat_ray.run.tail_report import TailReport


class StepGuards:
    """Call order for each step: `check` before its metrics are written, `end_if_due` after."""

    def __init__(self, config: Config, run_dir: Path, note: Callable[[str], None]) -> None:
        self._dumps = run_dir / "dumps"
        self._note = note  # shows a line that stays
        guards = config.guards
        if not config.objective.opd.weight:  # a student that learns from rewards alone may leave the teacher
            guards = guards.model_copy(update={"kl_rise": None, "kl_fall": None})
        self._guards = CollapseGuards(guards, (config.student.dtype, config.learner.dtype))
        self._tail = TailReport(config.rollout.top_k_logprobs)
        self._refill, self._max_rl = RefillReport(config), MaxRlReport(config)
        self._held_out, self._leak = HeldOutWatch(), HeldOutWatch()
        self._has_context = any(teacher.context is not None for teacher in config.used_teachers.values())
        self._skips = SkipGuard(config.learner.max_skipped_steps)
        self._step: StepResult | None = None  # the one that was checked last
        self._stop: str | None = None
        self._stop_fields: tuple[str, ...] = ()
        self._skips_due = False

    @property
    def skipped_steps(self) -> int:
        """Steps of the run that were skipped."""
        return self._skips.total

    def check(self, step: StepResult) -> dict[str, float]:
        """Take the next step; returns the metric to write with its own."""
        self._held_out.observe(step.reward_mean)
        if self._has_context and step.kl_mean is not None:
            self._leak.observe(-step.kl_mean)
        self._step = step = replace(step, held_out_fall=self._held_out.take(), leak_fall=self._leak.take())
        report = step.learner
        self._skips_due = self._skips.observe(report.skipped, report.tokens)
        if report.skipped and self._skips.in_a_row == 1:
            self._note(f"step {step.done} was skipped: its loss or gradient was not finite")
        for line in (self._tail.observe(step), self._refill.observe(step), self._max_rl.observe(step)):
            if line is not None:
                self._note(line)
        verdict = self._guards.observe(step)
        for text in verdict.notes:
            self._note(text)
        self._stop, self._stop_fields = verdict.stop, verdict.stop_fields
        return {"guards/fired": float(verdict.fired)}

    def evaluated(self, result: EvalResult) -> None:
        """Take an evaluation; what it shows is judged with the next step, or by `last_evaluation`."""
        for watch in (self._held_out, self._leak):
            watch.evaluated([right / result.k for right in result.right])

    def last_evaluation(self, done: int) -> None:
        """Say what the evaluation after the last step showed: no step follows it, and there is none to end."""
        for name, watch in (("held_out_fall", self._held_out), ("context_leak", self._leak)):
            fall = watch.take()
            if fall is not None and (text := self._guards.judge(name, done, fall)) is not None:
                self._note(text)

    def end_if_due(self, batch: Callable[[], StepBatch | None], save: Callable[[], object]) -> None:
        """UserError if the run has to end after this step.

        Before it, `save` is called for a checkpoint of the weights, which no skipped step has touched, and `batch`
        for the batch to be dumped, if there still is one.
        """
        if self._step is None or (not self._skips_due and self._stop is None):
            return
        save()
        if self._skips_due:
            content = batch()
            done, report = self._step.done, self._step.learner.to_metrics()
            dump = None if content is None else dump_batch(self._dumps, done, content, report)
            raise self._skips.error(done, dump)
        why = ", ".join(f"{field} = stop" for field in self._stop_fields)
        raise UserError(f"{self._stop}. The run was ended for {why}, after a checkpoint")

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "guards": self._guards.state(),
            "skips": self._skips.state(),
            "tail": self._tail.state(),
            "held_out": self._held_out.state(),
            "leak": self._leak.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._guards.load_state(state["guards"])
        self._skips.load_state(state["skips"])
        self._tail.load_state(state["tail"])
        self._held_out.load_state(state["held_out"])
        self._leak.load_state(state["leak"])
