"""The frozen records that cross actor boundaries.

Each stage writes a new record to the object store; none changes a record that it was given.
Ragged data is flat: `offsets[i]:offsets[i + 1]` are the rows of the i-th rollout of a chunk. All
log-probabilities are natural logarithms of the *unfiltered* distributions at temperature 1, but for the teacher's
rows, which have `objective.opd.teacher_temperature`; all KL values are in nats.

A worked example. Rollout 7 has the prompt `[5, 6]` and the student has generated `[9, 4, 2]` so far.
Its first chunk (two tokens) has `start = 0`, `token_ids = [9, 4]`, `context_ids = [5, 6]`; row 0 holds
the student's top-k after `[5, 6]`, row 1 after `[5, 6, 9]`. Its second chunk has `start = 2`,
`token_ids = [2]`, an empty context, and one row: the top-k after `[5, 6, 9, 4]`. `d[i]` of the rollout
belongs to generated token i and is KL(student || teacher) on the prefix *before* that token. If an environment
had inserted `[8, 8]` after 4, the second chunk would have `context_ids = [8, 8]` with `inserted` set, and its row
would be the top-k after `[5, 6, 9, 4, 8, 8]`: inserted tokens are context, never rows.

Where a rollout is not cut, its `cut` is None; where cuts lie in an integer array, -1.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kat_ray.types.token_ids import unpack_ids

IntArray: TypeAlias = NDArray[np.integer[Any]]
FloatArray: TypeAlias = NDArray[np.floating[Any]]


class StopReason(enum.StrEnum):
    """How a rollout ended. Every rollout that was started ends in exactly one of these ways.

    `TRAPPED` is said of every rollout that its rule cut, whichever rule that is. It takes precedence over what the
    engine says if the rule confirms a cut at or before the last token.
    """

    EOS = "eos"
    MAX_TOKENS = "max_tokens"
    TRAPPED = "trapped"
    FAILED = "failed"


class EngineEnd(enum.IntEnum):
    """What the engine says of a rollout after a chunk's last token (`ChunkRows.ended`)."""

    RUNNING = 0
    EOS = 1
    MAX_TOKENS = 2
    FAILED = 3


DEFAULT_TEACHER = "default"  # the one of the configuration's section `teacher`


def array_bytes(record: Any) -> int:
    """Bytes of a record's arrays. What pickling adds, about 1 kB a record, is not in it."""
    values = (getattr(record, f.name) for f in fields(record))
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt. `answer` is the gold answer of a graded task."""

    prompt_id: str
    token_ids: tuple[int, ...]
    answer: str | None = None
    teacher: str = DEFAULT_TEACHER  # the name of the one that scores its rollouts
    problem: str | None = None  # of an environment, as JSON
    context_ids: tuple[int, ...] | None = None  # what the teacher is given instead of `token_ids`; None: the same
    source: str | None = None  # what it is from, where metrics tell sources apart
    level: int = 0  # how hard it is, in a curriculum
    completion_ids: tuple[int, ...] | None = None  # of the data, where completions are learnt from

    @property
    def gold(self) -> str | None:
        """What answers are held against: the problem of an environment, or else the gold answer."""
        return self.answer if self.problem is None else self.problem


@dataclass(frozen=True)
class RolloutSpec:
    """One rollout to generate.

    `rollout_id` is unique in a run. With `seed` the tokens do not depend on which sampler draws them. A `probe` is
    never cut; its d's enter the calibration uncensored. `max_tokens` is limited by the rule's budget.
    """

    rollout_id: int
    prompt_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    probe: bool
    max_tokens: int
    teacher: str = DEFAULT_TEACHER
    context_ids: tuple[int, ...] | None = None  # what its teacher is given instead of the prompt; None: the same

    @property
    def scored_prompt(self) -> tuple[int, ...]:
        """The tokens that its teacher has before the rollout's own."""
        return self.prompt_ids if self.context_ids is None else self.context_ids


