"""The completions of the data in a step: brought to scorers, where a teacher is asked, and to the learner.

A step's rollouts have ended when this begins. So no scorer has anything else to do, and whoever is lost meanwhile
is replaced as ever (`ActorGroup.call`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ray

from actors.cluster.handles import Handle, Ref, remote_pair
from actors.cluster.run_actors import RunActors
from actors.cluster.scorers import ScorerActors
from actors.teacher.scorer import TeacherScorer
from kat_ray.config import Config
from kat_ray.data.given import GivenCompletion, GivenShare, given_chunk
from kat_ray.types.records import ChunkRefs, KeptRollout, ScoredGiven, TeacherRows, array_bytes


@dataclass(frozen=True)
class GivenStep:
    """What a step learns from in place of rollouts."""

    completions: Sequence[GivenCompletion]
    chunks: Sequence[ChunkRefs]
    weight: float  # of each token
    scored: Sequence[ScoredGiven]  # what teachers were asked; none where none are

    @property
    def kept(self) -> list[KeptRollout]:
        """The learner's work: all of it."""
        return [c.kept for c in self.completions]

    @property
    def ids(self) -> frozenset[int]:
        """Under which they are known."""
        return frozenset(c.rollout_id for c in self.completions)

    @property
    def tokens(self) -> int:
        """That are learnt."""
        return sum(len(c.token_ids) for c in self.completions)

    @property
    def prompt_tokens(self) -> int:
        """That the learner has before them."""
        return sum(len(c.prompt.token_ids) for c in self.completions)

    @property
    def scored_tokens(self) -> dict[str, int]:
        """Prompt and given tokens that each teacher was asked about, by its name."""
        counts: dict[str, int] = {}
        for c in self.completions if self.scored else ():
            counts[c.prompt.teacher] = counts.get(c.prompt.teacher, 0) + len(c.scored_prompt) + len(c.token_ids)
        return counts

    def share(self, ids: Collection[int]) -> GivenShare:
        """What a rank has to learn of it, by ids."""
        own = [k for k in self.kept if k.rollout_id in ids]
        needed = [c for c in self.chunks if not {k.rollout_id for k in own}.isdisjoint(c.rollout_ids)]
        teacher = [c.teacher for c in needed if c.teacher is not None]
        return GivenShare([c.chunk for c in needed], teacher, own, self.weight)


def prepare_given(config: Config, actors: RunActors, completions: Sequence[GivenCompletion]) -> GivenStep:
    """The completions of a step, scored by their teachers where these are asked."""
    settings = config.objective.off_policy
    distils = settings.loss == "distillation"
    chunks: list[ChunkRefs] = []
    scored: list[ScoredGiven] = []
    if distils:
        for group in config.scorer_groups:
            own = [c for c in completions if c.prompt.teacher in group.teachers]
            if own:
                more, answers = _scored(actors.teachers[group.name], own)
                chunks += more
                scored += answers
    else:
        chunk = given_chunk(completions)
        chunks.append(ChunkRefs(_ids(completions), ray.put(chunk), array_bytes(chunk)))
    tokens = sum(len(c.token_ids) for c in completions)
    return GivenStep(completions, chunks, settings.weight / tokens, scored)


def _scored(
    group: ScorerActors, completions: Sequence[GivenCompletion]
) -> tuple[list[ChunkRefs], list[ScoredGiven]]:
    """One chunk for each scorer of a group; the teacher's rows stay where they are until they are learnt."""
    count = len(group.replicas)
    parts = [completions[i::count] for i in range(count)]  # of few completions some have none
    made = [given_chunk(part) for part in parts]
    chunks = [ray.put(chunk) for chunk in made]
    rows: dict[int, Ref[TeacherRows]] = {}

    def ask(i: int, scorer: Handle[TeacherScorer]) -> Ref[ScoredGiven]:
        scored, rows[i] = remote_pair(scorer, TeacherScorer.score_given)(chunks[i])
        return scored

    answers = group.call(ask, "completions to be scored")
    refs = [
        ChunkRefs(_ids(part), chunks[i], array_bytes(made[i]), teacher=rows[i])
        for i, part in enumerate(parts)
        if part
    ]
    return refs, answers


def _ids(completions: Sequence[GivenCompletion]) -> tuple[int, ...]:
    return tuple(c.rollout_id for c in completions)
