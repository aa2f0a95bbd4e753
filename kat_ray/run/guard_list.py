"""The limits that `CollapseGuards` holds a run to: metric, value, field and advice of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from kat_ray.models.tolerance import logprob_tolerance
from kat_ray.run.step_result import PolicyReport, StepResult


@dataclass(frozen=True)
class Guard:
    """One limit: `field` of `GuardsConfig` sets it, `limit(setting, reference)` is it, in the metric's unit.

    With `tolerance` the reference is that of the data types of sampler and learner.
    """

    field: str
    metric: str  # for messages, and for the state of a checkpoint
    value: Callable[[StepResult], float | None]  # None: it says nothing in this step
    above: bool  # the limit is an upper one
    limit: Callable[[float, float], float]
    advice: str
    least: float | None = None  # smallest reference that a limit can be taken from; None: needs no mean
    tolerance: Callable[[str, str], float] | None = None
    at_once: bool = False  # fires at its first step, whatever `patience`
    name: str = ""  # of its counts; empty: the field's

    @property
    def key(self) -> str:
        """What its counts are called in a checkpoint."""
        return self.name or self.field


def _share(setting: float, reference: float) -> float:
    return setting * reference


def _stop_mass(step: StepResult) -> float | None:
    return step.learner.stop_mass if step.learner.tokens else None


def _entropy(step: StepResult) -> float | None:
    return step.learner.entropy if step.learner.tokens and step.learner.policy is None else None


def _policy(figure: Callable[[PolicyReport], float]) -> Callable[[StepResult], float | None]:
    """A figure of the policy's loss, where a token is in it."""

    def value(step: StepResult) -> float | None:
        policy = step.learner.policy
        return figure(policy) if policy is not None and policy.tokens else None

    return value


def _max_tokens_share(step: StepResult) -> float | None:
    return step.max_tokens_share if step.budget is None else None


def _kl(step: StepResult) -> float | None:
    return step.kl_mean


def _tail_mass(step: StepResult) -> float | None:
    return step.learner.tail_mass if step.learner.tokens else None


_OTHER_MODEL = (
    "sampler and learner compute different models, and what is learnt is not what was sampled: compare the engines "
    "(docs/numbers.md), take student.dtype = learner.dtype = float32 for a few steps; raise or null "
    "guards.logprob_diff only where you know why"
)


def _logprob_diff(kind: Literal["mean", "max"], *, at_once: bool = False) -> Guard:
    """How far sampler and learner are apart, against what rounding explains."""
    name = f"logprob_diff_{kind}"

    def value(step: StepResult) -> float | None:
        # A difference that older weights explain says nothing of the engines.
        return getattr(step.learner, name) if step.learner.tokens and not step.staleness else None

    return Guard(
        "logprob_diff", f"learner/{name}", value, True, _share, _OTHER_MODEL,
        tolerance=lambda *dtypes: getattr(logprob_tolerance(*dtypes), kind), at_once=at_once, name=name,
    )  # fmt: skip


def _ratio(kind: Literal["mean", "max"], metric: str, figure: Callable[[PolicyReport], float]) -> Guard:
    """How far the ratio of learner to sampler is from 1, against what rounding explains."""
    of_policy = _policy(figure)

    def value(step: StepResult) -> float | None:
        return None if step.staleness else of_policy(step)

    return Guard(
        "ratio", metric, value, True, _share, _OTHER_MODEL.replace("logprob_diff", "ratio"),
        tolerance=lambda *dtypes: getattr(logprob_tolerance(*dtypes), kind), at_once=kind == "mean",
        name=f"ratio_off_{kind}",
    )  # fmt: skip


