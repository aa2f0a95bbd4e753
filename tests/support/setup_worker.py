"""Stands in for Ray's own `setup_worker.py`: takes on a worker's environment and becomes the worker.

Ray's imports all of Ray for that, most of a second of a core for each worker, before the worker imports it again.
What is not a plain Python worker goes to Ray's own. Imports nothing of this project: it is run by its path.
"""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
PLAIN = {"env_vars", "py_executable"}  # parts of a context that are known here


def main(argv: list[str]) -> None:
    """Does not return."""
    rest = [word for word in argv if not word.startswith((CONTEXT, LANGUAGE))]
    given = next((word.removeprefix(CONTEXT) for word in argv if word.startswith(CONTEXT)), "{}")
    context = {name: value for name, value in json.loads(given or "{}").items() if value}
    if f"{LANGUAGE}PYTHON" not in argv or not context.keys() <= PLAIN:
        ray = Path(find_spec("ray").origin).parent
        os.execv(sys.executable, [sys.executable, str(ray / "_private/workers/setup_worker.py"), *argv])
    for name, value in context.get("env_vars", {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    python = context.get("py_executable", sys.executable)
    os.execvp(python, [python, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
