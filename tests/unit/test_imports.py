"""Who may import whom; `kat_ray` runs without the cluster's libraries, and its command line answers at once."""

import ast
import pkgutil
import subprocess
import sys

import pytest

import kat_ray
from tests.support.house import FLOOR, home, imported, imports_between_rooms, is_upward, sources, tree_of
from tests.support.paths import ROOT

HEAVY = ("ray", "vllm", "deepspeed")


def modules():
    return [m.name for m in pkgutil.walk_packages(kat_ray.__path__, "kat_ray.") if not m.name.endswith("__main__")]


def fresh(code):
    """Run code in a fresh interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_is_a_room_on_one_floor():
    assert {home(path) for path in sources()} - {None} == set(FLOOR), "a new package gets a floor"


def test_rooms_import_lower_floors_only():
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, line, own, name, other in imports_between_rooms()
        if is_upward(own, other)
    ]
    assert upwards == []


def test_no_module_imports_the_cluster():
    # One interpreter for all modules: what any of them imports stays in sys.modules.
    code = (
        f"import importlib, sys\nfor m in {modules()!r}: importlib.import_module(m)\n"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {(*HEAVY, 'actors')!r}))"
    )
    assert fresh(code) == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "actors.sampler.settings",
        "actors.teacher.settings",
        "actors.testing.stub_engine",
        "kat_ray.cli.main",
        "kat_ray.config.load",
        "kat_ray.data.prompts",
        "kat_ray.models.inspect",
        "kat_ray.rewards.verifiers",
    ],
)
def test_what_answers_at_once_does_not_import_torch(module):
    code = f"import sys, {module}\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    assert fresh(code) == "False False"


def test_actors_are_imported_inside_commands_only():
    wrong = []
    for path in (p for p in sources() if p.is_relative_to(ROOT / "kat_ray")):
        tree = tree_of(path)
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for name, node in imported(tree):
            package = name.split(".")[0]
            allowed = package == "actors" and path.parent.name == "cli" and id(node) in inside
            if package in (*HEAVY, "actors") and not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert wrong == []
