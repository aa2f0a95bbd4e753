"""A run on a fake cluster whose reward functions fail too often: what was learnt is kept, and it goes on."""

import pytest

from kat_ray.cluster.roles import roles_of
from kat_ray.errors import RewardError
from kat_ray.rewards.scoring import Scored
from kat_ray.run.grading_ahead import GradingAhead
from kat_ray.types.records import Reward
from tests.support.scenarios import ALONE, LAYOUTS, Run, check, compare, finish


class Scorer:
    """Rewards by the last token; fails when it is asked the n-th time."""

    def __init__(self, fails_at=None):
        self.fails_at, self.asked = fails_at, 0

    def ask(self, answers, check=None, spent=0.0):
        return {i: {} for i in answers}

    def score(self, answers, check=None, replies=None, seconds=0.0):
        self.asked += 1
        if self.asked == self.fails_at:
            raise RewardError("too many")
        return Scored({i: Reward(float(a.token_ids[-1] % 3)) for i, a in answers.items()}, {})

    def close(self):
        pass


class RewardedRun(Run):
    def __init__(self, scorer, changes, start_from=None):
        super().__init__(0, changes, start_from)
        self.scorer = scorer

    def _replaced(self):
        return super()._replaced() | {"actors.driver.training_run.make_scorer": lambda *_: self.scorer}


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_what_was_learnt_is_kept_and_the_run_goes_on(staleness, fails_at):
    rewards = LAYOUTS["rewards"]
    changes = {
        **rewards, "rollout": {**rewards["rollout"], "staleness": staleness}, "run": {"checkpoint_every": 9}
    }  # fmt: skip
    whole = RewardedRun(Scorer(), {**changes, "run": {"checkpoint_every": 1}}).go()
    assert whole.finished and whole.error is None
    broken = RewardedRun(Scorer(fails_at), changes).go()
    check(broken)
    assert isinstance(broken.error, RewardError) and not broken.finished
    done = fails_at - 1
    assert [*broken.checkpoints.written] == ([done] if done else [])
    mended = Scorer()
    result = RewardedRun(mended, changes, start_from=broken).go()
    check(result)
    assert result.finished and mended.asked == 3 - done, "no step that was done is rewarded again"
    compare(result, whole.fingerprint())


def test_what_is_learnt_is_counted_up_to_the_confirmation():
    result = RewardedRun(Scorer(), LAYOUTS["rewards"]).go()
    rows = [row for step in result.run.traces.values() for row in step]
    lengths = [len(row.token_ids) if row.cut is None else row.confirmed for row in rows]
    cuts = sum(row.confirmed - row.cut for row in rows if row.cut is not None)
    summary = result.run.summary
    assert cuts > 0 and summary["learnt_tokens"] == sum(lengths) == summary["kept_tokens"] + cuts


def slowed(run):
    """Its engines take seconds for a rollout: some end while others go on."""
    make = run.engine

    def make_slow(settings):
        engine = make(settings)
        engine.set_rate(8.0)  # tokens a second, of all rollouts
        return engine

    run.engine = make_slow
    return run


@pytest.mark.parametrize("layout", ["rewards", ALONE, "imputed cuts"])
@pytest.mark.parametrize("lost", [None, "sampler:0", "sampler:1", "scorer:0", "monitor:0"])
def test_what_is_graded_while_others_are_sampled_changes_nothing(layout, lost, monkeypatch):
    """Rollouts of a sampler that is lost, and such as a decision cuts after their end, are begun with, too."""
    begun, used = [], []
    begin, take = GradingAhead.begin, GradingAhead.take

    def noted_begin(self, rollouts):
        begun.extend(rollouts)
        begin(self, rollouts)

    def noted_take(self, rollouts, check):
        found = take(self, rollouts, check)
        used.extend(found)
        return found

    monkeypatch.setattr(GradingAhead, "begin", noted_begin)
    monkeypatch.setattr(GradingAhead, "take", noted_take)
    run = slowed(Run(0, LAYOUTS[layout]))
    if lost is not None and lost.partition(":")[0] in roles_of(run.config):
        run.cluster.when("sampler", "ended", lambda: run.cluster.kill(lost), nth=2)
    result = finish(run)
    assert begun and used and len(used) == len(set(used)), "each is taken once"
    assert set(used) <= {row.rollout_id for rows in result.run.traces.values() for row in rows if row.cut is None}


@pytest.mark.parametrize("layout", ["rewards", ALONE])
def test_the_learners_log_probabilities_are_recorded_whoever_dies(layout):
    """They come from the ranks after a step: of a step that is taken again, those of the last time."""
    changes = {**LAYOUTS[layout], "run": {"learner_logprobs": True}}
    plain = Run(0, {**changes, "run": {**changes["run"], "checkpoint_every": 1}}).go()
    rows = [row.policy for rows in plain.run.traces.values() for row in rows]
    own = [p for p in rows if p.learner_logprobs is not None]
    assert own and all(len(p.learner_logprobs) >= p.policy_tokens for p in own)
    assert all((p.learner_logprobs == p.sampled_logprobs[: len(p.learner_logprobs)] + 0.25).all() for p in own)
    killed = 0
    for switch in range(200, 1400, 300):
        run = Run(switch, changes).disturb([(switch, "kill", "learner:0")])
        result = run.go()
        check(result)
        assert result.finished and result.error is None
        compare(result, plain.fingerprint())
        killed += len(result.cluster.log)
    assert killed >= 3, "some of them before the run had ended"


def test_without_rewards_there_is_nothing_to_hold_them_against():
    with pytest.raises(ValueError, match=r"run\.learner_logprobs = true: needs objective\.rl\.weight > 0"):
        Run(0, {"run": {"learner_logprobs": True}})
