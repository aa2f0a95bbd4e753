"""What the benchmark says of weights that travel: once to every node, however many samplers live there."""

import pytest

from actors.bench.publication import publication_figures

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]


def test_weights_travel_once_to_every_node():
    (figure,) = publication_figures(vocabulary=2000)
    assert 1.0 <= figure.value <= figure.goal
    assert figure.detail["samplers_per_node"] > 1 and len(figure.detail["store_bytes_by_node"]) == 3
