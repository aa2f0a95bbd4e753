"""A scorer that asks one server, then another: no tokens are scored behind others than those before them."""

from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from aiohttp import web

from actors.teacher.scorer import TeacherScorer
from kat_ray.errors import StateLost
from kat_ray.remote.info import SCORE
from tests.support.chunks import chunk_of
from tests.support.served import server_of, settings_of
from tests.support.teacher_server import AppInThread

BUSY, LOSES = "busy", "loses"  # 503 in place of an answer; 502 once the request was carried out


def rollouts_of(*ids, seed=0, tokens=12):
    draw = lambda i: np.random.default_rng([seed, i]).integers(2, 200, tokens).tolist()  # noqa: E731
    return {i: ([3, 4, 5 + i], draw(i)) for i in ids}


def piece(student, rollouts, a, b, whole=False):
    past = {i: [*prompt, *tokens[:a]] for i, (prompt, tokens) in rollouts.items()} if whole else None
    return chunk_of(
        student, rollouts, start=dict.fromkeys(rollouts, a), end=dict.fromkeys(rollouts, b), context=past
    )


class Two:
    """Two servers of the teacher; `fault` says what one of them does with its next request."""

    def __init__(self, models):
        self.models, self.fault, self.asked = models, {}, []
        self.services, self.servers = zip(*(server_of(models) for _ in range(2)), strict=True)

    def app(self, number):
        app = self.servers[number].app()
        app.middlewares.append(self._disturb(number))
        return app

    def _disturb(self, number):
        @web.middleware
        async def disturb(request, handler):
            fault = self.fault.pop(number, None) if request.path == SCORE else None
            if fault == BUSY:
                await request.read()
                return web.Response(status=503)
            answer = await handler(request)
            if request.path == SCORE:
                self.asked.append(number)
            return web.Response(status=502) if fault == LOSES else answer

        return disturb


@contextmanager
def behind(two, way):
    """A scorer of both, which are two addresses, or behind one proxy that takes turns where one has failed."""
    with AppInThread(two.app(0)) as a, AppInThread(two.app(1)) as b:
        if way == "addresses":
            yield TeacherScorer("scorer:0", settings_of(two.models, [a.url, b.url]))
            return
        turn = count()
        at = [next(turn)]

        async def through(request):
            from aiohttp import ClientSession

            body = await request.read()
            url = (a.url, b.url)[at[0] % 2]
            async with ClientSession() as session, session.request(
                request.method, url + request.path, data=body or None
            ) as found:  # fmt: skip
                answer = await found.read()
            if found.status >= 500:
                at[0] = next(turn)
            return web.Response(status=found.status, body=answer, content_type=found.content_type)

        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", through)
        with AppInThread(app) as proxy:
            yield TeacherScorer("scorer:0", settings_of(two.models, proxy.url))


def lost(scorer, chunk):
    with pytest.raises(StateLost, match="is not held: send their context"):
        scorer.score(chunk)


def assert_close(scored, expected):
    """Of what was run in other pieces: not the same bits."""
    np.testing.assert_allclose(scored[0].d, expected[0].d, atol=1e-5)


@pytest.mark.parametrize("way", ["addresses", "proxy"])
@pytest.mark.parametrize("fault", [BUSY, LOSES])
def test_a_server_that_was_passed_over_adds_nothing_to_what_it_holds(models, way, fault):
    """Tokens 0 to 4 are scored at the first server, 4 to 8 at the second, then the first is asked again."""
    student, rollouts = models["student"][1], rollouts_of(0, 1)
    local, two = TeacherScorer("scorer:0", settings_of(models)), Two(models)
    expected = [local.score(piece(student, rollouts, a, a + 4)) for a in (0, 4, 8)]
    with behind(two, way) as scorer:
        assert_close(scorer.score(piece(student, rollouts, 0, 4)), expected[0])
        two.fault = {0: fault}
        lost(scorer, piece(student, rollouts, 4, 8))
        assert_close(scorer.score(piece(student, rollouts, 4, 8, whole=True)), expected[1])
        two.fault = {1: fault}
        lost(scorer, piece(student, rollouts, 8, 12))
        assert_close(scorer.score(piece(student, rollouts, 8, 12, whole=True)), expected[2])
    assert {*two.asked} == {0, 1}


def test_a_chunk_that_was_sent_before_the_loss_was_known_is_lost_too(models):
    """Samplers send ahead: the first server holds what went before the chunk that the second did not take."""
    student, rollouts, two = models["student"][1], rollouts_of(0), Two(models)
    with behind(two, "addresses") as scorer:
        scorer.score(piece(student, rollouts, 0, 4))
        two.fault = {0: BUSY}
        lost(scorer, piece(student, rollouts, 4, 8))
        two.fault = {1: BUSY}
        lost(scorer, piece(student, rollouts, 8, 12))


def test_as_many_tokens_of_another_attempt_are_not_taken_for_a_rollouts_own(models):
    """The first server holds 4 tokens of a rollout that has begun again, with others, at the second."""
    student, two = models["student"][1], Two(models)
    first, again = rollouts_of(0), rollouts_of(0, seed=1)
    with behind(two, "addresses") as scorer:
        scorer.score(piece(student, first, 0, 4))
        scorer.release([0])
        two.fault = {0: BUSY}
        scorer.score(piece(student, again, 0, 4))
        assert [s.held for s in two.services] == [1, 1]
        two.fault = {1: BUSY}
        lost(scorer, piece(student, again, 4, 8))


def test_a_server_that_is_asked_again_drops_what_was_let_go_of_elsewhere(models):
    student, two = models["student"][1], Two(models)
    some, others = rollouts_of(0, 1), rollouts_of(2)
    with behind(two, "addresses") as scorer:
        scorer.score(piece(student, some, 0, 4))
        two.fault = {0: BUSY}
        scorer.score(piece(student, others, 0, 4))
        scorer.release([0])
        scorer.score(piece(student, others, 4, 8))
        assert [s.held for s in two.services] == [2, 1]
        two.fault = {1: BUSY}
        scorer.score(piece(student, others, 8, 12, whole=True))
        assert [s.held for s in two.services] == [2, 1], "rollouts 1 and 2; the second server is not asked"


def test_two_scorers_share_two_servers(models):
    """Each begins with one, goes to the other where its own is busy, and has a session of its own at both."""
    student, two, rollouts = models["student"][1], Two(models), rollouts_of(0, 1)
    local = TeacherScorer("scorer:0", settings_of(models))
    expected = [local.score(piece(student, rollouts, a, a + 4)) for a in (0, 4)]
    with AppInThread(two.app(0)) as a, AppInThread(two.app(1)) as b:
        scorers = [TeacherScorer(f"scorer:{n}", settings_of(models, [a.url, b.url])) for n in (0, 1)]
        for scorer in scorers:
            assert_close(scorer.score(piece(student, rollouts, 0, 4)), expected[0])
        two.fault = {0: BUSY}
        lost(scorers[0], piece(student, rollouts, 4, 8))
        assert_close(scorers[1].score(piece(student, rollouts, 4, 8)), expected[1])
        assert_close(scorers[0].score(piece(student, rollouts, 4, 8, whole=True)), expected[1])
    assert two.services[1].held == 4, "of both"
