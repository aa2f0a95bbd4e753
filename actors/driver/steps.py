"""The verbs of a training step: sample, score and monitor; hand over; learn.

Rollouts are sampled from the weights that the samplers hold when sampling starts. With staleness 0 these are the
learner's; with staleness 1 sampling starts while the learner works, and they are one version older.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import ObjectLostError

from actors.cluster.handles import Actor, Ref, remote
from actors.cluster.run_actors import RunActors
from actors.cluster.waiting import ACTOR_LOST
from actors.driver.dispatcher import RolloutDispatcher
from actors.driver.given import GivenStep, prepare_given
from actors.driver.monitor_group import MonitorGroup
from actors.driver.unmonitored import Unmonitored
from actors.learner.learner import Learner
from kat_ray.algorithms.base import Credit, EndedStep
from kat_ray.algorithms.choice import algorithm_of
from kat_ray.config import Config
from kat_ray.config.environment import is_environment
from kat_ray.data.accounting import FinishedRollout, join_outcomes
from kat_ray.data.batch import assign_ranks
from kat_ray.data.prompt_order import PromptOrder, given_completions, given_places, probe_share, rollout_specs
from kat_ray.observability.timeline import Span
from kat_ray.run.batch_dump import StepBatch
from kat_ray.run.carried import Carried
from kat_ray.run.curriculum import Move, advanced, answers_by_family
from kat_ray.run.probes import Graded, RolloutGrader, together
from kat_ray.run.refill import missing_prompts
from kat_ray.run.step_result import LearnerReport
from kat_ray.termination import RunFacts
from kat_ray.termination.by_teacher import TeacherRules
from kat_ray.types.records import (
    DEFAULT_TEACHER,
    ChunkRefs,
    EndedRollout,
    FloatArray,
    RolloutSpec,
    SamplerReport,
    ScoredChunk,
    StepStart,
    StopReason,
)


@dataclass(frozen=True)
class SampledBatch:
    """Prompts of a step that were sampled together; all of a step's, unless it had to draw others."""

    specs: Sequence[RolloutSpec]
    rollouts: list[FinishedRollout]  # in the order of ids
    reports: list[SamplerReport]
    scored: list[ScoredChunk]
    monitor_seconds: float  # that the monitor was busy in the step so far
    graded: Graded | None  # verdicts, where rollouts are graded before they are learnt from


@dataclass(frozen=True)
class SampledStep:
    """One step's rollouts, each at its end."""

    step: int
    version: int  # of the weights they were sampled from
    specs: Sequence[RolloutSpec]
    step_start: StepStart
    rollouts: list[FinishedRollout]  # in the order of ids
    chunks: list[ChunkRefs]
    scored: list[ScoredChunk]
    reports: list[list[SamplerReport]]  # of each batch of prompts
    monitor_seconds: float  # that the monitor was busy
    ended_with: Mapping[str, Any]  # the rule's calibration
    probe_share: float  # chance with which a rollout was a probe
    credit: Credit
    graded: Graded | None  # verdicts, where rollouts are graded before they are learnt from
    levels: Mapping[str, int]  # of the families of a curriculum
    moves: Sequence[Move]  # of these after the step
    given: GivenStep | None = None  # completions of the data, which are in none of the above


