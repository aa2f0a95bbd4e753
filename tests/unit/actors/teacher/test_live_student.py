"""A teacher that is the student: its scorer takes the weights that samplers take."""

import numpy as np
import pytest
import torch

from actors.learner.model import StudentModel
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.errors import ConfigError, StateLost, UserError
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.models import make_model

PAIRS = [([5, 6, 7], [8, 9, 10, 11]), ([3], [2, 1])]


def scorer_of(path, live=True):
    teacher = {"path": path, "dtype": "float32"} | ({"weights": "live", "context": "{prompt}"} if live else {})
    tree = {"student": {"path": path, "dtype": "float32"}, "teacher": teacher, "data": {"path": "p.jsonl"}}
    config = Config.model_validate(tree | {"rollout": {"top_k_logprobs": 16}})
    return TeacherScorer("scorer:0", ScorerSettings.from_config(config, path, (1,), 64, 200))


def logprobs(model):
    found = []
    for prompt, answer in PAIRS:
        with torch.inference_mode():
            rows = torch.log_softmax(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0], -1)
        found.append([float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_the_student_that_was_published_does(tmp_path, tied):
    make_model(tmp_path / "a", seed=1, tied=tied)
    newer = make_model(tmp_path / "b", seed=2, tied=tied)
    scorer = scorer_of(str(tmp_path / "a"))
    scorer.follow(0, None)
    scorer.score(chunk_of(newer, random_rollouts(2), top_k=16))  # whose keys and values are of the older weights
    scorer.follow(1, StudentModel(newer).weight_update(1, torch.float32))
    assert scorer.stats()["states"] == 0
    for plain in (True, False):
        for own, expected in zip(scorer.logprobs(PAIRS, plain), logprobs(newer), strict=True):
            np.testing.assert_allclose(own, expected, atol=1e-4)
    same = scorer.score(chunk_of(newer, random_rollouts(2), top_k=16))[0].d
    assert np.abs(same).max() < 5e-3, "told the same, the student has no KL to itself"


def test_a_new_process_scores_nothing_until_it_is_told_what_it_holds(models):
    path, model = models["student"]
    scorer, chunk = scorer_of(path), chunk_of(model, random_rollouts(2), top_k=16)
    with pytest.raises(StateLost, match="was not told which of the student's weights to hold"):
        scorer.score(chunk)
    scorer.follow(3, None, unless_held=True)
    assert len(scorer.score(chunk)[0].d) == chunk.tokens
    scorer_of(path, live=False).score(chunk)  # one of a teacher with weights of its own needs no word


def test_weights_of_another_model_change_nothing(models, tmp_path):
    path, _ = models["student"]
    scorer = scorer_of(path)
    before = scorer.logprobs(PAIRS, True)
    other = StudentModel(make_model(tmp_path / "long", num_hidden_layers=3)).weight_update(1, torch.float32)
    with pytest.raises(UserError, match="published weights have other names than the model has"):
        scorer.follow(1, other)
    for own, expected in zip(scorer.logprobs(PAIRS, True), before, strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "teacher.path=other",
            "teacher.weights = 'live': teacher.path = 'other': must be 'a', that of the student",
        ),
        ("teacher.dtype=float32", "teacher.dtype = 'float32': must be 'bfloat16', that of the student"),
        ("teacher.context=null", "teacher.weights = 'live': needs teacher.context; told the same as the student"),
        ("scorer.backend=vllm", "take new weights with backend = 'transformers' only, not 'vllm'"),
        ("learner.lora={publish: adapters}", "learner.lora.publish = 'adapters' publishes none"),
    ],
)
def test_what_a_teacher_that_is_the_student_cannot_be(tmp_path, override, said):
    file = tmp_path / "c.yaml"
    teacher = "{path: a, weights: live, context: '{solution}{prompt}'}"
    file.write_text(f"student: {{path: a}}\nteacher: {teacher}\ndata: {{path: p.jsonl}}\n")
    assert load_config(file).scorer_groups[0].follows_student
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert said in str(error.value)


def test_a_run_keeps_one_average(tmp_path):
    file = tmp_path / "c.yaml"
    average = "path: a, weights: average, average_decay"
    data = "data: {path: p.jsonl, teacher_column: of}"
    file.write_text(f"student: {{path: a}}\nteachers: {{x: {{{average}: 0.9}}, y: {{{average}: 0.9}}}}\n{data}\n")
    config = load_config(file)
    assert config.average_decay == 0.9 and [g.teachers for g in config.scorer_groups] == [("x", "y")]
    with pytest.raises(ConfigError, match=r"y.average_decay = 0.5: must be that of teachers.x.average_decay = 0.9"):
        load_config(file, ["teachers.y.average_decay=0.5"])
    assert load_config(file, ["teachers.y={path: a}"]).average_decay == 0.9
