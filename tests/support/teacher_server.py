"""kat-ray's teacher server in a thread of a test, and the commands of servers in processes of their own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from aiohttp import web


class AppInThread:
    """An aiohttp application on loopback."""

    def __init__(self, app, port=0):
        self._app, self._port = app, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def _run(self):
        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answers(url):
    """Whether something is healthy at an address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as found:
            return found.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def server_process(command, url, log, seconds=240, **environment):
    """A server in a process of its own, once it is healthy; it is ended by its id."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + seconds
        while not answers(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not healthy within {seconds} s: {log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def own_server(port, *more, model="demo:teacher"):
    """The command of kat-ray's server."""
    return [
        sys.executable, "-m", "kat_ray.cli", "serve-teacher", model, "--dtype", "float32", "--threads", "1",
        "--port", str(port), *more,
    ]  # fmt: skip


def vllm_server(port, model, *more):
    """The command of vLLM's server, on CPUs."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64",
        "--served-model-name", "teacher", *more,
    ]  # fmt: skip


# torch compiles a small function of vLLM's sampler at the first request: minutes on a busy machine.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
