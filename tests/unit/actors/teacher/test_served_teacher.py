"""A teacher behind kat-ray's own server, on loopback: the same bits as a local one, whatever happens on the way."""

import asyncio
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from aiohttp import web

from actors.teacher import serve
from actors.teacher.backend import RunNeeds
from actors.teacher.messages import NOTHING, Past, chunk_arrays, needs_meta
from actors.teacher.remote import ServedTeacher, remote_teacher
from actors.teacher.scorer import TeacherScorer, make_teacher
from actors.teacher.server import Listening, TeacherServer
from actors.teacher.service import Limits, TeacherService
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.cli.main import main
from kat_ray.cluster.devices import environment_of
from kat_ray.errors import StateLost, UserError
from kat_ray.remote.client import HttpClient, Request
from kat_ray.remote.info import INFO, PLAIN, SCORE
from kat_ray.remote.token import Token
from kat_ray.remote.wire import CONTENT_TYPE, pack
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.served import assert_same, info_of, pieces, server_of, settings_of
from tests.support.teacher_server import AppInThread, answers, free_port

SECRET = "hush-hush-5309"


@pytest.fixture(scope="module")
def served(models):
    """A service and the address of its server."""
    service, server = server_of(models)
    with AppInThread(server.app()) as running:
        yield service, running.url


@pytest.mark.parametrize("size", [3, 1000])
def test_scores_are_those_of_a_local_teacher_to_the_bit(models, served, size):
    service, url = served
    local = TeacherScorer("scorer:0", settings_of(models))
    remote = TeacherScorer("scorer:1", settings_of(models, url))
    for chunk in pieces(models["student"][1], random_rollouts(7), size):
        assert_same(remote.score(chunk), local.score(chunk))
    assert remote.stats() | {"busy_seconds": 0, "cache_bytes": 0} == local.stats() | {
        "busy_seconds": 0,
        "cache_bytes": 0,
    }
    assert service.held == 0


def test_bytes_of_bodies_are_counted_where_they_are_sent_and_received(models):
    """Against the server's own count, over three chunks, of which one is asked for twice."""
    service, server = server_of(models)
    bodies, score, failed = [], service.score, []

    def counted(body):
        answer = score(body)
        bodies.append((len(body), len(answer)))
        return answer

    @web.middleware
    async def fails_once(request, handler):
        if request.path == SCORE and len(bodies) == 1 and not failed:
            failed.append(len(await request.read()))
            return web.Response(status=500)
        return await handler(request)

    service.score = counted
    app = server.app()
    app.middlewares.append(fails_once)
    with AppInThread(app) as running:
        remote = TeacherScorer("scorer:0", settings_of(models, running.url))
        chunks = list(pieces(models["student"][1], random_rollouts(3), 4))[:3]
        scored = [remote.score(chunk)[0] for chunk in chunks]
    assert len(failed) == 1 and len(bodies) == 3
    assert [s.http_sent for s in scored] == [b[0] + f for b, f in zip(bodies, (0, failed[0], 0), strict=True)]
    assert [s.http_received for s in scored] == [b[1] for b in bodies]
    local = TeacherScorer("scorer:1", settings_of(models)).score(chunks[0])[0]
    assert (local.http_sent, local.http_received) == (0, 0)


