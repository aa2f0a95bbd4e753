"""A run that learns from a reward function of the user's: on a real Ray, with stub engines and a stub learner."""

import dataclasses
import json

import pytest

from actors.driver import train as job
from kat_ray.errors import UserError
from kat_ray.records.traces import read_traces
from kat_ray.run.grading_ahead import GradingAhead
from tests.support.quick_engines import make_engine
from tests.support.runs import QUICK, SINGLE, stub_config

pytestmark = [pytest.mark.integration, pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]

STEPS = 4
CODE = '''
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def score(prompts, completions, completion_ids, **kwargs):
    """Written for TRL: it knows nothing of kat-ray."""
    print("what would break a protocol" * 1000)
    with CALLS.open("a") as calls:
        calls.write(".")
    if BREAKS and CALLS.stat().st_size > 40:
        return [1 / 0]
    ids = completion_ids[0]
    return [None if ids[0] % 5 == 0 else len(set(ids)) / len(ids)]
'''


def config_of(files, folder, code):
    folder.mkdir(exist_ok=True)
    (folder / "my_rewards.py").write_text(code)
    functions = {f"{folder}/my_rewards.py:score": 2.0, "format": 0.5}
    return stub_config(
        files, folder, STEPS,
        **SINGLE | {
            "run": {"steps": STEPS, "checkpoint_every": 5, "deterministic": True, "name": "r"},
            "objective": {"rl": {"weight": 1.0}},
            "rollout": {"top_k_logprobs": 16, "top_p": 1.0, "prompts_per_step": 4, "rollouts_per_prompt": 4},
            "reward": {"functions": functions, "format_pattern": "a"},
            "data": {"path": str(files / "prompts.jsonl"), "answer_column": None},
        },
    )  # fmt: skip


def test_a_run_learns_from_a_function_and_goes_on_when_that_is_mended(files, tmp_path):
    """It fails in the third step. The same rewards come of the same rollouts before and after."""
    config = config_of(files, tmp_path, CODE.replace("BREAKS", "True"))
    with pytest.raises(UserError) as error:
        job.train(config, engines=QUICK)
    said = str(error.value)
    assert "answers of a step could not be rewarded" in said and "in score" in said and "ZeroDivisionError" in said

    assert (tmp_path / "r/checkpoints/step-2").is_dir(), "what was learnt is kept"

    (tmp_path / "my_rewards.py").write_text(CODE.replace("BREAKS", "False"))
    path = job.train(config, resume=tmp_path / "r", engines=QUICK)
    assert f"reward.functions: {tmp_path}/my_rewards.py has changed since" in (path / "run.log").read_text()
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in steps if "learner/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    traces = read_traces(path).to_pylist()
    for number, m in enumerate(steps):
        ended = [t["token_ids"] for t in traces if t["step"] == number and t["cut"] is None]
        parts = [len({*ids}) / len(ids) for ids in ended if ids[0] % 5]
        assert 0 < len(parts) < len(ended) <= 16
        assert m["reward/part/score"] == pytest.approx(sum(parts) / len(parts), rel=1e-12)
        assert (m["reward/errors"], m["reward/timeouts"]) == (0, 0)
        assert m["reward/mean"] < 2.5 and m["advantage/abs_mean"] > 0
    assert any(m.get("reward/left_out_not_graded") for m in steps)


def test_a_function_that_cannot_work_is_refused_before_anything_starts(files, tmp_path):
    config = config_of(files, tmp_path, "def score(completions): return ['1']")
    with pytest.raises(UserError, match=r"my_rewards\.py:score was tried .*returned '1', which is no number"):
        job.train(config, engines=QUICK)
    missing = config_of(files, tmp_path, "def scores(completions): return [1]")
    with pytest.raises(UserError, match=r"defines no 'score'; it defines scores"):
        job.train(missing, engines=QUICK)
    assert not (tmp_path / "r").exists(), "no run was begun"


def slow_engine(settings):
    """Answers of different lengths, some seconds for all of a step."""
    engine = make_engine(True, settings)
    engine.set_rate(40.0)
    return engine


def test_rollouts_that_have_ended_are_graded_while_others_are_sampled(files, tmp_path, monkeypatch):
    used, take = [], GradingAhead.take

    def noted(self, rollouts, check):
        found = take(self, rollouts, check)
        used.append(len(found))
        return found

    monkeypatch.setattr(GradingAhead, "take", noted)
    config = config_of(files, tmp_path, CODE.replace("BREAKS", "False"))
    path = job.train(config, engines=dataclasses.replace(QUICK, sampler=slow_engine))
    assert len(used) == STEPS and sum(used) > 0
    rows = [t for t in read_traces(path).to_pylist() if t["cut"] is None]
    for row in rows:
        ids = row["token_ids"]
        assert dict(row["rewards"])["score"] == (None if ids[0] % 5 == 0 else len(set(ids)) / len(ids))
    assert (tmp_path / "calls").stat().st_size == len(rows) + 1, "each once, and the first of them to try"
