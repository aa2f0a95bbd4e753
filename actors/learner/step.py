"""One rank's part in an optimiser step: its passes, the collectives around them, and AdamW.

The loss is the mean over the *global* number of kept tokens, so that two ranks do what one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.learner.collectives import max_over_ranks, sum_over_ranks
from actors.learner.engine import clips_itself, complete_gradients
from actors.learner.logprob_log import LogprobLog
from actors.learner.report import OptimizerStep
from actors.learner.schedule import learning_rate
from actors.learner.sequence_pass import SequencePass
from actors.learner.tensors import model_arguments, token_rows
from kat_ray.config import LearnerConfig
from kat_ray.data.collate import MicroBatch
from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.term import LossTerm, TermSums
from kat_ray.observability.timeline import Timeline


class StudentTrainer:
    """Takes optimiser steps with a DeepSpeed engine of `make_engine`; `beat` is called after each pass."""

    def __init__(
        self,
        engine: Any,
        term: LossTerm,
        learner: LearnerConfig,
        steps: int,
        dummy: MicroBatch,
        timeline: Timeline,
        beat: Callable[[], object],
        curve: MassCurve | None = None,
        sequence: SequencePass | None = None,
        term_at: Callable[[int], LossTerm] | None = None,
        logprobs: LogprobLog | None = None,
    ) -> None:
        """`sequence` is made before each pass with a gradient; `term_at` gives the term after so many steps, where
        it changes with them. `logprobs` watches the terms.
        """
        self.logprobs = logprobs
        self.steps_taken = 0  # skipped ones too: the schedule goes by the steps of the run
        self._engine = engine
        self._term = term
        self._learner = learner
        self._steps = steps
        self._dummy = dummy  # touches every parameter, for a rank that has run out of work
        self._timeline = timeline
        self._beat = beat
        self._curve = curve or MassCurve(1)  # what the engine was made with
        self._policy_scale = 1.0
        self._sequence = sequence
        self._term_at = term_at
        self._clip = GradientClip(engine, learner.clip) if clips_itself(learner) else None

    def step(self, batches: Sequence[MicroBatch], global_weight: float) -> OptimizerStep:
        """One step on this rank's micro-batches; all ranks call it, with the same `global_weight`."""
        lr = self._set_lr()
        if self.logprobs is not None:
            self.logprobs.take()  # what nobody asked for
        if self._term_at is not None:
            self._term = self._term_at(self.steps_taken)
            self._engine.module.use_term(self._term)
        # ZeRO gathers parameters and reduces gradients on the way: all ranks must make as many passes.
        passes = int(max_over_ranks([len(batches)], self._engine.device)[0])
        loss, sums, maxima = self._run_passes(batches, passes, global_weight)
        curve = sum_over_ranks(self._curve.take(), self._engine.device).tolist()
        grad_norm = 0.0 if global_weight == 0 else self._update(loss, sums, global_weight)
        self.steps_taken += 1
        top_k = self._curve.size_for(curve, 0.99)
        return OptimizerStep(
            loss, sums, maxima, grad_norm, lr, micro_batches=passes, top_k_for_99=top_k, weight=global_weight
        )

    def _run_passes(
        self, batches: Sequence[MicroBatch], passes: int, global_weight: float
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """All forward and backward passes; the term's loss, sums and maxima over all ranks.

        A global weight of 0 leaves nothing to learn, and one that is not finite no mean: no pass is made then.
        """
        totals = np.zeros(1 + len(self._term.sum_names))
        maxima = np.zeros(len(self._term.max_names))
        if math.isfinite(global_weight) and global_weight > 0:
            # DeepSpeed averages over ranks; the mean is over the tokens of all ranks together.
            scale = self._learner.world_size / global_weight
            # The weights of the policy's tokens, and of given ones, have their denominator already.
            self._policy_scale = global_weight
            for i in range(passes):
                with self._timeline.span("forward and backward"):
                    if i < len(batches):
                        result = self._forward_backward(batches[i], scale)
                        totals += [float(result.loss), *result.sums.tolist()]
                        maxima = np.maximum(maxima, result.maxima.numpy())
                    else:
                        # Without it ZeRO's collectives on the other ranks would wait for ever.
                        self._forward_backward(self._dummy, 0.0)
                self._beat()
        device = self._engine.device
        loss, *sums = sum_over_ranks(totals, device).tolist()
        return (
            loss,
            dict(zip(self._term.sum_names, sums, strict=True)),
            dict(zip(self._term.max_names, max_over_ranks(maxima, device).tolist(), strict=True)),
        )

    def _forward_backward(self, batch: MicroBatch, scale: float) -> TermSums:
        device = self._engine.device
        self._curve.counts = batch is not self._dummy
        positions = torch.from_numpy(batch.inputs.positions).to(device)
        rows = token_rows(batch, device)
        if rows.policy_weights is not None:
            rows = rows._replace(policy_weights=rows.policy_weights * self._policy_scale)
        if rows.given_weights is not None:
            rows = rows._replace(given_weights=rows.given_weights * self._policy_scale)
        if self._sequence is not None:
            rows = self._sequence(self._engine, batch, rows)
        result: TermSums = self._engine(model_arguments(batch, device), positions, rows)
        self._engine.backward(result.loss * scale)
        if self.logprobs is not None:
            self.logprobs.end_pass(() if batch is self._dummy else batch.samples)
        return result._replace(loss=result.loss.detach())

    def _update(self, loss: float, sums: Mapping[str, float], global_weight: float) -> float:
        """Take the optimiser step, or skip it on all ranks; returns the gradient norm, inf where it was skipped."""
        if not math.isfinite(global_weight):
            return math.inf
        with self._timeline.span("optimiser"):
            learnt = sums["tokens"] or sums.get("policy_tokens") or sums.get("given_tokens")
            if not math.isfinite(loss) or not learnt:
                # Gradients may be finite all the same, and zeros would still move AdamW. DeepSpeed skips a step,
                # and forgets its gradients, where their norm is not finite: so make it that. The sums are those of
                # all ranks, which makes this pass, a collective operation, one that all make or none.
                self._forward_backward(self._dummy, math.nan)
            complete_gradients(self._engine)
            self._engine.step()
        norm = self._clip.norm if self._clip else self._engine.get_global_grad_norm()
        return float(norm)

    def _set_lr(self) -> float:
        lr = learning_rate(self.steps_taken, self._steps, self._learner)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        return lr


class GradientClip:
    """Clips reduced gradients before a step of AdamW, and skips the step where ZeRO would."""

    def __init__(self, engine: Any, limit: float) -> None:
        self.norm = 0.0  # before clipping, of the last step; inf where it was skipped
        self._limit = limit
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = float(nn.utils.clip_grad_norm_(parameters, self._limit))
        if not math.isfinite(self.norm):
            self.norm = math.inf
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves parameters without a gradient alone
