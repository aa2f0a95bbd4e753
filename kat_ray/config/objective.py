"""What a run optimises: the section `objective`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Section, changed_fields
from kat_ray.rewards.limits import LARGEST_REWARD

Share = Annotated[float, Field(gt=0)]


class _Weighted(Section):
    """One of the losses of a run."""

    weight: float = Field(1.0, ge=0)
    final_weight: float | None = Field(None, ge=0)
    """`weight` after `anneal_steps`; null leaves it as it is."""
    anneal_steps: int | None = Field(None, ge=1)
    """Optimiser steps in which `weight` goes to `final_weight`, in a straight line."""

    @model_validator(mode="after")
    def _anneals_something(self) -> _Weighted:
        if (self.final_weight is None) != (self.anneal_steps is None):
            raise ValueError(
                f"final_weight = {_shown(self.final_weight)} and anneal_steps = {_shown(self.anneal_steps)}: set "
                "both, or neither"
            )
        if self.final_weight is not None and not self.weight:
            raise ValueError(
                "weight = 0: leaves this loss out of the run, and cannot go to final_weight = "
                f"{self.final_weight:g}; begin with a small weight"
            )
        return self

    def weight_at(self, step: int) -> float:
        """The weight in the optimiser step that `step` others came before."""
        if self.final_weight is None or self.anneal_steps is None:
            return self.weight
        done = min(1.0, step / self.anneal_steps)
        return (1.0 - done) * self.weight + done * self.final_weight


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"


class DistillationObjective(_Weighted):
    """On-policy distillation: an exact divergence from the teacher, up to the cut."""

    weight: float = Field(1.0, ge=0)
    """Factor of the mean divergence in the loss."""
    divergence: Literal["reverse", "forward", "jsd", "skewed_forward", "skewed_reverse"] = "reverse"
    """What the loss takes of the two distributions: `reverse` KL(student || teacher), `forward`
    KL(teacher || student), `jsd`, the generalised Jensen-Shannon divergence, or the skewed KLs of DistiLLM,
    `skewed_forward` KL(teacher || a teacher + (1 - a) student) and `skewed_reverse`
    KL(student || (1 - a) teacher + a student), a = `skew_alpha`; each over the top k of `support` and the rest as
    one. Rules, traces and guards go by the reverse KL in any case."""
    support: Literal["student", "teacher"] = "student"
    """Whose top k (rollout.top_k_logprobs) are events on their own in the loss. `teacher` sees all that the teacher
    would say, which `forward` is about; its ids travel with its rows. Rules and traces take the student's in any
    case."""
    beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in the mixture that `jsd` holds both against: near 0 it goes the way of `forward`, near 1
    that of `reverse`."""
    skew_alpha: float = Field(0.1, gt=0, lt=1)
    """What a skewed KL mixes into the distribution that it is held against: near 0 it is the KL of its name."""
    teacher_temperature: float = Field(1.0, gt=0)
    """The loss takes the teacher's logits divided by this, over the whole vocabulary: below 1 it is more certain
    than it is. Rules and traces have temperature 1 in any case. Needs a teacher on transformers (scorer.backend,
    or `kat-ray serve-teacher --backend transformers`), since vLLM gives log-probabilities of single ids."""
    student_temperature: float = Field(1.0, gt=0)
    """The same of the student. Sampling has rollout.temperature; nothing is multiplied by the square of either."""

    @model_validator(mode="after")
    def _mixes_what_it_is_told_to(self) -> DistillationObjective:
        of = {"beta": ("jsd",), "skew_alpha": ("skewed_forward", "skewed_reverse")}
        for name, value in changed_fields(self).items():
            kinds = of.get(name, (self.divergence,))
            if self.divergence not in kinds:
                meant = " or ".join(map(repr, kinds))
                raise ValueError(
                    f"{name} = {value:g}: is of divergence = {meant}, and divergence is {self.divergence!r}; leave "
                    f"it out, or set divergence = {meant}"
                )
        return self


class OverlongPenalty(Section):
    """What an answer loses by running up to the cap, before it is held against others (DAPO)."""

    buffer: int = Field(0, ge=0)
    """Last tokens of rollout.max_tokens over which the penalty grows from 0, in a straight line; 0 sets none."""
    factor: float = Field(1.0, gt=0, le=LARGEST_REWARD)
    """The whole of it, in units of the reward."""


