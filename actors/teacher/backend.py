"""The interface of a teacher, whichever engine it runs on, and what it returns for the rows of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kat_ray.errors import StateLost
from kat_ray.losses.divergence import entropy, tail_and_stop, tail_and_stop_of_ids
from kat_ray.remote.traffic import Traffic
from kat_ray.types.records import FloatArray, IntArray, RolloutChunk, WeightUpdate

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt and answer, token ids

OVERLAP_TOP = 16  # ids compared for the overlap ratio (arXiv 2604.13016)


def max_ids(top_k: int, stop_ids: Sequence[int]) -> int:
    """The most ids of a token that vLLM is set up to score, for runs with this top k and these stop ids."""
    return max(top_k + len(stop_ids), OVERLAP_TOP)


@dataclass(frozen=True)
class TeacherTargets:
    """What the learner is given of each row, where it is not what the KL of the rules is taken from."""

    topk: Tensor  # [N, k] log q at the temperature of the loss, at the student's top-k ids or at `ids`
    tail: Tensor  # [N] as in `TeacherColumns`
    stop: Tensor  # [N]
    ids: Tensor | None = None  # [N, k] int64, the teacher's own top k, most likely first; None: the student's


@dataclass(frozen=True)
class TeacherColumns:
    """One row per new token, at temperature 1; NaN for what an engine does not report."""

    topk: Tensor  # [N, k] log q at the student's top-k ids
    tail: Tensor  # [N] log of the mass of all other ids that are no stop ids
    stop: Tensor  # [N] log of the mass of the stop ids outside the top k; -inf where there are none
    overlap: Tensor  # [N] share of the student's top-16 ids among the teacher's
    teacher_max: Tensor  # [N] largest probability
    teacher_entropy: Tensor  # [N] nats, whole vocabulary
    top: Tensor  # [N] int32, the most likely id; -1 if an engine does not report it
    targets: TeacherTargets | None = None  # for the learner; None: the first three

    @classmethod
    def join(cls, parts: Sequence[TeacherColumns], top_k: int) -> TeacherColumns:
        """Concatenate parts; without any, no rows."""
        none = torch.zeros(0)
        empty = cls(torch.zeros(0, top_k), none, none, none, none, none, none.int())
        names = [f.name for f in fields(cls) if f.name != "targets"]
        targets = [p.targets for p in parts if p.targets is not None]
        return cls(
            **{name: torch.cat([getattr(p, name) for p in (empty, *parts)]) for name in names},
            targets=_joined(targets) if targets else None,
        )


class Teacher(Protocol):
    """An engine that scores chunks, and keeps a state per rollout so that each token is run once."""

    run_tokens: int

    @property
    def vocabulary(self) -> int:
        """Ids that the model has a token for."""

    @property
    def held(self) -> int:
        """Number of rollouts with a state."""

    @property
    def cache_bytes(self) -> int:
        """Memory of these states."""

    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked.

        With `own_top` the targets are those of so many of the teacher's own most likely ids.
        """

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Drop the state of rollouts; unknown ones are ignored."""

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        """Log-probabilities [tokens] of each answer by a pass of its own, which holds and uses no state."""


@dataclass(frozen=True)
class RunNeeds:
    """What a run asks of a teacher, beside its chunks."""

    stop_ids: tuple[int, ...]  # of all its models
    student_vocabulary: int  # ids that its chunks may hold; 0: those of the teacher
    top_needed: bool  # its rule cannot do without the teacher's most likely ids
    temperature: float = 1.0  # of the targets


@runtime_checkable
class ServesRuns(Protocol):
    """A teacher that can score for one run after another."""

    def serve(self, run: RunNeeds) -> None:
        """Score for this run, from the next chunk on; states of other runs are kept."""


@runtime_checkable
class ReportsProgress(Protocol):
    """A teacher whose scoring of a chunk may take long, and shows that it goes on."""

    def on_progress(self, beat: Callable[[], None]) -> None:
        """Have `beat` called whenever something was done."""


@runtime_checkable
class AsksServer(Protocol):
    """A teacher that a server has."""

    @property
    def traffic(self) -> Traffic:
        """All that went to the server so far, and came back."""


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that can be the student itself."""

    def load_weights(self, update: WeightUpdate) -> None:
        """Hold these weights, and nothing of rollouts: their keys and values are of others."""


