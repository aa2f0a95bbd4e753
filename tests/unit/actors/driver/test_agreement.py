"""The check before the first step, on stand-ins that compute one model, while actors are lost."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError

from actors.cluster.actor_groups import ActorGroup
from actors.driver.agreement import AgreementCheck
from kat_ray.agreement.compare import AgreementError
from tests.support.configs import make_config


class Method:
    """Ray's `handle.method`, whose reference is the call that is still to be made."""

    def __init__(self, call):
        self._call = call

    def remote(self, *args):
        return lambda: self._call(*args)


class Weights:
    """One number, which the learner changes; samplers hold what was published last."""

    def __init__(self):
        self.learner = self.samplers = 0.0

    def change(self, scale):
        self.learner = scale

    def publish(self, _):
        self.samplers = self.learner


class Actor:
    """One of any role. Its log-probabilities are -1 less the weights; it is lost at its call number `dies`."""

    def __init__(self, weights, dies=0):
        self.check, self.logprobs = Method(self._check), Method(self._score)
        self.change_weights = Method(weights.change)
        self._weights, self._left = weights, dies

    def _lives(self):
        self._left -= 1
        if not self._left:
            raise ActorUnavailableError("gone", None)

    def _check(self, prompts, tokens, _):
        self._lives()
        answers = np.ones(tokens, dtype=np.int32)
        logprobs = np.full(tokens, -1.0 - self._weights.samplers)
        return [SimpleNamespace(token_ids=answers, logprobs=logprobs) for _ in prompts]

    def _score(self, pairs, _):
        self._lives()
        return [np.full(len(answer), -1.0 - self._weights.learner) for _, answer in pairs]


class Group(ActorGroup):
    """Actors of which none comes back."""

    weights = None

    def __init__(self, role, actors):
        supervisor = SimpleNamespace(
            wait=lambda refs, *_, **__: [ref() for ref in refs], lost=lambda *_: None, forget=lambda _: None
        )
        placement = SimpleNamespace(
            places=lambda _: range(len(actors)), options=lambda *_: {}, release=lambda _: None
        )
        left = iter(actors)
        super().__init__(role, supervisor, placement, lambda *_: next(left))
        self.start()

    def revive(self, replica, interruptible=False):
        return False


@pytest.fixture
def check_of(monkeypatch):
    """The check of a run with so many samplers and scorers, which are lost at the calls named."""
    monkeypatch.setattr(ray, "kill", lambda _: None)

    def make(samplers, scorers, config=None):
        weights = Weights()
        learner = Actor(weights)
        model = SimpleNamespace(edges={}, vocabulary=50)
        prepared = SimpleNamespace(
            facts=SimpleNamespace(models={"student": model, "teacher": model}, tokenizer=range(50)),
            paths=SimpleNamespace(max_model_len=64), train=SimpleNamespace(prompts=[]),
        )  # fmt: skip
        actors = SimpleNamespace(
            samplers=Group("sampler", [Actor(weights, dies) for dies in samplers]),
            teachers={"default": Group("scorer", [Actor(weights, dies) for dies in scorers])} if scorers else {},
            learners=SimpleNamespace(on_all=lambda request, _: [request(learner)()]),
            publish=weights.publish,
        )  # fmt: skip
        return AgreementCheck(config or make_config("s", "t"), prepared, actors)

    return make


def compared(check):
    """Who was compared how often."""
    names = [agreement.ours.split()[0] for agreement in check.run(0)]
    return {name: names.count(name) for name in names}


def test_all_are_compared(check_of):
    each = {"sampler:0": 6, "sampler:1": 6, "scorer:0": 1, "scorer:1": 1, "the": 1}
    assert compared(check_of((0, 0), (0, 0))) == each


def test_without_a_teacher_samplers_and_learner_are_compared_all_the_same(check_of):
    rl = {"opd": {"weight": 0.0}, "rl": {"weight": 1.0}}
    config = make_config("s", "t", objective=rl, rollout={"rollouts_per_prompt": 2, "top_p": 1.0})
    assert compared(check_of((0, 0), (), config)) == {"sampler:0": 6, "sampler:1": 6, "the": 1}


@pytest.mark.parametrize(("call", "comparisons"), [(1, 0), (2, 1), (6, 5)])
def test_a_sampler_that_is_dropped_meanwhile_is_not_compared(check_of, call, comparisons):
    for samplers, stays, goes in (((call, 0), "sampler:1", "sampler:0"), ((0, call), "sampler:0", "sampler:1")):
        found = compared(check_of(samplers, (0,)))
        assert found[stays] == 6 and found.get(goes, 0) == comparisons


@pytest.mark.parametrize("call", [1, 2])
def test_a_scorer_that_is_dropped_meanwhile_is_not_compared(check_of, call):
    found = compared(check_of((0,), (call, 0)))
    assert found["scorer:1"] == 1 and "scorer:0" not in found


def test_samplers_that_take_no_weights_are_still_found_when_one_is_dropped(check_of):
    check = check_of((0, 1), (0,))
    check.actors.publish = lambda _: None
    with pytest.raises(AgreementError, match="sampler:0 after changed weights were published"):
        check.run(0)
