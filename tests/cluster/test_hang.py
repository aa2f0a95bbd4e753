"""An actor that hangs answers when asked how it is, and its task makes no progress: it is found and replaced."""

import re
import time
from functools import partial

import pytest

from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_engine import StubEngine, fast_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import StubTeacher, stub_teacher
from tests.support.runs import check_books, stub_config

pytestmark = pytest.mark.integration

STEPS, HANG = 4, 8
MARK = "hung-once"  # in run.dir: whoever makes it sleeps for ever, whoever finds it does not


def hang_once(folder):
    try:
        (folder / MARK).touch(exist_ok=False)
    except FileExistsError:
        return
    time.sleep(1e6)


class HangingEngine(StubEngine):
    """Sleeps in `step` once, in the middle of the second step's rollouts."""

    def __init__(self, folder, settings):
        super().__init__(settings.rollout.top_k_logprobs, vocabulary=16)
        self._dir, self._first = folder, settings.rollout.rollouts_per_step
        self._half = settings.rollout.max_tokens // 2

    def step(self):
        if any(int(request) >= self._first and left < self._half for request, left in self._left.items()):
            hang_once(self._dir)
        return super().step()


class HangingTeacher(StubTeacher):
    """Sleeps in `score` once, in the middle of the second step's rollouts."""

    def __init__(self, folder, settings):
        super().__init__(settings.rollout.max_tokens)
        self._dir, self._first = folder, settings.rollout.rollouts_per_step

    def score(self, chunk, topk_ids, own_top=0):
        if chunk.rollout_ids.max() >= self._first and chunk.start.max() > 0:
            hang_once(self._dir)
        return super().score(chunk, topk_ids)


@pytest.mark.parametrize(
    ("role", "task", "hanging"),
    [
        pytest.param("sampler", "generate", {"sampler": HangingEngine}, id="sampler"),
        # Every role is frozen in virtual time: test_control_plane_schedules.
        pytest.param("scorer", "score", {"scorer": HangingTeacher}, id="scorer", marks=pytest.mark.nightly),
    ],
)
def test_an_actor_that_answers_and_makes_no_progress_is_replaced(ray_local, files, tmp_path, role, task, hanging):
    # Who is not found would be waited for until step_timeout, and fail the run.
    config = stub_config(files, tmp_path, STEPS, cluster={"hang_timeout": HANG, "step_timeout": 120})
    made = {"sampler": fast_stub_engine, "scorer": stub_teacher}
    made |= {which: partial(engine, tmp_path) for which, engine in hanging.items()}
    path = job.train(config, engines=Engines(**made, learner=StubLearner))
    assert (tmp_path / MARK).exists(), "nobody hung"
    _, _, metrics = check_books(config, path)
    said = re.findall(
        r"(\w+):\d hangs \(no progress for (\d+) s in '(\w+)'; cluster.hang_timeout\): it is killed and replaced",
        (path / "run.log").read_text(),
    )
    assert [(who, what) for who, _, what in said] == [(role, task)], "it and nobody else, who waits for it included"
    assert int(said[0][1]) >= HANG
    assert sum(m["pool/restarts"] for m in metrics) >= 1
