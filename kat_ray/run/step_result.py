"""What one step came to, as values that the guards and the pools decide by; metric names only in `to_metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from kat_ray.types.records import SamplerReport, ScoredChunk


@dataclass(frozen=True)
class PolicyReport:
    """The policy's loss of one optimiser step, over all ranks. Ratios are those of learner to sampler."""

    loss: float  # by `objective.rl.aggregate`
    tokens: int  # in the policy's loss
    ratio_mean: float
    ratio_max: float
    effective_share: float  # (mean ratio)^2 / mean ratio^2: 1 where learner and sampler are the same policy
    clip_low_share: float  # of the tokens
    clip_high_share: float
    masked_share: float  # whose correction is 0
    log_ratio_max: float  # largest |log ratio|
    entropy: float  # nats, of the student's top k and the rest as one; without a top k an estimate
    grad_share: float | None = None  # of the gradient in the logits; None where the policy's loss is all there is
    grad_cosine: float | None = None  # of the policy's and the KL's gradient in the logits of events


@dataclass(frozen=True)
class GivenReport:
    """The completions of the data in one optimiser step, over all ranks."""

    tokens: int  # in their loss
    loss: float  # mean over them, by `objective.off_policy.loss`; nats
    nll: float  # mean of -log p(token) of the student, nats
    dropped_tokens: int  # without a finite loss


@dataclass(frozen=True)
class LearnerReport:
    """One optimiser step, summed over all ranks. `loss` is the (weighted) mean KL over the kept tokens, nats.

    Without a teacher tokens are those of the policy's loss, and what needs a top k is None.
    A step is `skipped` if its loss or gradient is not finite, or none of its tokens has a finite KL: weights and
    optimiser stay as they were, to the bit, on all ranks. A step without kept tokens is not: nothing was wrong.
    """

    policy_version: int
    loss: float  # nan where tokens were kept and none has a finite KL; without a teacher the policy's
    grad_norm: float  # before clipping; inf where the step was skipped
    lr: float
    tokens: int  # tokens in the loss
    dropped_tokens: int  # kept, but without a finite KL
    logprob_diff_mean: float  # mean |log p learner - log p sampler| of the sampled tokens
    logprob_diff_max: float
    entropy: float  # nats, of the student's events; without a teacher estimated from the sampled tokens
    tail_mass: float | None
    stop_mass: float
    micro_batches: int
    seconds: float
    skipped: bool
    kl_hidden: float | None = None  # estimate of the KL within the tail, nats
    top_k_for_99: int | None = None  # how long a top k holds 99 % of the student's mass
    policy: PolicyReport | None = None
    given: GivenReport | None = None  # of what was not generated, which is in no figure above
    weights: Mapping[str, float] | None = None  # of the losses "opd" and "rl", where they change from step to step

    def to_metrics(self) -> dict[str, float]:
        """All fields but the version, which other metrics give, and those that are not known."""
        elsewhere = ("policy_version", "policy", "weights", "given")
        figures = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        of_policy = {} if self.policy is None else asdict(self.policy)
        policy = {f"rl/{name}": float(v) for name, v in of_policy.items() if v is not None}
        given = {} if self.given is None else asdict(self.given)
        if self.policy is not None and not self.policy.tokens:  # means of nothing
            policy = {name: policy[name] for name in ("rl/loss", "rl/tokens")}
        return (
            {f"learner/{name}": float(value) for name, value in figures.items() if value is not None}
            | {f"objective/{name}_weight": weight for name, weight in (self.weights or {}).items()}
            | policy
            | {f"offpolicy/{name}": float(value) for name, value in given.items()}
        )


@dataclass(frozen=True)
class StageWork:
    """What the replicas of one stage did in a step."""

    tokens: int
    seconds: float  # at work, all replicas together
    replicas: int

    @property
    def busy(self) -> float:
        """Seconds at work, mean over the replicas."""
        return self.seconds / max(1, self.replicas)

    @property
    def tokens_per_second(self) -> float:
        """Of one replica, while it is at work."""
        return self.tokens / max(self.seconds, 1e-9)


def _scoring(scored: Sequence[ScoredChunk]) -> StageWork:
    return StageWork(
        tokens=sum(len(c.d) for c in scored),
        seconds=sum(c.seconds for c in scored),
        replicas=len({c.scorer for c in scored}),
    )


