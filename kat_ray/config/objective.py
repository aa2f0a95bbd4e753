"""What a run optimises: the section `objective`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Section

Share = Annotated[float, Field(gt=0)]


class DistillationObjective(Section):
    """On-policy distillation: the exact reverse KL to the teacher, up to the cut."""

    weight: float = Field(1.0, ge=0)
    """Factor of the mean KL in the loss."""


class PolicyObjective(Section):
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
    """Bound of that ratio where the advantage is negative, for `clip`; null sets none."""
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
    cut_reward: Literal["failure", "probe_weighted", "exclude"] = "failure"
    """What a rollout counts that its rule cut before its answer (docs/rl.md): as wrong; nothing, while probes that
    would have been cut count 1 / termination.probe_share times, which is unbiased; or nothing at all."""
    truncated: Literal["grade", "zero", "exclude"] = "grade"
    """A rollout that ran to rollout.max_tokens is graded as any other, has reward 0, or counts nothing."""

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
    def _is_corrected_once(self) -> PolicyObjective:
        if self.correction != "none" and self.loss != "reinforce":
            raise ValueError(
                f"correction = {self.correction!r}: counts the ratio of learner to sampler twice, since loss = "
                f"{self.loss!r} has it already; use loss = 'reinforce', or correction = 'none'"
            )
        low, high = self.correction_range
        if low >= high:
            raise ValueError(f"correction_range = [{low:g}, {high:g}]: must be two rising numbers")
        return self


class ObjectiveConfig(Section):
    """What a run optimises: the sum of two losses, a weight each."""

    opd: DistillationObjective = DistillationObjective()
    """On-policy distillation."""
    rl: PolicyObjective = PolicyObjective()
    """Reinforcement learning."""

    @model_validator(mode="after")
    def _optimises_something(self) -> ObjectiveConfig:
        if not (self.opd.weight or self.rl.weight):
            raise ValueError("opd.weight = 0 and rl.weight = 0: there is nothing to optimise; set one of them")
        return self
