"""A whole step of the learner with rewards: values derived by hand, and the same step however it is dealt out.

The example of `test_policy`: one prompt, four answers of 2, 1, 3 and 2 tokens, ratios of learner to sampler RHO,
and the sampler's probabilities 0.4 everywhere.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.learner.report import policy_report
from kat_ray.algorithms.aggregation import token_weights
from kat_ray.data.collate import PackedCollator, PaddedCollator
from kat_ray.types.records import PolicyCredit
from tests.support.plain_engine import credit_of, sample_of, take_step

LENGTHS = np.array([2, 1, 3, 2])
RHO = np.array([1.5, 0.9, 0.5, 1.1, 1.0, 0.7, 1.25, 2.0])
GRPO, DR_GRPO, RLOO = ((a, -a / 3, -a / 3, -a / 3) for a in (1.5, 0.75, 1.0))
VOCABULARY = 12


def example(advantages=GRPO, aggregate="token_mean"):
    """Logits, and a sample of each answer; every token follows another one, so each has a row of its own."""
    ids = iter(range(VOCABULARY))
    logits, samples, rho = torch.zeros(VOCABULARY, VOCABULARY), [], iter(RHO)
    credits = credit_of(advantages, token_weights(aggregate, LENGTHS, np.ones(4), length=4), LENGTHS)
    for number, (length, credit) in enumerate(zip(LENGTHS, credits, strict=True)):
        prompt, *tokens = (next(ids) for _ in range(length + 1))
        for before, token in zip((prompt, *tokens), tokens, strict=False):
            p = 0.4 * next(rho)
            logits[before] = np.log((1 - p) / (VOCABULARY - 1))
            logits[before, token] = np.log(p)
        samples.append(sample_of(number, [prompt], tokens, np.log(np.full(length, 0.4)), credit))
    return logits, samples


def in_order(samples, table):
    """The table's entries of the sampled tokens."""
    return [
        table[before, token]
        for s in samples
        for before, token in zip((*s.prompt_ids, *s.token_ids), s.token_ids, strict=False)
    ]


REINFORCE = -np.repeat(GRPO, LENGTHS) * np.log(0.4 * RHO)
PRODUCT = np.repeat([1.35, 0.5, 0.77, 2.5], LENGTHS)


@pytest.mark.parametrize(
    ("loss", "advantages", "expected"),
    [
        ({"clip": (0.2, 0.2), "dual_clip": None}, GRPO, 0.040625),
        ({"clip": (0.2, 0.2), "dual_clip": None, "aggregate": "sequence_mean"}, GRPO, 0.030208333),
        ({"clip": (0.2, 0.2), "dual_clip": None, "aggregate": "sequence_sum"}, GRPO, 0.08125),
        ({"clip": (0.2, 0.2), "dual_clip": None, "aggregate": "constant"}, GRPO, 0.0203125),
        ({"clip": (0.2, 0.28), "dual_clip": None}, GRPO, 0.025625),
        ({"clip": (0.2, 0.28), "dual_clip": None, "aggregate": "sequence_mean"}, GRPO, 0.015208333),
        ({"clip": (0.2, 0.28), "dual_clip": None, "aggregate": "sequence_sum"}, GRPO, 0.05125),
        ({"clip": (0.2, 0.28), "dual_clip": None, "aggregate": "constant"}, GRPO, 0.0128125),
        ({"clip": (0.2, 0.28), "dual_clip": 1.5}, GRPO, -0.005625),
        ({"clip": (0.2, 0.28), "dual_clip": 1.5, "aggregate": "sequence_mean"}, GRPO, -0.016041667),
        ({"clip": (0.2, 0.28), "dual_clip": 1.5, "aggregate": "sequence_sum"}, GRPO, -0.01125),
        ({"clip": (0.2, 0.28), "dual_clip": 1.5, "aggregate": "constant"}, GRPO, -0.0028125),
        ({"clip": (0.2, 0.2), "dual_clip": None, "aggregate": "constant"}, DR_GRPO, 0.01015625),
        ({"clip": (0.2, 0.2), "dual_clip": None}, RLOO, 0.027083333),
        ({"loss": "reinforce"}, RLOO, -0.039105625),
        ({"loss": "reinforce", "aggregate": "sequence_sum"}, RLOO, -0.078211249),
        ({"loss": "cispo", "clip": (0.2, 0.28)}, GRPO, -0.034832573),
        ({"loss": "gspo", "clip": (0.2, 0.2)}, GRPO, -0.023497567),
        ({"loss": "gspo", "clip": (3e-4, 4e-4)}, GRPO, 0.072417354),
        ({"loss": "reinforce", "correction": "truncate", "correction_range": (0.1, 1.2)}, GRPO,
         (REINFORCE * [1.2, 0.9, 0.5, 1.1, 1.0, 0.7, 1.2, 1.2]).mean()),
        ({"loss": "reinforce", "correction": "interval", "correction_range": (0.8, 1.3)}, GRPO,
         (REINFORCE * [0, 0.9, 0, 1.1, 1.0, 0, 1.25, 0]).mean()),
        ({"loss": "reinforce", "correction": "sequence_mask", "correction_range": (0.5, 2.0)}, GRPO,
         (REINFORCE * PRODUCT * (PRODUCT <= 2)).mean()),
        ({"loss": "reinforce", "correction": "geometric_mask", "correction_range": (0.6, 1.4)}, GRPO,
         (REINFORCE * [1.4, 0.9, 0, 1.1, 1.0, 0.7, 0, 0]).mean()),
    ],
)  # fmt: skip
def test_a_step_has_the_loss_that_was_derived(monkeypatch, loss, advantages, expected):
    aggregate = "sequence_mean" if loss.get("loss") == "gspo" else loss.get("aggregate", "token_mean")
    logits, samples = example(advantages, aggregate)
    objective = {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, **loss}}
    step, *_ = take_step(monkeypatch, logits, samples, objective)
    report = policy_report(step)
    assert report.loss == pytest.approx(expected, abs=2e-7) and report.tokens == 8
    assert report.ratio_mean == pytest.approx(RHO.mean()) and report.ratio_max == pytest.approx(2.0)


