"""The pages of docs/howto, followed to the letter: their files written, their edits made, their commands run."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs/howto").glob("*.md"))
SLOW = {"teacher-backend", "loss-term"}  # their commands and tests import torch and transformers, several times
TREE = ("kat_ray", "actors", "tests", "docs/configuration.md", "pyproject.toml")


def fences(text):
    """(language, code) of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def steps(text):
    """What a page asks for, in its order: a file to write, an edit to make, a command to run."""
    for language, code in fences(text):
        if language == "diff":
            yield "edit", code
        elif language == "sh":
            yield from (("run", line) for line in code.splitlines() if line.strip())
        else:
            first, _, rest = code.partition("\n")
            name = re.fullmatch(r"# ([\w./-]+)", first)
            assert name, f"the first line of a block of {language} is `# file name`, not {first!r}"
            yield "write", (name[1], rest)


def edited(source, diff):
    """The source after the hunks of a diff; each is found by the lines that it keeps and takes out."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = [line for line in hunk.splitlines() if not line.startswith(("---", "+++"))]
        if not lines:
            continue
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert source.count(old) == 1, f"{source.count(old)} times in the file:\n{old}"
        source = source.replace(old, new)
    return source


def install(project):
    """What `pip install` leaves of a project of modules: its metadata, here beside them."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = project / f"{described['name'].replace('-', '_')}-{described['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {described['name']}\nVersion: {described['version']}\n"
    )
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_dict(described.get("entry-points", {}))
    with (info / "entry_points.txt").open("w") as file:
        points.write(file)


def left_out(folder, names):
    """Of a folder of the tree; the room kat_ray/models is none of the models."""
    return {"__pycache__", "golden", "deploy", *(["models"] if Path(folder).name == "demo" else [])} & set(names)


def copy_of_the_tree(folder):
    """The sources, in a folder that may be edited. Models and pictures are linked, since nobody edits these."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=left_out)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    (folder / "kat_ray/demo/models").symlink_to(ROOT / "kat_ray/demo/models")


def in_shell(line, folder):
    """Run a command of a page in `folder`; the commands that it may use are few."""
    words = shlex.split(line)
    name, rest = words[0], words[1:]
    if name == "pip":
        assert rest == ["install", "-e", "."]
        return install(folder)
    if name == "kat-ray":
        command = [sys.executable, "-m", "kat_ray.cli", *rest]
    elif name == "make" and rest[0] == "test":
        arguments = rest[1].removeprefix("ARGS=").split()
        # Without the suite's fixtures, which take seconds to import: a page's test needs none.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *arguments]
    elif name == "pytest":
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *rest]
    else:
        raise AssertionError(f"no command of a page on how to add something: {line}")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    redirect = command.index(">") if ">" in command else len(command)
    done = subprocess.run(
        command[:redirect], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    if redirect < len(command):
        (folder / command[redirect + 1]).write_text(done.stdout)
    return done.stdout


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.integration] * (p.stem in SLOW)) for p in PAGES]
)
def test_a_page_works_as_written(page, tmp_path):
    asked = list(steps(page.read_text(encoding="utf-8")))
    if any(kind == "edit" for kind, _ in asked):
        copy_of_the_tree(tmp_path)
    for kind, what in asked:
        if kind == "write":
            name, content = what
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        elif kind == "edit":
            (name,) = re.findall(r"^\+\+\+ (\S+)$", what, re.M)
            file = tmp_path / name
            file.write_text(edited(file.read_text(), what))
            compile(file.read_text(), name, "exec")
        else:
            in_shell(what, tmp_path)
    tests = [what for kind, what in asked if kind == "run" and re.match(r"pytest|make test", what)]
    assert tests, "a page ends with a test that is run"


def test_an_edit_that_does_not_fit_is_refused():
    diff = "--- a.py\n+++ a.py\n@@\n x\n-y\n+z\n"
    assert edited("x\ny\n", diff) == "x\nz\n"
    for source in ("x\nw\n", "x\ny\nx\ny\n"):
        with pytest.raises(AssertionError, match="times in the file"):
            edited(source, diff)
