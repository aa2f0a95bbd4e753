"""Privileged context: a token's KL is between what each model says before it, each after its own prompt."""

import numpy as np
import torch

from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.types.records import EngineEnd, RolloutSpec
from tests.support.configs import make_config

K, VOCABULARY = 12, 200
CONTEXTS = (3, 17, 40)  # tokens of what the teacher is told; prompts have 5


def logprobs(model, ids):
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1).numpy()


def expected_kl(student, teacher, prompt, context, tokens):
    """Over the student's top k and the rest as one event, by plain forward passes in float64."""
    p = logprobs(student, [*prompt, *tokens])[len(prompt) - 1 : -1]
    q = logprobs(teacher, [*context, *tokens])[len(context) - 1 : -1]
    found = []
    for own, given in zip(p, q, strict=True):
        top = np.argsort(-own)[:K]
        rest = np.setdiff1d(np.arange(VOCABULARY), top)
        a = np.append(own[top], np.log(np.exp(own[rest]).sum()))
        b = np.append(given[top], np.log(np.exp(given[rest]).sum()))
        found.append(float((np.exp(a) * (a - b)).sum()))
    return found, p


def test_the_kl_of_a_token_is_after_each_models_own_prompt(models):
    """In pieces, in the cache of one scorer, beside rollouts with contexts of other lengths; and taken over."""
    student, teacher = models["student"][1], models["teacher"][1]
    config = make_config(models["student"][0], models["teacher"][0], rollout={"top_k_logprobs": K})
    settings = ScorerSettings.from_config(config, models["teacher"][0], (), 96, VOCABULARY)
    scorers = [TeacherScorer(f"scorer:{i}", settings) for i in range(2)]
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(2, VOCABULARY, n).tolist())  # noqa: E731
    specs = [RolloutSpec(i, "p", draw(5), 0, False, 30, context_ids=draw(n)) for i, n in enumerate(CONTEXTS)]
    specs.append(RolloutSpec(9, "p", draw(5), 0, False, 30))  # one whose teacher has the prompt
    answers = {s.rollout_id: draw(14) for s in specs}
    known = {s.rollout_id: expected_kl(student, teacher, s.prompt_ids, s.scored_prompt, answers[s.rollout_id])
             for s in specs}  # fmt: skip
    pending = {s.rollout_id: PendingRollout(s.rollout_id, s.scored_prompt, scorer=0) for s in specs}
    scored = {i: [] for i in pending}
    for at in range(0, 14, 4):
        for i, rollout in pending.items():
            for position in range(at, min(at + 4, 14)):
                own = known[i][1][position]
                ids = np.concatenate([[answers[i][position]], np.argsort(-own)[:K]]).astype(np.int32)
                rollout.add([answers[i][position]], ids[None], own[ids][None].astype(np.float32))
            rollout.end = EngineEnd.EOS if at + 4 >= 14 else EngineEnd.RUNNING
            rollout.known = rollout.known and at != 8  # the second scorer takes over, and needs the whole past
        chunk = build_chunk(list(pending.values()), [], attempt=0, top_k=K, vocabulary=VOCABULARY)
        found, _ = scorers[at >= 8].score(chunk)
        for i, rollout_id in enumerate(found.rollout_ids.tolist()):
            scored[rollout_id] += found.d[found.offsets[i] : found.offsets[i + 1]].tolist()
    for spec in specs:
        # Log-probabilities travel in half precision.
        np.testing.assert_allclose(scored[spec.rollout_id], known[spec.rollout_id][0], atol=4e-3)
    off_by_one = expected_kl(student, teacher, specs[1].prompt_ids, specs[1].context_ids[1:], answers[1])[0]
    assert np.abs(np.array(off_by_one) - known[1][0]).max() > 0.04, "another context would be seen"
