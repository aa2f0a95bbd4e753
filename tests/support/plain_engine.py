"""The learner's step on plain torch: ranks are threads, and a student is a table of logits by the token before.

So a step's loss can be worked out by hand, and its gradient compared between any numbers of ranks.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import nn

from actors.learner import step as step_module
from actors.learner.engine import StudentWithLoss
from actors.learner.objective import make_term, sequence_pass
from actors.learner.settings import LearnerSettings
from actors.learner.step import StudentTrainer
from actors.learner.tensors import dummy_sample
from kat_ray.config import LearnerConfig, ModelConfig, ObjectiveConfig
from kat_ray.data.batch import TrainingSample, assign_ranks
from kat_ray.data.collate import PaddedCollator
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.observability.timeline import Timeline
from kat_ray.types.records import KeptRollout, PolicyCredit

TOP_K = 4


class Table(nn.Module):
    """Hidden states are rows of a table of logits [V, V], by the token before; the output layer is the identity."""

    def __init__(self, logits):
        super().__init__()
        self.rows = nn.Parameter(logits.clone())
        self.head = nn.Linear(*logits.shape, bias=False)
        self.head.weight = nn.Parameter(torch.eye(len(logits)))
        self.network, self.output_layer = nn.ModuleList([self.head]), OutputLayer(self.head)
        self.network.register_parameter("rows", self.rows)

    def hidden_states(self, arguments):
        return self.rows[arguments["input_ids"]]


class Ranks:
    """What threads reduce over each other, in place of `actors.learner.collectives`."""

    def __init__(self, count):
        self._barrier, self._values, self._own = threading.Barrier(count), [None] * count, threading.local()

    def enter(self, rank):
        self._own.rank = rank

    def reduce(self, values, operation):
        self._values[self._own.rank] = np.asarray(values, np.float64)
        self._barrier.wait(60)
        result = operation(np.stack(self._values), axis=0)
        self._barrier.wait(60)
        return result


class PlainEngine:
    """As much of DeepSpeed's engine as a step asks for; gradients are averaged over ranks, and kept."""

    def __init__(self, logits, term, ranks, count, chunk_tokens=3):
        self.module = StudentWithLoss(Table(logits), term, chunk_tokens)
        self.device, self.passes, self._ranks, self._count = torch.device("cpu"), 0, ranks, count
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0)

    def __call__(self, *args):
        self.passes += 1
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        own = self.module.network.get_parameter("rows").grad.numpy()
        self.gradient = self._ranks.reduce(own, np.sum) / self._count
        self.optimizer.step()

    def zero_optimization_stage(self):
        return 1

    def get_global_grad_norm(self):
        return np.linalg.norm(self.gradient)


def sample_of(number, prompt, tokens, sampled_logprobs, policy, weights=None):
    """A training sample whose teacher is uniform."""
    dummy, n = dummy_sample(TOP_K), len(tokens)
    given = {f: np.repeat(getattr(dummy, f), n, axis=0) for f in ("topk_ids", "teacher_topk", "teacher_tail")}
    return TrainingSample(
        number, np.array(prompt, np.int32), np.array(tokens, np.int32), **given,
        teacher_stop=np.full(n, -np.inf, np.float32), sampled_logprobs=np.array(sampled_logprobs, np.float32),
        weights=np.ones(n, np.float32) if weights is None else np.array(weights, np.float32), policy=policy,
    )  # fmt: skip


def credit_of(advantages, weights, tokens):
    """A `PolicyCredit` for each rollout, None where it weighs nothing."""
    rows = zip(advantages, weights, tokens, strict=True)
    return [PolicyCredit(float(a), int(t), float(w)) if w else None for a, w, t in rows]


def settings_of(objective, **learner):
    return LearnerSettings(
        LearnerConfig(lr=1e-3, warmup_ratio=0.0, **learner), ModelConfig(path="student"), "student", (1,), "merged",
        TOP_K, seed=0, steps=10, objective=ObjectiveConfig.model_validate(objective),
    )  # fmt: skip


def take_step(
    monkeypatch,
    logits,
    samples,
    objective,
    *,
    world_size=1,
    micro_batch_tokens=64,
    steps_taken=0,
    kind=PaddedCollator,
):
    """One step of all ranks: rank 0's `OptimizerStep`, the gradient in the table's rows, and the ranks' engines."""
    ranks = Ranks(world_size)
    monkeypatch.setattr(step_module, "sum_over_ranks", lambda values, device: ranks.reduce(values, np.sum))
    monkeypatch.setattr(step_module, "max_over_ranks", lambda values, device: ranks.reduce(values, np.max))
    settings = settings_of(objective, world_size=world_size)
    kept = [KeptRollout(s.rollout_id, len(s.prompt_ids), len(s.token_ids), s.weights, s.policy) for s in samples]
    by_id = {s.rollout_id: s for s in samples}
    shares = [[by_id[k.rollout_id] for k in share] for share in assign_ranks(kept, world_size)]
    weight = sum(k.weight for k in kept) or 1.0
    collator = kind(micro_batch_tokens)
    (dummy,) = collator.micro_batches([dummy_sample(TOP_K)])

    def rank(number):
        ranks.enter(number)
        engine = PlainEngine(logits, make_term(settings), ranks, world_size)
        trainer = StudentTrainer(
            engine, make_term(settings), settings.learner, settings.steps, dummy, Timeline(), lambda: None,
            sequence=sequence_pass(settings), term_at=partial(make_term, settings),
        )  # fmt: skip
        trainer.steps_taken = steps_taken
        return trainer.step(collator.micro_batches(shares[number]), weight), engine

    with ThreadPoolExecutor(world_size) as threads:
        done = list(threads.map(rank, range(world_size)))
    return done[0][0], done[0][1].gradient, [engine for _, engine in done]