def test_a_rollout_that_a_mask_leaves_out_stays_in_the_denominator(monkeypatch):
    loss = {"loss": "reinforce", "correction": "geometric_mask", "correction_range": (0.6, 1.4)}
    step, *_ = take_step(monkeypatch, *example(), {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, **loss}})
    assert policy_report(step).masked_share == 3 / 8, "the rollouts of one token and of the last two"


@pytest.mark.parametrize(
    ("loss", "slopes"),
    [
        ({"clip": (0.2, 0.2), "dual_clip": None}, [0, -0.16875, 0, 0.06875, 0.0625, 0, 0.078125, 0.125]),
        ({"loss": "cispo"}, [-0.24, -0.16875, 0.05, 0.06875, 0.0625, 0.05, 0.078125, 0.08]),
        ({"loss": "gspo", "clip": (0.2, 0.2)},
         [-0.217855, -0.217855, 0, 0.038190, 0.038190, 0.038190, 0.098821, 0.098821]),
    ],
)  # fmt: skip
def test_a_step_has_the_gradient_that_was_derived(monkeypatch, loss, slopes):
    """In the logit of a sampled token it is the slope in log p, times 1 - p."""
    logits, samples = example(aggregate="sequence_mean" if "gspo" in loss.values() else "token_mean")
    objective = {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, **loss}}
    _, gradient, _ = take_step(monkeypatch, logits, samples, objective)
    assert in_order(samples, gradient) == pytest.approx(np.array(slopes) * (1 - 0.4 * RHO), abs=1e-6)


