"""The loop around an engine, without Ray and without a model."""

from types import SimpleNamespace

import numpy as np
import pytest

from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from actors.testing.stub_engine import StubEngine
from kat_ray.types.records import GenerateRequest, RolloutSpec, SamplingSettings, TerminationDecision
from tests.support.configs import make_config


class Failing(StubEngine):
    """Raises at the `fails`-th request that it is given, or at that step."""

    def __init__(self, add=None, step=None):
        super().__init__(top_k=4, vocabulary=50)
        self.calls = {"add": 0, "step": 0}
        self.fails = {"add": add, "step": step}

    def _count(self, call):
        self.calls[call] += 1
        if self.calls[call] == self.fails[call]:
            raise RuntimeError(f"{call} {self.calls[call]}")

    def add(self, request_id, *args):
        self._count("add")
        self.prefix, _, number = request_id.rpartition("-")
        super().add(number, *args)

    def step(self):
        self._count("step")
        return [rows._replace(request_id=f"{self.prefix}-{rows.request_id}".lstrip("-")) for rows in super().step()]

    def abort(self, request_ids):
        super().abort([r.split("-")[-1] for r in request_ids])


class Answers:
    """A future that is there."""

    def __init__(self, value):
        self.value = value

    def done(self):
        return True

    def result(self, timeout=None):
        return self.value

    def future(self):
        return self


def method(answer):
    call = SimpleNamespace(remote=lambda *_: answer)
    call.options = lambda **_: call
    return call


def sampler_with(engine, cut=(), objective=None, **scorer):
    """A sampler whose monitor cuts these rollouts, and else none."""
    rollout = {"top_k_logprobs": 4, "chunk_tokens": 2, "rollouts_per_prompt": 2, "temperature": 1.0, "top_p": 1.0}
    config = make_config("a", "b", rollout=rollout, scorer=scorer, objective=objective or {})
    settings = SamplerSettings.from_config(
        config, config.student, "", stop_ids=(1,), vocabulary=50, max_model_len=64
    )
    sampler = StudentSampler("sampler:0", settings, lambda _: engine)
    scorer = SimpleNamespace(score=method((Answers(None), Answers(None))), release=method(None))
    decision = TerminationDecision(np.array(cut, np.int64))
    sampler.connect({"default": [scorer]}, SimpleNamespace(admit=method(None), observe=method(Answers(decision))))
    return sampler


def request(rollouts=4):
    specs = tuple(RolloutSpec(i, "p", (5, 6), i, False, 8) for i in range(rollouts))
    return GenerateRequest(1, 0, 0, specs, {})


SETTINGS = SamplingSettings(8, 1.0, 1.0, 4, (1,))
COMPLETE = ([(5, 6)] * 4, [0] * 4, SETTINGS, 0)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr("actors.sampler.score_stream.ray.put", lambda chunk: chunk)


@pytest.mark.parametrize("fails", [{"add": 3}, {"step": 3}])
@pytest.mark.parametrize("call", ["generate", "complete"])
def test_an_error_half_way_leaves_an_idle_engine(call, fails):
    engine = Failing(**fails)
    sampler = sampler_with(engine)
    arguments = (request(),) if call == "generate" else COMPLETE
    with pytest.raises(RuntimeError, match="3"):
        getattr(sampler, call)(*arguments)
    assert engine.running == 0
    report = sampler.generate(request())
    assert [len(r.token_ids) for r in report.rollouts] == [8] * 4
    assert len(report.chunks) == len(report.decision_seconds) == 4


@pytest.mark.parametrize(
    "scorer, ends",
    [({}, [4, 6, 8, 10]), ({"num_gpus": 1, "cache_block": 3}, [4, 7, 10]),
     ({"num_gpus": 1, "cache_block": 3, "backend": "transformers"}, [4, 6, 8, 10])],
)  # fmt: skip
def test_chunks_end_where_the_teachers_blocks_do(scorer, ends):
    """A prompt of 2 and 8 tokens, a chunk every 2 steps: one token after a block of 3, where vLLM scores."""
    report = sampler_with(Failing(), **scorer).generate(request(1))
    assert [2 + int(c.chunk.start[0]) + c.chunk.tokens for c in report.chunks] == ends


def test_log_probabilities_of_all_tokens_are_recorded_where_rewards_are_learnt_from():
    """Those of the chunks, and of tokens that were in none since the rollout was cut before."""
    report = sampler_with(Failing(), cut=[2], objective={"rl": {"weight": 1.0}}).generate(request())
    assert [len(r.token_ids) for r in report.rollouts] == [8, 8, 3, 8]
    sent = {r.rollout_id: [] for r in report.rollouts}
    for chunk in (c.chunk for c in report.chunks):
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            sent[rollout_id] += chunk.sampled_logprobs[chunk.offsets[i] : chunk.offsets[i + 1]].tolist()
    for rollout in report.rollouts:
        recorded = rollout.sampled_logprobs
        assert recorded.dtype == np.float32 and len(recorded) == len(rollout.token_ids)
        assert recorded[: len(sent[rollout.rollout_id])].tolist() == sent[rollout.rollout_id]
    assert [len(tokens) for tokens in sent.values()] == [8, 8, 2, 8]
    without = sampler_with(Failing()).generate(request())
    assert all(r.sampled_logprobs is None for r in without.rollouts)
