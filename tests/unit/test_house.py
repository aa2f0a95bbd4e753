"""The house of the tests: what several of them use is in tests/support or in a conftest.py; and its figures."""

import ast

from hypothesis import settings

from tests.support.house import figures
from tests.support.paths import ROOT


def modules_named_in(tree, package):
    """Every module that the code of a file in `package` may import, whole names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of_tests(source, package):
    """Test modules and conftests that a file of tests imports."""
    names = modules_named_in(ast.parse(source), package)
    return [
        name
        for name in names
        if name.startswith("tests.")
        and any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    ]


def test_no_test_module_is_imported():
    wrong = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        where = path.relative_to(ROOT)
        found = imports_of_tests(path.read_text(encoding="utf-8"), list(where.parent.parts))
        if found:
            wrong[str(where)] = found
    assert wrong == {}, "what it takes from there goes to tests/support, a fixture to conftest.py"


def test_no_law_has_a_deadline():
    """Which would be the machine's and not the law's: `tests/conftest.py` takes it from all of them."""
    assert settings().deadline is None


def test_every_way_to_import_one_is_found():
    ways = (
        "import tests.cluster.test_run",
        "from tests.cluster import test_run",
        "from tests.cluster.test_run import config_of",
        "from tests.conftest import models",
        "from . import test_run",
        "from .test_run import config_of",
        "from ..cluster import test_run",
        "def f():\n    from tests.cluster.test_run import config_of",
    )
    assert all(imports_of_tests(way, ["tests", "cluster"]) for way in ways)
    assert not imports_of_tests("import pytest\nfrom tests.support.runs import config_of", ["tests", "cluster"])


def test_figures_by_hand(tmp_path):
    files = {
        "kat_ray/__init__.py": "import kat_ray.run\n",  # of no room
        "kat_ray/config/__init__.py": "class Config: ...\n",
        "kat_ray/config/load.py": "def f():\n    from kat_ray.run.state import S\n" + "    f()\n" * 49,
        "kat_ray/run/state.py": "from kat_ray.config import Config\nfrom kat_ray import config\nclass S:\n"
        + "    a: int\n" * 199
        + "    b: Config | None\n",
        "actors/driver/train.py": "def f(config: 'int', whole: list[Config]):\n"
        + "    f()\n" * 49
        + "x = 1\n" * 351,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert figures(tmp_path) == {
        "rooms": ["actors.driver", "kat_ray.config", "kat_ray.run"],
        "arrows between rooms": ["kat_ray.config -> kat_ray.run", "kat_ray.run -> kat_ray.config"],
        "upward arrows": ["kat_ray.config -> kat_ray.run"],
        "modules that take Config whole": ["actors/driver/train.py, 1 times", "kat_ray/run/state.py, 1 times"],
        "classes above 200 lines": ["kat_ray/run/state.py:3 S, 201 lines"],
        "functions above 50 lines": ["kat_ray/config/load.py:1 f, 51 lines"],
        "files above 400 lines": ["actors/driver/train.py, 401 lines"],
    }
