"""A run on a fake cluster whose answers real children grade by what made the problems: as if by gold answers."""

import json
from dataclasses import replace

import pytest

from kat_ray.config import EnvironmentConfig
from kat_ray.data.environment import columns_of
from kat_ray.rewards.child import GradingChild
from kat_ray.run.probes import RolloutGrader
from kat_ray.types.records import Prompt
from tests.support.scenarios import HELDOUT, LAYOUTS, PROMPTS, Run, check, compare

MADE = EnvironmentConfig(families={"gcd": {"settings": {"max_value": 30}}}, train=40, heldout=30, binarise=False)
EVALUATED = {"k": 2, "every": 1, "teacher": False, "grading_processes": 1}
LAYOUT = {**LAYOUTS["rewards"], "run": {"checkpoint_every": 1}}
CHANGES = {
    True: {
        **LAYOUT, "data": {"path": "environment:train"}, "environment": MADE.model_dump(),
        "evaluation": {**EVALUATED, "verifier": "environment", "data": {"path": "environment:heldout"}},
    },
    False: {**LAYOUT, "evaluation": {**EVALUATED, "data": {"path": "unused.jsonl"}}},
}  # fmt: skip


def prompts(split, those, environment):
    """Problems of which some have the answer 1; answers on the fake cluster are 0 or 1."""
    rows = columns_of(MADE, split)
    ones = [row for row in rows if row["answer"] == "1"][: len(those.prompts) - 2]
    others = [row for row in rows if len(row["answer"]) == 1 and row["answer"] != "1"][:2]
    made = [
        replace(prompt, answer=row["answer"], problem=row["problem"] if environment else None)
        for prompt, row in zip(those.prompts, (*ones, *others), strict=True)
    ]
    return replace(those, prompts=tuple(made))


class GradedRun(Run):
    """The small run on such problems, graded by the environment or by their gold answers."""

    def __init__(self, environment, start_from=None):
        super().__init__(0, CHANGES[environment], start_from)
        self.train, self.heldout = prompts("train", PROMPTS, environment), prompts("heldout", HELDOUT, environment)
        self.golds = {p.prompt_id: p.gold for p in self.train.prompts}

    def _replaced(self):
        own = {"tests.support.scenarios.PROMPTS": self.train, "tests.support.scenarios.HELDOUT": self.heldout}
        return super()._replaced() | own


@pytest.fixture(scope="module")
def plain():
    result = GradedRun(False).go()
    assert result.error is None
    return result


def graded(result):
    return [
        (row.rollout_id, row.correct, row.policy.reward, row.policy.advantage)
        for rows in result.run.traces.values()
        for row in rows
    ]


def test_rewards_probes_and_evaluations_are_those_of_the_gold_answers(plain, monkeypatch):
    started, spawn = [], GradingChild._spawn
    monkeypatch.setattr(GradingChild, "_spawn", lambda child: started.append(child) or spawn(child))
    whole = GradedRun(True).go()
    assert len(started) == 1, "steps and evaluations share the children that grade"
    assert whole.error is None and whole.finished
    check(whole)
    assert graded(whole) == graded(plain)
    rewards = [reward for _, _, reward, _ in graded(whole)]
    assert {0.0, 1.0} <= {*rewards} and any(right for _, right, _, _ in graded(whole))
    rights = [record["right"] for _, record in whole.run.evaluations]
    assert rights == [record["right"] for _, record in plain.run.evaluations] and len(rights) == 4
    assert any(map(sum, rights)) and all(right[-2:] == (0, 0) for right in rights), "no answer is 0"
    assert any("environment" in row.policy.rewards for rows in whole.run.traces.values() for row in rows)

    run = GradedRun(True)
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=2)
    broken = run.go()
    assert not broken.finished
    again = GradedRun(True, start_from=broken).go()
    check(again)
    assert again.finished
    compare(again, whole.fingerprint())
    assert [record["right"] for _, record in again.run.evaluations] == rights


LADDER = {
    **LAYOUT, "data": {"path": "environment:train"},
    "environment": {
        "families": {"gcd": {}, "lcm": {}}, "curriculum": {"levels": 3, "window": 4, "success_threshold": 0.4}
    },
    "evaluation": {"verifier": "environment"}, "run": {"checkpoint_every": 1, "steps": 5},
}  # fmt: skip


class Climbing(Run):
    """The small run on prompts of two families in three levels; a rollout whose last token is odd is right."""

    def __init__(self, staleness=0, start_from=None):
        rollout = {**LAYOUT["rollout"], "staleness": staleness}
        super().__init__(0, {**LADDER, "rollout": rollout}, start_from)
        prompts = [
            Prompt(f"{family}{level}{i}", (20 + i, 30 + level, 40), source=family, level=level)
            for i in range(3) for level in range(3) for family in ("gcd", "lcm")
        ]  # fmt: skip
        self.train = replace(PROMPTS, prompts=tuple(prompts))
        self.golds = {p.prompt_id: "1" for p in prompts}

    def _replaced(self):
        integers = {"actors.driver.recorder.RolloutGrader": by_integers}
        return super()._replaced() | {"tests.support.scenarios.PROMPTS": self.train} | integers


def by_integers(golds, decode, verifier, *rest):
    return RolloutGrader(golds, decode, "integer", *rest)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_family_climbs_by_its_answers_and_a_resumed_run_where_it_would_have(staleness):
    whole = Climbing(staleness).go()
    check(whole)
    assert whole.error is None and whole.finished
    standings, expected = {"gcd": [0, 0, 0], "lcm": [0, 0, 0]}, []
    for step, rows in sorted(whole.run.traces.items()):
        metrics = dict(whole.run.metrics)[step + 1]
        for family in dict.fromkeys(row.prompt_id[:3] for row in rows):
            own, standing = [row for row in rows if row.prompt_id.startswith(family)], standings[family]
            assert {int(row.prompt_id[3]) for row in own} == {standing[0]} == {metrics[f"source/level/{family}"]}
            standing[1] += sum(bool(row.correct) for row in own)
            standing[2] += len(own)
            if standing[2] >= 4:
                level, right, count = standing
                standings[family] = [min(2, level + (right >= 0.4 * count)), 0, 0]
                if standings[family][0] != level:
                    expected.append(f"curriculum, after step {step + 1}: {family} goes from level {level} to")
        assert json.loads(whole.checkpoints.written[step + 1][0])["curriculum"] == {
            family: standing for family, standing in standings.items() if family in families_until(whole, step)
        }
    said = [note for note in whole.notes if note.startswith("curriculum")]
    assert expected and len(said) == len(expected) and all(map(str.startswith, said, expected))
    run = Climbing(staleness)
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=3)
    broken = run.go()
    assert not broken.finished
    again = Climbing(staleness, start_from=broken).go()
    check(again)
    assert again.finished
    compare(again, whole.fingerprint())


def families_until(result, step):
    """Families that some step up to this one had rollouts of."""
    return {row.prompt_id[:3] for s, rows in result.run.traces.items() if s <= step for row in rows}
