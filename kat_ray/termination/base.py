"""The interface of a termination rule.

A rule has two halves. A `RolloutTracker` belongs to one rollout and sees its reverse KL values in order;
it decides where the rollout is cut. A `TerminationRule` belongs to the run and holds what rollouts share
(the calibration). Neither knows of actors, chunks or clocks: the same d's give the same outcome however
they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kat_ray.termination.settings import RuleSettings


@dataclass(frozen=True)
class Cut:
    """Where a rule ends a rollout.

    `at` is the first token not kept; `confirmed` is the number of tokens the rule had seen when it
    decided, `at <= confirmed`.
    """

    at: int
    confirmed: int


@dataclass(frozen=True)
class RolloutStart:
    """What a rule may know of a rollout before its first token. A probe is followed to its own end."""

    rollout_id: int
    probe: bool


class RolloutTracker(Protocol):
    """A rule's state for one rollout."""

    @property
    def threshold(self) -> float | None:
        """Threshold in nats, fixed when the rollout started; None while the rule is inactive."""

    @property
    def cut(self) -> Cut | None:
        """The decision, once made. It never changes afterwards."""

    @property
    def minimum(self) -> float | None:
        """m(y): smallest window mean up to the decision (of a probe: of all), nats; None without a window."""

    @property
    def seen(self) -> int:
        """Number of d's observed: up to the decision, or all of a probe's."""

    def observe(self, d: Sequence[float], token_ids: Sequence[int]) -> Cut | None:
        """Take the next tokens in order, d in nats beside their ids; return the decision once it is made."""


@dataclass(frozen=True)
class Finished:
    """A rollout's contribution to the calibration."""

    minimum: float | None
    cut: bool
    probe: bool


class TerminationRule(Protocol):
    """A rule's state for the run."""

    @property
    def threshold(self) -> float | None:
        """The threshold that rollouts starting now get, nats; None while inactive."""

    @property
    def samples(self) -> int:
        """Rollouts in the calibration."""

    def start_step(self, step: int) -> None:
        """Fix the threshold for the rollouts of optimiser step `step` (0-based)."""

    def begin(self, start: RolloutStart) -> RolloutTracker:
        """Start a rollout under the present threshold."""

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Take the rollouts that ended in the step, in a fixed order."""


@dataclass(frozen=True)
class RuleType:
    """A kind of rule: its settings, with a field `rule: Literal["name"]`, and what makes it from them.

    `make(settings, seed)` is called once a run, in the monitor.
    """

    settings: type[RuleSettings]
    make: Callable[[Any, int], TerminationRule]

    @property
    def name(self) -> str:
        """What `termination.rule` calls it."""
        return str(self.settings.model_fields["rule"].default)
