"""The acceptance check: its verdicts, and its arithmetic on a CPU, where it has to pass, and where it must not."""

import json
import math

import pytest
import torch

from actors.acceptance import __main__ as command
from actors.acceptance import arithmetic
from actors.acceptance.rows import Row, document, row_of, table
from kat_ray.losses import fused_head

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("loss", "a", 0.1, 0.2), "pass"),
        (Row("loss", "a", 0.3, 0.2), "FAIL"),
        (Row("loss", "a", math.nan, 0.2), "FAIL"),
        (Row("loss", "a", 0.3), "info"),
        (Row("loss", "not run", note="vllm not installed"), "skipped"),
        (Row("loss", "did not end", failed=True), "FAIL"),
    ],
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict
    assert repr(row_of(row.as_dict())) == repr(row)
    assert table([row]).startswith(verdict)
    assert json.loads(document([row], {"device": "CPU"}))["rows"][0]["verdict"] == verdict


@pytest.mark.parametrize("part", [arithmetic.columns, arithmetic.loss])
def test_the_arithmetic_passes_on_a_cpu(part):
    rows = part(CPU, arithmetic.SMALL)
    assert rows and {row.verdict for row in rows} == {"pass"}, table(rows)


def test_a_loss_that_is_wrong_fails(monkeypatch):
    right = fused_head.product_with_weight
    monkeypatch.setattr(fused_head, "product_with_weight", lambda d, w: right(d, w) * 1.05)
    failed = [row.name for row in arithmetic.loss(CPU, arithmetic.SMALL) if row.verdict == "FAIL"]
    assert failed == ["float32: of the gradient in hidden states", "bfloat16: of the gradient in hidden states"]


def test_parts_without_their_packages_are_skipped_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("vllm", "deepspeed") else object())
    (row,) = command.check("agreement", tmp_path, 60)
    assert (row.verdict, row.note) == ("skipped", "deepspeed, vllm not installed")
    (row,) = command.check("columns", tmp_path, 0)
    assert row.verdict == "FAIL" and "no time is left" in row.note


@pytest.mark.integration
@pytest.mark.parametrize("part", ["teacher", "learner", "learner, packed"])
def test_parts_in_processes_of_their_own(tmp_path, part):
    rows = command.check(part, tmp_path, 120)
    assert rows and {row.verdict for row in rows} <= {"pass", "info"}, table(rows)


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_the_whole_command(tmp_path, monkeypatch):
    out = tmp_path / "check.json"
    monkeypatch.setattr("sys.argv", ["gpu-check", "--out", str(out)])
    assert command.main() == 0
    verdicts = {row["part"]: row["verdict"] for row in json.loads(out.read_text())["rows"]}
    assert set(verdicts) >= {name for name in command.PARTS if not name.startswith("speed")} | {"speed"}
    assert "FAIL" not in verdicts.values()
