"""The learning rate's schedule where a run is resumed with another length."""

from actors.learner.schedule import lr_factor, schedule_note
from tests.support.configs import make_config


def config(steps):
    return make_config("s", "t", run={"steps": steps}, learner={"lr": 2e-6, "warmup_ratio": 0.0})


def test_a_longer_run_says_where_its_rate_jumps_to():
    note = schedule_note(config(100), config(300), 100)
    assert note == (
        "run.steps = 300, and 100 so far: the learning rate's schedule is stretched to it. The last step had "
        "0.000247 of learner.lr = 2e-06, the next has 0.75 of it"
    )
    assert abs(lr_factor(100, 300, 0.0, 0.0) - 0.75) < 1e-12


def test_nothing_is_said_where_nothing_changes():
    assert schedule_note(config(100), config(100), 50) is None
    assert schedule_note(config(100), config(300), 0) is None, "no step was taken under the other schedule"
