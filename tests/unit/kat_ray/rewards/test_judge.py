"""An async reward function that asks a judge over HTTP: a real server on loopback."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

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


def test_a_worker_has_several_calls_under_way(file):
    """It would wait for ever if one were made after the other; the seventh waits for a place."""
    with judge(together=6) as server:
        name = file(f"PORT = {server.server_address[1]}\n{JUDGE}")
        with scorer({name: 1.0}, calls_at_once=6) as made:
            scored = made.score(answers(*"abcdef", *("ab",) * 6))
        assert values(scored) == [0.25] * 6 + [0.5] * 6
        assert server.most == 6 and len(server.asked) == 12


def test_workers_share_calls_that_are_under_way_at_once(file):
    with judge(together=6) as server:
        name = file(f"PORT = {server.server_address[1]}\n{JUDGE}")
        with scorer({name: 1.0}, processes=3, calls_at_once=2) as made:
            assert values(made.score(answers(*"abcdef"))) == [0.25] * 6
        assert server.most == 6


MIXED = """
import asyncio, os, time

async def score(completions, **kwargs):
    text = completions[0]
    await asyncio.sleep(0)
    if text == "raises":
        raise ValueError("no answer")
    if text == "waits":
        await asyncio.Event().wait()
    if text == "stays":
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()
    if text == "blocks":
        time.sleep(1e6)
    if text == "dies":
        os._exit(3)
    if text == "eats":
        return [bytearray(1 << 40)]
    return [len(text)]
"""


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("raises", "ValueError: no answer"), ("waits", "took longer than reward.seconds = 2"),
        ("stays", "took longer than reward.seconds = 2"), ("blocks", "took longer than reward.seconds = 2"),
        ("dies", "ended its process (exit code 3)"), ("eats", "took more memory than"),
    ],
)  # fmt: skip
def test_one_answers_calls_are_that_answers_affair_alone(file, bad, fault):
    with scorer({file(MIXED): 1.0}, seconds=2.0, calls_at_once=4) as made:
        scored = made.score(answers("a", bad, "abc", "abcd", "abcde", "ab"))
    assert values(scored) == [1, None, 3, 4, 5, 2]
    assert fault in scored.rewards[1].error


COUNTS = """
import asyncio, os
now = most = 0

async def score(completions, **kwargs):
    global now, most
    if completions[0] == "dies":
        os._exit(3)
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.05)
    now -= 1
    return [most]
"""


def test_calls_that_had_not_begun_are_no_victims_of_one_that_ends_the_process(file):
    """The reward is how many a process has had under way at once; three were beside the one and are asked alone."""
    with scorer({file(COUNTS): 1.0}, calls_at_once=4) as made:
        scored = made.score(answers("dies", *("ab",) * 12))
    assert "ended its process" in scored.rewards[0].error
    assert values(scored) == [None, *[1.0] * 3, *[4.0] * 9]


def test_processes_that_keep_ending_have_the_rest_asked_one_at_a_time(file):
    """Three batches are broken off; what was in none of them is asked alone as well."""
    with scorer({file(COUNTS): 1.0}, calls_at_once=2, total_seconds=120.0) as made:
        scored = made.score(answers(*["dies", *("ab",) * 5] * 4))
    assert sum("ended its process" in reward.error for reward in scored.rewards.values()) == 4
    assert all(value in (1.0, 2.0) for value in values(scored) if value is not None)
    assert values(scored).count(None) == 4


LOOP = """
import asyncio
held = None

async def first(completions, **kwargs):
    global held
    held = held or asyncio.get_running_loop().create_future()
    return [1.0]

async def second(completions, **kwargs):
    assert held is None or held.get_loop() is asyncio.get_running_loop()
    return [2.0]
"""


def test_functions_of_one_file_share_a_loop(file):
    name = file(LOOP).rpartition(":")[0]
    with scorer({f"{name}:first": 1.0, f"{name}:second": 1.0}, calls_at_once=4) as made:
        assert values(made.score(answers(*"abcdef"))) == [3.0] * 6


def test_who_stops_waiting_ends_what_is_under_way(file):
    class Enough(Exception):
        pass

    def check():
        raise Enough

    with scorer({file(MIXED): 1.0}, seconds=1e6, total_seconds=1e6, calls_at_once=4) as made:
        with pytest.raises(Enough):
            made.ask(answers(*("waits",) * 8), check)
        assert values(made.score(answers("a", "ab"))) == [1, 2], "another process goes on"


def test_the_time_of_a_step_ends_calls_that_are_under_way(file):
    with scorer({file(MIXED): 1.0}, seconds=60.0, total_seconds=3.0, calls_at_once=4) as made:
        scored = made.score(answers("a", "waits", "abc"))
    assert values(scored) == [1, None, 3] and "not done within reward.step_seconds = 3" in scored.rewards[1].error