def test_plain_passes_are_those_of_a_local_teacher_to_the_bit(models, served):
    pairs = [([3, 4, 5], [6, 7]), ([9], [8]), ([2, 3], [])]
    local, remote = make_teacher(settings_of(models)), make_teacher(settings_of(models, served[1]))
    for a, b in zip(remote.plain_logprobs(pairs), local.plain_logprobs(pairs), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert remote.plain_logprobs([]) == []


def test_runs_with_other_stop_ids_and_equal_numbers_share_a_server(models, served):
    """Their rollouts are told apart, and each is scored under the stop ids of its run."""
    _, url = served
    own = settings_of(models, url)
    other = replace(own, stop_ids=(1, 9, 11))
    student, runs = models["student"][1], []
    for settings, seed in ((own, 0), (other, 5)):
        local = replace(settings_of(models), stop_ids=settings.stop_ids)
        chunks = [*pieces(student, random_rollouts(3, seed=seed), 4)]
        runs.append((TeacherScorer("scorer:0", settings), TeacherScorer("scorer:0", local), chunks))
    for pair in zip(*(chunks for *_, chunks in runs), strict=False):
        for (remote, local, _), chunk in zip(runs, pair, strict=True):
            assert_same(remote.score(chunk), local.score(chunk))


def test_a_server_that_comes_back_empty_is_sent_the_past_again(models):
    """It is killed between two chunks; requests wait for the next one, which knows nobody."""
    student, rollouts, port = models["student"][1], random_rollouts(3), free_port()
    first, second = list(pieces(student, rollouts, 2))[:2]
    with AppInThread(server_of(models)[1].app(), port):
        remote = TeacherScorer("scorer:0", settings_of(models, f"http://127.0.0.1:{port}"))
        remote.score(first)
    with AppInThread(server_of(models)[1].app(), port):
        with pytest.raises(StateLost, match=r"rollouts \[0, 1, 2\] is not held"):
            remote.score(second)
        whole = {i: [*prompt, *tokens[:2]] for i, (prompt, tokens) in rollouts.items()}
        again = chunk_of(
            student, rollouts, start=dict.fromkeys(rollouts, 2), end=dict.fromkeys(rollouts, 4), context=whole
        )
        local = TeacherScorer("scorer:0", settings_of(models))
        local.score(first)
        np.testing.assert_allclose(remote.score(again)[0].d, local.score(second)[0].d, atol=1e-5)


def test_an_answer_that_was_lost_is_given_again_and_nothing_is_scored_twice(models):
    """A proxy in front of the server that lets requests through and loses the first answer to each."""
    service, server = server_of(models)
    lost = []

    async def through(request):
        from aiohttp import ClientSession

        body = await request.read()
        async with ClientSession() as session, session.request(
            request.method, behind.url + request.path, data=body or None, headers={"Content-Type": CONTENT_TYPE}
        ) as found:  # fmt: skip
            answer = await found.read()
        if request.path == SCORE and (not lost or lost[-1] != body):
            lost.append(body)
            return web.Response(status=502)
        return web.Response(status=found.status, body=answer, content_type=found.content_type)

    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", through)
    with AppInThread(server.app()) as behind, AppInThread(app) as proxy:
        remote = TeacherScorer("scorer:0", settings_of(models, proxy.url))
        local = TeacherScorer("scorer:0", settings_of(models))
        for chunk in pieces(models["student"][1], random_rollouts(4), 5):
            assert_same(remote.score(chunk), local.score(chunk))
        assert lost and service.scored_tokens == local.stats()["scored_tokens"], "each token once"


def test_another_address_is_taken_where_one_is_dead(models, served):
    settings = settings_of(models, [f"http://127.0.0.1:{free_port()}", served[1]])
    chunk = next(pieces(models["student"][1], random_rollouts(2), 1000))
    assert_same(
        TeacherScorer("scorer:0", settings).score(chunk),
        TeacherScorer("scorer:0", settings_of(models)).score(chunk),
    )


def test_a_server_that_stays_away_ends_the_run_with_one_message(models):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=r"teacher\.url = .*no good answer within 0.5 s .*tried \d+ times") as ended:
        make_teacher(settings_of(models, url, retry_seconds=0.5))
    assert "ClientConnectorError" in str(ended.value)


