"""Threads of the roles, by what works at the same time."""

import os

import pytest

from actors.cluster.placement import environments
from kat_ray.cluster.machine import own_cores
from kat_ray.cluster.threads import threads_of
from tests.support.configs import ALONE, make_config


def threads(cores, **sections):
    found = threads_of(make_config("s", "t", **sections), cores)
    return found["learner"], found["sampler"], found["scorer"], found["monitor"]


@pytest.mark.parametrize(
    ("cores", "sections", "expected"),
    [
        (2, {}, (2, 1, 1, 1)),
        (1, {}, (1, 1, 1, 1)),
        (16, {}, (16, 8, 8, 1)),
        (16, {"rollout": {"staleness": 1}}, (5, 5, 5, 1)),
        (16, {"learner": {"world_size": 2}, "sampler": {"replicas": 3}}, (8, 4, 4, 1)),
        (16, {"sampler": {"replicas": 1, "max_replicas": 3}}, (16, 4, 4, 1)),
        (2, {"sampler": {"replicas": 4}}, (2, 1, 1, 1)),
        (16, {"sampler": {"num_gpus": 1, "num_cpus": 2}}, (16, 2, 16, 1)),
        (16, {"learner": {"threads": 3}, "scorer": {"threads": 7}, "monitor": {"threads": 2}}, (3, 8, 7, 2)),
    ],
)
def test_cores_of_one_machine_are_shared_by_those_that_work_at_once(cores, sections, expected):
    assert threads(cores, **sections) == expected


def test_on_a_cluster_that_others_use_a_replica_has_what_it_reserves():
    assert threads(None) == (1, 1, 1, 1)
    assert threads(None, learner={"num_cpus": 12}, sampler={"num_cpus": 3.5}, scorer={"num_cpus": 0.5}) == (
        12, 3, 1, 1,
    )  # fmt: skip


def test_a_deterministic_run_does_not_depend_on_the_machine():
    found = {threads(cores, run={"deterministic": True}) for cores in (None, 1, 2, 64)}
    assert found == {(1, 1, 1, 1)}
    assert threads(64, run={"deterministic": True}, learner={"threads": 4}) == (4, 1, 1, 1)


def test_the_cores_that_a_process_may_use(tmp_path):
    every = len(os.sched_getaffinity(0))
    quota = tmp_path / "cpu.max"
    assert own_cores({}, quota) == every
    quota.write_text("max 100000\n")
    assert own_cores({}, quota) == every
    quota.write_text("50000 100000\n")
    assert own_cores({}, quota) == 1
    quota.write_text(f"{every * 800_000} 100000\n")
    assert own_cores({}, quota) == every
    assert own_cores({"OMP_NUM_THREADS": "3"}, quota) == 3
    assert own_cores({"OMP_NUM_THREADS": "4,2"}, quota) == every


def test_every_process_is_told_its_threads():
    config = make_config("s", "t")
    told = environments(config, {"learner": 5, "sampler": 4, "scorer": 3, "monitor": 1})
    assert {name: env["OMP_NUM_THREADS"] for name, env in told.items()} == {
        "learner": "5", "sampler": "4", "scorer": "3", "monitor": "1",
    }  # fmt: skip


def test_without_a_teacher_samplers_have_the_cores_of_its_scorers():
    config = make_config("s", "t", **ALONE)
    assert threads_of(config, 16) == {"learner": 16, "sampler": 16}
    assert [*environments(config, threads_of(config, 16))] == ["learner", "sampler"]
