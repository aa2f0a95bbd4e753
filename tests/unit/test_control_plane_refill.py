"""A run on a fake cluster that draws other prompts for those whose rollouts all have one reward."""

import functools
import json
import re
from itertools import pairwise

import pytest

from actors.driver.preparation import _check_refill
from kat_ray.analysis.objective import differences, recorded_steps, replayed
from kat_ray.config import Config
from kat_ray.errors import RewardError, UserError
from kat_ray.records.traces import write_traces
from kat_ray.rewards.limits import Failures
from kat_ray.rewards.scoring import Scored
from kat_ray.types.records import Reward, StopReason
from tests.support.rewarded import written
from tests.support.scenarios import ALONE, LAYOUTS, PLAIN, PROMPTS, Run, check, compare

WANTED = 4  # groups of two rollouts


def changes(layout=ALONE, batches=3, staleness=0, **more):
    own = LAYOUTS[layout]
    return {
        **own,
        "objective": {
            "opd": {"weight": 0.0},
            "rl": {"weight": 1.0, "filter_constant_groups": True, "max_num_gen_batches": batches},
        },
        "rollout": {"prompts_per_step": WANTED, "temperature": 1.0, "top_p": 1.0, "staleness": staleness},
        "run": {"checkpoint_every": 1, "steps": 4},
        **more,
    }  # fmt: skip


def steps_of(result):
    """Groups of each step in the order of their ids: rewards by prompt."""
    found = {}
    for step, rows in sorted(result.run.traces.items()):
        groups = found.setdefault(step, {})
        for row in sorted(rows, key=lambda row: row.rollout_id):
            groups.setdefault(row.prompt_id, []).append(row)
    return found


def tells(rows):
    return len({row.policy.reward for row in rows}) > 1


@functools.cache
def undisturbed(**how):
    result = Run(0, changes(**how)).go()
    assert result.error is None, result.error
    check(result)
    return result


@pytest.mark.parametrize("staleness", [0, 1])
def test_prompts_are_drawn_until_there_are_enough_or_the_bound_is_hit(staleness):
    result = undisturbed(staleness=staleness)
    metrics = dict(result.run.metrics)
    drawn, filled, short = [], 0, []
    for step, groups in steps_of(result).items():
        told = sum(map(tells, groups.values()))
        own, rows = metrics[step + 1], result.run.traces[step]
        ids = sorted(row.rollout_id for row in rows)
        drawn += ids
        assert own["group/prompts"] == len(rows) / 2 and own["group/missing"] == max(0, WANTED - told)
        assert 1 <= own["group/gen_batches"] <= 3
        assert told >= WANTED or own["group/gen_batches"] == 3, "it ends at the bound alone"
        assert len(rows) == 2 * WANTED or own["group/gen_batches"] > 1
        filled += own["group/gen_batches"] > 1 and not own["group/missing"]
        if own["group/missing"]:
            short.append(step + 1)
        assert {r.policy.advantage is None for g in groups.values() if not tells(g) for r in g} <= {True}
    assert drawn == list(range(len(drawn))) and filled, "no rollout twice, none left out"
    firsts = [step for before, step in pairwise([0, *short]) if step != before + 1]
    said = [note for note in result.notes if "max_num_gen_batches" in note]
    assert [note.split(":")[0] for note in said] == [f"step {step}" for step in firsts]
    last = json.loads(result.checkpoints.written[4][0])
    assert last["prompts_taken"] == len(drawn) / 2


def test_a_step_needs_no_others_where_all_of_its_groups_tell_something():
    """The rollouts of a run without a bound are the first of those with one."""
    plain, more = undisturbed(batches=1), undisturbed(batches=2)
    first = {row.rollout_id: row.token_ids.tolist() for row in plain.run.traces[0]}
    assert "group/missing" not in dict(plain.run.metrics)[1]
    assert first == {r.rollout_id: r.token_ids.tolist() for r in more.run.traces[0] if r.rollout_id in first}


