"""Figures of rollouts by what their prompts are from, by hand; and where that is said."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kat_ray.config import DataConfig
from kat_ray.config.data import EvaluationConfig
from kat_ray.data.accounting import FinishedRollout, count_tokens
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.observability.metric_catalog import check_names
from kat_ray.run.step_metrics import source_metrics
from kat_ray.types.records import Reward, RolloutOutcome, StopReason
from tests.support.scenarios import ALONE, LAYOUTS, PROMPTS, Run, check
from tests.support.tokenizers import make_tokenizer


def finished_rollout(rollout_id, length):
    outcome = RolloutOutcome(rollout_id, StopReason.EOS, length, None, None, None, None, False, None)
    return FinishedRollout(outcome, np.zeros(length, np.int32), count_tokens(outcome, length))


def test_figures_by_hand():
    rollouts = [finished_rollout(i, length) for i, length in enumerate((2, 4, 6, 10))]
    sources = {0: "gcd", 1: "gcd", 2: "gcd", 3: "openai/gsm8k"}
    rewards = {0: Reward(1.0), 1: Reward(0.5), 2: Reward(None), 3: Reward(None)}
    figures = source_metrics(rollouts, sources, {0: True, 1: False}, rewards)
    assert figures == {
        "source/rollouts/gcd": 3, "source/tokens/gcd": 12, "source/mean_length/gcd": 4, "source/pass_rate/gcd": 0.5,
        "source/reward/gcd": 0.75, "source/rollouts/openai/gsm8k": 1, "source/tokens/openai/gsm8k": 10,
        "source/mean_length/openai/gsm8k": 10,
    }, "nothing is said of what has no verdict and no reward"  # fmt: skip
    check_names(figures)
    assert source_metrics(rollouts, {}, {}, {}) == {}
    late = source_metrics(rollouts, sources, {0: True}, rewards, {1, 2})
    assert (late["source/pass_rate/gcd"], late["source/ungraded/gcd"]) == (1.0, 2), (
        "what is not graded is not wrong"
    )
    check_names(late)


def load(tmp_path, rows, **data):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(DataConfig(path=str(path), **data), make_tokenizer(), None)


def test_a_column_says_it(tmp_path):
    rows = [{"prompt": "a", "data_source": "gsm8k"}, {"prompt": "b", "data_source": 7}]
    named = load(tmp_path, rows, source_column="data_source")
    assert [p.source for p in named.prompts] == ["gsm8k", "7"]
    plain = load(tmp_path, rows)
    assert [p.source for p in plain.prompts] == [None, None] and plain.digest == named.digest


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({}, r"prompts.jsonl:2: .*'source'.*data.source_column"),
        ({"source": [1]}, r"prompts.jsonl:2: source is a list; a source is a name or a whole number"),
        ({"source": " "}, r"prompts.jsonl:2: source is empty"),
    ],
)
def test_a_row_that_does_not_say_it_is_named(tmp_path, second, said):
    with pytest.raises(DataError, match=said):
        load(tmp_path, [{"prompt": "a", "source": "x"}, {"prompt": "b", **second}], source_column="source")


def test_a_column_of_ids_is_refused(tmp_path):
    rows = [{"prompt": "a", "n": i} for i in range(51)]
    with pytest.raises(DataError, match=r"column 'n' has 51 different values, such as '0'; .* at most 50"):
        load(tmp_path, rows, source_column="n")
    load(tmp_path, rows[:50], source_column="n")
    with pytest.raises(ValueError, match=r"data\.source_column = 'n': .*leave it out"):
        EvaluationConfig(data={"path": "x.jsonl", "source_column": "n"})


def test_a_run_records_them(monkeypatch):
    prompts = tuple(replace(p, source="odd" if i % 2 else "even") for i, p in enumerate(PROMPTS.prompts))
    monkeypatch.setattr("tests.support.scenarios.PROMPTS", replace(PROMPTS, prompts=prompts))
    result = Run(0, LAYOUTS[ALONE]).go()
    check(result)
    for done, metrics in result.run.metrics:
        rows = {name: [] for name in ("odd", "even")}
        for row in result.run.traces[done - 1]:
            rows["odd" if int(row.prompt_id[1:]) % 2 else "even"].append(row)
        for name, own in rows.items():
            assert metrics[f"source/rollouts/{name}"] == len(own)
            assert metrics[f"source/tokens/{name}"] == sum(len(row.token_ids) for row in own)
            rewards = [row.policy.reward for row in own]
            assert (
                metrics[f"source/reward/{name}"] == metrics[f"source/pass_rate/{name}"] == sum(rewards) / len(own)
            )