class PolicyObjective(_Weighted):
    """Reinforcement learning: the policy gradient of graded rollouts, up to where a cut was confirmed."""

    weight: float = Field(0.0, ge=0)
    """Factor of the policy's loss; 0 trains without rewards."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl"] = "grpo"
    """How the rewards of a prompt's rollouts become advantages (docs/rl.md)."""
    min_std: float = Field(1e-6, ge=0)
    """Added to the standard deviation that `grpo` divides by."""
    loss: Literal["clip", "reinforce", "cispo", "gspo"] = "clip"
    """Loss of a token: `clip` (PPO), `reinforce` (-A log p), `cispo` (-A ratio log p, the ratio held), `gspo` (as
    `clip`, with one ratio for all tokens of a rollout, the geometric mean of theirs; needs a pass without gradient
    first)."""
    clip: tuple[Share, Share] = (0.2, 0.28)
    """How far the ratio of learner to sampler may lie below and above 1 before `clip`, `cispo` and `gspo` hold it.
    For `gspo`, whose ratios lie close to 1, its authors have [3e-4, 4e-4]."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound of that ratio where the advantage is negative, for `clip`; null sets none. At least 1 + the second
    number of `clip`: below it tokens within the clip would have no gradient."""
    correction: Literal["none", "truncate", "interval", "sequence_mask", "geometric_mask"] = "none"
    """Weight of a token by its ratio of learner to sampler, for `reinforce`, whose loss has none: `truncate` takes
    the ratio up to the second number of `correction_range`, `interval` takes it within the two and 0 outside.
    `sequence_mask` takes the product of its rollout's ratios, and 0 for all tokens of a rollout whose product is
    above the second number. `geometric_mask` is `truncate` for rollouts whose geometric mean of ratios lies within
    the two, and 0 for the others. The last two need a pass without gradient first."""
    correction_range: tuple[Share, Share] = (0.5, 2.0)
    """See `correction`."""
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How the losses of tokens become one: their mean over the batch; the mean of the rollouts' means, or of their
    sums; or of their sums divided by rollout.max_tokens. With loss = `gspo` it is `sequence_mean`."""
    cut_reward: Literal["failure", "probe_mean", "probe_weighted", "exclude"] = "failure"
    """What a rollout counts that its rule cut before its answer (docs/rl.md): as wrong, that is 0, or as the worst
    answer of its step where that is below 0; as the mean of recent probes that would have been cut; nothing, while
    such probes count 1 / termination.probe_share times, which is unbiased with the advantages and means that
    `probe_weighted` is allowed with; or nothing at all. The two by probes are refused with rules that bound
    lengths."""
    probe_buffer: int = Field(256, ge=1)
    """Newest probes that the rule would have cut, whose mean reward `probe_mean` gives to those that it cuts."""
    probe_min: int = Field(20, ge=1)
    """Such probes before it does; until then a cut is a `failure`."""
    truncated: Literal["grade", "zero", "exclude"] = "grade"
    """A rollout that ran to rollout.max_tokens is graded as any other, counts as a `failure` does (less its penalty
    for length), or counts nothing."""
    overlong: OverlongPenalty = OverlongPenalty()
    """Penalty on long answers: over the last `buffer` tokens of rollout.max_tokens (0 sets none) it grows to
    `factor`, in units of the reward."""
    filter_constant_groups: bool = False
    """Leave prompts whose rollouts all have one reward, penalties aside, out of the policy's denominator; the KL of
    their tokens counts as ever."""
    max_num_gen_batches: int = Field(1, ge=1)
    """Batches of prompts that a step may sample, the first included. Above 1 other prompts are drawn in the place
    of those that `filter_constant_groups` leaves out, as many as are missing each time, until the step has
    rollout.prompts_per_step groups or has sampled so many batches; then it is taken with those that it has, and the
    log says so. For objective.opd.weight = 0: a teacher teaches on constant groups, too."""
    advantage_clip: float | None = Field(None, gt=0)
    """Largest size of an advantage; null sets no limit."""

    @property
    def rollout_ratio(self) -> Literal["mean", "sum"] | None:
        """What a token's loss needs of the ratios of its rollout, hence a pass without gradient before its own.

        Their geometric mean or their product; None where it needs neither, or nothing is learnt from rewards.
        """
        if not self.weight:
            return None
        if self.loss == "gspo" or self.correction == "geometric_mask":
            return "mean"
        return "sum" if self.correction == "sequence_mask" else None

    @model_validator(mode="before")
    @classmethod
    def _has_the_mean_of_its_loss(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("loss") == "gspo":
            return {"aggregate": "sequence_mean"} | dict(values)
        return values

    @model_validator(mode="after")
    def _is_a_mean_over_rollouts(self) -> PolicyObjective:
        if self.loss == "gspo" and self.aggregate != "sequence_mean":
            raise ValueError(
                f"aggregate = {self.aggregate!r}: must be 'sequence_mean' with loss = 'gspo', whose ratio is that "
                "of a whole rollout; leave aggregate out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_weighted(self) -> PolicyObjective:
        if self.cut_reward != "probe_weighted":
            return self
        allowed: dict[str, tuple[str | bool, ...]] = {
            "advantage": ("rloo", "dr_grpo"),
            "aggregate": ("sequence_sum", "constant"),
            "filter_constant_groups": (False,),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                words = " or ".join("false" if v is False else repr(v) for v in values)
                shown = "true" if value is True else repr(value)
                raise ValueError(
                    f"{name} = {shown}: must be {words} with cut_reward = 'probe_weighted', which is unbiased only "
                    "for sums of rewards over a fixed number of rollouts (docs/rl.md); or take another cut_reward"
                )
        return self

    @model_validator(mode="after")
    def _bounds_what_the_clip_leaves(self) -> PolicyObjective:
        if self.loss == "clip" and self.dual_clip is not None and self.dual_clip < 1.0 + self.clip[1]:
            raise ValueError(
                f"dual_clip = {self.dual_clip:g}: lies within clip = [{self.clip[0]:g}, {self.clip[1]:g}], whose "
                f"ratios go up to {1.0 + self.clip[1]:g}: with a negative advantage tokens in between would have "
                f"no gradient; it must be at least {1.0 + self.clip[1]:g}, such as 3, or null"
            )
        return self

    @model_validator(mode="after")
    def _is_corrected_once(self) -> PolicyObjective:
        if self.correction != "none" and self.loss != "reinforce":
            raise ValueError(
                f"correction = {self.correction!r}: counts the ratio of learner to sampler twice, since loss = "
                f"{self.loss!r} has it already; use loss = 'reinforce', or correction = 'none'"
            )
        if self.max_num_gen_batches > 1 and not self.filter_constant_groups:
            raise ValueError(
                f"max_num_gen_batches = {self.max_num_gen_batches}: draws prompts for those that are left out, "
                "and filter_constant_groups = false leaves out none; set it to true, or max_num_gen_batches = 1"
            )
        if self.probe_min > self.probe_buffer:
            raise ValueError(f"probe_min = {self.probe_min}: must be <= probe_buffer = {self.probe_buffer}")
        low, high = self.correction_range
        if low >= high:
            raise ValueError(f"correction_range = [{low:g}, {high:g}]: must be two rising numbers")
        return self


class OffPolicyObjective(Section):
    """Completions of the data in place of rollouts: classical distillation, and a warm start by imitation."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of a step's prompts whose completion is taken from data.completion_column instead of being generated,
    one for each such prompt. At least one prompt of a step is left to the student."""
    loss: Literal["distillation", "sft"] = "distillation"
    """Of a given token: `distillation` takes objective.opd.divergence from the teacher, over the teacher's own top
    k and the rest as one; `sft` -log p(token), which asks no teacher."""
    weight: float = Field(1.0, gt=0)
    """Factor of the mean of these losses over the given tokens, which have a denominator of their own."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps after which all completions are generated; null takes given ones to the end."""

    @model_validator(mode="after")
    def _takes_some(self) -> OffPolicyObjective:
        for name, value in changed_fields(self).items() if not self.share else ():
            raise ValueError(
                f"{name} = {value!r}: is of given completions, and share is 0, which takes none; leave it out, or "
                "set share above 0"
            )
        return self


