"""What is released works without the tree: a source archive, its wheel, which is the tree's, what that installs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT

PACKAGES = ("kat_ray", "actors")
OPTIONAL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
EXTRAS = sorted(OPTIONAL.keys() - {"gpu", "cpu", "dev"})  # those are installed from locks (docker/install.sh)
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def build(what, source, out):
    """As pip and `python -m build` have it done: by the hook of the build backend, in the folder of the source."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(out)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source archive, the wheel of the tree, and the wheel of the archive."""
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    archive = build("sdist", tree, folder / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return archive, build("wheel", tree, folder / "wheel"), build("wheel", unpacked, folder / "again")


def contents(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_archive_builds_the_wheel_that_the_tree_builds(built):
    _, wheel, again = built
    assert wheel.name == again.name
    assert contents(wheel) == contents(again)


def test_the_wheel_holds_all_of_both_packages_and_nothing_else(built):
    _, wheel, _ = built
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    files = {p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file()}
    expected = {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    # The page of the embedded tasks and what it shows are for readers of the tree.
    assert names == {name for name in expected if not name.endswith((".md", ".png"))}
    for needed in ("kat_ray/demo/long.yaml", "kat_ray/py.typed"):
        assert needed in names
    for kind in (".safetensors", ".jsonl", ".j2", ".css", ".js"):
        assert any(name.endswith(kind) for name in names), kind


def test_the_wheel_says_what_it_is(built):
    _, wheel, _ = built
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (text,) = (text.decode() for name, text in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(text)
    assert (said["Name"], said["Version"]) == ("kat-ray", project["version"])
    assert said["License-Expression"] == project["license"]
    assert set(said.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert said.get_payload() == (ROOT / "README.md").read_text()


def test_extras_of_other_packages_are_named_as_these_name_them():
    """The pip of Python 3.11 takes `a_b` for another extra than `a-b`, and leaves it out with a warning."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    named = [Requirement(line) for line in asked]
    assert any(requirement.extras for requirement in named)
    for requirement in named:
        if requirement.extras:
            assert requirement.extras <= set(metadata(requirement.name).get_all("Provides-Extra")), requirement


@pytest.mark.nightly
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_resolves_beside_the_pinned_torch(extra, built, tmp_path):
    """By pip, which installs nothing and brings no other build of torch. A package registry has to be there."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "install", "--dry-run", "--no-input", "--report", report,
         f"{built[1]}[{extra}]"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    brought = [found["metadata"]["name"] for found in json.loads(report.read_text())["install"]]
    harmless = {"nvidia-ml-py"}  # Python alone, which reads the load of a GPU
    assert not [n for n in brought if n.startswith(("torch", "nvidia", "triton", "cuda")) and n not in harmless]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a command of an environment that has the wheel and sees the packages of this one, but not the tree."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A path, whose own .pth files are not read: that of an editable install of the tree among them.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--python", folder / "venv/bin/python", "install", "--no-deps",
         "--no-index", built[1]],
        check=True, timeout=300,
    )  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}

    def run(program, *arguments, seconds=120):
        done = subprocess.run(
            [folder / "venv/bin" / program, *arguments], cwd=folder, env=kept | {"HOME": str(folder)},
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


@pytest.mark.integration
def test_what_is_installed_answers_outside_the_tree(installed):
    assert "FAIL" not in installed("kat-ray", "doctor", "demo", seconds=300)
    where = installed("python", "-c", "import kat_ray, actors; print(kat_ray.__file__, actors.__file__)")
    assert all(str(installed.folder) in path for path in where.split())
    assert installed("kat-ray", "--version").startswith("kat-ray ")
    assert "distil the teacher into the student" in installed("kat-ray", "--help")
    assert "demo:heldout" in installed("kat-ray", "config", "demo-long")


@pytest.mark.integration
def test_what_is_installed_trains_and_reports(own_ray, installed):
    said = installed(
        "kat-ray", "train", "demo", "run.steps=2", "run.dir=runs", "evaluation.data.limit=4", "evaluation.k=1",
        "rollout.prompts_per_step=4", "data.limit=40", seconds=900,
    )  # fmt: skip
    assert "step 2/2" in said
    assert (installed.folder / "runs/latest/summary.json").is_file()
    installed("kat-ray", "report", "runs/latest", seconds=300)
    assert (Path(installed.folder) / "runs/latest/report/report.html").stat().st_size > 10_000