def _role(chunk: ScoredChunk) -> str:
    """Of the scorer that scored it, such as `scorer-math:0`."""
    return chunk.scorer.rpartition(":")[0]


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of one step went. The first four are the driver's clock."""

    step: float  # the whole step
    sample: float  # that the driver waited for rollouts
    learn: float
    publish: float
    sampling: float  # of the slowest sampler, waiting included
    score_wait: float  # the longest that a sampler waited for decisions
    control: float  # CPU time of the busiest sampler in sending chunks and applying decisions
    monitor: float  # CPU time of the busiest monitor
    sampler: StageWork
    scorer: StageWork | None  # None where nobody scores; nor are there decisions to wait for then
    scorers: Mapping[str, StageWork]  # by the role of those that scored anything, `scorer` or `scorer-NAME`
    decisions: tuple[float, float] | None  # mean and longest, from building a chunk to applying the decision on it

    @classmethod
    def of(
        cls,
        reports: Sequence[Sequence[SamplerReport]],
        scored: Sequence[ScoredChunk],
        monitor: float,
        *,
        step: float,
        sample: float,
        learn: float,
        publish: float,
    ) -> StepTimes:
        """The driver's clock, and what samplers, scorers and monitors say of themselves.

        `reports` are those of each batch of prompts, which were sampled one after the other.
        """
        every = [r for batch in reports for r in batch]
        decisions = np.concatenate([r.decision_seconds for r in every])
        return cls(
            step=step,
            sample=sample,
            learn=learn,
            publish=publish,
            sampling=sum(max(r.seconds for r in batch) for batch in reports),
            score_wait=max(r.wait_seconds for r in every),
            control=max(r.control_seconds for r in every),
            monitor=monitor,
            sampler=StageWork(
                tokens=sum(len(rollout.token_ids) for r in every for rollout in r.rollouts),
                seconds=sum(r.seconds - r.wait_seconds for r in every),
                replicas=max(map(len, reports)),
            ),
            scorer=_scoring(scored) if scored else None,
            scorers={
                role: _scoring([c for c in scored if _role(c) == role]) for role in sorted({*map(_role, scored)})
            },
            decisions=(float(decisions.mean()), float(decisions.max())) if len(decisions) else None,
        )

    def to_metrics(self) -> dict[str, float]:
        """Without chunks there are no decisions to say anything of."""
        figures = {
            "time/step": self.step,
            "time/sample": self.sample,
            "time/learn": self.learn,
            "time/publish": self.publish,
            "time/sampling": self.sampling,
            "time/sampler_busy": self.sampler.busy,
            "time/control": self.control,
            "throughput/tokens_per_second": self.sampler.tokens / self.step,
            "throughput/sampler": self.sampler.tokens_per_second,
        }
        if self.scorer is not None:
            figures |= {
                "time/scorer_busy": self.scorer.busy,
                "time/monitor": self.monitor,
                "time/score_wait": self.score_wait,
                "throughput/scorer": self.scorer.tokens_per_second,
            }
        if self.decisions is not None:
            figures["time/decision_mean"], figures["time/decision_max"] = self.decisions
        return figures


@dataclass(frozen=True)
class StepResult:
    """One step that is done."""

    done: int  # steps, this one included: `step` of metrics.jsonl
    learner: LearnerReport
    times: StepTimes
    staleness: int  # versions that the learner's weights were newer than the samplers'
    restarts: int  # actors lost since the step before
    recorded: Mapping[str, float] = field(default_factory=dict)  # metrics of the rollouts and their scores
    store: Mapping[str, float] = field(default_factory=dict)  # and of the object stores
    held_out_fall: float | None = None  # of `HeldOutWatch.take`, while rewards rose; None: nothing was evaluated
    leak_fall: float | None = None  # while the KL to a teacher that is told more fell

    @property
    def kl_mean(self) -> float | None:
        """Of all scored tokens, nats; None where none was scored."""
        return self.recorded.get("kl/mean")

    @property
    def constant_groups(self) -> float | None:
        """Prompts whose rollouts all have one reward, as a share; None without rewards."""
        return self.recorded.get("group/constant_share")

    @property
    def missing_groups(self) -> float | None:
        """That other prompts were to be drawn for, and were not; None where none are."""
        return self.recorded.get("group/missing")

    @property
    def reward_mean(self) -> float | None:
        """Of the rollouts that have one."""
        return self.recorded.get("reward/mean")

    @property
    def reward_min(self) -> float | None:
        """The smallest of them; with penalties for length at most the mean of these."""
        lowest = self.recorded.get("reward/min")
        return None if lowest is None else min(lowest, self.recorded.get("reward/overlong", 0.0))

    @property
    def max_tokens_share(self) -> float | None:
        """Rollouts that ran to `rollout.max_tokens`."""
        return self.recorded.get("rollout/max_tokens_share")

    @property
    def budget(self) -> float | None:
        """Longest rollout that the rule allowed, tokens; None where it set none."""
        return self.recorded.get("rollout/budget")

    @property
    def idle_share(self) -> float:
        """Of the step, that its busiest stage idled."""
        scorers = (stage.busy for stage in self.times.scorers.values())
        busiest = max(self.times.sampler.busy, *scorers, self.learner.seconds)
        return max(0.0, 1.0 - busiest / self.times.step)

    def to_metrics(self) -> dict[str, float]:
        """All metrics of the step but those of what is decided after it (guards, pools, checkpoint)."""
        return {
            **self.recorded,
            **self.learner.to_metrics(),
            "rollout/staleness": float(self.staleness),
            **self.times.to_metrics(),
            "time/idle_share": self.idle_share,
            "throughput/learner": self.learner.tokens / max(self.learner.seconds, 1e-9),
            **self.store,
            "pool/restarts": float(self.restarts),
        }
