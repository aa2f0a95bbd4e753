"""What a tracker is told of a run's records: every line once, whatever happened to them meanwhile."""

import json

import pytest

from kat_ray.tracking.follow import Follower
from kat_ray.tracking.service import Service


class Recorded(Service):
    """Keeps what it is told."""

    def __init__(self):
        self.told, self.summary = [], "not yet"

    def log(self, step, values, seconds):
        self.told.append((step, dict(values), seconds))

    def end(self, summary):
        self.summary = summary


@pytest.fixture
def service():
    return Recorded()


def follower(folder, service):
    return Follower(service, folder, folder / "wandb.json")


def write(folder, *steps, mode="a", **more):
    with (folder / "metrics.jsonl").open(mode) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "time": 9.5, "kl/mean": step / 10, **more}) + "\n")


def test_lines_are_told_as_they_come(tmp_path, service):
    write(tmp_path, 1, 2)
    following = follower(tmp_path, service)
    following.catch_up(1)
    following.catch_up(1)
    write(tmp_path, 3)
    following.catch_up(1)
    assert service.told == [(step, {"kl/mean": step / 10}, 9.5) for step in (1, 2, 3)]


def test_half_a_line_waits_for_its_end(tmp_path, service):
    write(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 9.5, "kl/')
    following = follower(tmp_path, service)
    following.catch_up(1)
    assert [step for step, *_ in service.told] == [1]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('mean": 0.2}\n')
    following.catch_up(1)
    assert [step for step, *_ in service.told] == [1, 2]


def test_steps_that_come_again_are_not_told_again(tmp_path, service):
    """Longer and shorter than before; the evaluation of a step is another thing than the step."""
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 4, **{"eval/avg_at_k": 0.5})
    following = follower(tmp_path, service)
    following.catch_up(1)
    write(tmp_path, 1, 2, mode="w")
    write(tmp_path, 3, 4, 5, more_of_it="x" * 500, **{"kl/k1": 7.0})
    write(tmp_path, 5, **{"eval/avg_at_k": 0.6})
    following.catch_up(2)
    assert [step for step, *_ in service.told] == [1, 2, 3, 4, 4, 5, 5]
    assert "kl/k1" not in service.told[3][1] and service.told[5][1]["kl/k1"] == 7.0


def test_another_process_goes_on_where_the_last_one_was(tmp_path, service):
    write(tmp_path, 1, 2, 3)
    follower(tmp_path, service).catch_up(1)
    write(tmp_path, 1, 2, mode="w")
    write(tmp_path, 3, 4)
    again = Recorded()
    follower(tmp_path, again).catch_up(1)
    assert [step for step, *_ in again.told] == [4]


def test_what_nobody_nudged_for_is_told_at_the_end(tmp_path, service):
    """A nudge that found the pipe full is lost: also the one that says that the records were cut back."""
    write(tmp_path, 1, 2, 3, **{"kl/k1": 1.0})
    following = follower(tmp_path, service)
    following.catch_up(1)
    write(tmp_path, 1, mode="w")
    write(tmp_path, 2, 3, 4)
    (tmp_path / "summary.json").write_text('{"steps": 4}')
    following.end()
    assert [step for step, *_ in service.told] == [1, 2, 3, 4]
    assert service.summary == {"steps": 4}


def test_what_is_no_number_is_left_out_and_what_is_no_record_passed_over(tmp_path, service):
    (tmp_path / "metrics.jsonl").write_text(
        'nonsense\n[1]\n{"step": "x"}\n'
        '{"step": 1, "kl/mean": null, "non_finite": ["kl/mean"], "a/b": 1, "c/d": true}\n'
        '{"step": 2, "kl/mean": null}\n'
    )
    following = follower(tmp_path, service)
    following.end()
    assert service.told == [(1, {"a/b": 1.0}, 0.0)]
    assert service.summary is None, "a run without a summary may be resumed"


def test_another_server_is_told_everything(tmp_path, service):
    write(tmp_path, 1, 2)
    service.place = "http://here"
    follower(tmp_path, service).catch_up(1)
    for place, steps in (("http://there", [1, 2]), ("http://there", [])):
        other = Recorded()
        other.place = place
        follower(tmp_path, other).catch_up(1)
        assert [step for step, *_ in other.told] == steps
