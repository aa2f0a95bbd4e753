"""Requests over loopback: how many at once, tried again, bounded; and where a token does not go."""

import asyncio
import threading

import pytest
from aiohttp import web

from kat_ray.config.http_teacher import HttpConfig
from kat_ray.errors import UserError
from kat_ray.remote import client as client_module
from kat_ray.remote.client import AnswerTooLarge, HttpClient, Request
from kat_ray.remote.token import Token
from tests.support.teacher_server import AppInThread


class Server:
    """Answers each request with its body, and remembers what it saw; `plan` are statuses to give first."""

    def __init__(self, *plan, headers=None):
        self.plan, self.headers = list(plan), headers or {}
        self.running = self.most = self.count = 0
        self.tokens, self.hold, self.full = set(), 0, None

    def app(self):
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app

    async def answer(self, request):
        self.count += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.tokens.add(request.headers.get("Authorization"))
        try:
            body = await request.read()
            if self.hold:  # the first ones wait until there are so many
                self.full = self.full or asyncio.Event()
                if self.running == self.hold:
                    self.full.set()
                await self.full.wait()
            if self.plan:
                status = self.plan.pop(0)
                return web.Response(status=status, headers=self.headers, text="later")
            return web.Response(body=body)
        finally:
            self.running -= 1


def client_of(*urls, token=None, first=0, **http):
    return HttpClient(urls, HttpConfig(**{"retry_seconds": 20.0, **http}), "teacher", token, first)


def test_answers_come_in_the_order_of_requests_and_so_many_at_a_time():
    server = Server()
    server.hold = 3
    with AppInThread(server.app()) as running:
        client, beats = client_of(running.url, concurrency=3), []
        client.on_progress = lambda: beats.append(1)
        answers = client.ask_all(Request("/x", str(i).encode()) for i in range(50))
        assert [int(a.body) for a in answers] == [*range(50)] and len(beats) == 50
        assert server.most == 3 and client.ask_all([]) == []
        assert client.traffic.sent_bytes == client.traffic.received_bytes == sum(len(str(i)) for i in range(50))
        client.close()


def test_what_fails_for_a_while_is_asked_again():
    server = Server(503, 500, 429, 502)
    with AppInThread(server.app()) as running:
        client = client_of(running.url)
        assert client.ask(Request("/x", b"1")).body == b"1" and server.count == 5
        assert client.traffic.requests == 5 and client.traffic.retries == 4


def test_an_answer_is_not_asked_for_again():
    server = Server(404)
    with AppInThread(server.app()) as running:
        assert client_of(running.url).ask(Request("/x")).status == 404 and server.count == 1


def test_the_server_says_how_long_to_wait_and_the_end_says_why():
    server = Server(*[503] * 99, headers={"Retry-After": "30"})
    with AppInThread(server.app()) as running:
        with pytest.raises(UserError, match=r"no good answer within 5 s .*tried 1 times; the last: .*503 later"):
            client_of(running.url, retry_seconds=5.0).ask(Request("/x"))
        assert server.count == 1


def test_what_is_not_answered_in_time_is_asked_again():
    waits = [10.0]

    async def slow(_):
        await asyncio.sleep(waits.pop() if waits else 0)
        return web.Response(text="now")

    app = web.Application()
    app.router.add_get("/x", slow)
    with AppInThread(app) as running:
        client = client_of(running.url, answer_seconds=0.3)
        assert client.ask(Request("/x")).body == b"now" and client.traffic.retries == 1


def test_a_token_goes_to_the_address_alone(monkeypatch):
    """Neither to a proxy of the environment nor after a redirection."""
    server, other = Server(), Server()
    with AppInThread(server.app()) as running, AppInThread(other.app()) as elsewhere:
        monkeypatch.setenv("http_proxy", elsewhere.url)
        monkeypatch.setenv("HTTP_PROXY", elsewhere.url)
        assert client_of(running.url, token=Token("hush-hush")).ask(Request("/x")).status == 200
        assert server.tokens == {"Bearer hush-hush"} and not other.count
        server.plan, server.headers = [302], {"Location": elsewhere.url}
        assert client_of(running.url, token=Token("hush-hush")).ask(Request("/x")).status == 302
        assert not other.count


def test_each_scorer_begins_with_an_address_of_its_own():
    one, two = Server(), Server()
    with AppInThread(one.app()) as a, AppInThread(two.app()) as b:
        for first in range(4):
            client_of(a.url, b.url, first=first).ask(Request("/x"))
        assert (one.count, two.count) == (2, 2)


def test_an_endless_answer_is_not_read(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_ANSWER", 1000)
    with AppInThread(Server().app()) as running, pytest.raises(AnswerTooLarge, match="more than 1,000 bytes"):
        client_of(running.url).ask(Request("/x", b"1" * 2000))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_request_that_ends_with_an_error_gives_up_its_place(monkeypatch, concurrency):
    """So do those that were under way beside it."""
    monkeypatch.setattr(client_module, "MAX_ANSWER", 1000)
    with AppInThread(Server().app()) as running:
        client = client_of(running.url, concurrency=concurrency)
        for _ in range(concurrency):
            with pytest.raises(AnswerTooLarge):
                client.ask_all([Request("/x", b"1" * 2000)] * 3)
        assert answered_within(30, lambda: client.ask(Request("/x", b"2")).body) == b"2"


def answered_within(seconds, ask):
    """What it gives; None where it still waits. A thread that nobody waits for, since it may never end."""
    found = []
    asking = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else None
