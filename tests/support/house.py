"""Rooms, floors and sizes of the sources: `python -m tests.support.house` prints the figures.

A room is a package of `kat_ray` or `actors`; an arrow is a room that imports another, anywhere in its modules.
"""

import argparse
import ast
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("kat_ray", "actors")
# A room may import rooms of lower floors, and no other room of its own.
FLOORS = (
    ("kat_ray.errors", "kat_ray.types", "kat_ray.losses", "kat_ray.observability"),
    ("kat_ray.records", "kat_ray.rewards"),
    ("kat_ray.termination",),
    ("kat_ray.config",),
    ("kat_ray.remote",),
    ("kat_ray.cluster", "kat_ray.data", "kat_ray.models", "kat_ray.demo", "kat_ray.storage"),
    ("kat_ray.agreement", "kat_ray.algorithms", "kat_ray.run"),
    ("kat_ray.analysis", "kat_ray.tracking"),
    ("kat_ray.report", "kat_ray.watch"),
    ("actors.sampler", "actors.teacher", "actors.learner", "actors.monitor", "actors.ray_jobs"),
    ("actors.cluster", "actors.testing"),
    ("actors.driver",),
    ("actors.bench",),
    ("actors.acceptance",),
    ("kat_ray.cli",),  # imports actors inside its commands only
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONG_FILE, LONG_CLASS, LONG_FUNCTION = 400, 200, 50  # lines that none should have more of


def sources(root=ROOT):
    return sorted(p for package in PACKAGES for p in (root / package).rglob("*.py"))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """Each name that a module imports, with the node that does it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            deeper = {f"{module}.{alias.name}" for alias in node.names} if module in PACKAGES else ()
            yield from ((name, node) for name in (deeper or [module]))


def room(module):
    """`kat_ray.data` of `kat_ray.data.prompts`; None for what is not ours, and for the two packages themselves."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in PACKAGES and len(parts) > 1 else None


def home(path, root=ROOT):
    """The room that a source file is in; None for the two packages' own `__init__`."""
    found = room(".".join(path.relative_to(root).with_suffix("").parts))
    return None if found and found.endswith(".__init__") else found


def imports_between_rooms(root=ROOT):
    """(path, line, room of the file, module that it imports, room of that) of each import of another room."""
    for path in sources(root):
        own = home(path, root)
        for name, node in imported(tree_of(path)):
            other = room(name)
            if own and other not in (None, own):
                yield path, node.lineno, own, name, other


def is_upward(own, other):
    return own in FLOOR and other in FLOOR and FLOOR[other] >= FLOOR[own]


def places_of_config(tree):
    """Parameters and fields that are a whole `Config`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            names = {n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)}
            if "Config" in names:
                yield node


def long_ones(tree, kinds, limit):
    """Definitions of more than `limit` lines, without their decorators."""
    found = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return [node for node in found if node.end_lineno - node.lineno + 1 > limit]


def figures(root=ROOT):
    """By its name, each a list of what is counted."""
    files = sources(root)
    arrows = sorted({(own, other) for _, _, own, _, other in imports_between_rooms(root)})
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)

    def named(kinds, limit):
        return [
            f"{path.relative_to(root)}:{node.lineno} {node.name}, {node.end_lineno - node.lineno + 1} lines"
            for path in files
            for node in long_ones(tree_of(path), kinds, limit)
        ]

    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    places = {path: len(list(places_of_config(tree_of(path)))) for path in files}
    return {
        "rooms": sorted({own for own in (home(path, root) for path in files) if own}),
        "arrows between rooms": [f"{own} -> {other}" for own, other in arrows],
        "upward arrows": [f"{own} -> {other}" for own, other in arrows if is_upward(own, other)],
        "modules that take Config whole": [f"{p.relative_to(root)}, {n} times" for p, n in places.items() if n],
        f"classes above {LONG_CLASS} lines": named(ast.ClassDef, LONG_CLASS),
        f"functions above {LONG_FUNCTION} lines": named(functions, LONG_FUNCTION),
        f"files above {LONG_FILE} lines": [
            f"{path.relative_to(root)}, {n} lines" for path, n in lines.items() if n > LONG_FILE
        ],
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.support.house", description="Figures of the sources.")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another tree of the same packages")
    parser.add_argument("--names", action="store_true", help="and what is counted")
    arguments = parser.parse_args()
    for name, counted in figures(arguments.root.resolve()).items():
        print(f"{len(counted):4d}  {name}")
        if arguments.names:
            print(*(f"        {one}" for one in counted), sep="\n")


if __name__ == "__main__":
    main()
