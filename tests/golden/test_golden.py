"""The code leaves the records that it left before it was laid out anew, to the bit."""

import copy
import json

import pytest

from tests.golden.runs import FOLDER, STEPS, compare, differences, record, run


@pytest.mark.parametrize(
    "name",
    [pytest.param("stub", marks=pytest.mark.integration), pytest.param("demo", marks=pytest.mark.nightly)],
)
@pytest.mark.usefixtures("ray_local")
def test_a_recorded_run_comes_out_again(name, tmp_path):
    assert compare(name, record(run(name, tmp_path), STEPS[name])) == []


def test_a_metric_that_is_newer_than_the_recording_is_left_out_and_no_other():
    golden = json.loads((FOLDER / "stub.json").read_text())
    newer = copy.deepcopy(golden)
    for line in newer["metrics"]:
        line["learner/of_tomorrow"] = 1.0
    assert compare("stub", newer) == []
    lost = copy.deepcopy(golden)
    del lost["metrics"][-1]["kl/mean"]
    assert len(compare("stub", lost)) == 1


def test_a_column_of_the_traces_that_is_newer_must_be_empty():
    newer = json.loads((FOLDER / "stub.json").read_text())
    for row in newer["traces"]:
        row["of_tomorrow"] = None
    assert compare("stub", copy.deepcopy(newer)) == []
    newer["traces"][3]["of_tomorrow"] = 0.5
    (found,) = compare("stub", newer)
    assert "of_tomorrow: 0.5" in found


def test_a_difference_in_the_last_bit_is_found():
    golden = {"metrics": [{"kl/mean": 0.1}], "weights": {"w": "0" * 16}}
    assert differences({"metrics": [{"kl/mean": 0.1 + 2**-55}], "weights": {"w": "0" * 16}}, golden, exact=True)
    assert differences({"metrics": [{"kl/mean": 0.1}], "weights": {"w": "1" + "0" * 15}}, golden, exact=True)
    assert differences({"metrics": [], "weights": {"w": "0" * 16}}, golden, exact=True)
    assert not differences({"metrics": [{"kl/mean": 0.1}], "weights": {"w": "0" * 16}}, golden, exact=True)
