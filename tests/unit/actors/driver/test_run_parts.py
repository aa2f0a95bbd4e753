"""Checkpoints, evaluations, rollouts sampled ahead: when, and what a failure leaves. No actors."""

import json
from types import SimpleNamespace

import pytest
from ray.exceptions import ObjectLostError

from actors.cluster.signals import Preempted
from actors.driver import train as train_module
from actors.driver.checkpointing import CheckpointWriter
from actors.driver.evaluation import EvaluationSchedule
from actors.driver.prefetch import Prefetch
from actors.driver.preparation import prepare
from actors.driver.steps import Steps
from kat_ray.algorithms.base import Credit
from kat_ray.config import EvaluationConfig, RunConfig
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.models.inspect import ModelFacts, ModelInfo
from kat_ray.models.shape import ModelShape
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import Checkpoints, FileDigest
from kat_ray.types.records import KeptRollout, PolicyCredit
from tests.support.configs import make_config

LOST = ObjectLostError("0" * 56, "nowhere", "here")


class Writing:
    """A learner whose state is one file."""

    def __init__(self, tmp_path, **run):
        self.events, self.folder = [], None
        self.writer = CheckpointWriter(
            Checkpoints(tmp_path, keep=3, keep_best=False), RunConfig(**run), self.snapshot, self.written,
            lambda step, path: self.events.append("complete"),
        )  # fmt: skip

    def snapshot(self, folder):
        self.events.append("copied")
        self.folder = folder

    def written(self, step):
        self.events.append("on disk")
        (self.folder / "weights").write_text(str(step))
        return {"weights": FileDigest.of(self.folder / "weights")}


def test_a_checkpoint_is_due_every_so_many_steps_and_after_the_last_one(tmp_path):
    writer = Writing(tmp_path, steps=7, checkpoint_every=3).writer
    assert [done for done in range(8) if writer.is_due(done)] == [3, 6, 7]
    writer.go_back(3, None)
    assert not writer.is_due(3), "it was restored from there"
    assert [d for d in range(8) if Writing(tmp_path, steps=7, checkpoint_every=0).writer.is_due(d)] == [7]


def test_a_checkpoint_is_complete_once_its_files_are_on_disk(tmp_path):
    w = Writing(tmp_path, steps=9, checkpoint_every=1)
    w.writer.begin(1, {"done": 1}, None)
    assert w.events == ["copied"] and w.writer.saved == 1 and w.writer.newest is None
    assert not (tmp_path / "step-1").exists()
    w.writer.begin(2, {"done": 2}, None)
    assert w.events == ["copied", "on disk", "complete", "copied"], "the one before is finished first"
    w.writer.finish()
    w.writer.finish()
    assert w.events[4:] == ["on disk", "complete"] and w.writer.newest == tmp_path / "step-2"
    assert json.loads((tmp_path / "step-2" / "training" / "state.json").read_text()) == {"done": 2}
    assert w.writer.take_stall_seconds() > 0 == w.writer.take_stall_seconds()


def test_a_checkpoint_that_was_lost_with_the_learner_is_not_waited_for(tmp_path):
    w = Writing(tmp_path, steps=9, checkpoint_every=1)
    w.writer.begin(1, {"done": 1}, None)
    w.writer.forget_pending()
    w.writer.finish()
    assert w.events == ["copied"]


def result(score, k=1):
    return EvalResult(
        k=k, problems=2, avg_at_k=score, pass_at_k=score, mean_length=3.0, truncated_share=0.0, right=(1, 0)
    )


def schedule(scores, steps=10, **fields):
    said, recorded = [], []
    answers = iter(scores)
    made = EvaluationSchedule(
        lambda k: result(next(answers), k), EvaluationConfig(**{"every": 4, "k": 1, **fields}), steps=steps,
        phase=said.append, on_result=lambda done, r: recorded.append((done, r.avg_at_k)),
    )  # fmt: skip
    return made, said, recorded


def test_evaluations_come_before_every_so_many_steps_and_after_the_last_one():
    made, said, recorded = schedule([0.1, 0.2, 0.3, 0.4])
    for done in range(11):
        made.run_if_due(done)
        made.run_if_due(done)
    assert recorded == [(0, 0.1), (4, 0.2), (8, 0.3), (10, 0.4)], "each once"
    assert said == [
        f"evaluating {w}" for w in ("before training", "after step 4", "after step 8", "after training")
    ]
    assert made.results["before"].avg_at_k == 0.1 and made.results["after"].avg_at_k == 0.4
    assert made.metric(10) == 0.4 and made.metric(9) is None


def test_an_evaluation_that_a_checkpoint_has_is_not_repeated():
    made, _, recorded = schedule([0.9])
    made.go_back({"before": result(0.1), "after": result(0.2)}, 4)
    made.run_if_due(4)
    assert recorded == [] and made.metric(4) == 0.2
    made.run_if_due(8)
    assert recorded == [(8, 0.9)]


