"""Limits of metrics: the section `guards`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kat_ray.config.cluster import Section


class GuardsConfig(Section):
    """Collapse guards: limits of metrics; each is said in one line when it is passed, and can end the run."""

    action: Literal["warn", "stop"] = "warn"
    """What a guard does when it fires: `warn` says so, `stop` ends the run after a checkpoint. Of guards without an
    action of their own."""
    patience: int = Field(5, ge=1)
    """Steps in a row beyond a limit before a guard fires; a first line comes after half of them."""
    reference_steps: int = Field(10, ge=1)
    """First steps of the run whose mean the relative limits are taken from; until then these do not act."""
    stop_mass_fall: float | None = Field(0.1, gt=0, lt=1)
    """Lower limit of learner/stop_mass, as a share of its first mean; null switches it off."""
    stop_mass_rise: float | None = Field(0.5, gt=0, lt=1)
    """Upper limit of learner/stop_mass, as a share of the way from its first mean to 1; null switches it off."""
    entropy_fall: float | None = Field(0.1, gt=0, lt=1)
    """Lower limit of learner/entropy, or with rewards of rl/entropy in its place, as a share of its first mean;
    null switches it off."""
    max_tokens_share: float | None = Field(0.9, ge=0, lt=1)
    """Upper limit of rollout/max_tokens_share, from the first step on; without effect where the rule sets a budget.
    null switches it off."""
    kl_rise: float | None = Field(3.0, gt=1)
    """Upper limit of kl/mean, as a multiple of its first mean; without effect where objective.opd.weight is 0.
    null switches it off."""
    kl_fall: float | None = Field(0.02, gt=0, lt=1)
    """Lower limit of kl/mean, as a share of its first mean; without effect where objective.opd.weight is 0. null
    switches it off."""
    logprob_diff: float | None = Field(1.0, gt=0)
    """Upper limit of learner/logprob_diff_mean and learner/logprob_diff_max, as a multiple of what rounding
    explains with the data types of sampler and learner (docs/numbers.md), in steps sampled from the learner's own
    weights: beyond it the two compute different models. The mean's acts at its first step, without `patience`. null
    switches it off."""
    logprob_diff_action: Literal["warn", "stop"] = "stop"
    """`action` of `logprob_diff`."""
    tail_mass: float | None = Field(0.1, gt=0, lt=1)
    """Upper limit of learner/tail_mass, the student's mass that rollout.top_k_logprobs leaves in one event; null
    switches it off."""
    tail_mass_action: Literal["warn", "stop"] = "warn"
    """`action` of `tail_mass`."""
    ratio: float | None = Field(1.0, gt=0)
    """Upper limit of |rl/ratio_mean - 1| and of rl/log_ratio_max, as a multiple of what rounding explains with the
    data types of sampler and learner (with float32 on both 0.001, and 0.01 for a single token), in steps sampled
    from the learner's own weights. The mean's acts at its first step, without `patience`. null switches it off."""
    ratio_action: Literal["warn", "stop"] = "stop"
    """`action` of `ratio`."""
    ratio_max: float | None = Field(100.0, gt=1)
    """Upper limit of rl/ratio_max, also where sampling is ahead; null switches it off."""
    constant_groups: float | None = Field(0.9, gt=0, lt=1)
    """Upper limit of group/constant_share; null switches it off."""
    held_out_fall: float | None = Field(0.05, gt=0, lt=1)
    """How far avg@k of one evaluation may lie below that of the one before, beyond what chance explains (twice the
    standard error of the difference, paired by problem), where the mean reward of the steps between rose. Needs
    evaluations along the run (evaluation.every), and acts with the step after the third of them or a later one,
    without `patience`; of the evaluation after the last step it says a line. null switches it off."""
    context_leak: float | None = Field(0.05, gt=0, lt=1)
    """As `held_out_fall`, where a teacher has a context (teacher.context) and kl/mean of the steps between fell."""