@dataclass(frozen=True)
class GenerateRequest:
    """One attempt: rollouts for one sampler. If the sampler is lost, they are requested again under another number.

    `rule_state` is the calibration that the step began with: a monitor that was restarted needs it. A scorer that
    was restarted, of a teacher that is the student, needs `teacher_weights`: references by the name of its group,
    None for those as given.
    """

    attempt: int  # unique in a run
    step: int
    version: int  # of the weights that the sampler must hold
    specs: tuple[RolloutSpec, ...]
    rule_state: Mapping[str, Any]
    teacher_weights: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkRows:
    """The rows of a chunk, one per new token: what a sampler's chunk and its scores have in common.

    Shapes here and below: R rollouts, N new tokens in all, k = top-k (0 where nobody scores), C context tokens in
    all.
    """

    attempt: int  # that these rollouts belong to
    rollout_ids: IntArray  # [R] int64
    start: IntArray  # [R] int32, index of the first new token among the rollout's generated tokens
    offsets: IntArray  # [R + 1] int32, rows of each rollout
    token_ids: IntArray  # [N] int32, the generated tokens
    ended: IntArray  # [R] int8, EngineEnd after the rollout's last new token

    @property
    def tokens(self) -> int:
        """Number of new tokens, N."""
        return int(self.offsets[-1])

    def new_tokens(self, i: int) -> IntArray:
        """New tokens of the i-th rollout."""
        return self.token_ids[self.offsets[i] : self.offsets[i + 1]]

    def of_rows(self) -> dict[str, Any]:
        """The fields of this class, to make another record of the same rows."""
        return {f.name: getattr(self, f.name) for f in fields(ChunkRows)}


@dataclass(frozen=True)
class RolloutChunk(ChunkRows):
    """New tokens of all active rollouts of one sampler that belong to one scorer."""

    sampled_logprobs: FloatArray  # [N] float32, log p(token) at generation time
    # The student's top-k ids, most likely first, packed by kat_ray.types.token_ids: `topk_ids` unpacks them.
    topk_ids_low: IntArray  # [N, k] uint16
    topk_ids_high: IntArray  # [N, *] uint8; no columns if the vocabulary fits into 16 bits
    topk_logprobs: FloatArray  # [N, k] float16, see kat_ray.types.token_ids
    tail_logprobs: FloatArray  # [N] float32, log of the mass outside the top k, taken before quantising
    # Tokens a scorer must run before the first row and has not seen: the prompt for a new rollout, or what its
    # teacher is told instead; all tokens before the first row when another scorer takes the rollout over; else what
    # was inserted since the last chunk.
    context_offsets: IntArray  # [R + 1] int32
    context_ids: IntArray  # [C] int32
    inserted: NDArray[np.bool_]  # [R], the context follows what the scorer holds; else it is the whole past
    released: IntArray  # [*] int64, rollouts (not in this chunk) whose scorer state can be dropped

    def topk_ids(self, rows: slice = slice(None)) -> IntArray:
        """The student's top-k ids of these rows, [n, k] int32."""
        return unpack_ids(self.topk_ids_low[rows], self.topk_ids_high[rows])

    def context(self, i: int) -> IntArray:
        """Context tokens of the i-th rollout."""
        return self.context_ids[self.context_offsets[i] : self.context_offsets[i + 1]]

    @property
    def whole_past(self) -> NDArray[np.bool_]:
        """[R], whether a rollout's context is all that went before; of others, the scorer must hold that."""
        return (np.diff(self.context_offsets) > 0) & ~self.inserted


@dataclass(frozen=True)
class ScoredChunk(ChunkRows):
    """What the monitor sees of a chunk: numbers only. The rows are those of the RolloutChunk that was scored."""

    scorer: str
    d: FloatArray  # [N] float32, reverse KL in nats; NaN where the teacher gave no finite value
    # Health features per token (arXiv 2604.13016), each [N] float16.
    overlap: FloatArray  # share of the student's top-16 ids among the teacher's top-16
    teacher_max: FloatArray  # the teacher's largest probability
    teacher_entropy: FloatArray  # nats, full vocabulary
    student_entropy: FloatArray  # nats, of the (k + 1)-event student distribution
    student_tail: FloatArray  # probability mass outside the student's top k
    teacher_top: IntArray  # [N] int32, the teacher's most likely id; -1 where the engine does not say
    seconds: float  # time the scorer worked on this chunk
    asked_tokens: int = 0  # tokens that the chunk brought, context included
    run_tokens: int = 0  # tokens that the teacher's engine ran for it
    row_bytes: int = 0  # of its `TeacherRows`
    http_sent: int = 0  # bytes of the bodies that went to the teacher's server for it, repeated requests included
    http_received: int = 0


