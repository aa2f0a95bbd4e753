"""Who may import whom; `kat_ray` runs without the cluster's libraries, and its command line answers at once."""

import ast
import pkgutil
import subprocess
import sys

import pytest

import kat_ray
from tests.support.paths import ROOT

HEAVY = ("ray", "vllm", "deepspeed")
# A room may import rooms of lower floors, and no other room of its own.
FLOORS = (
    ("kat_ray.errors", "kat_ray.types", "kat_ray.losses", "kat_ray.observability"),
    ("kat_ray.records", "kat_ray.rewards"),
    ("kat_ray.termination",),
    ("kat_ray.config",),
    ("kat_ray.cluster", "kat_ray.data", "kat_ray.models", "kat_ray.demo"),
    ("kat_ray.analysis", "kat_ray.run"),
    ("kat_ray.report",),
    ("actors.sampler", "actors.teacher", "actors.learner", "actors.monitor", "actors.ray_jobs"),
    ("actors.cluster", "actors.testing"),
    ("actors.driver",),
    ("actors.bench",),
    ("kat_ray.cli",),  # imports actors inside its commands only
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    return sorted(p for package in ("kat_ray", "actors") for p in (ROOT / package).rglob("*.py"))


def imported(tree):
    """Each name that a module imports, with the node that does it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            deeper = {f"{module}.{alias.name}" for alias in node.names} if module in ("kat_ray", "actors") else ()
            yield from ((name, node) for name in (deeper or [module]))


def room(module):
    """`kat_ray.data` of `kat_ray.data.prompts`; None for what is not ours, and for the two packages themselves."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("kat_ray", "actors") and len(parts) > 1 else None


def home(path):
    """The room that a source file is in; None for the two packages' own `__init__`."""
    found = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return None if found and found.endswith(".__init__") else found


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
    rooms = {
        room(".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in sources() if p.parent.name != p.parts[-1]
    }
    found = {r for r in rooms if r and not r.endswith("__init__")}
    assert found == set(FLOOR), "a new package gets a floor"


def test_rooms_import_lower_floors_only():
    upwards = []
    for path in sources():
        own = home(path)
        for name, node in imported(ast.parse(path.read_text(encoding="utf-8"))):
            other = room(name)
            if own and other not in (None, own) and FLOOR[other] >= FLOOR[own]:
                upwards.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for name, node in imported(tree):
            package = name.split(".")[0]
            allowed = package == "actors" and path.parent.name == "cli" and id(node) in inside
            if package in (*HEAVY, "actors") and not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert wrong == []
