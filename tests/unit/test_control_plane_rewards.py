"""A run on a fake cluster whose reward functions fail too often: what was learnt is kept, and it goes on."""

import pytest

from kat_ray.errors import RewardError
from kat_ray.rewards.scoring import Scored
from kat_ray.types.records import Reward
from tests.support.scenarios import LAYOUTS, Run, check, compare


class Scorer:
    """Rewards by the last token; fails when it is asked the n-th time."""

    def __init__(self, fails_at=None):
        self.fails_at, self.asked = fails_at, 0

    def score(self, answers, check=None):
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