def _joined(parts: Sequence[TeacherTargets]) -> TeacherTargets:
    ids = [p.ids for p in parts if p.ids is not None]
    topk, tail, stop = (torch.cat([getattr(p, name) for p in parts]) for name in ("topk", "tail", "stop"))
    return TeacherTargets(topk, tail, stop, torch.cat(ids) if ids else None)


def columns_of(
    logprobs: Tensor,
    ids: Tensor,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    own_top: int = 0,
    common: int | None = None,
) -> TeacherColumns:
    """Columns from the whole distribution: log-probabilities [N, V] and the student's top-k ids [N, k].

    They are made where the log-probabilities are; only the columns, k + 6 numbers a row, go to the CPU, and with
    another temperature than 1 k + 2 more, with `own_top` so many ids besides. These are among the first
    `common`, which the student has too; None: it has all.
    """
    ids = ids.to(logprobs.device)
    top = min(OVERLAP_TOP, ids.shape[-1], logprobs.shape[-1])
    best, best_ids = logprobs.topk(top, dim=-1)
    tail, stop = tail_and_stop(logprobs, ids, stop_ids)
    columns = TeacherColumns(
        topk=logprobs.gather(-1, ids),
        tail=tail,
        stop=stop,
        overlap=overlap_share(ids[:, :top], best_ids),
        teacher_max=best[:, 0].exp(),
        teacher_entropy=entropy(logprobs),
        top=best_ids[:, 0].int(),
    )
    own = TeacherColumns(*(getattr(columns, f.name).cpu() for f in fields(columns) if f.name != "targets"))
    if temperature == 1.0 and not own_top:
        return own
    return replace(own, targets=_targets(logprobs, ids, stop_ids, temperature, own_top, common))


def _targets(
    logprobs: Tensor, ids: Tensor, stop_ids: Sequence[int], temperature: float, own_top: int, common: int | None
) -> TeacherTargets:
    """The same distribution with its logits divided by a temperature: masses take the whole vocabulary."""
    learnt = logprobs if temperature == 1.0 else torch.log_softmax(logprobs / temperature, dim=-1)
    # A row that is not a number has no most likely ids; any will do, the row is dropped.
    events = learnt[:, :common].topk(own_top, dim=-1).indices if own_top else ids
    tail, stop = tail_and_stop(learnt, events, stop_ids)
    named = events.cpu() if own_top else None
    return TeacherTargets(learnt.gather(-1, events).cpu(), tail.cpu(), stop.cpu(), named)


def own_targets(
    logprobs: Tensor, ids: Tensor, stop_logprobs: Tensor, stop_ids: Sequence[int], common: int
) -> TeacherTargets:
    """Targets at the teacher's own most likely ids [N, k] int64, of which an engine gives the log-probabilities
    [N, k], and those of the stop ids [N, S] beside them, at temperature 1.

    The student has the first `common` ids. A row with one that it lacks is NaN: dropped, and counted.
    """
    foreign = (ids >= common).any(dim=-1, keepdim=True)
    topk = logprobs.masked_fill(foreign, torch.nan)
    ids = torch.where(foreign, torch.arange(ids.shape[-1]), ids)
    return TeacherTargets(topk, *tail_and_stop_of_ids(topk, ids, stop_logprobs, stop_ids), ids)


def with_chunk(held: Mapping[int, Sequence[int]], chunk: RolloutChunk) -> dict[int, list[int]]:
    """The tokens of each of a chunk's rollouts: those that are `held`, and those that it brings.

    `StateLost` names rollouts of which neither holds the past.
    """
    ids, whole = chunk.rollout_ids.tolist(), chunk.whole_past.tolist()
    if unknown := [i for i, w in zip(ids, whole, strict=True) if not w and i not in held]:
        raise StateLost(f"the past of rollouts {unknown} is not held: send their context")
    return {
        rollout_id: [
            *([] if whole[i] else held[rollout_id]),
            *chunk.context(i).tolist(),
            *chunk.new_tokens(i).tolist(),
        ]
        for i, rollout_id in enumerate(ids)
    }


def overlap_share(ids: Tensor, best_ids: Tensor) -> Tensor:
    """Share [N] of the student's most likely ids [N, n] that are among the teacher's [N, n]."""
    return (ids[:, :, None] == best_ids[:, None, :]).any(dim=-1).float().mean(dim=-1)
