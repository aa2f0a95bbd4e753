"""What the learner gets of a teacher behind HTTP where the loss is on its own top k, or at another temperature."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.teacher.backend import TeacherColumns, TeacherTargets
from actors.teacher.messages import Wanted, columns_body, columns_of_message
from actors.teacher.scorer import TeacherScorer
from actors.teacher.vllm_server import VllmServerTeacher
from kat_ray.config import Config
from kat_ray.data.given import GivenCompletion, given_chunk
from kat_ray.errors import ModelError, UserError
from kat_ray.models.inspect import check_models
from kat_ray.remote.client import HttpClient
from kat_ray.remote.vllm import VllmInfo
from kat_ray.remote.wire import WireError, unpack
from kat_ray.types.records import Prompt
from tests.support.chunks import random_rollouts
from tests.support.configs import make_config
from tests.support.models import write_job_files
from tests.support.served import assert_same, assert_same_rows, info_of, pieces, server_of, settings_of
from tests.support.teacher_server import AppInThread
from tests.support.vllm_like import VllmLike

OBJECTIVES = [
    {"opd": {"support": "teacher"}},
    {"opd": {"teacher_temperature": 0.7}},
    {"opd": {"support": "teacher", "teacher_temperature": 2.0}},
]


@pytest.fixture(scope="module")
def url(models):
    with AppInThread(server_of(models)[1].app()) as running:
        yield running.url


def given():
    prompts = random_rollouts(3, seed=8)
    return given_chunk(
        [
            GivenCompletion(i, Prompt(f"p{i}", tuple(prompt), completion_ids=tuple(tokens)))
            for i, (prompt, tokens) in prompts.items()
        ]
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_are_those_of_a_local_teacher_to_the_bit(models, url, objective):
    local = TeacherScorer("scorer:0", settings_of(models, objective=objective))
    remote = TeacherScorer("scorer:0", settings_of(models, url, objective))
    for chunk in pieces(models["student"][1], random_rollouts(4), 6):
        ours, theirs = remote.score(chunk), local.score(chunk)
        assert_same(ours, theirs)
        assert ours[0].row_bytes == theirs[0].row_bytes
    (asked, theirs), (own, ours) = remote.score_given(given()), local.score_given(given())
    assert_same_rows(theirs, ours)
    assert asked.row_bytes == own.row_bytes and own.http_sent == 0 < min(asked.http_sent, asked.http_received)


def test_runs_of_other_temperatures_share_a_server(models, url):
    """Each is scored at its own, whoever was before it."""
    chunk = next(pieces(models["student"][1], random_rollouts(2), 1000))
    for temperature in (1.0, 3.0, 1.0):
        objective = {"opd": {"teacher_temperature": temperature}}
        local = TeacherScorer("scorer:0", settings_of(models, objective=objective))
        assert_same(TeacherScorer("scorer:0", settings_of(models, url, objective)).score(chunk), local.score(chunk))


def columns(rows=2, targets=None):
    some = torch.zeros(rows)
    return TeacherColumns(torch.zeros(rows, 3), some, some, some, some, some, some.int(), targets)


AT_STUDENTS = TeacherTargets(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("targets", "wanted", "words"),
    [
        (None, {"own_top": 2}, "targets_topk is missing"),
        (None, {"temperature": 2.0}, "targets_topk is missing"),
        (AT_STUDENTS, {"own_top": 3}, "targets_ids is missing"),
        (AT_STUDENTS, {"own_top": 2}, "for 2 rows of 2 ids"),
        (replace(AT_STUDENTS, tail=torch.zeros(1)), {"temperature": 2.0}, r"shape \(1,\)"),
        (
            replace(AT_STUDENTS, ids=torch.tensor([[3, 4, 5], [50, 6, 7]])),
            {"own_top": 3, "own_below": 50},
            "ids that are not below 50",
        ),
    ],
)  # fmt: skip
def test_an_answer_without_what_the_learner_needs_is_refused(targets, wanted, words):
    message = unpack(columns_body(columns(targets=targets), {}))
    with pytest.raises(WireError, match=words):
        columns_of_message(message, Wanted(2, 3, **wanted))


def test_a_chunk_without_tokens_has_no_targets():
    assert columns_of_message(unpack(columns_body(columns(0), {})), Wanted(0, 3, own_top=2)).targets is None


# --- a stock vLLM server --------------------------------------------------------------------------------------


def stock(models, url, objective):
    """A scorer of a stock server; its model's directory has no tokenizer, which a run would look at before."""
    settings = settings_of(models, url, objective)
    client = HttpClient([url], settings.remote.http, "teacher", None)
    return TeacherScorer("scorer:0", settings, lambda s: VllmServerTeacher(s, client, VllmInfo("teacher", 64)))


def assert_close(ours, theirs):
    """Of values in float16, of which the server gives other roundings; where two ids are as likely, either."""
    np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=2e-2)
    np.testing.assert_allclose(np.exp(ours.tail_logprobs), np.exp(theirs.tail_logprobs), atol=1e-5)
    np.testing.assert_allclose(np.exp(ours.stop_logprobs), np.exp(theirs.stop_logprobs), atol=1e-5)
    assert (ours.topk_ids() == theirs.topk_ids()).mean() > 0.999


