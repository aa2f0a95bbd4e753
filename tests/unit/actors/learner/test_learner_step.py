"""An optimiser step's control flow, with an engine that only writes down what is asked of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.learner import step as step_module
from actors.learner.step import StudentTrainer
from actors.learner.tensors import dummy_sample
from kat_ray.config import LearnerConfig
from kat_ray.data.collate import PaddedCollator
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.term import TermSums
from kat_ray.observability.timeline import Timeline

TERM = Distillation((1,), "merged")


class WritesDown:
    """An engine of one rank whose passes give a loss of 2 over 4 tokens, or what `loss` and `tokens` say."""

    def __init__(self, loss=2.0, tokens=4.0):
        self.device, self.scales, self.stepped = torch.device("cpu"), [], 0
        self.optimizer, self.module = SimpleNamespace(param_groups=[{}]), torch.nn.Linear(2, 2)
        self._loss, self._tokens = loss, tokens

    def __call__(self, arguments, positions, rows):
        self.rows = rows
        counts = dict.fromkeys(TERM.sum_names, 0.0) | {"tokens": self._tokens, "weight": self._tokens}
        sums = torch.tensor(list(counts.values()), dtype=torch.float64)
        return TermSums(torch.tensor(self._loss), sums, torch.tensor([0.25]))

    def backward(self, loss):
        self.scales.append(float(loss) / self._loss)

    def step(self):
        self.stepped += 1

    def zero_optimization_stage(self):
        return 0

    def get_global_grad_norm(self):
        return torch.tensor(math.inf if any(map(math.isnan, self.scales)) else 0.5)


def take_step(monkeypatch, engine, batches=1, weight=4.0, busiest=1):
    """A step of one of two ranks; the other makes `busiest` passes and adds nothing to any sum."""
    monkeypatch.setattr(step_module, "sum_over_ranks", lambda values, device: np.asarray(values, np.float64))
    reductions = iter([[busiest]])
    monkeypatch.setattr(
        step_module, "max_over_ranks", lambda values, device: np.maximum(values, next(reductions, values))
    )
    (batch,) = PaddedCollator(16).micro_batches([dummy_sample(8)])
    learner = LearnerConfig(world_size=2, lr=1e-3, warmup_ratio=0.0)
    trainer = StudentTrainer(engine, TERM, learner, 10, batch, Timeline(), lambda: None)
    return trainer.step([batch] * batches, weight), trainer


def test_a_rank_that_runs_out_of_work_makes_passes_that_count_nothing(monkeypatch):
    engine = WritesDown()
    result, trainer = take_step(monkeypatch, engine, batches=1, weight=8.0, busiest=3)
    assert engine.scales == [2 / 8, 0, 0] and engine.stepped == 1, "DeepSpeed averages over the two ranks"
    assert (result.loss, result.sums["tokens"], result.maxima) == (2.0, 4.0, {"logprob_diff": 0.25})
    assert (result.micro_batches, result.grad_norm, result.lr) == (3, 0.5, 1e-3)
    assert trainer.steps_taken == 1 and engine.optimizer.param_groups == [{"lr": 1e-3}]


@pytest.mark.parametrize(("loss", "tokens"), [(math.nan, 4.0), (math.inf, 4.0), (2.0, 0.0)])
def test_a_loss_that_is_not_finite_or_empty_spoils_the_gradient(monkeypatch, loss, tokens):
    engine = WritesDown(loss, tokens)
    result, trainer = take_step(monkeypatch, engine)
    assert len(engine.scales) == 2 and math.isnan(engine.scales[1]) and engine.stepped == 1
    assert result.grad_norm == math.inf and trainer.steps_taken == 1


@pytest.mark.parametrize(("weight", "norm"), [(0.0, 0.0), (math.nan, math.inf), (math.inf, math.inf)])
def test_without_a_finite_weight_no_pass_is_made(monkeypatch, weight, norm):
    engine = WritesDown()
    result, trainer = take_step(monkeypatch, engine, weight=weight)
    assert (engine.scales, engine.stepped, result.grad_norm) == ([], 0, norm)
    assert (result.loss, result.sums["tokens"], trainer.steps_taken) == (0.0, 0.0, 1)


def test_the_dummy_has_a_finite_loss():
    (batch,) = PaddedCollator(16).micro_batches([dummy_sample(8)])
    rows = step_module.token_rows(batch, torch.device("cpu"))
    assert rows.topk_ids.shape == (1, 8) and rows.teacher_stop.tolist() == [-math.inf], "no stop ids outside"
    assert all(
        torch.isfinite(column).all() for column in rows._replace(teacher_stop=rows.weights) if column is not None
    )
    mass = rows.teacher_topk.exp().sum() + rows.teacher_tail.exp()
    assert mass.item() == pytest.approx(1.0)
