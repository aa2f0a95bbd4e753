"""What a run optimises: the section `objective`."""

from __future__ import annotations

from typing import Annotated, Literal

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
    loss: Literal["clip", "reinforce", "cispo"] = "clip"
    """Loss of a token: `clip` (PPO), `reinforce` (-A log p), `cispo` (-A ratio log p, the ratio held)."""
    clip: tuple[Share, Share] = (0.2, 0.28)
    """How far the ratio of learner to sampler may lie below and above 1 before `clip` and `cispo` hold it."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound of that ratio where the advantage is negative, for `clip`; null sets none."""
    correction: Literal["none", "truncate", "interval"] = "none"
    """Weight of a token by its ratio of learner to sampler, for `reinforce`, whose loss has none: `truncate` takes
    the ratio up to the second number of `correction_range`, `interval` takes it within the two and 0 outside."""
    correction_range: tuple[Share, Share] = (0.5, 2.0)
    """See `correction`."""
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How the losses of tokens become one: their mean over the batch; the mean of the rollouts' means, or of their
    sums; or of their sums divided by rollout.max_tokens."""
    cut_reward: Literal["failure", "probe_weighted", "exclude"] = "failure"
    """What a rollout counts that its rule cut before its answer (docs/rl.md): as wrong; nothing, while probes that
    would have been cut count 1 / termination.probe_share times, which is unbiased; or nothing at all."""
    truncated: Literal["grade", "zero", "exclude"] = "grade"
    """A rollout that ran to rollout.max_tokens is graded as any other, has reward 0, or counts nothing."""

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
