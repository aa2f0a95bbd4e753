"""Which files of tests pytest-xdist keeps in one process, one after another.

By a word in the file: the fixture that its tests take. pytest-xdist has groups too, marks that it writes
into the names of tests; pytest no longer lets it.
"""

import re
from functools import cache

from xdist.scheduler import LoadScopeScheduling

from tests.support.paths import ROOT

GROUPS = {"own_ray": "own", "ray_local": "shared"}  # by fixture


@cache
def group_of(file: str) -> str:
    """Of a file of tests: those that start a Ray of their own, those that share one, or the file by itself."""
    found = {GROUPS[word] for word in re.findall(r"\w+", (ROOT / file).read_text()) if word in GROUPS}
    assert len(found) < 2, f"{file}: tests that share a Ray and tests that start their own; make two files of them"
    return found.pop() if found else file


class Lanes(LoadScopeScheduling):
    """The two groups go first, each to a process; who is done takes the other files."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.split("::")[0])
