"""Requests to a teacher's server: many at once, tried again, bounded in number, time and size. Blocking outside.

Addresses and tokens come from the configuration alone: no proxy of the environment is used and no redirection is
followed, so that a token goes nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from kat_ray.config.http_teacher import HttpConfig
from kat_ray.errors import UserError
from kat_ray.remote.retry import TOO_MANY, Retry, Window, verdict
from kat_ray.remote.token import Token
from kat_ray.remote.traffic import Traffic

log = logging.getLogger("kat_ray.scorer")

MAX_ANSWER = 2**30  # bytes
_SHOWN = 300  # characters of a server's words in a message


class AnswerTooLarge(UserError):
    """A server's answer exceeds what is taken."""


@dataclass(frozen=True)
class Request:
    """What is asked of whichever address; a body makes it a POST."""

    path: str
    body: bytes | None = None
    content_type: str = "application/json"


@dataclass(frozen=True)
class Answer:
    """What a server said, good or bad."""

    status: int
    body: bytes
    url: str  # address and path

    @property
    def words(self) -> str:
        """The body as part of a message: its first line or so."""
        text = " ".join(self.body[: 4 * _SHOWN].decode("utf-8", "replace").split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


@dataclass
class _Place:
    """Of a request under way; `too_many`: the server said that it has more than it can do."""

    too_many: bool = False


class HttpClient:
    """The servers of one teacher. `first` chooses among several addresses; another is taken where one fails."""

    def __init__(
        self, urls: Sequence[str], http: HttpConfig, section: str, token: Token | None, first: int = 0
    ) -> None:
        self._urls, self._http, self._section, self._token = tuple(urls), http, section, token
        self._at = first % len(self._urls)
        self._window = Window(http.concurrency)
        self._runner = asyncio.Runner()
        self._session: aiohttp.ClientSession | None = None
        self._random = random.Random()  # noqa: S311 - spreads retries
        self.traffic = Traffic()
        self.on_progress: Callable[[], None] = lambda: None  # called at each answer

    @property
    def url(self) -> str:
        """The address that the next request goes to."""
        return self._urls[self._at]

    @property
    def http_model(self) -> str | None:
        """`http.model` of the configuration."""
        return self._http.model

    @property
    def has_token(self) -> bool:
        """Whether requests bear one."""
        return self._token is not None

    def ask(self, request: Request) -> Answer:
        """One answer; `UserError` where none comes within `http.retry_seconds`."""
        return self.ask_all([request])[0]

    def ask_all(self, requests: Iterable[Request]) -> list[Answer]:
        """The answers in the order of the requests, of which `http.concurrency` are under way at a time."""
        return self._runner.run(self._ask_all(list(requests)))

    def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            self._runner.run(self._session.close())
            self._session = None
        self._runner.close()

    async def _ask_all(self, requests: Sequence[Request]) -> list[Answer]:
        if self._session is None:
            self._session = self._new_session()
        self._changed = asyncio.Condition()
        answers: dict[int, Answer] = {}
        left = iter(enumerate(requests))

        async def work() -> None:
            for number, request in left:
                answers[number] = await self._one(request)

        tasks = [asyncio.ensure_future(work()) for _ in range(min(self._http.concurrency, len(requests)))]
        try:
            await asyncio.gather(*tasks)
        finally:  # where one failed, the others are of no use
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [answers[number] for number in range(len(requests))]

    def _new_session(self) -> aiohttp.ClientSession:
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token.reveal()}"}
        return aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),  # `Window` limits
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def _one(self, request: Request) -> Answer:
        retry = Retry(time.monotonic(), self._http.retry_seconds)
        while True:
            async with self._place() as place:
                answer, failure, asked = await self._attempt(request, retry.left(time.monotonic()))
                place.too_many = answer is not None and answer.status in TOO_MANY
            if answer is not None and verdict(answer.status) == "answer":
                self.on_progress()
                return answer
            failed = f"{answer.url}: {answer.status} {answer.words}" if answer is not None else failure
            seconds = retry.wait(time.monotonic(), self._random.random(), asked)
            if seconds is None:
                raise UserError(
                    f"{self._section}.url = {self._shown()}: no good answer within {self._http.retry_seconds:g} s "
                    f"({self._section}.http.retry_seconds), tried {retry.failures} times; the last: {failed}"
                )
            log.log(
                logging.WARNING if retry.failures == 1 else logging.INFO, "%s: asked again: %s",
                self._section, failed,
            )  # fmt: skip
            self.traffic.retries += 1
            await asyncio.sleep(seconds)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[_Place]:
        """A place among the requests under way, waited for; it is given up however the request ends."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._window.is_free)
            self._window.begin()
        place = _Place()
        try:
            yield place
        finally:
            self._window.end(place.too_many)
            async with self._changed:
                self._changed.notify_all()

    async def _attempt(self, request: Request, left: float) -> tuple[Answer | None, str, float | None]:
        """The answer, or why there is none; and the seconds that the server asks to wait."""
        assert self._session is not None
        base, at = self.url, self._at
        url, http = base + request.path, self._http
        timeout = aiohttp.ClientTimeout(
            total=max(0.001, min(http.answer_seconds, left)), sock_connect=http.connect_seconds
        )
        headers = {} if request.body is None else {"Content-Type": request.content_type}
        self.traffic.requests += 1
        self.traffic.sent_bytes += len(request.body or b"")
        try:
            async with self._session.request(
                "GET" if request.body is None else "POST", url, data=request.body, headers=headers, timeout=timeout,
                allow_redirects=False,
            ) as response:  # fmt: skip
                body = await _read(response, url)
                self.traffic.received_bytes += len(body)
                answer = Answer(response.status, body, url)
                if answer.status in TOO_MANY or verdict(answer.status) == "again":
                    self._turn_from(at)
                return answer, "", _seconds(response.headers)
        except TimeoutError:
            failure = f"{url}: no answer in time"
        except aiohttp.InvalidURL as error:
            raise UserError(f"{self._section}.url = {base!r}: is no address") from error
        except (aiohttp.ClientError, OSError) as error:
            failure = f"{url}: {type(error).__name__}: {error}"
        self._turn_from(at)
        return None, failure, None

    def _turn_from(self, at: int) -> None:
        """Take the next address, unless another request already has."""
        if self._at == at:
            self._at = (at + 1) % len(self._urls)

    def _shown(self) -> str:
        return repr(self._urls[0]) if len(self._urls) == 1 else repr(list(self._urls))


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_chunked(2**18):
        size += len(part)
        if size > MAX_ANSWER:
            raise AnswerTooLarge(f"{url}: its answer has more than {MAX_ANSWER:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _seconds(headers: Mapping[str, Any]) -> float | None:
    """Retry-After where it is a number of seconds."""
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() and len(text) < 6 else None
