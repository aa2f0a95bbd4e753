"""A command that is run by a Python without kat-ray's packages: which one, and what to do, before anything else."""

import ast
import subprocess
import sys
import tomllib

import pytest

from kat_ray.cli import interpreter
from kat_ray.cli import main as cli
from kat_ray.cli.interpreter import OLDEST, REQUIRED, missing, python_of_ray, too_old
from tests.support.paths import ROOT

IMPORTED_AS = {"pyyaml": "yaml"}


def test_a_python_without_the_packages_is_named_and_no_traceback_shown():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "kat_ray.cli", "train", "demo"],  # -S: no site-packages
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} (Python 3.") and "make setup" in line, line


@pytest.mark.parametrize(
    "version, old", [((3, 8, 1), True), ((3, 10), True), ((3, 11), False), ((3, 12, 1), False)]
)
def test_a_python_that_is_too_old_is_named(version, old):
    said = too_old(version)
    assert said is None or (said.startswith(sys.executable) and "is too old: 3.11 or newer is needed" in said)
    assert (said is not None) == old


def test_the_oldest_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, OLDEST))}"


@pytest.mark.parametrize("name", ["__init__", "__main__", "interpreter"])
def test_what_an_older_python_reads_is_written_for_it(name):
    source = (ROOT / f"kat_ray/cli/{name}.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {n for n in names if n.startswith(("kat_ray", "actors"))} <= {"kat_ray.cli.interpreter"}


def test_what_is_required_is_what_the_project_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {n.split("[")[0].split("=")[0].split(">")[0].split("<")[0].strip() for n in project["dependencies"]}
    assert {IMPORTED_AS.get(n.lower(), n) for n in names} == set(REQUIRED)


def test_any_other_module_keeps_its_traceback(monkeypatch):
    assert missing(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    monkeypatch.setattr(cli, "_train", lambda args: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["train", "demo"])


def process(proc, name, parent, *words):
    folder = proc / name
    folder.mkdir()
    (folder / "stat").write_text(f"7 (a) b) S {parent} 1 1")
    (folder / "cmdline").write_text("\0".join(words) + "\0")


def test_the_python_of_rays_workers_is_found_from_a_job(tmp_path, monkeypatch):
    process(tmp_path, "self", 30)
    process(tmp_path, "30", 20, "/bin/sh", "-c", "python -m kat_ray.cli train demo")
    process(tmp_path, "20", 10, "ray::JobSupervisor")
    command = "--python_worker_command=/env/bin/python /env/lib/setup_worker.py --node-ip-address=127.0.0.1"
    process(tmp_path, "10", 1, "/env/lib/raylet", "--node_id=5", command)
    assert python_of_ray(tmp_path) == "/env/bin/python"
    lacking = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    monkeypatch.setattr(interpreter, "python_of_ray", lambda: "/env/bin/python")
    said = missing(lacking)
    assert said.startswith(f"{sys.executable} (Python 3.") and " lacks pyarrow, and is what `python` means" in said
    assert "Ray itself runs under /env/bin/python" in said and "PATH=/env/bin:$PATH ray start --head" in said
    monkeypatch.setattr(interpreter, "python_of_ray", lambda: sys.executable)
    assert "Ray runs under it too: install docker/*.lock there" in missing(lacking)


def test_outside_of_a_job_there_is_no_ray(tmp_path):
    process(tmp_path, "self", 30)
    process(tmp_path, "30", 0, "init")
    assert python_of_ray(tmp_path) is None
    assert python_of_ray() is None