def test_evaluations_along_the_way_may_have_fewer_answers():
    asked = []
    made, _, _ = schedule([], k=3, every_k=2)
    made._evaluate = lambda k: asked.append(k) or result(0.5, k)
    made.teacher(made._evaluate)
    for done in range(11):
        made.run_if_due(done)
    assert asked == [3, 3, 2, 2, 3], "teacher, before, along the way, after"
    made, _, recorded = schedule([0.9], steps=8, k=3, every_k=2)
    made.go_back({"after": result(0.2, 2)}, 8)
    made.run_if_due(8)
    made.run_if_due(8)
    assert recorded == [(8, 0.9)], "resumed with fewer steps: it ends where it had two of three answers"
    with pytest.raises(ValueError, match=r"every_k = 4: must be <= 3"):
        EvaluationConfig(k=3, every_k=4)


def test_nothing_to_evaluate_on():
    made = EvaluationSchedule(None, EvaluationConfig(every=1), steps=2, phase=print, on_result=print)
    made.run_if_due(0)
    assert made.results == {} and made.metric(0) is None


def prefetch(finish=lambda sampling: (*sampling, "done")):
    losses = []
    return Prefetch(lambda step, state: (step, state), finish, lambda *loss: losses.append(loss)), losses


def test_rollouts_are_sampled_when_their_turn_comes_or_ahead():
    made, _ = prefetch()
    assert made.get(0, "a") == (0, "a", "done")
    made.start(1, "b")
    assert made.wait() and made.wait()
    assert made.get(1, "not asked for") == (1, "b", "done"), "those sampled ahead"
    assert made.get(2, "c") == (2, "c", "done")


def test_records_lost_ahead_are_sampled_when_their_turn_comes():
    answers = iter([LOST, "well"])

    def finish(sampling):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return sampling, answer

    made, losses = prefetch(finish)
    made.start(5, "a")
    assert made.wait() and losses == [(5, LOST)] and not made.cancel()
    assert made.get(5, "b") == ((5, "b"), "well")


def test_a_run_that_is_told_to_end_knows_that_samplers_are_at_work():
    def finish(sampling):
        raise Preempted

    made, _ = prefetch(finish)
    made.start(1, "a")
    assert made.wait() is False
    assert made.cancel() and not made.cancel()


@pytest.mark.parametrize("ahead", [True, False])
def test_cancelling_forgets_what_was_sampled_ahead(ahead):
    made, _ = prefetch()
    made.start(1, "a")
    if ahead:
        made.wait()
    assert made.cancel() is not ahead
    assert made.get(1, "b") == (1, "b", "done")


def test_a_run_begins_with_what_differs_what_is_slow_and_what_will_not_fit(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(train_module, "gpu_memory", lambda: None)
    monkeypatch.setattr(train_module, "cpu_flags", lambda: frozenset({"avx2"}))
    info = ModelInfo("m", "LlamaForCausalLM", 1000, 4096, (1,), True, 10**6, "F32", ModelShape(3, 10, 20))
    prompts = SimpleNamespace(longest=10, skipped_too_long=0, repeated=0, source="prompts.jsonl", prompts=range(99))
    facts, golds = ModelFacts(info, {"teacher": info}, None, (1,), ()), SimpleNamespace(note=None)
    prepared = SimpleNamespace(facts=facts, train=prompts, heldout=None, golds=golds)

    def notes(free, **sections):
        monkeypatch.setattr(train_module, "free_memory", lambda: free)
        return [note.split(" ")[0] for note in train_module._notes(make_config("s", "t", **sections), prepared)]

    assert notes(2**40) == []
    mixed = {"learner": {"dtype": "bfloat16"}}
    assert notes(10**6, **mixed) == ["student.dtype", "learner.dtype", "memory:"]
    joined = {"cluster": {"address": "auto"}}
    assert notes(10**6, **mixed, **joined) == ["student.dtype"], "the models are loaded elsewhere"


@pytest.mark.parametrize(
    ("opd", "policy", "weight"),
    [(1.0, None, 3.0), (0.0, None, 0.0), (0.0, PolicyCredit(0.5, 3, 0.1), 3.0)],
    ids=["the KL", "nothing is in the loss", "the policy"],
)
def test_a_batch_weighs_nothing_where_none_of_it_is_in_the_loss(opd, policy, weight):
    """The KL of a rule's tokens is measured, and no part of the loss: momentum alone would move the weights."""
    config = make_config(
        "s", "t", objective={"opd": {"weight": opd}, "rl": {"weight": 1.0}},
        rollout={"rollouts_per_prompt": 2, "top_p": 1.0},
    )  # fmt: skip
    rank = SimpleNamespace(collect=SimpleNamespace(remote=lambda *_: None))
    learners = SimpleNamespace(replicas=[0], handles=[rank], wait=lambda *_: None)
    steps = object.__new__(Steps)
    steps._config, steps._actors = config, SimpleNamespace(learners=learners)
    kept = [KeptRollout(0, 2, 3, None, policy)]
    assert steps.hand_over(SimpleNamespace(step=0, chunks=[], credit=Credit(kept), given=None)) == weight


def test_probes_cannot_stand_for_what_a_bound_on_length_ends():
    """Such a rule does not say which probes it would have ended."""
    config = load_config("demo-rl", ["termination.rule=progressive", "objective.rl.cut_reward=probe_weighted",
                                     "objective.rl.advantage=rloo", "objective.rl.aggregate=constant",
                                     "termination.start=16"])  # fmt: skip
    with pytest.raises(UserError, match=r"cut_reward = 'probe_weighted': termination\.rule = 'progressive' bounds"):
        prepare(config)
