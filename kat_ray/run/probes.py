"""What rollouts that were seen to their end say about the rule: what its cuts would have removed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from kat_ray.data.accounting import FinishedRollout
from kat_ray.rewards.grader_pool import Check, GraderPool, nothing
from kat_ray.rewards.limits import Failures, GradingLimits, Outcome, Reply, Verdicts, last_line, no_verdict
from kat_ray.rewards.scoring import PART, Answer, RewardScorer, Scored
from kat_ray.rewards.verifiers import Verifier, grade, pool_of
from kat_ray.run.grading_ahead import Ended, Found, GradingAhead
from kat_ray.termination import RULES
from kat_ray.termination.settings import RuleSettings
from kat_ray.types.records import FloatArray, Reward, RolloutOutcome, StopReason

log = logging.getLogger("kat_ray.probes")

_KNOWN = (Outcome.RIGHT, Outcome.WRONG)


@dataclass(frozen=True)
class Graded:
    """Verdicts on rollouts, by id. One without a verdict, for want of time, say, is not wrong: it is left out."""

    correct: Mapping[int, bool]
    ran_out: int  # of those that have a gold answer and no verdict, by too much time or memory taken in grading
    seconds: float
    rewards: Mapping[int, Reward] = field(default_factory=dict)  # where training learns from them
    reward_metrics: Mapping[str, float] = field(default_factory=dict)  # likewise
    ungraded: frozenset[int] = frozenset()  # that have a gold answer, and no verdict
    failures: Failures = field(default_factory=Failures)  # in grading them and in their rewards


class _Spent(NamedTuple):
    """Seconds of a step's grading that are over: verifier and reward functions have as many each of their own."""

    verifier: float
    functions: float


_NOTHING = _Spent(0.0, 0.0)