def test_no_token_but_those_of_the_policy_has_its_gradient(monkeypatch):
    """A mask that is off by one would leave the first token out, and take one in that came after the decision."""
    logits, samples = example()
    samples = [
        replace(s, policy=PolicyCredit(1e3, n, 0.125) if n else None)
        for s, n in zip(samples, (1, 0, 2, 2), strict=True)
    ]
    objective = {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, "loss": "reinforce"}}
    _, gradient, _ = take_step(monkeypatch, logits, samples, objective)
    assert [bool(value) for value in in_order(samples, gradient)] == [
        True,
        False,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert in_order(samples, gradient)[0] == pytest.approx(-1e3 / 8 * (1 - 0.6)), "more of the token itself"


@pytest.mark.parametrize(("done", "opd", "rl"), [(0, 1.0, 0.5), (1, 0.7, 0.5), (3, 0.1, 0.5), (9, 0.1, 0.5)])
def test_the_weights_of_a_step_are_a_function_of_the_step_alone(monkeypatch, done, opd, rl):
    logits, samples = batch()
    annealed = {"opd": {"weight": 1.0, "final_weight": 0.1, "anneal_steps": 3}, "rl": {"weight": 0.5}}
    step, gradient, _ = take_step(monkeypatch, logits, samples, annealed, steps_taken=done)
    fixed = {"opd": {"weight": opd}, "rl": {"weight": rl}}
    expected, same, _ = take_step(monkeypatch, logits, samples, fixed)
    assert step.loss == pytest.approx(expected.loss) and step.sums == expected.sums
    np.testing.assert_allclose(gradient, same, atol=1e-7)
    assert step.loss == pytest.approx(opd * step.sums["kl_loss"] + rl * step.sums["policy_loss"], rel=1e-5)


# --- however a batch is dealt out ---------------------------------------------------------------------------------


def batch(seed=0, count=14, vocabulary=20):
    """Rollouts of 1 to 9 tokens: some outside the policy's loss, some with a longer part in it than in the KL's."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(vocabulary, vocabulary))).float()
    tokens = rng.integers(1, 10, count)
    counts = (rng.random(count) < 0.8).astype(float)
    weights = token_weights("sequence_mean", tokens, counts)
    credits = credit_of(rng.normal(size=count), weights, tokens)
    logp = torch.log_softmax(logits, -1).numpy()
    samples = []
    for number, (length, credit) in enumerate(zip(tokens, credits, strict=True)):
        ids = rng.integers(0, vocabulary, length + 2)
        sampled = logp[ids[1:-1], ids[2:]] + rng.normal(scale=0.3, size=length)
        kept = np.arange(length) < length - number % 3 if length > 2 else np.ones(length)
        samples.append(sample_of(number, ids[:2], ids[2:], sampled, credit, kept))
    return logits, samples


LOSSES = {
    "clip": {"loss": "clip"},
    "gspo": {"loss": "gspo", "clip": (0.1, 0.1)},
    "sequence_mask": {"loss": "reinforce", "correction": "sequence_mask", "correction_range": (0.5, 1.5)},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", [11, 33, 1000])
@pytest.mark.parametrize("kind", [PaddedCollator, PackedCollator])
def test_ranks_and_micro_batches_do_not_change_a_step(monkeypatch, loss, world_size, budget, kind):
    logits, samples = batch()
    objective = {"opd": {"weight": 0.3}, "rl": {"weight": 1.0, **loss}}
    expected, gradient, _ = take_step(monkeypatch, logits, samples, objective, micro_batch_tokens=1000)
    step, found, engines = take_step(
        monkeypatch, logits, samples, objective, world_size=world_size, micro_batch_tokens=budget, kind=kind
    )
    assert step.loss == pytest.approx(expected.loss, rel=1e-5)
    assert step.sums == pytest.approx(dict(expected.sums), rel=1e-5) and step.maxima == expected.maxima
    assert np.abs(gradient).max() > 1e-3, "there must be a gradient for this to mean anything"
    np.testing.assert_allclose(found, gradient, atol=1e-6)
    assert len({engine.passes for engine in engines}) == 1, "a rank that passes alone waits for ever"
    assert engines[0].passes == step.micro_batches * (1 if loss["loss"] == "clip" else 2)


def test_a_mean_over_micro_batches_would_be_another_number(monkeypatch):
    """As micro-batches of the tokens (1-3) and (4-8), of one rank or of two: no mean of means."""
    logits, samples = example()
    objective = {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, "clip": (0.2, 0.2), "dual_clip": None}}
    for world_size, budget in ((1, 2), (1, 4), (2, 64)):
        step, *_ = take_step(
            monkeypatch, logits, samples, objective, world_size=world_size, micro_batch_tokens=budget
        )
        assert policy_report(step).loss == pytest.approx(0.040625, abs=2e-7)


@pytest.mark.parametrize("budget", [1, 11, 33, 1000])
def test_a_rollout_is_in_one_micro_batch(budget):
    _, samples = batch()
    found = PaddedCollator(budget).micro_batches(samples)
    assert sorted(s.rollout_id for b in found for s in b.samples) == [s.rollout_id for s in samples]
    assert all(len(b.inputs.positions) == sum(len(s.token_ids) for s in b.samples) for b in found)