class ObjectiveConfig(Section):
    """What a run optimises: the sum of two losses, a weight each, and of one of given completions."""

    opd: DistillationObjective = DistillationObjective()
    """On-policy distillation."""
    rl: PolicyObjective = PolicyObjective()
    """Reinforcement learning."""
    off_policy: OffPolicyObjective = OffPolicyObjective()
    """Completions of the data."""

    @model_validator(mode="after")
    def _optimises_something(self) -> ObjectiveConfig:
        if not (self.opd.weight or self.rl.weight):
            raise ValueError("opd.weight = 0 and rl.weight = 0: there is nothing to optimise; set one of them")
        if not self.opd.weight and self.opd.support != "student":
            raise ValueError(
                f"opd.support = {self.opd.support!r}: is of distillation, and opd.weight is 0; leave it out, or "
                "set opd.weight above 0"
            )
        end = max(self.opd.anneal_steps or 0, self.rl.anneal_steps or 0)
        if not (self.opd.weight_at(end) or self.rl.weight_at(end)):
            raise ValueError(
                f"opd's weight and rl's are both 0 after {end} steps: there is nothing to optimise from then on; "
                "set one of opd.final_weight and rl.final_weight above 0"
            )
        return self

    @property
    def is_annealed(self) -> bool:
        """Whether a weight depends on the step."""
        return self.opd.final_weight is not None or self.rl.final_weight is not None

    def weights_at(self, step: int) -> dict[str, float]:
        """Of both losses, in the optimiser step that `step` others came before: a function of the step alone."""
        return {"opd": self.opd.weight_at(step), "rl": self.rl.weight_at(step)}
