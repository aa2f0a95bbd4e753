"""Where a role computes: as its `num_gpus` says, whatever the machine has."""

import pytest
import torch

from actors.cluster.placement import environments
from kat_ray.cluster.devices import device_of
from kat_ray.cluster.threads import threads_of
from kat_ray.errors import UserError
from tests.support.configs import make_config


@pytest.fixture
def cuda(monkeypatch):
    """Set what torch says of CUDA devices."""

    def set_number(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_number


@pytest.mark.parametrize("role", ["sampler", "scorer", "learner"])
def test_a_role_without_gpus_computes_on_the_cpu_whatever_the_machine_has(cuda, role):
    cuda(8)
    assert device_of(0, role) == torch.device("cpu")


@pytest.mark.parametrize("number", [1, 0.5, 4])
def test_a_role_with_gpus_has_the_first_that_it_sees(cuda, number):
    cuda(4)
    assert device_of(number, "learner") == torch.device("cuda", 0)


def test_gpus_that_cannot_be_used_are_the_fields_error_and_not_a_cpu_run(cuda, monkeypatch):
    cuda(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError) as error:
        device_of(1, "sampler")
    message = str(error.value)
    assert message.startswith("sampler.num_gpus = 1: this process sees no usable CUDA device (torch ")
    assert "driver none" in message and "CUDA_VISIBLE_DEVICES = '3'" in message
    assert message.endswith("sampler.num_gpus = 0")


def test_the_driver_is_named_as_the_kernel_tells_it(cuda, monkeypatch, tmp_path):
    cuda(0)
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    monkeypatch.setattr("kat_ray.cluster.devices._DRIVER", told)
    with pytest.raises(UserError, match=r"driver 535\.104\.05;"):
        device_of(2, "learner")
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    with pytest.raises(UserError, match=r"driver 580\.65\.06;"):
        device_of(2, "learner")


def test_processes_of_roles_without_gpus_are_shown_none():
    config = make_config("a", "b", sampler={"num_gpus": 1}, learner={"num_gpus": 0.5})
    found = environments(config, threads_of(config, 1))
    shown = {role: env.get("CUDA_VISIBLE_DEVICES", "as Ray says") for role, env in found.items()}
    assert shown == {"sampler": "as Ray says", "learner": "as Ray says", "scorer": "", "monitor": ""}


def test_processes_of_one_engine_on_a_cpu_need_no_numa_node_each():
    sizes = [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "num_gpus": 2}, {}]
    configs = [make_config("a", "b", sampler=size) for size in sizes]
    found = [environments(config, threads_of(config, 1))["sampler"] for config in configs]
    assert [env.get("VLLM_CPU_OMP_THREADS_BIND") for env in found] == ["nobind", None, None]


@pytest.mark.parametrize(
    "sampler, eager", [({}, True), ({"num_gpus": 1}, False), ({"num_gpus": 1, "enforce_eager": True}, True),
                       ({"enforce_eager": False}, False)],
)  # fmt: skip
def test_engines_are_eager_on_a_cpu_only_unless_told(sampler, eager):
    config = make_config("a", "b", sampler=sampler)
    assert config.sampler.eager is eager
    env = environments(config, threads_of(config, 1))["sampler"]
    assert env.get("TORCHDYNAMO_DISABLE") == ("1" if eager else None)
