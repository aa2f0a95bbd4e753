"""Names of reward functions, and a file of the user's looked at without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from kat_ray.errors import UserError

VERIFIERS = ("integer", "math", "environment")  # graded against a gold answer, as `evaluation.verifier` grades
BUILT_IN = (*VERIFIERS, "format")
_NAME_RE = re.compile(r"(?P<path>.+\.py):(?P<name>[^\W\d]\w*)")


def file_and_name(function: str) -> tuple[str, str] | None:
    """`my_rewards.py:score` as its two parts; None for what is not of this form."""
    found = _NAME_RE.fullmatch(function)
    return None if found is None else (found["path"], found["name"])


def labels(functions: list[str]) -> dict[str, str]:
    """A short name for each function: `score` of `my_rewards.py:score`, where no other has it."""
    short = {f: (file_and_name(f) or ("", f))[1] for f in functions}
    return {f: label if [*short.values()].count(label) == 1 else f for f, label in short.items()}


def check_source(function: str) -> None:
    """`UserError` unless the file is there, is Python, and defines the name. Its code is read, not run."""
    parts = file_and_name(function)
    assert parts is not None, function
    path, name = parts
    where = f"reward.functions: {function}"
    try:
        tree = ast.parse(Path(path).expanduser().read_bytes(), path)
    except (OSError, RuntimeError) as error:
        here = "" if Path(path).is_absolute() else f" (relative to {Path.cwd()})"
        raise UserError(f"{where}: {path}{here} cannot be read: {getattr(error, 'strerror', error)}") from error
    except SyntaxError as error:
        raise UserError(f"{where}: {path}:{error.lineno}: {error.msg}") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{where}: {path}: not a file of Python: {error}") from error
    defined = list(dict.fromkeys(_defined(tree.body)))
    if name not in defined and "*" not in defined and "__getattr__" not in defined:
        raise UserError(f"{where}: {path} defines no {name!r}; it defines {', '.join(defined) or 'nothing'}")


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements of a module bind, also within `if`, `try` and the like."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        for part in ("body", "orelse", "finalbody"):
            yield from _defined(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _defined(handler.body)
