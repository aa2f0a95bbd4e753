"""A local Ray that does not come up; with a real one: tests/cluster."""

import pytest
import ray

from actors.cluster.session import ray_session
from kat_ray.errors import UserError
from tests.support.configs import make_config


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup."), RuntimeError("no"), OSError(28, "full")]
)
def test_a_local_ray_that_does_not_start_is_one_message(monkeypatch, error):
    def fails(**_):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(UserError) as raised, ray_session(make_config("s", "t")):
        pass
    assert str(raised.value).startswith("a local Ray did not start: ") and str(error) in str(raised.value)
    assert "kat-ray doctor" in str(raised.value)
