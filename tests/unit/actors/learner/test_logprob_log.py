"""What the learner makes of the sampled tokens is kept as its passes compute it, and changes nothing of them."""

from functools import partial

import numpy as np
import pytest
import torch

from actors.learner.logprob_log import LogprobLog
from actors.learner.objective import make_term, sequence_pass
from actors.learner.step import StudentTrainer
from actors.learner.tensors import dummy_sample
from kat_ray.data.collate import PaddedCollator
from kat_ray.observability.timeline import Timeline
from tests.support.plain_engine import TOP_K, PlainEngine, Ranks, credit_of, sample_of, settings_of

BOTH = {"opd": {"weight": 0.5}, "rl": {"weight": 1.0}}


def batch():
    rng, logits = np.random.default_rng(0), torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    lengths = [3, 1, 5, 2]
    credits = credit_of([1, -1, 0.5, 0], [0.125, 0.125, 0.125, 0], lengths)
    samples = [
        sample_of(7 + i, rng.integers(0, 9, 2), rng.integers(0, 9, n), np.full(n, -2.0), credit)
        for i, (n, credit) in enumerate(zip(lengths, credits, strict=True))
    ]
    return logits, samples


def trainer_of(monkeypatch, logits, objective, logprobs):
    ranks = Ranks(1)
    ranks.enter(0)
    for name in ("sum_over_ranks", "max_over_ranks"):
        monkeypatch.setattr(f"actors.learner.step.{name}", lambda values, device: np.asarray(values))
    settings = settings_of(objective)
    term_at = partial(make_term, settings)
    if logprobs is not None:
        term_at = lambda step=0: logprobs.watched(make_term(settings, step))  # noqa: E731
    (dummy,) = PaddedCollator(16).micro_batches([dummy_sample(TOP_K)])
    engine = PlainEngine(logits, term_at(), ranks, 1)
    trainer = StudentTrainer(
        engine, term_at(), settings.learner, settings.steps, dummy, Timeline(), lambda: None,
        sequence=sequence_pass(settings), term_at=term_at, logprobs=logprobs,
    )  # fmt: skip
    return trainer, engine


@pytest.mark.parametrize("objective", [BOTH, {**BOTH, "rl": {"weight": 1.0, "loss": "gspo"}}])
@pytest.mark.parametrize("micro_batch_tokens", [16, 64])
def test_they_are_those_of_the_weights_before_the_step(monkeypatch, objective, micro_batch_tokens):
    logits, samples = batch()
    logprobs = LogprobLog()
    trainer, engine = trainer_of(monkeypatch, logits, objective, logprobs)
    plain, other = trainer_of(monkeypatch, logits, objective, None)
    batches = PaddedCollator(micro_batch_tokens).micro_batches(samples)
    assert (len(batches) > 1) == (micro_batch_tokens == 16)
    step, expected = trainer.step(batches, 11.0), plain.step(batches, 11.0)
    assert step == expected and np.array_equal(engine.gradient, other.gradient), "to the bit"
    found = logprobs.take()
    assert sorted(found) == [7, 8, 9, 10] and logprobs.take() == {}
    table = torch.log_softmax(logits, -1)
    for sample in samples:
        before = [*sample.prompt_ids, *sample.token_ids][len(sample.prompt_ids) - 1 : -1]
        wanted = table[torch.tensor(before), torch.from_numpy(sample.token_ids).long()]
        np.testing.assert_allclose(found[sample.rollout_id], wanted.numpy(), atol=1e-6)


def test_a_step_without_a_pass_has_none_not_even_those_of_the_one_before(monkeypatch):
    logits, samples = batch()
    logprobs = LogprobLog()
    trainer, _ = trainer_of(monkeypatch, logits, BOTH, logprobs)
    trainer.step(PaddedCollator(64).micro_batches(samples), 11.0)
    trainer.step([], 0.0)
    assert logprobs.take() == {}
