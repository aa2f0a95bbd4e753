"""Names of reward functions, and files that are read but never run."""

import pytest

from kat_ray.errors import UserError
from kat_ray.rewards.source import check_source, file_and_name, labels

CODE = """
raise RuntimeError("nobody runs this")
import os.path, json as j
from x import y as z
def f(): inner = 1
async def g(): ...
class C:
    method = 1
a, (b, *c) = 1, (2, 3)
d: int = 4
if a:
    e = 1
else:
    h = 2
try:
    k = 1
except ImportError:
    l = 1
"""


@pytest.mark.parametrize("name", [*"fgCabcdehklz", "os", "j"])
def test_a_name_that_a_file_defines_is_found(tmp_path, name):
    (tmp_path / "r.py").write_text(CODE)
    check_source(f"{tmp_path}/r.py:{name}")


@pytest.mark.parametrize("name", ["inner", "method", "x", "y", "json", "path"])
def test_a_name_that_it_lacks_is_refused(tmp_path, name):
    (tmp_path / "r.py").write_text(CODE)
    with pytest.raises(UserError, match=rf"r\.py defines no '{name}'; it defines os, j, z, f, g, C, a"):
        check_source(f"{tmp_path}/r.py:{name}")


@pytest.mark.parametrize("code", ["from x import *\n", "def __getattr__(name): ...\n"])
def test_names_that_only_running_it_would_tell_are_believed(tmp_path, code):
    (tmp_path / "r.py").write_text(code)
    check_source(f"{tmp_path}/r.py:anything")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"def f(:\n", "r.py:1: "),
        (b"\0", "r.py"),
        (b"# coding: nonsense\n", "unknown encoding"),
        (b"x = '\xff'\n", "r.py"),
        (b"", "defines no 'f'; it defines nothing"),
    ],
)
def test_what_is_no_python_is_refused(tmp_path, code, said):
    (tmp_path / "r.py").write_bytes(code)
    with pytest.raises(UserError, match=r"^reward\.functions: ") as error:
        check_source(f"{tmp_path}/r.py:f")
    assert said in str(error.value)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        check_source("no.py:f")
    assert str(error.value) == (
        f"reward.functions: no.py:f: no.py (relative to {tmp_path}) cannot be read: No such file or directory"
    )
    for path in ("/no/no.py", "~nobody-of-this-name/no.py", f"{tmp_path}/d.py"):
        (tmp_path / "d.py").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="cannot be read"):
            check_source(f"{path}:f")


def test_names_and_labels():
    assert file_and_name("a b/c.py:f_1") == ("a b/c.py", "f_1")
    assert [file_and_name(n) for n in ("math", "c.py", "c.py:", "c.py:1", "c:f", ":f", "c.py:f.g")] == [None] * 7
    assert labels(["a.py:f", "b.py:g", "math"]) == {"a.py:f": "f", "b.py:g": "g", "math": "math"}
    assert labels(["a.py:f", "b.py:f", "c.py:math", "math"]) == {
        "a.py:f": "a.py:f", "b.py:f": "b.py:f", "c.py:math": "c.py:math", "math": "math"
    }  # fmt: skip