class Steps:
    """The verbs of a step. They move references; no token or logit passes through but for the accounting."""

    def __init__(
        self,
        config: Config,
        actors: RunActors,
        order: PromptOrder,
        grader: RolloutGrader | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """`grader` is asked for rewards, where the objective has a use for them; `sources` are by prompt id."""
        self._config, self._sources = config, sources or {}
        environment = config.environment if is_environment(config.data.path) else None
        self._curriculum = None if environment is None else environment.curriculum
        self._algorithm = algorithm_of(config)
        self._grader = grader if config.objective.rl.weight else None
        self._actors = actors
        self._order = order
        self._attempts = itertools.count(1)
        facts = RunFacts(config.run.seed, config.rollout.max_tokens)
        teachers = tuple(config.used_teachers) or (DEFAULT_TEACHER,)
        self._initial = TeacherRules(config.termination, facts, teachers).state()
        self._monitors: MonitorGroup | Unmonitored = Unmonitored(self._initial)
        if config.used_teachers:
            self._monitors = MonitorGroup(actors.monitors, self._initial)
        self._carried = {0: Carried()}  # by the step that begins with it

    @property
    def rule_state(self) -> Mapping[str, Any]:
        """The calibration after the last step whose rollouts have ended."""
        return self._monitors.state

    def reset_rule(self, state: Mapping[str, Any] | None) -> None:
        """Go on with this calibration; None: with an empty one."""
        self._monitors.state = self._initial if state is None else state

    def carried(self, done: int) -> Carried:
        """What `done` steps leave to those after them, also where the next one was sampled ahead."""
        return self._carried[done]

    def reset_carried(self, done: int, carried: Carried) -> None:
        """Go on after `done` steps with this."""
        self._carried = {done: carried}

    def sample(self, step: int) -> SampledStep:
        """Generate, score and monitor the rollouts of one step, each to its end."""
        return self.finish_sampling(self.start_sampling(step, self.rule_state))

    def start_sampling(self, step: int, rule_state: Mapping[str, Any]) -> RolloutDispatcher:
        """Set the samplers going on the rollouts of one step, which begins with this calibration."""
        start, first = self._monitors.start_step(step, rule_state), self._carried[step].prompts
        places = range(first, first + self._config.rollout.prompts_per_step)
        return self._start_batch(step, places, start, rule_state, given_places(self._config, step))

    def _start_batch(
        self,
        step: int,
        places: range,
        start: StepStart,
        rule_state: Mapping[str, Any],
        given: frozenset[int] = frozenset(),
    ) -> RolloutDispatcher:
        specs = rollout_specs(self._order, self._config, places, start, self._carried[step].levels, given)
        begin = None if self._grader is None else partial(_begin_grading, self._grader, _prompts(specs))
        return RolloutDispatcher(self._actors, step, specs, start, rule_state, self._attempts, begin)

    def finish_sampling(self, sampling: RolloutDispatcher) -> SampledStep:
        """Wait until every rollout of a step has ended and is scored, where anybody scores; count its tokens.

        Where too few of its prompts tell anything, others are sampled: from the weights that the samplers hold,
        which are those that the step began with.
        """
        step, start = sampling.step, sampling.step_start
        carried = self._carried[step]
        batches = [self._finish_batch(sampling)]
        taken = carried.prompts + self._config.rollout.prompts_per_step
        ended, credit = self._credit(sampling, batches)
        while more := missing_prompts(self._config, credit.groups, len(batches)):
            places, taken = range(taken, taken + more), taken + more
            batches.append(self._finish_batch(self._start_batch(step, places, start, sampling.rule_state)))
            ended, credit = self._credit(sampling, batches)
        graded = together([batch.graded for batch in batches if batch.graded is not None])
        if self._grader is not None and graded is not None:
            self._grader.check_failures(graded)
        self._monitors.end_step(step, [r.outcome for r in ended.rollouts], sampling.rule_state)
        # The step before may still be learnt: its checkpoint holds what this step began with, and where its
        # records are lost it is sampled again.
        kept = {s: own for s, own in self._carried.items() if s >= step - 1}
        standings, moves = carried.curriculum, list[Move]()
        if self._curriculum is not None and graded is not None:
            families = {s.rollout_id: self._sources[s.prompt_id] for s in ended.specs}
            answers = answers_by_family(ended.rollouts, families, graded.correct)
            standings, moves = advanced(self._curriculum, standings, answers)
        self._carried = kept | {step + 1: Carried(taken, credit.probe_rewards, standings)}
        completions = given_completions(self._order, self._config, step)
        reports = [batch.reports for batch in batches]
        return SampledStep(
            step=step,
            version=sampling.version,
            specs=ended.specs,
            step_start=start,
            rollouts=list(ended.rollouts),
            chunks=[c for of_batch in reports for report in of_batch for c in report.chunks],
            scored=[c for batch in batches for c in batch.scored],
            reports=reports,
            monitor_seconds=max(batch.monitor_seconds for batch in batches),
            ended_with=self.rule_state,
            probe_share=ended.probe_share,
            credit=credit,
            graded=graded,
            levels=carried.levels,
            moves=moves,
            given=prepare_given(self._config, self._actors, completions) if completions else None,
        )

    def _finish_batch(self, sampling: RolloutDispatcher) -> SampledBatch:
        """Wait for the rollouts of a batch of prompts, and grade them."""
        completed = sampling.finish()
        closed = self._monitors.close(completed)
        reports = [done.report for done in completed]
        chunks = [c for report in reports for c in report.chunks]
        scored: list[ScoredChunk] = self._actors.supervisor.wait(_given(c.scored for c in chunks), "scores")
        rollouts = join_outcomes((r for report in reports for r in report.rollouts), closed.outcomes)
        graded = self._grade(rollouts, sampling.specs)
        return SampledBatch(sampling.specs, rollouts, reports, scored, closed.busy_seconds, graded)

    def _credit(self, sampling: RolloutDispatcher, batches: Sequence[SampledBatch]) -> tuple[EndedStep, Credit]:
        """What the step has so far, and what is learnt of it. Rollouts are in the order of ids, as batches are."""
        ended = EndedStep(
            rollouts=[r for batch in batches for r in batch.rollouts],
            specs=[s for batch in batches for s in batch.specs],
            rewards={i: r for batch in batches if batch.graded for i, r in batch.graded.rewards.items()},
            probe_share=_probe_share(self._config, sampling.step_start),
            probe_rewards=self._carried[sampling.step].probe_rewards,
        )
        return ended, self._algorithm.credit(ended)

    def _grade(self, rollouts: Sequence[FinishedRollout], specs: Sequence[RolloutSpec]) -> Graded | None:
        """Verdicts on all that have an answer, where the algorithm learns from them."""
        if self._grader is None:
            return None
        prompt_ids = _prompts(specs)
        failed = StopReason.FAILED
        ended = [r for r in rollouts if r.outcome.cut is None and r.outcome.stop_reason is not failed]
        answers = {r.rollout_id: (prompt_ids[r.rollout_id], r.token_ids.tolist()) for r in ended}
        return self._grader.grade(answers, partial(self._actors.supervisor.check, True))

    def hand_over(self, sampled: SampledStep) -> float:
        """Bring the step's kept tokens to the learner's ranks; returns their weight in all.

        Nothing is learnt yet: `ObjectLostError` says that records were lost with a node, and the step's rollouts
        must be sampled again.
        """
        kept, given = sampled.credit.kept, sampled.given
        learners = self._actors.learners
        pending = []
        shares = assign_ranks([*kept, *(given.kept if given else ())], len(learners.replicas))
        for rank, whole in zip(learners.handles, shares, strict=True):
            share = [k for k in whole if given is None or k.rollout_id not in given.ids]
            ids = {k.rollout_id for k in share}
            needed = [c for c in sampled.chunks if not ids.isdisjoint(c.rollout_ids)]
            collect = remote(rank, Learner.collect)
            own = (given.share([k.rollout_id for k in whole]),) if given else ()
            pending.append(collect([c.chunk for c in needed], _given(c.teacher for c in needed), share, *own))
        learners.wait(pending, "the batch to reach the learner")
        if given is not None:
            return sum(k.weight for k in kept) or 1.0  # the given tokens' weights have their denominator already
        if not self._config.objective.weights_at(sampled.step)["opd"] and not any(k.policy for k in kept):
            return 0.0  # nothing is in the loss: no pass, and no optimiser step that momentum alone would make
        # Without a token that has a KL the policy may have some: its weights have their denominator already.
        return sum(k.weight for k in kept) or float(any(k.policy for k in kept))

    def learn(self, weight: float) -> list[Ref[LearnerReport]]:
        """Start one optimiser step on what was handed over; returns the ranks' pending reports."""
        version = self._actors.samplers.version
        return [remote(rank, Learner.learn)(weight, version) for rank in self._actors.learners.handles]

    def learner_logprobs(self) -> dict[int, FloatArray]:
        """What the ranks made of the sampled tokens in the step that they have just learnt, by rollout id."""
        of_ranks = self._actors.learners.on_all(
            lambda rank: remote(rank, Learner.step_logprobs)(), "the learner's log-probabilities"
        )
        return {rollout_id: values for own in of_ranks for rollout_id, values in own.items()}

    def batch_of(self, sampled: SampledStep) -> StepBatch | None:
        """Fetch all that the learner was given of a step; None if records were lost since."""
        wait = self._actors.supervisor.wait
        try:
            return StepBatch(
                chunks=wait([c.chunk for c in sampled.chunks], "the batch"),
                teacher=wait(_given(c.teacher for c in sampled.chunks), "the batch"),
                scored=sampled.scored,
                kept=sampled.credit.kept,
                prompt_ids=_prompts(sampled.specs),
            )
        except ObjectLostError:
            return None

    def spans(self) -> dict[str, tuple[Span, ...]]:
        """What every actor did since this was last asked, by its name; of one that is lost, nothing.

        No actor may be at work.
        """
        refs = {name: remote(actor, Actor.spans)() for name, actor in self._actors.by_name().items()}
        drained: dict[str, tuple[Span, ...]] = {}
        for name, ref in refs.items():
            try:
                (drained[name],) = self._actors.supervisor.wait([ref], "the timeline")
            except ACTOR_LOST:
                continue
        return drained


def _probe_share(config: Config, start: StepStart) -> float:
    """The chance with which a rollout of a step was a probe."""
    shares = {probe_share(config, start.of(name)) for name in config.used_teachers}
    # `Config` refuses rewards that are weighed by it where the teachers' shares may differ.
    return max(shares, default=probe_share(config, start))


def _begin_grading(grader: RolloutGrader, prompt_ids: Mapping[int, str], ended: Sequence[EndedRollout]) -> None:
    """Of rollouts that a decision may cut still: what is found of those is not asked for."""
    grader.begin({r.rollout_id: (prompt_ids[r.rollout_id], r.token_ids.tolist()) for r in ended})


def _prompts(specs: Iterable[RolloutSpec]) -> dict[int, str]:
    """Prompt ids by rollout."""
    return {s.rollout_id: s.prompt_id for s in specs}


def _given(references: Iterable[Any]) -> list[Any]:
    """Those of all chunks, or none where nobody scored."""
    return [reference for reference in references if reference is not None]
