"""What the monitor sees and what the learner minimises are one divergence, also against a certain teacher."""

import pytest
import torch

from actors.learner.engine import StudentWithLoss
from actors.learner.model import StudentModel
from actors.learner.tensors import model_arguments, token_rows
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.data.batch import collect_samples
from kat_ray.data.collate import PaddedCollator
from kat_ray.losses.distillation import Distillation
from kat_ray.types.records import KeptRollout
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config
from tests.support.models import make_model

STOP = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student that stops now and then, and a teacher that is certain, most often of something else."""
    root = tmp_path_factory.mktemp("models")
    student, teacher = (make_model(root / n, seed=s, tied=False) for n, s in (("student", 1), ("teacher", 2)))
    with torch.no_grad():
        student.lm_head.weight[STOP] *= 4
        teacher.lm_head.weight *= 8
    teacher.save_pretrained(root / "teacher")
    return root, student, teacher


@torch.no_grad()
def exact(student, teacher, rollouts, eos, k=64, temperatures=(1.0, 1.0)):
    """Summed KL of the student's top k, STOP and the rest, of either at its temperature."""
    total = 0.0
    for prompt, tokens in rollouts.values():
        ids = torch.tensor([[*prompt, *tokens]])
        logits = [m(ids).logits[0, len(prompt) - 1 : -1].double() for m in (student, teacher)]
        p, q = ((x / t).softmax(-1) for x, t in zip(logits, temperatures, strict=True))
        for a, b in zip(p, q, strict=True):
            top = a.topk(k).indices.tolist()
            parts = [[i] for i in top if eos != "mask" or i != STOP]
            parts.append([i for i in range(200) if i not in {*top, STOP}] + ([STOP] if STOP not in top else []))
            masses = [torch.stack([x[part].sum() for part in parts]) for x in (a, b)]
            a_events, b_events = (x / x.sum() for x in masses)
            total += (a_events * (a_events.log() - b_events.log())).sum().item()
    return total


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
def test_the_scores_sum_to_the_loss_and_to_the_definition(pair, eos):
    root, student, teacher = pair
    config = make_config(str(root / "student"), str(root / "teacher"), rollout={"eos": eos})
    scorer = TeacherScorer("scorer:0", ScorerSettings.from_config(config, str(root / "teacher"), (STOP,), 64))
    rollouts = random_rollouts(6, seed=3)
    chunk = chunk_of(student, rollouts)
    scored, rows = scorer.score(chunk)
    kept = [KeptRollout(i, len(prompt), len(tokens)) for i, (prompt, tokens) in rollouts.items()]
    (batch,) = PaddedCollator(10_000).micro_batches(collect_samples([chunk], [rows], kept))
    module = StudentWithLoss(StudentModel(student), Distillation((STOP,), eos), 1000)
    device = torch.device("cpu")
    arguments, positions = model_arguments(batch, device), torch.from_numpy(batch.inputs.positions)
    loss = module(arguments, positions, token_rows(batch, device)).loss.item()
    expected = exact(student, teacher, rollouts, eos)
    assert rows.topk_logprobs.min() < -30 and scored.d.max() > 10, "the teacher is certain"
    assert float(scored.d.sum(dtype="float64")) == pytest.approx(expected, rel=1e-3)
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
def test_at_temperatures_the_loss_is_the_definition_and_the_scores_stay(pair, eos):
    root, student, teacher = pair
    names = str(root / "student"), str(root / "teacher")
    opd = {"teacher_temperature": 3.0, "student_temperature": 0.7}
    rollouts = random_rollouts(6, seed=3)
    chunk, scores = chunk_of(student, rollouts), {}
    for name, objective in (("plain", {}), ("tempered", {"opd": opd})):
        config = make_config(*names, rollout={"eos": eos}, objective=objective)
        settings = ScorerSettings.from_config(config, names[1], (STOP,), 64)
        scores[name] = TeacherScorer("scorer:0", settings).score(chunk)
    scored, rows = scores["tempered"]
    assert (scored.d == scores["plain"][0].d).all(), "rules see temperature 1"
    kept = [KeptRollout(i, len(prompt), len(tokens)) for i, (prompt, tokens) in rollouts.items()]
    (batch,) = PaddedCollator(10_000).micro_batches(collect_samples([chunk], [rows], kept))
    term = Distillation((STOP,), eos, temperature=opd["student_temperature"])
    module, device = StudentWithLoss(StudentModel(student), term, 1000), torch.device("cpu")
    positions = torch.from_numpy(batch.inputs.positions)
    loss = module(model_arguments(batch, device), positions, token_rows(batch, device)).loss.item()
    expected = exact(student, teacher, rollouts, eos, temperatures=(0.7, 3.0))
    assert loss == pytest.approx(expected, rel=1e-3)