class RolloutGrader:
    """Grades training rollouts against the gold answers of their prompts, where there are any, and rewards them."""

    def __init__(
        self,
        golds: Mapping[str, str],
        decode: Callable[[Sequence[int]], str],
        verifier: Verifier,
        limits: GradingLimits | None = None,
        scorer: RewardScorer | None = None,
        max_error_share: float | None = None,
    ) -> None:
        """`golds` by prompt id (`Prompt.gold`); `limits` bound what one step's grading may take.

        `scorer` rewards rollouts, with or without a gold answer; without it the verdict is their reward, and
        `max_error_share` of a step's may lack one. None: as many as like, since nothing is learnt from them.
        """
        self._golds = golds
        self._decode = decode
        self._verifier: Verifier = verifier
        self._limits = limits or GradingLimits()
        self._pool = pool_of(verifier, self._limits)
        self._scorer = scorer
        self._max_error_share = max_error_share
        self._ahead = GradingAhead(self._ask)
        self._verified = 0.0  # when the verifier was last done, by the monotonic clock; its functions follow

    @property
    def pool(self) -> GraderPool:
        """The child processes that grade; ended by `close`."""
        return self._pool

    def begin(self, rollouts: Mapping[int, tuple[str, Sequence[int]]]) -> None:
        """Begin to grade rollouts that have ended, for the next `grade`; never waits, and raises nothing."""
        self._ahead.begin(self._ended(rollouts))

    def grade(self, rollouts: Mapping[int, tuple[str, Sequence[int]]], check: Check = nothing) -> Graded:
        """Grade rollouts, given as (prompt id, token ids) by id; those without a gold answer get no verdict.

        `check` is called every second meanwhile; what it raises ends the grading. That too many have no reward is
        for `check_failures` to say, of a whole step.
        """
        started = time.monotonic()
        ended = self._ended(rollouts)
        found = self._ahead.take(ended, check)
        left = {i: rollout for i, rollout in ended.items() if i not in found}
        found |= self._ask(left, check, self._spent_since(started))
        outcomes = {i: one.outcome for i in ended if (one := found[i]).outcome is not None}
        correct = {i: outcome is Outcome.RIGHT for i, outcome in outcomes.items() if outcome in _KNOWN}
        if self._scorer is None:
            scored = self._by_verdict({i: found[i] for i in outcomes})
        else:
            answers = {i: _answer(rollout, found[i]) for i, rollout in ended.items()}
            replies = {i: found[i].replies for i in answers}
            scored = self._scorer.score(answers, check, replies, time.monotonic() - started)
        seconds = time.monotonic() - started
        return Graded(
            correct,
            Verdicts(tuple(outcomes.values())).ran_out,
            seconds,
            scored.rewards,
            scored.metrics,
            frozenset(outcomes.keys() - correct.keys()),
            scored.failures,
        )

    def check_failures(self, graded: Graded) -> None:
        """Say how many of a step's rollouts could not be graded; `RewardError` beyond `reward.max_error_share`."""
        failures = graded.failures
        if self._max_error_share is not None:
            failures.check(self._max_error_share)
        if failures.failed:
            log.warning(
                "%d of %d answers of a step could not be graded or rewarded; %s",
                failures.failed, failures.answers, failures.first,
            )  # fmt: skip

    def _by_verdict(self, found: Mapping[int, Found]) -> Scored:
        """Verdicts as rewards; nothing where there is none, since that says nothing of the answer."""
        name, rewards, replies = self._verifier, dict[int, Reward](), list[dict[str, Reply]]()
        for i, one in found.items():
            assert one.outcome is not None, "it has a gold answer"
            reply = Reply(one.worth) if one.worth is not None else no_verdict(one.outcome, one.verifier)
            rewards[i] = Reward(one.worth, {name: one.worth}, last_line(reply.error))
            replies.append({f"evaluation.verifier = {name}": reply})
        failures = Failures.of(replies)
        learnt = self._max_error_share is not None and found
        return Scored(rewards, failures.metrics if learnt else {}, failures)

    def close(self) -> None:
        """End what grades."""
        self._ahead.close()
        self._pool.close()
        if self._scorer is not None:
            self._scorer.close()

    def _ended(self, rollouts: Mapping[int, tuple[str, Sequence[int]]]) -> dict[int, Ended]:
        needed = {i: self._scorer is not None or p in self._golds for i, (p, _) in rollouts.items()}
        return {i: Ended(p, ids, self._decode(ids) if needed[i] else "") for i, (p, ids) in rollouts.items()}

    def _spent_since(self, started: float) -> _Spent:
        """Of a step that began to wait for what is graded ahead at `started`, and does no longer."""
        now = time.monotonic()
        verified = max(started, self._verified)
        return _Spent(verified - started, now - verified)

    def _ask(self, rollouts: Mapping[int, Ended], check: Check, spent: _Spent = _NOTHING) -> dict[int, Found]:
        """The verdict on each that has a gold answer, and the replies to each."""
        known = {i: self._golds[r.prompt_id] for i, r in rollouts.items() if r.prompt_id in self._golds}
        texts, within = [rollouts[i].text for i in known], self._limits.total_seconds - spent.verifier
        verdicts = grade(texts, list(known.values()), self._verifier, self._pool, within, check)
        self._verified = time.monotonic()
        replies_of = verdicts.replies or [None] * len(known)
        judged = zip(known, verdicts.outcomes, verdicts.values, replies_of, strict=True)
        graded = {i: Found(outcome, worth, verifier=reply) for i, outcome, worth, reply in judged}
        found = {i: graded.get(i, Found(None)) for i in rollouts}
        if self._scorer is None:
            return found
        answers = {i: _answer(r, found[i]) for i, r in rollouts.items()}
        replies = self._scorer.ask(answers, check, spent.functions)
        return {i: replace(one, replies=replies.get(i, {})) for i, one in found.items()}


def _answer(rollout: Ended, found: Found) -> Answer:
    return Answer(rollout.prompt_id, rollout.text, rollout.token_ids, found.outcome, found.worth, found.verifier)