def test_without_the_token_nobody_is_let_in(models, monkeypatch, caplog):
    monkeypatch.setenv("THE_TOKEN", SECRET)
    with AppInThread(server_of(models, Token(SECRET))[1].app()) as running:
        good = settings_of(models, running.url, token_env="THE_TOKEN")
        assert make_teacher(good).vocabulary == 200
        with pytest.raises(UserError, match=r"the server wants a token \(401\); name the variable or the file"):
            make_teacher(settings_of(models, running.url))
        monkeypatch.setenv("THE_TOKEN", SECRET + "x")
        with pytest.raises(UserError, match=r"the server refuses the token \(401\)") as refused:
            make_teacher(good)
        for path in (INFO, SCORE, PLAIN, "/", "/v1/teacher/close"):
            client = HttpClient([running.url], good.remote.http, "teacher", None)
            assert client.ask(Request(path, b"x" if path != INFO else None)).status == 401
        assert client.ask(Request("/health")).status == 200
    assert SECRET not in str(refused.value) and SECRET not in caplog.text and SECRET not in repr(good)


def body_of(chunk, session="s" * 16, number=0, **meta):
    run = needs_meta(RunNeeds((1,), 200, False))
    past = Past(np.full(len(chunk.rollout_ids), NOTHING), np.zeros(0))
    return pack({**run, "session": session, "number": number, "own_top": 0, **meta}, chunk_arrays(chunk, past))


def test_what_cannot_be_scored_is_refused_by_the_server_itself(models, served):
    """Whoever sends it: lengths, ids, names and numbers; nothing is held of it."""
    service, url = served
    student = models["student"][1]
    chunk = next(pieces(student, {0: ([3, 4], [5, 6])}, 1))
    foreign = replace(chunk, token_ids=np.array([10**6], dtype=np.int32))
    negative = replace(chunk, context_ids=np.array([-1, 3], dtype=np.int32))
    long = next(pieces(student, {0: ([3] * 64, [5])}, 1))
    twice = replace(next(pieces(student, random_rollouts(2), 1)), rollout_ids=np.array([4, 4]))
    ragged = replace(chunk, offsets=np.array([0, 9], dtype=np.int32))
    bodies = {
        b"nothing": "no message of kat-ray", body_of(foreign): "1000000", body_of(negative): "-1",
        body_of(long): "have 65 tokens, the model takes 64", body_of(twice): "named twice",
        body_of(ragged): "do not divide", body_of(chunk, session="me"): "session: must be",
        body_of(chunk, number=-1): "number = -1", body_of(chunk, stop_ids=["x"]): "stop_ids",
        body_of(chunk, student_vocabulary=2**40): "student_vocabulary",
        body_of(chunk, own_top=201): "own_top = 201: must be a whole number <= 200",
        body_of(chunk, temperature=0): "temperature = 0: must be a number > 0",
        pack({}, {}): "stop_ids",
    }  # fmt: skip
    client = HttpClient([url], settings_of(models, url).remote.http, "teacher", None)
    for body, words in bodies.items():
        answer = client.ask(Request(SCORE, body, CONTENT_TYPE))
        assert answer.status == 400 and words in json.loads(answer.body)["error"], answer
    assert service.held == 0
    assert client.ask(Request("/v1/teacher/nothing")).status == 404


def test_bodies_rollouts_and_silent_sessions_are_bounded(models):
    now = [0.0]
    teacher = TransformersTeacher(settings_of(models))
    service = TeacherService(teacher, "the model", Limits(64, max_rollouts=2, idle_seconds=60), lambda: now[0])
    server = TeacherServer(service, info_of(max_body=2000), None, Listening())
    student = models["student"][1]
    with AppInThread(server.app()) as running:
        http = settings_of(models, running.url, retry_seconds=0.4).remote.http
        client = HttpClient([running.url], http, "teacher", None)
        assert client.ask(Request(SCORE, b"x" * 4000)).status == 413
        first = next(pieces(student, random_rollouts(2), 1))
        assert client.ask(Request(SCORE, body_of(first), CONTENT_TYPE)).status == 200
        assert service.held == teacher.held == 2
        with pytest.raises(UserError, match=r"429 .*2 rollouts are held, of 2"):
            client.ask(Request(SCORE, body_of(first, session="t" * 16), CONTENT_TYPE))
        now[0] = 61.0
        assert client.ask(Request(SCORE, body_of(first, session="t" * 16), CONTENT_TYPE)).status == 200
        assert service.held == teacher.held == 2, "the first session is forgotten"
        with pytest.raises(UserError, match=r"a chunk has [\d,]+ bytes, and its server takes 2,000"):
            TeacherScorer("scorer:0", settings_of(models, running.url)).score(
                next(pieces(student, random_rollouts(9), 1000))
            )


