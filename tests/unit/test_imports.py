"""kat_ray runs without the cluster's libraries, and its command line answers at once."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kat_ray

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "vllm", "deepspeed")


def modules():
    return [m.name for m in pkgutil.walk_packages(kat_ray.__path__, "kat_ray.")]


def fresh(code):
    """Run code in a fresh interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_imports_the_cluster():
    # One interpreter for all modules: what any of them imports stays in sys.modules.
    code = (
        f"import importlib, sys\nfor m in {modules()!r}: importlib.import_module(m)\n"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {(*HEAVY, 'actors')!r}))"
    )
    assert fresh(code) == "[]"


@pytest.mark.parametrize(
    "module", ["kat_ray.cli", "kat_ray.config_io", "kat_ray.data", "kat_ray.models", "kat_ray.verify"]
)
def test_what_answers_at_once_does_not_import_torch(module):
    code = f"import sys, {module}\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    assert fresh(code) == "False False"


@pytest.mark.parametrize("path", sorted((ROOT / "kat_ray").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_actors_are_imported_inside_commands_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom)
            else []
        )  # fmt: skip
        for name in names:
            root = name.split(".")[0]
            assert root not in HEAVY, f"{path.name}:{node.lineno} imports {name}"
            allowed = path.name in ("cli.py", "cli_jobs.py") and id(node) in inside
            assert root != "actors" or allowed, f"{path.name}:{node.lineno} imports {name}"