GUARDS = (
    Guard(
        "stop_mass_fall",
        "learner/stop_mass",
        _stop_mass,
        False,
        _share,
        "the student unlearns to end its answers: use rollout.eos = merged, compare the two models' stop ids "
        "(kat-ray doctor), lower learner.lr",
        least=1e-6,
    ),
    Guard(
        "stop_mass_rise",
        "learner/stop_mass",
        _stop_mass,
        True,
        lambda setting, reference: reference + setting * (1.0 - reference),
        "the student ends its answers at once: check data.chat_template and what the teacher says to an empty "
        "answer, lower learner.lr",
        least=0.0,
    ),
    Guard(
        "entropy_fall",
        "learner/entropy",
        _entropy,
        False,
        _share,
        "the student has become sure of everything: lower learner.lr, raise rollout.top_p or rollout.temperature, "
        "take more prompts a step",
        least=1e-3,
    ),
    Guard(
        "max_tokens_share",
        "rollout/max_tokens_share",
        _max_tokens_share,
        True,
        lambda setting, _: setting,
        "nearly all rollouts run to the cap: look for loops (kat-ray report), raise rollout.max_tokens if answers "
        "are cut off, use termination.rule = kat or repetition, rollout.eos = merged",
    ),
    Guard(
        "kl_rise",
        "kl/mean",
        _kl,
        True,
        _share,
        "the student moves away from the teacher: lower learner.lr, look at learner/logprob_diff_max and "
        "learner/grad_norm",
        least=1e-3,
    ),
    Guard(
        "kl_fall",
        "kl/mean",
        _kl,
        False,
        _share,
        "the teacher agrees with everything: look for loops that it follows (kat-ray report); if answers are good, "
        "the student has learnt what it can, and fewer run.steps do",
        least=1e-3,
    ),
    _logprob_diff("mean", at_once=True),
    _logprob_diff("max"),
    Guard(
        "tail_mass",
        "learner/tail_mass",
        _tail_mass,
        True,
        lambda setting, _: setting,
        "the KL sees this mass as one event, and not where in it the models differ: raise rollout.top_k_logprobs "
        "(learner/top_k_for_99 would see 99 %)",
    ),
    _ratio("mean", "|rl/ratio_mean - 1|", lambda policy: abs(policy.ratio_mean - 1.0)),
    _ratio("max", "rl/log_ratio_max", lambda policy: policy.log_ratio_max),
    Guard(
        "ratio_max",
        "rl/ratio_max",
        _policy(lambda policy: policy.ratio_max),
        True,
        lambda setting, _: setting,
        "the policy that learns has left the one that sampled: lower learner.lr, use rollout.staleness = 0, or "
        "objective.rl.loss = clip",
    ),
    Guard(
        "entropy_fall",
        "rl/entropy",
        _policy(lambda policy: policy.entropy),
        False,
        _share,
        "the student has become sure of everything, and its rollouts are all alike: lower learner.lr, raise the "
        "second number of objective.rl.clip, take more prompts a step",
        least=1e-3,
        name="policy_entropy_fall",
    ),
    Guard(
        "constant_groups",
        "group/constant_share",
        attrgetter("constant_groups"),
        True,
        lambda setting, _: setting,
        "nearly all prompts have rollouts that are all right or all wrong, and teach nothing: take prompts of "
        "which the student gets some, or more rollout.rollouts_per_prompt",
    ),
    Guard(
        "held_out_fall",
        "fall of avg@k beyond chance",
        attrgetter("held_out_fall"),
        True,
        lambda setting, _: setting,
        "rewards of training rose meanwhile: what is rewarded is not what is wanted, or the prompts are learnt by "
        "heart; look at answers with a high reward (kat-ray report)",
        at_once=True,
    ),
    Guard(
        "context_leak",
        "fall of avg@k beyond chance while the KL fell",
        attrgetter("leak_fall"),
        True,
        lambda setting, _: setting,
        "the student comes nearer to a teacher that is told more (teacher.context), and answers worse without it: "
        "it acts as if it had been told; take the best checkpoint, lower learner.lr, train for fewer steps, or "
        "tell the teacher less",
        at_once=True,
    ),
)
