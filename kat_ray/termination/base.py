"""The interface of a termination rule.

A rule has two halves. A `RolloutTracker` belongs to one rollout and sees its tokens with their reverse KL and
other features in order; it decides where the rollout is cut, and may weigh its tokens in the loss. A
`TerminationRule` belongs to the run and holds what rollouts share (the calibration); it may bound the length of a
step's rollouts. Neither knows of actors, chunks or clocks: the same values give the same outcome in whatever pieces
they arrive.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kat_ray.termination.settings import RuleSettings
from kat_ray.types.records import DEFAULT_TEACHER, FloatArray, IntArray

_NONE = np.zeros(0, dtype=np.float32)


class NewTokens(NamedTuple):
    """The next tokens of one rollout, in order. Arrays of n values; a feature that is not known may be empty."""

    d: FloatArray  # reverse KL in nats; NaN where the teacher gave no finite value
    token_ids: IntArray = np.zeros(0, dtype=np.int32)
    overlap: FloatArray = _NONE  # share of the student's top-16 ids among the teacher's top-16
    teacher_max: FloatArray = _NONE  # the teacher's largest probability
    teacher_entropy: FloatArray = _NONE  # nats
    student_entropy: FloatArray = _NONE  # nats
    student_tail: FloatArray = _NONE  # probability mass outside the student's top k


@dataclass(frozen=True)
class RunFacts:
    """What a rule may know of the run it is made for."""

    seed: int
    max_tokens: int  # rollout.max_tokens: the longest a rollout can get


@dataclass(frozen=True)
class RunScale:
    """What a rule's settings are held against before a run, to warn of those that would do nothing in it."""

    steps: int
    max_tokens: int  # rollout.max_tokens
    rollouts_per_step: int


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

    @property
    def weights(self) -> Sequence[float] | None:
        """Weight in the loss of every token seen, 0 to 1; None weighs all alike. Read at the rollout's end."""

    def observe(self, tokens: NewTokens) -> Cut | None:
        """Take the next tokens in order; return the decision once it is made."""


@dataclass(frozen=True)
class Finished:
    """What a rule learns from a rollout that ended."""

    minimum: float | None  # m(y), nats
    cut: bool
    probe: bool
    length: int = 0  # tokens scored
    full: bool = False  # it ran into its token limit
    evidence: Any = None  # what its tracker left for the calibration; None of those that have none to leave
    teacher: str = DEFAULT_TEACHER  # whose scores it was judged by: a rule is given those of one teacher only


class TerminationRule(Protocol):
    """A rule's state for the run."""

    @property
    def threshold(self) -> float | None:
        """The threshold that rollouts starting now get, nats; None while inactive."""

    @property
    def samples(self) -> int:
        """Rollouts in the calibration."""

    @property
    def budget(self) -> int | None:
        """Most tokens of a rollout that starts now, probes excepted; None leaves it at rollout.max_tokens."""

    def start_step(self, step: int) -> None:
        """Fix threshold and budget for the rollouts of optimiser step `step` (0-based)."""

    def begin(self, start: RolloutStart) -> RolloutTracker:
        """Start a rollout under the present threshold."""

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Take the rollouts that ended in the step, in a fixed order."""

    def state(self) -> dict[str, Any]:
        """All that a rule of the same settings needs to go on between two steps as this one would.

        What JSON gives back as it was: dictionaries with string keys, lists, strings, numbers, None.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; `UserError` where it is none of this rule's."""


class Effect(enum.Enum):
    """The most that a rule does to a rollout which is no probe."""

    NOTHING = enum.auto()
    WEIGHS = enum.auto()  # its tokens in the loss; it goes on to its own end
    BOUNDS = enum.auto()  # its length, by a budget that is fixed before it starts
    CUTS = enum.auto()  # it ends where the rule decides


def _no_values(settings: Any, max_tokens: int) -> Mapping[str, Sequence[Any]]:
    return {}


def _no_warnings(settings: Any, run: RunScale) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class RuleType:
    """A kind of rule: its settings, with a field `rule: Literal["name"]`, and what makes it from them.

    `make(settings, facts)` is called once a run, in the monitor (and once before, to see that it works). The other
    fields say what commands and records may expect of the rule; left out, it is one that cuts, is active from the
    first step on, and may read any feature.
    """

    settings: type[RuleSettings]
    make: Callable[[Any, RunFacts], TerminationRule]
    effect: Effect = Effect.CUTS
    calibrates: bool = False  # it does nothing to rollouts that start while its threshold is None
    by_windows: bool = False  # it divides rollouts as kat.py defines; its settings are `KatParameters`
    reads: tuple[str, ...] = NewTokens._fields[1:]  # fields of `NewTokens` beside d that its trackers use
    needs: tuple[str, ...] = ()  # those of them without which a replay of it would mean nothing
    copies: str | None = None  # the setting with the directory of the run whose lengths it copies, for a control
    # (settings, rollout.max_tokens) -> values of settings that `kat-ray replay` tries where the user names none
    sweep: Callable[[Any, int], Mapping[str, Sequence[Any]]] = _no_values
    # (settings, run) -> a line for each setting that does nothing in that run, or not what it seems to
    warnings: Callable[[Any, RunScale], Iterable[str]] = _no_warnings

    @property
    def name(self) -> str:
        """What `termination.rule` calls it."""
        return str(self.settings.model_fields["rule"].default)
