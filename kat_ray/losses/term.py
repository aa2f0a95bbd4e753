"""A term of the loss: what it gets of the student, what it gives back."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class TokenRows(NamedTuple):
    """What is given for T tokens, a row each; the student's top-k ids define the events."""

    topk_ids: Tensor  # [T, k] int64
    teacher_topk: Tensor  # [T, k] float32, log-probabilities at these ids
    teacher_tail: Tensor  # [T] float32, log of the mass of all other ids that are no stop ids
    teacher_stop: (
        Tensor  # [T] float32, log of the mass of the stop ids outside the top k; -inf where there are none
    )
    token_ids: Tensor  # [T] int64, the sampled tokens
    sampled_logprobs: Tensor  # [T] float32, the sampler's, at generation time
    weights: Tensor  # [T] float32, what each token's KL counts in the loss; 0 leaves it out
    advantages: Tensor | None = None  # [T] float32, of the sampled tokens
    policy_weights: Tensor | None = None  # [T] float32, what each counts in the policy's loss; 0 leaves it out
    sequence: Tensor | None = None  # [T] float32, log of its rollout's ratio, where a pass was made for it
    given_weights: Tensor | None = None  # [T] float32, what a token of a given completion counts; 0: generated

    def part(self, rows: slice | Tensor) -> TokenRows:
        """Some rows of every column."""
        columns = {name: column for name, column in self._asdict().items() if column is not None}
        return TokenRows(**{name: column[rows] for name, column in columns.items()})


class EventLogprobs(NamedTuple):
    """The student at a temperature: log-masses of C tokens as those of `StudentLogprobs`."""

    topk: Tensor  # [C, k]
    tail: Tensor  # [C]
    stop: Tensor  # [C]


class StudentLogprobs(NamedTuple):
    """All that a term may depend on: four kinds of log-probabilities of C tokens, each with its gradient.

    They are at temperature 1. Where the term has another one, `tempered` has the events at that, too.
    """

    topk: Tensor  # [C, k] at `TokenRows.topk_ids`
    tail: Tensor  # [C] of the mass of ids that are neither there nor stop ids; -inf where there is none
    stop: Tensor  # [C] of the mass of the stop ids outside the top k; -inf where there is none
    sampled: Tensor  # [C] at `TokenRows.token_ids`
    tempered: EventLogprobs | None = None

    def part(self, rows: Tensor) -> StudentLogprobs:
        """Some tokens of every column."""
        tempered = None if self.tempered is None else EventLogprobs(*(column[rows] for column in self.tempered))
        return StudentLogprobs(self.topk[rows], self.tail[rows], self.stop[rows], self.sampled[rows], tempered)

    @property
    def learnt(self) -> EventLogprobs:
        """The events at the term's temperature."""
        return self.tempered or EventLogprobs(self.topk, self.tail, self.stop)


class TermSums(NamedTuple):
    """A term over some tokens. `loss` is a sum over tokens, with gradient; the rest is for metrics, detached."""

    loss: Tensor  # scalar float32, nats
    sums: Tensor  # float64, one for each of `LossTerm.sum_names`
    maxima: Tensor  # float32, >= 0, one for each of `LossTerm.max_names`


class LossTerm(Protocol):
    """A loss that is a sum over tokens, and what is counted along with it.

    The head calls it chunk by chunk and adds up. Autograd runs from the loss to the `StudentLogprobs` only; the
    gradient in the logits is the head's.
    """

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids whose mass, where they lie outside the top k, `StudentLogprobs.stop` is."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of `TermSums.sums`."""

    @property
    def max_names(self) -> tuple[str, ...]:
        """Names of `TermSums.maxima`."""

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """The term over C tokens; C may be 0."""


@runtime_checkable
class SeesGradient(Protocol):
    """What a term may have besides: it is shown the gradient of its loss, where there is one."""

    def with_gradient(
        self, result: TermSums, student: StudentLogprobs, derivatives: StudentLogprobs, rows: TokenRows
    ) -> TermSums:
        """`result` with more counted; `derivatives` are those of its loss in each of `student`, 0 where none is."""


@runtime_checkable
class HasTemperature(Protocol):
    """What a term may have besides: a temperature at which it wants the student's events."""

    @property
    def temperature(self) -> float:
        """Of `StudentLogprobs.tempered`; with 1 there is none."""


def temperature_of(term: LossTerm) -> float:
    """The temperature at which a term wants the student's events."""
    return term.temperature if isinstance(term, HasTemperature) else 1.0
