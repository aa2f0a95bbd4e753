"""What a checkpoint holds of a run: written, read back, and read from where less was written."""

import json
import math

import pytest

from kat_ray.config import GuardsConfig
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import CheckpointError, Checkpoints, check_state
from kat_ray.run.collapse_guards import CollapseGuards
from kat_ray.run.held_out import HeldOutWatch
from kat_ray.run.skipped_steps import SkipGuard
from kat_ray.run.state import RunState
from kat_ray.run.summary import Totals
from kat_ray.run.tail_report import TailReport
from kat_ray.types.records import StopReason

# As a run of commit 3aa4268 wrote it after two steps.
AT_3AA4268 = json.loads("""
{"done": 2, "rule": {"buffer": [0.25, 1.5], "threshold": null},
 "totals": {"steps": 2, "started": 4, "ended": {"eos": 3, "max_tokens": 1},
            "tokens": {"prompt": 20, "generated": 64, "kept": 60, "overshoot": 4, "cut_back": 0, "scored": 64,
                       "trained": 60}},
 "evaluations": {"before": {"avg_at_k": 0.5, "pass_at_k": 1.0, "k": 2, "problems": 1, "mean_length": 7.5,
                            "truncated_share": 0.0, "right": [1]}},
 "evaluated": 0, "positions": {"metrics.jsonl": 900, "evaluations.jsonl": 150},
 "watch": {"guards": {"first": {"kl/mean": [0.5, 0.25]}, "beyond": {"kl_rise": 0}, "within": {"kl_rise": 2},
                      "said": {"kl_rise": 0}},
           "skips": {"in_a_row": 1, "total": 1}},
 "seconds": 12.5, "prompts": {"data": "abc"}}
""")


def saved(folder, state):
    """A checkpoint that holds this state."""
    checkpoints = Checkpoints(folder, 1, keep_best=False)
    checkpoints.begin(2)
    checkpoints.commit(2, state, {}, None)
    return checkpoints.newest()[0]


def test_a_checkpoint_without_a_version_is_read_whole(tmp_path):
    state = RunState.of(saved(tmp_path, AT_3AA4268))
    assert (state.done, state.evaluated, state.seconds) == (2, 0, 12.5)
    assert state.evaluations["before"] == EvalResult(0.5, 1.0, 2, 1, 7.5, 0.0, right=(1,))
    assert state.totals.ended == {StopReason.EOS: 3, StopReason.MAX_TOKENS: 1}
    watch = AT_3AA4268["watch"] | {
        "tail": {"said": None},
        "held_out": HeldOutWatch().state(),
        "leak": HeldOutWatch().state(),
    }
    before = AT_3AA4268["evaluations"]["before"] | {"ran_out": 0, "errors": 0, "sets": None}
    evaluations = AT_3AA4268["evaluations"] | {"before": before}
    assert state.to_json() == AT_3AA4268 | {
        "version": 1, "watch": watch, "evaluations": evaluations, "probe_rewards": [], "reward_files": {},
        "prompts_taken": None, "curriculum": {},
        "totals": AT_3AA4268["totals"] | {"teacher_tokens": {}},
    }  # fmt: skip


def test_what_is_written_is_read_back_the_same(tmp_path):
    state = RunState.from_json(AT_3AA4268)
    check_state(state.to_json())
    assert RunState.of(saved(tmp_path, state.to_json())) == state


def test_what_is_missing_is_as_before_the_first_step(tmp_path):
    assert RunState.of(None) == RunState() == RunState.of(saved(tmp_path, {}))
    assert RunState().rule is None and RunState().done == 0


def test_the_parts_go_on_from_their_states():
    state = RunState.from_json(AT_3AA4268)
    totals = Totals.from_state(state.totals.model_dump())
    assert totals.tokens.pop("learnt") == totals.tokens["kept"], "as it was counted then"
    assert totals.state() == AT_3AA4268["totals"] | {"teacher_tokens": {}}
    assert Totals.from_state(RunState().totals.model_dump()).state() == Totals().state()
    guards, skips = CollapseGuards(GuardsConfig()), SkipGuard(3)
    guards.load_state(state.watch.guards.model_dump())
    skips.load_state(state.watch.skips.model_dump())
    assert guards.state()["first"] == {"kl/mean": [0.5, 0.25]} and skips.state() == {"in_a_row": 1, "total": 1}
    tail = TailReport(64)
    tail.load_state(state.watch.tail.model_dump())
    watch = {
        "guards": guards.state(),
        "skips": skips.state(),
        "tail": tail.state(),
        "held_out": HeldOutWatch().state(),
        "leak": HeldOutWatch().state(),
    }
    assert RunState(watch=watch, totals=Totals().state()).to_json()["watch"] == watch


def test_what_is_written_later_is_what_was_taken():
    calibration = {"buffer": [1.0, math.inf], "of": (1, 2)}
    written = RunState(rule=calibration).to_json()
    calibration["buffer"].append(2.0)
    assert written["rule"]["buffer"] == [1.0, math.inf]
    with pytest.raises(TypeError, match=r"state\.rule\.of is a tuple"):
        check_state(written)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"done": "2"}, "done: "),
        ({"done": -1}, "done: "),
        ({"totals": {"ended": {"lost": 1}}}, r"totals\.ended\.lost"),
        ({"evaluations": {"after": {"k": 4}}}, r"evaluations\.after\.avg_at_k: "),
        ({"positions": {"metrics.jsonl": 1.5}}, r"positions\.metrics\.jsonl: "),
        ({"watch": {"skips": {"total": None}}}, r"watch\.skips\.total: "),
        ({"rule": []}, "rule: "),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(tmp_path, change, where):
    with pytest.raises(CheckpointError, match=rf"step-2/training/state\.json: {where}.*of another version"):
        RunState.of(saved(tmp_path, AT_3AA4268 | change))
