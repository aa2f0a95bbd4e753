"""Every rule in a run on a fake cluster: what it ended was not generated to its end, and a replay says the same.

On a real Ray two of them act in the gate, `kat` and `repetition`, and all of them in the nightly tier: test_run.
"""

import numpy as np
import pytest

from kat_ray.analysis.replay import load_traces
from kat_ray.analysis.replay_rules import COLUMNS, reproduce
from kat_ray.records.traces import write_traces
from kat_ray.termination import RunFacts
from tests.support.rules import ACTING, check_acting
from tests.support.scenarios import Run


def traces_of(result, folder):
    """Write the rollouts of a run to `folder`, and read them."""
    (folder / "traces").mkdir(parents=True)
    for step, rows in result.run.traces.items():
        write_traces(folder / "traces", step, rows)
    return load_traces(folder, COLUMNS)[0]


@pytest.mark.parametrize("rule", ACTING, ids=lambda rule: rule["rule"])
def test_every_rule_acts_while_rollouts_are_generated(tmp_path, rule):
    rollout = {"prompts_per_step": 8, "max_tokens": 48}
    if rule["rule"] == "length_matched":
        traces_of(Run(0, {"rollout": rollout}).go(), tmp_path / "matched")
        rule = {**rule, "run": str(tmp_path / "matched")}
    run = Run(0, {"rollout": rollout, "termination": rule})
    result = run.go()
    assert result.error is None and result.finished, result.error
    traces = traces_of(result, tmp_path / "run")
    generated = np.array([len(row.token_ids) for _, rows in sorted(result.run.traces.items()) for row in rows])
    check_acting(rule["rule"], traces, generated, 48)
    again = reproduce(traces, run.config.termination, RunFacts(run.config.run.seed, 48)).cut
    assert again.tolist() == np.where(traces.probe == 1, traces.would_cut, traces.cut).tolist()