def seen_to_the_end(rollouts: Sequence[FinishedRollout], cuts: bool) -> list[FinishedRollout]:
    """Rollouts that no rule touched: the probes of a rule that cuts, all of one that does not.

    A rollout that a rule let pass is not among them: those that pass are a choice of the rule's.
    """
    whole = [r for r in rollouts if r.outcome.stop_reason is not StopReason.FAILED]
    return [r for r in whole if r.outcome.probe or not cuts]


def is_active(settings: RuleSettings, threshold: float | None) -> bool:
    """Whether the rule could do anything in a step: one that calibrates a threshold must have one."""
    return threshold is not None or not RULES[settings.rule].calibrates


def together(batches: Sequence[Graded]) -> Graded | None:
    """The verdicts on a step whose prompts were sampled in several batches; None of none."""
    if len(batches) < 2:
        return batches[0] if batches else None
    rewards = {i: reward for batch in batches for i, reward in batch.rewards.items()}
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.reward_metrics):
        if name.startswith(PART):  # a mean, where the others are sums
            parts = (reward.parts.get(name.removeprefix(PART)) for reward in rewards.values())
            metrics[name] = float(np.mean([value for value in parts if value is not None]))
        else:
            metrics[name] = sum(batch.reward_metrics.get(name, 0.0) for batch in batches)
    return Graded(
        correct={i: right for batch in batches for i, right in batch.correct.items()},
        ran_out=sum(batch.ran_out for batch in batches),
        seconds=sum(batch.seconds for batch in batches),
        rewards=rewards,
        reward_metrics=metrics,
        ungraded=frozenset().union(*(batch.ungraded for batch in batches)),
        failures=sum((batch.failures for batch in batches), Failures()),
    )


def grading_metrics(graded: Graded) -> dict[str, float]:
    """What grading a step's rollouts took, and what functions gave them; nothing where none was graded."""
    judged = bool(graded.correct or graded.ungraded)
    if not judged and not graded.rewards:
        return {}
    failed = {
        "probe/ran_out": float(graded.ran_out),
        "probe/errors": float(len(graded.ungraded) - graded.ran_out),
    }
    return (failed if judged else {}) | {"time/grade": graded.seconds} | dict(graded.reward_metrics)


def probe_metrics(
    outcomes: Sequence[RolloutOutcome],
    traces: Mapping[int, FloatArray],
    correct: Mapping[int, bool],
    active: bool,
) -> dict[str, float]:
    """What the rule would have done to a step's probes, and what their continuations were worth.

    Nothing is said of a step without probes or in which the rule was not `active`; a step in which it would have
    cut no probe counts with a share of 0.
    """
    probes = [o for o in outcomes if o.probe]
    if not probes or not active:
        return {}
    cut = [(o, traces[o.rollout_id][o.would_cut :]) for o in probes if o.would_cut is not None]
    figures = {"probe/would_cut_share": len(cut) / len(probes)}
    figures["probe/kl_lost_share"] = float(np.mean([_lost(o, traces[o.rollout_id]) for o in probes]))
    graded = [o for o in probes if o.rollout_id in correct]
    if graded:
        figures["probe/right_share"] = sum(correct[o.rollout_id] for o in graded) / len(graded)
        false_cuts = sum(correct[o.rollout_id] and o.would_cut is not None for o in graded)
        figures["probe/false_cut_share"] = false_cuts / len(graded)
    if cut:
        figures["probe/tokens_after_cut"] = float(np.mean([len(rest) for _, rest in cut]))
        rest = np.concatenate([rest for _, rest in cut])
        if np.isfinite(rest).any():
            figures["probe/kl_after_cut"] = float(np.nanmean(rest, dtype=np.float64))
    return figures


def _lost(probe: RolloutOutcome, kl: FloatArray) -> float:
    """Share of a probe's KL that its cut would have removed: what `termination.budget` bounds on average."""
    sums = np.cumsum(np.where(np.isfinite(kl), kl, 0.0), dtype=np.float64)
    if probe.would_cut is None or not len(sums) or sums[-1] <= 0:
        return 0.0
    return float(1.0 - (sums[probe.would_cut - 1] if probe.would_cut else 0.0) / sums[-1])
