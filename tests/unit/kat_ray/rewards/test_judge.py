"""An async reward function that asks a judge over HTTP: a real server on loopback."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.unit.kat_ray.rewards.functions import answers, scorer, values

JUDGE = """
import asyncio, json

async def score(prompts, completions, **kwargs):
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    body = json.dumps({"prompt": prompts[0], "answer": completions[0]}).encode()
    head = f"POST / HTTP/1.1\\r\\nHost: judge\\r\\nConnection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    writer.write(head.encode() + body)
    await writer.drain()
    head, _, body = (await reader.read()).partition(b"\\r\\n\\r\\n")
    writer.close()
    return [json.loads(body)["score"] if head.split()[1] == b"200" else None]
"""


class Judge(BaseHTTPRequestHandler):
    """Scores an answer by its length, once as many are asked about as its server waits for."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(asked)
            server.now += 1
            server.most = max(server.most, server.now)
        if asked["answer"] == "hangs":
            server.over.wait()
        server.together.wait(timeout=120)
        with server.lock:
            server.now -= 1
        body = json.dumps({"score": len(asked["answer"]) / 4}).encode()
        self.send_response(503 if asked["answer"] == "busy" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def judge(together):
    """A judge that answers when so many are asking."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.lock, server.together, server.over = threading.Lock(), threading.Barrier(together), threading.Event()
    server.asked, server.now, server.most = [], 0, 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_as_many_answers_are_asked_about_at_once_as_there_are_workers(file):
    """It would wait for ever if calls of different workers were made one after the other."""
    with judge(together=3) as server:
        name = file(f"PORT = {server.server_address[1]}\n{JUDGE}")
        with scorer({name: 1.0}, processes=3) as made:
            scored = made.score(answers("a", "ab", "abc", "abcd", "", "abcde"))
        assert values(scored) == [0.25, 0.5, 0.75, 1.0, 0.0, 1.25]
        assert server.most == 3 and len(server.asked) == 6
        assert {asked["prompt"] for asked in server.asked} == {"1+1?"}


def test_a_judge_that_is_busy_or_hangs_costs_its_own_answer_alone(file):
    with judge(together=1) as server:
        name = file(f"PORT = {server.server_address[1]}\n{JUDGE}")
        with scorer({name: 1.0}, seconds=3.0) as made:
            scored = made.score(answers("a", "busy", "hangs", "ab"))
        assert values(scored) == [0.25, None, None, 0.5]
        assert (scored.metrics["reward/errors"], scored.metrics["reward/timeouts"]) == (0, 1)
        assert scored.rewards[1].error == "", "None on purpose is no error"
