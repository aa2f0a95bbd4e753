"""The HTTP side of `kat-ray serve-teacher`: addresses, tokens, bounds on what is taken, and an end without haste.

One thread runs the teacher; requests wait for it in a queue whose length is bounded. An error after which no
process can go on (`kat_ray.cluster.fatal_errors`) ends the server, as it ends a scorer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aiohttp import web

from actors.teacher.service import TeacherService, TooManyRollouts
from kat_ray.cluster.fatal_errors import fatal_reason
from kat_ray.errors import EngineLost, StateLost, UserError
from kat_ray.remote.info import CLOSE, HEALTH, INFO, PLAIN, SCORE, STATE_LOST, ServerInfo
from kat_ray.remote.token import Token
from kat_ray.remote.wire import CONTENT_TYPE

log = logging.getLogger("kat_ray.server")

_SLOW_DOWN = {"Retry-After": "1"}
_KEEP_ALIVE = 75.0  # seconds of a connection without requests


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and what it bears."""

    host: str = "127.0.0.1"
    port: int = 8766
    max_waiting: int = 256  # requests
    grace_seconds: float = 30.0  # for requests under way, when it is told to end


class TeacherServer:
    """Answers requests for one teacher."""

    def __init__(
        self, service: TeacherService, info: ServerInfo, token: Token | None, listening: Listening
    ) -> None:
        self._service, self._info, self._token, self._listening = service, info, token, listening
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._waiting = 0
        self._ending = False
        self._lost: str | None = None  # why the engine is of no use any more
        self._told = asyncio.Event()  # to end

    def app(self) -> web.Application:
        """All addresses."""
        app = web.Application(client_max_size=self._info.max_body, middlewares=[self._guard])
        app.router.add_get(HEALTH, self._health)
        app.router.add_get(INFO, self._describe)
        for path, call in (
            (SCORE, self._service.score),
            (PLAIN, self._service.plain),
            (CLOSE, self._service.close),
        ):
            app.router.add_post(path, self._handler(call))
        return app

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Serve until the process is told to end (SIGTERM, SIGINT); `ready` is given the address.

        `EngineLost` where it ends by itself.
        """
        runner = web.AppRunner(
            self.app(), access_log=None, shutdown_timeout=self._listening.grace_seconds,
            keepalive_timeout=_KEEP_ALIVE,
        )  # fmt: skip
        await runner.setup()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._told.set)
        try:
            site = web.TCPSite(runner, self._listening.host, self._listening.port)
            try:
                await site.start()
            except OSError as error:
                where = f"{self._listening.host}:{self._listening.port}"
                raise UserError(f"{where}: cannot be listened on: {error.strerror or error}") from error
            host = f"[{self._listening.host}]" if ":" in self._listening.host else self._listening.host
            ready(f"http://{host}:{runner.addresses[0][1]}")
            await self._told.wait()
        finally:
            self._ending = True  # what asks for health goes elsewhere; requests under way are answered
            await runner.cleanup()
            self._thread.shutdown(cancel_futures=True)
        if self._lost is not None:
            raise EngineLost(f"the teacher's engine is lost, and the server ends: {self._lost}")

    # --- one request ------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path != HEALTH and not self._is_let_in(request.headers.get("Authorization", "")):
            return _error(401, "a token is wanted: Authorization: Bearer TOKEN")
        return await handler(request)

    def _is_let_in(self, header: str) -> bool:
        if self._token is None:
            return True
        return hmac.compare_digest(header.encode(errors="replace"), f"Bearer {self._token.reveal()}".encode())

    async def _health(self, _: web.Request) -> web.Response:
        if self._ending:
            return _error(503, "ending")
        return web.json_response(
            {"status": "ok", "rollouts": self._service.held, "scored_tokens": self._service.scored_tokens}
        )

    async def _describe(self, _: web.Request) -> web.Response:
        return web.Response(body=self._info.to_json(), content_type="application/json")

    def _handler(self, call: Callable[[bytes], bytes]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if self._ending or self._waiting >= self._listening.max_waiting:
                return _error(503, "ending" if self._ending else "too many requests wait", _SLOW_DOWN)
            self._waiting += 1
            try:
                body = await request.read()  # 413 beyond client_max_size
                answer = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, call, body)
            except EngineLost:
                return _error(503, "ending: its engine is lost")  # another server is asked, or this one's successor
            except StateLost as error:
                return _error(STATE_LOST, str(error))
            except TooManyRollouts as error:
                return _error(429, str(error), _SLOW_DOWN)
            except UserError as error:
                return _error(400, str(error))
            except web.HTTPException:
                raise
            except Exception:  # of the engine: its caller is told, and the server goes on for the others
                log.exception("a request failed")
                return _error(500, "the server failed at this request; its log says why")
            finally:
                self._waiting -= 1
                if self._lost is not None:
                    self._ending = True
                    self._told.set()
            return web.Response(body=answer, content_type=CONTENT_TYPE)

        return handle

    def _run(self, call: Callable[[bytes], bytes], body: bytes) -> bytes:
        """In the teacher's thread. Once the engine is lost it is asked nothing more: it might never answer."""
        if self._lost is not None:
            raise EngineLost(self._lost)
        try:
            return call(body)
        except Exception as error:  # of any type: the reason may be its cause's
            self._lost = fatal_reason(error)
            if self._lost is None:
                raise
            log.exception("the engine cannot go on: %s", self._lost)
            raise EngineLost(self._lost) from error


def _error(status: int, words: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, text=json.dumps({"error": words}), content_type="application/json", headers=headers
    )