@dataclass(frozen=True)
class ScoredGiven:
    """What the driver hears of a chunk of completions that no student generated: there is no KL in it."""

    seconds: float  # time the scorer worked on it
    row_bytes: int  # of its `TeacherRows`
    http_sent: int  # as of a `ScoredChunk`
    http_received: int


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's side of the loss for one chunk; stays in the object store until the learner fetches it.

    Quantised; `kat_ray.losses.divergence.dequantise` returns distributions that sum to 1.
    """

    topk_logprobs: FloatArray  # [N, k] float16, log q at the student's top-k ids, or at those here
    tail_logprobs: FloatArray  # [N] float32, log of the mass of all other ids that are no stop ids
    stop_logprobs: FloatArray  # [N] float32, of the stop ids of both models outside the top k; -inf without any
    # The teacher's own top-k ids, most likely first, packed as those of a chunk; None: the chunk's are meant.
    topk_ids_low: IntArray | None = None
    topk_ids_high: IntArray | None = None

    def topk_ids(self, rows: slice = slice(None)) -> IntArray | None:
        """The ids of these rows, [n, k] int32, where they are the teacher's own."""
        if self.topk_ids_low is None or self.topk_ids_high is None:
            return None
        return unpack_ids(self.topk_ids_low[rows], self.topk_ids_high[rows])


@dataclass(frozen=True)
class TerminationDecision:
    """Rollouts that the rule has just cut: the sampler aborts them at once."""

    rollout_ids: IntArray  # [M] int64


@dataclass(frozen=True)
class RolloutOutcome:
    """How a rollout ended, as the monitor recorded it, or the engine where there is no monitor.

    `cut` is None if nothing is cut. `would_cut` is where the rule would have cut a probe. `scored` counts the d's
    that reached the monitor before the rollout ended, None without one. `minimum` is m(y) in nats, None if no
    window was full. `weights` [tokens that the rule saw] are the tokens' weights in the loss, None if all are 1.
    `evidence` is what the rule's calibration asks of the rollout beyond that, its own affair.
    """

    rollout_id: int
    stop_reason: StopReason
    scored: int | None
    cut: int | None
    confirmed: int | None
    threshold: float | None
    minimum: float | None
    probe: bool
    would_cut: int | None
    weights: FloatArray | None = None
    evidence: Any = None
    teacher: str = DEFAULT_TEACHER  # whose scores it was judged by


@dataclass(frozen=True)
class StepStart:
    """The rule's limits for a step's rollouts: threshold in nats, longest rollout in tokens; None if not set.

    `probe_share` is the share of the step's rollouts that are probes, None for `termination.probe_share`.
    Of several teachers each has limits of its own, and what is said of all is None.
    """

    threshold: float | None
    budget: int | None
    probe_share: float | None = None
    by_teacher: Mapping[str, StepStart] = field(default_factory=dict)  # empty of one teacher

    def of(self, teacher: str) -> StepStart:
        """The limits of rollouts that this teacher scores."""
        return self.by_teacher.get(teacher, self)


@dataclass(frozen=True)
class StepEnd:
    """Every rollout's outcome, and the seconds that the monitor worked on the step."""

    outcomes: tuple[RolloutOutcome, ...]
    busy_seconds: float


@dataclass(frozen=True)
class Reward:
    """What a rollout was worth. `value` is None where it was not graded, which is no reward of 0.

    `parts` are what each reward function gave, by its name, before weights; `error` is why the first of them gave
    nothing.
    """

    value: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class PolicyCredit:
    """What the first `tokens` tokens of a rollout have in the policy's loss: an advantage, and a weight each.

    Over the rollouts of a step the weights make the mean that `objective.rl.aggregate` names, with its denominator.
    """

    advantage: float
    tokens: int
    weight: float