def test_a_stock_servers_own_top_k_is_that_of_a_local_teacher(models):
    """For rollouts, whose KL is at the student's ids all the same, and for completions of the data."""
    objective, server = {"opd": {"support": "teacher"}}, VllmLike(models["teacher"][1], max_logprobs=64)
    local = TeacherScorer("scorer:0", settings_of(models, objective=objective))
    with AppInThread(server.app()) as running:
        remote = stock(models, running.url, objective)
        for chunk in pieces(models["student"][1], random_rollouts(3, tokens=(5, 12)), 6):
            (ours, our_rows), (theirs, their_rows) = remote.score(chunk), local.score(chunk)
            np.testing.assert_allclose(ours.d, theirs.d, atol=1e-4)
            assert_close(our_rows, their_rows)
        assert_close(remote.score_given(given())[1], local.score_given(given())[1])
        assert remote.stats()["states"] == 0
    asked = [body for body in server.asked if body.get("prompt_logprobs")]
    assert {body["prompt_logprobs"] for body in asked} == {64}


def test_ids_that_the_student_lacks_drop_their_rows(models):
    """A student of 40 ids, whose top k is 8: the teacher's most likely ones are among the 160 others."""
    config = make_config(models["student"][0], models["teacher"][0], rollout={"top_k_logprobs": 8})
    server = VllmLike(models["teacher"][1])
    with AppInThread(server.app()) as running:
        settings = replace(
            settings_of(models, running.url, {"opd": {"support": "teacher"}}),
            student_vocabulary=40, rollout=config.rollout,
        )  # fmt: skip
        client = HttpClient([running.url], settings.remote.http, "teacher", None)
        teacher = VllmServerTeacher(settings, client, VllmInfo("teacher", 64))
        chunk = given()
        found = teacher.score(chunk, chunk.topk_ids(), 8).targets
    assert torch.isnan(found.topk).all(dim=1).any() and (found.ids < 40).all()


def test_a_temperature_is_refused_by_a_stock_server_with_the_reason(models):
    server = VllmLike(models["teacher"][1])
    words = r"teacher_temperature = 2: takes .* the whole vocabulary"
    with AppInThread(server.app()) as running, pytest.raises(UserError, match=words):
        stock(models, running.url, {"opd": {"teacher_temperature": 2.0}})


# --- what is said before a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models with a tokenizer, as a run checks them."""
    return write_job_files(tmp_path_factory.mktemp("files"))


def checked(files, url, **sections):
    rollout = {"max_tokens": 32} | sections.pop("rollout", {})
    tree = make_config(str(files / "student"), str(files / "teacher"), rollout=rollout, **sections).model_dump(
        mode="json"
    )
    tree["teacher"] |= {"type": "http", "url": url, "http": {"retry_seconds": 10.0}}
    return check_models(Config.model_validate(tree))


def test_a_stock_server_is_asked_before_a_run_for_what_the_objective_needs(files):
    from transformers import AutoModelForCausalLM

    server = VllmLike(AutoModelForCausalLM.from_pretrained(files / "teacher"))
    teacher, rollout = {"opd": {"support": "teacher"}}, {"top_k_logprobs": 20}
    with AppInThread(server.app()) as running:
        assert checked(files, running.url, objective=teacher, rollout=rollout).teachers
        rollout = {"top_k_logprobs": 21}
        assert checked(files, running.url, rollout=rollout).teachers, "the student's ids are not bounded by it"
        with pytest.raises(ModelError, match=r"'teacher': needs .* 21 most .*allowed: 20.*--max-logprobs 21"):
            checked(files, running.url, objective=teacher, rollout=rollout)
        with pytest.raises(ModelError, match=r"teacher_temperature = 0.5: .*whole vocabulary"):
            checked(files, running.url, objective={"opd": {"teacher_temperature": 0.5}})


def test_what_the_engine_of_kat_rays_server_cannot_give_is_refused_before_a_run(models, files):
    from kat_ray.models.inspect import inspect_model
    from kat_ray.models.tokenizers import fingerprint

    model = make_config(str(files / "student"), str(files / "teacher")).teacher
    facts, tokenizer = inspect_model(model)
    info = info_of(
        tokenizer=fingerprint(tokenizer), vocabulary=facts.vocabulary, stop_ids=facts.stop_ids, backend="vllm",
        entropy=False, temperature=False, max_ids=20, dtype=model.dtype,
    )  # fmt: skip
    with AppInThread(server_of(models, info=info)[1].app()) as running:
        with pytest.raises(ModelError, match=r"teacher_temperature = 0.5: .*--backend transformers"):
            checked(files, running.url, objective={"opd": {"teacher_temperature": 0.5}})
        with pytest.raises(ModelError, match=r"top_k_logprobs = 20: must be <= 19 .*a larger --top-k"):
            checked(files, running.url, rollout={"top_k_logprobs": 20})
        assert checked(files, running.url, rollout={"top_k_logprobs": 19}).teachers
