"""The learner's stand-in: what it makes of the same tokens is the same, and of any others it is not."""

from dataclasses import replace

import numpy as np
import pytest

from actors.learner.learner import Learner
from actors.learner.settings import LearnerSettings
from actors.testing import stub_learner
from actors.testing.stub_learner import StubLearner
from kat_ray.data.batch import TrainingSample
from kat_ray.errors import StateLost
from kat_ray.run.checkpoint import Checkpoints
from tests.support.configs import make_config


def row(rollout_id, tokens):
    n = len(tokens)
    return TrainingSample(
        rollout_id, np.array([5], np.int32), np.array(tokens, np.int32), np.zeros((n, 2), np.int32),
        np.full((n, 2), -1.5, np.float16), np.zeros(n, np.float32), np.zeros(n, np.float32),
        np.full(n, -1.0, np.float32), np.ones(n, np.float32),
    )  # fmt: skip


@pytest.fixture
def learner(monkeypatch):
    """Makes started learners; what is collected are rows."""
    monkeypatch.setattr(stub_learner, "_fetched", lambda chunks, teacher, kept: kept)

    def make():
        made = StubLearner(0, LearnerSettings.from_config(make_config("a", "b"), "a", ()))
        made.start(*made.address())
        return made

    return make


def step(learner, rows):
    learner.collect([], [], rows)
    return learner.learn(float(sum(len(r.token_ids) for r in rows)), 0)


def weights(learner):
    return learner.weights(1)[0].arrays[0].tolist()


FIRST, SECOND = [row(1, [7, 8, 9]), row(2, [7, 7])], [row(3, [9])]


def after(learner, *steps):
    made = learner()
    for rows in steps:
        step(made, rows)
    return weights(made)


def test_the_order_of_rows_does_not_matter(learner):
    assert after(learner, FIRST, SECOND) == after(learner, FIRST[::-1], SECOND)


@pytest.mark.parametrize(
    "steps",
    [
        (FIRST,), (SECOND, FIRST), (FIRST, SECOND, SECOND), (FIRST[:1], SECOND), (FIRST + SECOND,),
        ([row(1, [7, 8, 10]), FIRST[1]], SECOND), ([row(1, [7, 8]), FIRST[1]], SECOND),
        ([row(4, [7, 8, 9]), FIRST[1]], SECOND),
        ([FIRST[0], replace(FIRST[1], weights=np.array([1, 0.5], np.float32))], SECOND),
    ],
    ids=["a step less", "steps exchanged", "a step twice", "a row less", "one step of two", "another token",
         "a token less", "another rollout", "another weight"],
)  # fmt: skip
def test_everything_else_does(learner, steps):
    assert after(learner, FIRST, SECOND) != after(learner, *steps)


def test_it_goes_on_from_a_checkpoint(learner, tmp_path):
    one, other = learner(), learner()
    step(one, FIRST)
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=False)
    one.snapshot(str(checkpoints.begin(1)), "")
    step(one, SECOND)  # while it is written
    checkpoints.commit(1, {}, one.written(), None)
    other.restore(str(checkpoints.newest()[0].path))
    step(other, SECOND)
    assert weights(other) == weights(one)


def test_a_new_process_knows_nothing():
    new = StubLearner(0, LearnerSettings.from_config(make_config("a", "b"), "a", ()))
    for call in (lambda: new.weights(1), lambda: new.collect([], [], []), lambda: new.learn(1.0, 0)):
        with pytest.raises(StateLost, match="its process is new"):
            call()


def test_it_has_what_a_learner_has():
    public = {name for name in vars(StubLearner) if not name.startswith("_")}
    assert len(public) > 8 and public <= vars(Learner).keys()


def test_its_report_says_how_far_the_teacher_is(learner):
    report = step(learner(), FIRST)
    assert (report.tokens, report.loss) == (5, pytest.approx(0.5))
