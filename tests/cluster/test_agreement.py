"""The self-test of a run with real engines: it passes where they agree, and names the one that is broken."""

import pytest

from actors.cluster.samplers import Engines
from actors.driver.train import check_agreement
from actors.sampler.student_sampler import vllm_engine
from kat_ray.agreement.compare import AgreementError
from tests.support.runs import config_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

ONE = {"sampler": {"replicas": 1}, "scorer": {"replicas": 1}, "learner": {"world_size": 1}}


class DeafEngine:
    """vLLM's engine, which says that it has taken new weights and has not."""

    def __init__(self, settings):
        self._engine = vllm_engine(settings)

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def load_weights(self, update):
        pass


@pytest.mark.nightly  # what a run finds of it is in the gate: test_run
def test_engines_that_agree(files, tmp_path):
    found = check_agreement(config_of(files, tmp_path))
    sides = {(a.ours, a.theirs) for a in found}
    for name in ("sampler:0", "sampler:1", "scorer:0", "scorer:1", "the learner's training path"):
        assert any(name in ours for ours, _ in sides)
    for when in ("as loaded", "after changed weights were published", "after the weights were published"):
        assert any(when in ours for ours, _ in sides)
    assert all(0 <= a.difference.mean < 1e-5 and a.difference.tokens for a in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly  # with a stand-in: tests/unit/actors/driver/test_agreement.py
def test_weights_that_do_not_arrive(files, tmp_path):
    with pytest.raises(AgreementError, match="sampler:0 after changed weights were published"):
        check_agreement(config_of(files, tmp_path, **ONE), Engines(sampler=DeafEngine))
