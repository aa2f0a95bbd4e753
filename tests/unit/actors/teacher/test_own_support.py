"""The loss on the teacher's own top k: what a scorer sends, and what the learner makes of it."""

import numpy as np
import pytest
import torch

from actors.learner.engine import StudentWithLoss
from actors.learner.model import StudentModel
from actors.learner.tensors import model_arguments, token_rows
from actors.teacher.backend import columns_of
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.data.batch import collect_samples
from kat_ray.data.collate import PaddedCollator
from kat_ray.data.given import GivenCompletion, GivenShare, given_chunk, given_samples
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import forward_kl, reverse_kl
from kat_ray.losses.given import WithGiven
from kat_ray.losses.policy import PolicyAndDistillation, reinforce_loss
from kat_ray.run.step_metrics import score_metrics
from kat_ray.types.records import KeptRollout, Prompt, array_bytes
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config
from tests.support.models import make_model

STOP, K, V = 5, 8, 200


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return root, *(
        make_model(root / name, seed=seed, tied=False) for name, seed in (("student", 1), ("teacher", 2))
    )


def scorer_of(root, **opd):
    names = str(root / "student"), str(root / "teacher")
    config = make_config(*names, objective={"opd": opd}, rollout={"top_k_logprobs": K})
    return TeacherScorer("scorer:0", ScorerSettings.from_config(config, names[1], (STOP,), 64))


def logits_of(model, prompt, tokens):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()


def exact(student, teacher, rollouts, kl, temperatures=(1.0, 1.0)):
    """Over the teacher's top k, STOP and the rest, in float64 from lists of ids."""
    total = 0.0
    for prompt, tokens in rollouts.values():
        sides = [logits_of(m, prompt, tokens) / t for m, t in zip((student, teacher), temperatures, strict=True)]
        for own, other in zip(*(x.softmax(-1) for x in sides), strict=True):
            top = other.topk(K).indices.tolist()
            parts = [[i] for i in top]
            parts.append([i for i in range(V) if i not in {*top, STOP}] + ([STOP] if STOP not in top else []))
            masses = (torch.stack([side[part].sum() for part in parts])[None].log() for side in (own, other))
            total += kl(*masses).item()
    return total


def loss_of(student, term, samples):
    (batch,) = PaddedCollator(10_000).micro_batches(samples)
    module, device = StudentWithLoss(StudentModel(student), term, 1000), torch.device("cpu")
    return module(
        model_arguments(batch, device), torch.from_numpy(batch.inputs.positions), token_rows(batch, device)
    )


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 2.0)])
def test_the_loss_is_the_definition_and_the_scores_stay(pair, kl, temperatures):
    root, student, teacher = pair
    rollouts = random_rollouts(5, seed=3)
    chunk = chunk_of(student, rollouts, top_k=K)
    plain, _ = scorer_of(root).score(chunk)
    scored, rows = scorer_of(root, support="teacher", teacher_temperature=temperatures[1]).score(chunk)
    assert (scored.d == plain.d).all() and (scored.overlap == plain.overlap).all(), "rules see the student's top k"
    assert plain.row_bytes == chunk.tokens * (K * 2 + 8), "log-probabilities in float16, two floats beside them"
    assert scored.row_bytes == chunk.tokens * (K * 4 + 8), "and ids of 16 bits"
    assert array_bytes(rows) == scored.row_bytes
    figure = score_metrics([scored], {i: len(tokens) for i, (_, tokens) in rollouts.items()})
    assert figure["scorer/row_bytes_per_token"] == K * 4 + 8
    kept = [KeptRollout(i, len(prompt), len(tokens)) for i, (prompt, tokens) in rollouts.items()]
    samples = collect_samples([chunk], [rows], kept)
    found = loss_of(student, Distillation((STOP,), "merged", kl, temperatures[0]), samples).loss.item()
    assert found == pytest.approx(exact(student, teacher, rollouts, kl, temperatures), rel=1e-3)


def test_the_teachers_ids_see_more_of_the_forward_kl(pair):
    """By data processing both are below the whole; on the ids that the teacher likes there is more of it."""
    root, student, _ = pair
    rollouts = random_rollouts(5, seed=4)
    chunk = chunk_of(student, rollouts, top_k=K)
    kept = [KeptRollout(i, len(prompt), len(tokens)) for i, (prompt, tokens) in rollouts.items()]
    found = {}
    for support in ("student", "teacher"):
        rows = scorer_of(root, support=support).score(chunk)[1]
        term = Distillation((STOP,), "merged", forward_kl)
        found[support] = loss_of(student, term, collect_samples([chunk], [rows], kept)).loss.item()
    assert found["teacher"] > 1.2 * found["student"]


def test_given_completions_are_scored_whole_and_learnt_as_the_definition_says(pair):
    root, student, teacher = pair
    rollouts = random_rollouts(4, seed=5)
    completions = [
        GivenCompletion(i, Prompt(f"p{i}", tuple(prompt), completion_ids=tuple(tokens)))
        for i, (prompt, tokens) in rollouts.items()
    ]
    scorer, chunk = scorer_of(root, divergence="forward"), given_chunk(completions)
    scored, rows = scorer.score_given(chunk)
    assert scored.seconds > 0 and (scored.row_bytes, scored.http_sent) == (array_bytes(rows), 0)
    assert scorer.stats()["states"] == 0, "nothing of them is held"
    tokens = sum(len(t) for _, t in rollouts.values())
    share = GivenShare([], [], [c.kept for c in completions], 1 / tokens)
    samples = given_samples(share, [chunk], [rows], K)
    kl = Distillation((STOP,), "merged", forward_kl)
    policy = PolicyAndDistillation(kl, lambda logp, _, a, __: reinforce_loss(logp, a), None, 1.0, 0.0)
    term = WithGiven(policy, kl)
    found = loss_of(student, term, samples)
    assert found.loss.item() == pytest.approx(exact(student, teacher, rollouts, forward_kl) / tokens, rel=1e-3)
    sums = dict(zip(term.sum_names, found.sums.tolist(), strict=True))
    assert sums["given_tokens"] == tokens and sums["tokens"] == 0
    alone = [rows_.topk_logprobs for rows_ in (scorer.score_given(given_chunk([c]))[1] for c in completions)]
    np.testing.assert_allclose(np.concatenate(alone), rows.topk_logprobs, atol=2e-3)


def test_a_scorer_without_completions_answers():
    logprobs = torch.log_softmax(torch.randn(0, V), -1)
    found = columns_of(logprobs, torch.zeros(0, 1, dtype=torch.long), (STOP,), own_top=K)
    assert found.targets.ids.shape == (0, K)


def test_ids_that_the_student_lacks_are_in_the_tail():
    logprobs = torch.log_softmax(torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 3, -1)
    found = columns_of(logprobs, torch.zeros(6, 1, dtype=torch.long), (STOP,), own_top=K, common=50).targets
    assert (found.ids < 50).all() and found.ids.tolist() == logprobs[:, :50].topk(K).indices.tolist()
    total = torch.cat([found.topk, found.tail[:, None], found.stop[:, None]], dim=1).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(6), atol=1e-5, rtol=0)