@dataclass(frozen=True)
class KeptRollout:
    """A rollout to train on: its first `kept` generated tokens.

    `weights` [kept] float32 scales each token's KL; None weighs all alike. Tokens of weight 0 are left out. `scale`
    multiplies the KL beside that, and is in no denominator: the weight of the rollout's teacher. `policy` is what
    they have in the policy's loss, None where there is none.
    """

    rollout_id: int
    prompt_length: int
    kept: int
    weights: FloatArray | None = None
    policy: PolicyCredit | None = None
    scale: float = 1.0
    # The student's prompt, and the length of what chunks have in its place, where the teacher was told another.
    prompt_ids: tuple[int, ...] | None = None
    context_length: int | None = None

    @classmethod
    def of(cls, spec: RolloutSpec, kept: int, **more: Any) -> KeptRollout:
        """The first `kept` tokens of a rollout that was made from `spec`."""
        if spec.context_ids is not None:
            more |= {"prompt_ids": spec.prompt_ids, "context_length": len(spec.context_ids)}
        return cls(spec.rollout_id, len(spec.prompt_ids), kept, **more)

    @property
    def past_length(self) -> int:
        """Tokens that its chunks have before its own."""
        return self.prompt_length if self.context_length is None else self.context_length

    @property
    def weight(self) -> float:
        """What this rollout adds to the denominator of the token mean."""
        return float(self.kept) if self.weights is None else float(self.weights.sum(dtype=np.float64))


@dataclass(frozen=True)
class WeightUpdate:
    """All weights of the student at one `policy_version`, as sent to the samplers.

    Arrays are contiguous; bfloat16 is sent as uint16 with its name in `dtypes`. `lm_head.weight` is included even
    if embeddings are tied: without it vLLM silently keeps the old output layer.
    """

    policy_version: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    arrays: tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class ChunkRefs:
    """The records of one chunk in the object store."""

    rollout_ids: tuple[int, ...]
    chunk: Any  # reference to a RolloutChunk
    chunk_bytes: int  # of its arrays
    scored: Any = None  # reference to its ScoredChunk; None where nobody scores
    teacher: Any = None  # reference to its TeacherRows; None where nobody scores


@dataclass(frozen=True)
class SampledRollout:
    """What the engine generated for one rollout, cut or not."""

    rollout_id: int
    token_ids: IntArray  # [T] int32, every token the engine generated, overshoot included
    sampled_logprobs: FloatArray | None = None  # [T] float32, log p(token) at generation time, where asked for
    end: EngineEnd = EngineEnd.RUNNING  # what the engine said of it; RUNNING where it was aborted


@dataclass(frozen=True)
class SamplerReport:
    """The result of one `generate` call of a sampler."""

    rollouts: tuple[SampledRollout, ...]
    chunks: tuple[ChunkRefs, ...]
    seconds: float  # whole call
    wait_seconds: float  # part of it spent waiting for decisions (back-pressure and the last chunks)
    control_seconds: float  # CPU time of the loop's thread in sending chunks and applying decisions
    decision_seconds: FloatArray  # [chunks] from building a chunk to applying the decision on it
    recovered: int = 0  # times that a scorer or the monitor was lost, and its work was repeated


@dataclass(frozen=True)
class SamplingSettings:
    """How one kind of request is sampled.

    `logprobs` is the number of most likely tokens whose log-probabilities come beside the sampled token's; None
    asks for none at all. Without `stop_ids` only `max_tokens` ends it.
    """

    max_tokens: int
    temperature: float
    top_p: float
    logprobs: int | None
    stop_ids: tuple[int, ...]
    prompt_logprobs: bool = False  # those of the prompt's own tokens, too


class EngineRows(NamedTuple):
    """What one engine step gave one request: n new tokens (n is 1 unless the engine speculates)."""

    request_id: str
    token_ids: list[int]
    topk_ids: IntArray | None  # [n, 1 + k], the sampled token first; None if none were asked for
    logprobs: FloatArray | None  # [n, 1 + k]
    end: EngineEnd
    prompt_logprobs: FloatArray | None = None  # [P - 1], once, with the first token, where they were asked for


class EndedRollout(NamedTuple):
    """A rollout that its engine has ended, of a step that goes on; a decision on its way may cut it still."""

    rollout_id: int
    token_ids: IntArray  # [T] int32


@dataclass(frozen=True)
class SampleCheck:
    """What an engine sampled for one prompt, to be compared with a plain forward; natural logs at temperature 1."""

    token_ids: IntArray  # [T] int32, the tokens that it drew
    logprobs: FloatArray  # [T] float32, of these tokens
    prompt_logprobs: FloatArray | None  # [P - 1] float32, of the prompt's tokens but for the first; None: no report
