"""The code leaves the records that it left before it was laid out anew, to the bit."""

import pytest

from tests.golden.runs import STEPS, compare, differences, record, run


@pytest.mark.parametrize(
    "name",
    [pytest.param("stub", marks=pytest.mark.integration), pytest.param("demo", marks=pytest.mark.nightly)],
)
@pytest.mark.usefixtures("own_ray")
def test_a_recorded_run_comes_out_again(name, tmp_path):
    assert compare(name, record(run(name, tmp_path), STEPS[name])) == []


def test_a_difference_in_the_last_bit_is_found():
    golden = {"metrics": [{"kl/mean": 0.1}], "weights": {"w": "0" * 16}}
    assert differences({"metrics": [{"kl/mean": 0.1 + 2**-55}], "weights": {"w": "0" * 16}}, golden, exact=True)
    assert differences({"metrics": [{"kl/mean": 0.1}], "weights": {"w": "1" + "0" * 15}}, golden, exact=True)
    assert differences({"metrics": [], "weights": {"w": "0" * 16}}, golden, exact=True)
    assert not differences({"metrics": [{"kl/mean": 0.1}], "weights": {"w": "0" * 16}}, golden, exact=True)
