"""What a rollout is worth: the section `reward`."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from kat_ray.config.cluster import Resumable, Section
from kat_ray.config.local_paths import ADVICE, is_url
from kat_ray.rewards.limits import GradingLimits
from kat_ray.rewards.scoring import RewardRules
from kat_ray.rewards.source import BUILT_IN, VERIFIERS, file_and_name


class RewardConfig(Section):
    """What a rollout of training is worth to objective.rl: a sum of reward functions (docs/rl.md)."""

    functions: dict[str, float] = Field({})
    """Reward functions and their weights, such as {"my_rewards.py:score": 1.0, format: 0.1}: a file of Python,
    relative to the working directory, and a name in it, with the signature of TRL, verl or OpenRLHF; `integer` or
    `math`, 1 or 0 by the gold answer, whichever evaluation.verifier is; `format`, 1 where `format_pattern` is found
    in the answer. {} is evaluation.verifier alone."""
    format_pattern: str | None = Field(None, min_length=1)
    """Regular expression of `format`; a dot matches line breaks too. It is searched for: ^ and $ tie it to the
    ends of the answer."""
    workers: Resumable[int] = Field(2, ge=1)
    """Child processes that call reward functions at the same time."""
    calls_at_once: Resumable[int] = Field(16, ge=1)
    """Calls of an `async` function that a worker has under way at once, such as requests to a judge; of others it
    makes one after the other."""
    seconds: Resumable[float] = Field(5.0, gt=0)
    """Seconds after which a call about one answer is ended, with its process; the answer is not graded. One of an
    `async` function is made once more before that, alone."""
    step_seconds: Resumable[float] = Field(60.0, gt=0)
    """Seconds that all calls of one step (of each batch that it samples) may take once its rollouts have ended;
    answers that are not reached are not graded."""
    memory_gib: Resumable[float] = Field(1.0, ge=0.25)
    """Memory of one child process, GiB, with all that the functions' files import."""
    max_error_share: Resumable[float] = Field(0.05, ge=0, le=1)
    """Share of a step's answers, all its batches together, that may have no reward, by an error or a timeout of a
    function or a verifier, before the run ends; a single one ends it only where this is 0."""
    threshold: float | None = None
    """The weighted sum becomes 1 where it is at least this, and 0 elsewhere; null takes the sum as it is."""

    @model_validator(mode="after")
    def _functions_are_known(self) -> RewardConfig:
        for name in self.functions:
            parts = file_and_name(name)
            if parts is not None and is_url(parts[0]):
                raise ValueError(f"functions.{name}: {ADVICE}")
            if parts is None and name not in BUILT_IN:
                raise ValueError(
                    f"functions.{name}: must be FILE.py:NAME, such as my_rewards.py:score, or one of "
                    f"{', '.join(BUILT_IN)}"
                )
        if self.functions and not any(self.functions.values()):
            raise ValueError("functions: every weight is 0, so that no answer is worth anything")
        return self

    @model_validator(mode="after")
    def _pattern_is_one(self) -> RewardConfig:
        if "format" in self.functions and self.format_pattern is None:
            raise ValueError(
                "functions.format: needs format_pattern, such as '^<think>.*</think>', which it looks for"
            )
        try:
            re.compile(self.format_pattern or "", re.DOTALL)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"format_pattern = {self.format_pattern!r}: is no regular expression: {error}"
            ) from error
        return self

    @property
    def verifiers(self) -> list[str]:
        """Functions that grade against a gold answer."""
        return [name for name in self.functions if name in VERIFIERS]

    @property
    def rules(self) -> RewardRules:
        """What scores answers by it."""
        limits = GradingLimits(
            self.workers, self.seconds, self.step_seconds, self.memory_gib, "reward.", self.calls_at_once
        )
        return RewardRules(self.functions, self.format_pattern or "", limits, self.threshold)