def test_a_fault_of_the_teacher_leaves_nothing_of_its_session(models, monkeypatch):
    """It is asked again; the past is then sent again."""
    service, server = server_of(models)
    score, faults = TransformersTeacher.score, [RuntimeError("a fault")]

    def faulty(self, *arguments):
        result = score(self, *arguments)
        if faults:
            raise faults.pop()
        return result

    first, second = list(pieces(models["student"][1], random_rollouts(2), 2))[:2]
    with AppInThread(server.app()) as running:
        remote = TeacherScorer("scorer:0", settings_of(models, running.url))
        remote.score(first)
        monkeypatch.setattr(TransformersTeacher, "score", faulty)
        with pytest.raises(StateLost, match="is not held"):
            remote.score(second)
        assert service.held == 0


LOST = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]


def post(url, body):
    """What the server says to a chunk: the status, and its words where it refuses."""
    try:
        with urllib.request.urlopen(url + SCORE, body, timeout=30) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)["error"]


@pytest.mark.parametrize("error", LOST)
def test_the_command_ends_with_1_where_its_engine_is_lost(files, monkeypatch, capsys, error):
    """Whoever asked is told to ask again: what is started in its place has the model."""
    for name in environment_of(0) | dict.fromkeys(("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the command sets is taken back
    monkeypatch.setattr(serve, "_end_at_last", lambda: None)  # it would end these tests

    def lost(*_):
        raise error

    monkeypatch.setattr(TeacherService, "score", lost)
    port, answered = free_port(), []
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30

    def ask():
        while not answers(url) and time.monotonic() < deadline:
            time.sleep(0.02)
        answered.append(post(url, b"a chunk"))

    caller = threading.Thread(target=ask)
    caller.start()
    code = main(["serve-teacher", str(files / "teacher"), "--dtype", "float32", "--port", str(port)])
    caller.join(30)
    said = capsys.readouterr().err
    assert code == 1 and answered == [(503, "ending: its engine is lost")], said
    assert f"error: the teacher's engine is lost, and the server ends: {type(error).__name__}" in said


def test_an_engine_that_is_lost_is_asked_nothing_more(models):
    """Of three requests that wait for it, the first one finds it lost."""
    service, server = server_of(models)
    asked, begun, all_here = [], [], threading.Event()

    def lost(_):
        asked.append(1)
        assert all_here.wait(30)
        raise LOST[1]

    @web.middleware
    async def counted(request, handler):
        begun.append(1)
        if len(begun) == 3:  # it is in the queue before the engine fails
            asyncio.get_running_loop().call_later(0.1, all_here.set)
        return await handler(request)

    service.score = lost
    app = server.app()
    app.middlewares.append(counted)
    with AppInThread(app) as running, ThreadPoolExecutor(3) as callers:
        said = list(callers.map(lambda _: post(running.url, b"a chunk"), range(3)))
    assert said == [(503, "ending: its engine is lost")] * 3 and asked == [1]


def test_a_server_of_another_version_is_named(models):
    async def other(_):
        return web.json_response({"kat_ray_teacher": 99})

    app = web.Application()
    app.router.add_get(INFO, other)
    with AppInThread(app) as running, pytest.raises(UserError, match="of another version of kat-ray"):
        remote_teacher(settings_of(models, running.url), settings_of(models, running.url).remote)


def test_what_is_no_teacher_is_named(models):
    with (
        AppInThread(web.Application()) as running,
        pytest.raises(UserError, match="is neither a server of kat-ray"),
    ):
        remote_teacher(settings_of(models, running.url), settings_of(models, running.url).remote)


def test_it_is_the_teacher_that_scorers_make(models, served):
    assert isinstance(make_teacher(settings_of(models, served[1])), ServedTeacher)