@pytest.mark.parametrize("layout", [ALONE, "rewards"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_was_told_to_end_goes_on_to_the_same_bits(layout, staleness):
    """With a rule, too, whose calibration learns once from all batches of a step."""
    plain = undisturbed(layout=layout, staleness=staleness)
    ended = 0
    for switch in (150, 450, 900, 1400):
        broken = Run(switch, changes(layout, staleness=staleness)).disturb([(switch, "terminate", "driver")]).go()
        check(broken)
        ended += not broken.finished
        if not broken.finished:
            broken = Run(switch, changes(layout, staleness=staleness), start_from=broken).go()
            check(broken)
            assert broken.error is None and broken.finished
        compare(broken, plain.fingerprint())
    assert ended, "some of them had not ended by then"


DEATHS = [(ALONE, "sampler:1"), (ALONE, "learner:0"), ("rewards", "scorer:0"), ("rewards", "monitor:0")]


@pytest.mark.parametrize(("layout", "whom"), DEATHS)
def test_whoever_dies_the_same_prompts_are_drawn(layout, whom):
    plain, killed = undisturbed(layout=layout), 0
    for switch in (200, 400, 600, 800):
        run = Run(switch, changes(layout)).disturb([(switch, "kill", whom)])
        result = run.go()
        check(result)
        assert result.finished and result.error is None
        compare(result, plain.fingerprint())
        killed += len(result.cluster.log)
    assert killed > 1, "before the run had ended"


def test_a_cut_rollout_is_a_wrong_answer_and_its_group_may_be_replaced():
    result = undisturbed(layout="rewards")
    rows = [row for rows in result.run.traces.values() for row in rows]
    cut = [row for row in rows if row.stop_reason is StopReason.TRAPPED]
    batches = [m["group/gen_batches"] for _, m in result.run.metrics]
    assert cut and max(batches) > 1


class FewLate:
    """Rewards by the last token; two answers of the first batch that is drawn for others are late, in each step."""

    def __init__(self):
        self.late, self.steps = False, 0

    def ask(self, answers, check=None, spent=0.0):
        return {i: {} for i in answers}

    def score(self, answers, check=None, replies=None, seconds=0.0):
        is_first = len(answers) == 2 * WANTED
        late = 0 if is_first or self.late else 2
        self.late = not is_first and (self.late or late > 0)
        self.steps += late > 0
        worth = [None] * late + [float(a.token_ids[-1] % 3) for a in [*answers.values()][late:]]
        rewards = {i: Reward(value) for i, value in zip(answers, worth, strict=True)}
        return Scored(rewards, {}, Failures(len(answers), 0, late, "late" if late else ""))

    def close(self):
        pass


@pytest.mark.parametrize(("share", "ends"), [(0.2, False), (0.1, True)])
def test_errors_are_counted_over_all_batches_of_a_step(share, ends, monkeypatch):
    """Two late answers are more than a batch of few prompts may have, and not more than its step may."""
    scorer = FewLate()
    monkeypatch.setattr(Run, "_replaced", lambda run, own=Run._replaced: own(run) | {
        "actors.driver.training_run.make_scorer": lambda *_: scorer
    })  # fmt: skip
    result = Run(0, changes(reward={"max_error_share": share})).go()
    assert scorer.steps, "other prompts were drawn"
    if not ends:
        assert result.error is None and result.finished
        check(result)
        return
    assert isinstance(result.error, RewardError) and not result.finished
    assert re.match(r"2 of \d\d answers of a step could not be rewarded", str(result.error))


def refused(**how):
    tree = {**PLAIN, **changes(**how)}
    tree["rollout"] = {**PLAIN["rollout"], **tree["rollout"]}
    with pytest.raises(ValueError) as error:
        Config.model_validate(tree)
    return str(error.value)


def test_what_cannot_mean_anything_is_refused():
    rl = {"weight": 1.0, "max_num_gen_batches": 3}
    text = refused(layout="rewards", objective={"opd": {"weight": 0.0}, "rl": rl})
    assert "max_num_gen_batches = 3" in text and "filter_constant_groups = false" in text
    text = refused(layout="rewards", objective={"rl": {**rl, "filter_constant_groups": True}})
    assert "needs objective.opd.weight = 0 (it is 1)" in text
    assert "max_num_gen_batches" in refused(
        objective={"opd": {"weight": 0.0}, "rl": {**rl, "max_num_gen_batches": 0}}
    )


def test_prompts_that_are_all_taken_by_a_step_are_refused():
    config = Run(0, changes()).config
    assert len(PROMPTS.prompts) == 5
    _check_refill(config, PROMPTS)
    rollout = config.rollout.model_copy(update={"prompts_per_step": 5})
    with pytest.raises(UserError, match=r"max_num_gen_batches = 3: .* only 5, .* = 5; lower that"):
        _check_refill(config.model_copy(update={"rollout": rollout}), PROMPTS)


def test_a_replay_gives_the_advantages_again_and_leaves_out_a_step_that_lacks_rollouts(tmp_path):
    run = Run(0, changes())
    result = run.go()
    path = written(run, tmp_path / "run")
    steps, notes = recorded_steps(path, run.config)
    assert not notes and [len(s.ended.rollouts) for s in steps] == [len(r) for r in result.run.traces.values()]
    assert len({len(s.ended.rollouts) for s in steps}) > 1, "steps of several sizes"
    assert differences(steps, replayed(steps, run.config)) == []
    for step, rows in [(1, result.run.traces[1][:-2]), (2, result.run.traces[2][1:])]:
        write_traces(path / "traces", step, rows)
    steps, notes = recorded_steps(path, run.config)
    assert [s.step for s in steps] == [0, 3] and "left out 2 steps" in notes[-1]
