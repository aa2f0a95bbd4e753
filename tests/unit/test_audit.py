"""The dependency audit: a finding fails, silence is called silence."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / ".ci" / "audit.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def report(vulns=(), **more):
    return {"dependencies": [{"name": "x", "version": "1", "vulns": list(vulns)} | more]}


BAD = report([{"id": "PYSEC-1", "fix_versions": ["2"]}])


def answers(by_service):
    """A service that condemns the known bad version or not, and says this of the lock."""

    def ask(service, requirements):
        known_bad, lock = by_service.get(service, (None, None))
        return known_bad if requirements.startswith(tool.KNOWN_BAD) else lock

    return ask


@pytest.mark.parametrize(
    ("services", "accepted", "code", "words"),
    [
        ({"pypi": (BAD, BAD)}, {}, 1, "x 1: PYSEC-1, mended in: 2"),
        ({"pypi": (BAD, BAD)}, {"PYSEC-1": "not used"}, 0, "pypi has 0 open advisories on 1 packages"),
        ({"pypi": (BAD, report())}, {}, 0, "pypi has 0 open advisories"),
        ({"pypi": (report(), report())}, {}, 0, "not reachable: no advisory service answers"),
        ({}, {}, 0, "not reachable: no advisory service answers"),
        ({"osv": (BAD, BAD)}, {}, 1, "osv has 1 open advisories"),
        ({"pypi": (BAD, None), "osv": (BAD, BAD)}, {}, 1, "pypi stopped answering"),
        ({"pypi": (BAD, report(skip_reason="not there"))}, {}, 0, "it does not know x"),
    ],
)
def test_verdicts(services, accepted, code, words):
    said = []
    assert tool.audit("x==1\n", accepted, answers(services), said.append) == code
    assert words in "\n".join(said)


def test_files_are_read():
    assert tool.accepted_in("# none\nPYSEC-1 not used # until 2027\n\n") == {"PYSEC-1": "not used"}
    assert tool.pinned("# a\ntorch==2.13.0+cpu  # why\n--index x\nx==1\n") == "torch==2.13.0\nx==1\n"
